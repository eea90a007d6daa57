"""Results files of the benchmark suite, read and checked, and the newest of each device and layer."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.report_charts import blocks_chart, models_chart

CHARTS = Path("benchmarks/results/charts")
OURS = "resnet_fused"
LAYERS = {"model": "Models", "block": "Blocks", "op": "Ops"}
MODES = {"train": "training step", "eval": "evaluation", "fwd_bwd": "forward and backward"}
DTYPES = ("fp32", "tf32", "bf16", "fp16")

TEXT, WHOLE, NUMBER, NONE = (str,), (int,), (int, float), (type(None),)
HEADER: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("device", "device_type", "python", "torch", "resnet_fused", "commit", "date"), TEXT),
    **dict.fromkeys(("driver", "triton", "cuda"), TEXT + NONE),
    **{"clocks": (dict, *NONE), "threads": WHOLE, "cudnn": WHOLE + NONE, "clean": (bool,)},
    **{"seconds": NUMBER, "ceilings": (dict,)},
}
CASE = ("layer", "name", "mode", "dtype", "batch", "shape")
TIMES, RATIOS = ("median_ms", "p20_ms", "p80_ms"), ("ratio", "ratio_p20", "ratio_p80")
ROW: dict[str, tuple[type, ...]] = {
    **dict.fromkeys((*CASE, "impl", "note"), TEXT),
    **{"batch": WHOLE, "rounds": WHOLE, "checked": (bool,)},
    **dict.fromkeys((*TIMES, *RATIOS, "peak_mb", "first_step_ms", "roofline_ms"), NUMBER + NONE),
}

Row = dict[str, Any]
#: Median, and the 20th and 80th percentile, or the lower and the upper end.
Spread = tuple[float, float, float]
Key = tuple[Any, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """One thing that was measured, by all implementations. One that was not checked has a time at most."""

    layer: str
    name: str
    mode: str
    dtype: str
    batch: int
    shape: str
    rows: dict[str, Row]

    @property
    def family(self) -> str:
        """The architecture of a block; the op."""
        return self.name.partition(" ")[0]

    def accepted(self, impl: str) -> Row | None:
        """The row of an implementation that ran and computed the right thing."""
        row = self.rows.get(impl)
        return row if row and row["checked"] and row["median_ms"] is not None else None

    def why_not(self, impl: str) -> str:
        """Why it has no figures; empty where it has some, or does not take part."""
        if impl not in self.rows or self.accepted(impl):
            return ""
        return "not measured" if self.time(impl) is None else "not checked"

    def time(self, impl: str) -> Spread | None:
        return _spread(self.rows.get(impl), TIMES)

    def ratio(self, impl: str) -> Spread | None:
        """How many times as fast ours is; None unless both are accepted."""
        return _spread(self.accepted(impl), RATIOS) if self.accepted(OURS) else None

    def memory(self, impl: str) -> float | None:
        """Our peak as a share of the other's; None unless both are accepted, and known."""
        ours, other = ((self.accepted(one) or {}).get("peak_mb") for one in (OURS, impl))
        return ours / other if ours and other else None

    def rate(self, impl: str) -> Spread | None:
        """Images per second; None unless accepted."""
        time = self.time(impl) if self.accepted(impl) else None
        if time is None:
            return None
        middle, low, high = (1e3 * self.batch / one for one in (time[0], time[2], time[1]))
        return middle, low, high


def _spread(row: Row | None, keys: tuple[str, str, str]) -> Spread | None:
    middle, low, high = (row[key] if row else None for key in keys)
    return None if middle is None or low is None or high is None else (middle, low, high)


@dataclass(frozen=True)
class Results:
    """A results file."""

    path: Path
    header: dict[str, Any]
    cases: list[Case]

    @property
    def date(self) -> datetime:
        return datetime.fromisoformat(self.header["date"]).astimezone(timezone.utc)

    @property
    def commit(self) -> str:
        changes = "" if self.header["clean"] else " (with uncommitted changes)"
        return f"commit {self.header['commit'][:7] or 'unknown'}{changes}"


@dataclass(frozen=True)
class Device:
    """The newest file of each layer, of one device with so many threads."""

    newest: dict[str, Results]

    @property
    def title(self) -> str:
        header = next(iter(self.newest.values())).header
        return f"{header['device']}, {header['threads']} threads"

    @property
    def sources(self) -> list[tuple[Results, list[str]]]:
        """The files, each with the layers that are from it."""
        groups = grouped(self.newest, lambda layer: (self.newest[layer].path,))
        return [(self.newest[layers[0]], layers) for layers in groups.values()]

    def cases(self, layer: str, mode: str | None = None) -> list[Case]:
        """By mode and dtype, else in the order of the file."""
        found = self.newest[layer].cases if layer in self.newest else []
        cases = [case for case in found if case.layer == layer and mode in (None, case.mode)]
        return sorted(cases, key=lambda case: (list(MODES).index(case.mode), DTYPES.index(case.dtype)))

    @property
    def impls(self) -> list[str]:
        """Ours, then the others in the order of the files."""
        others = (impl for layer in self.newest for case in self.cases(layer) for impl in case.rows)
        return list(dict.fromkeys([OURS, *others]))

    def chart(self, layer: str) -> Path:
        """Where its chart of a layer is, from the root."""
        return CHARTS / f"{re.sub('[^a-z0-9]+', '-', self.title.lower())}-{layer}s.svg"

    def drawn(self, layer: str) -> str:
        """The SVG of models' training steps, or of blocks; empty where nothing was accepted, and for ops."""
        if layer == "model":
            return models_chart(self.title, self.cases("model", "train"), self.impls)
        return blocks_chart(self.title, self.cases("block"), self.impls) if layer == "block" else ""


def grouped(items: Iterable[T], key: Callable[[T], Key]) -> dict[Key, list[T]]:
    """By key, in the order in which the keys are met."""
    groups: dict[Key, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def read(path: Path) -> Results:
    """A results file.

    Raises:
        ValueError: it is not one; says what is missing or wrong.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        problem = _problem("the file", found, {"header": (dict,), "rows": (list,)})
        problem = problem or _problem("header", found["header"], HEADER) or _header_problem(found["header"])
        for i, row in enumerate([] if problem else found["rows"]):
            problem = problem or _problem(f"row {i}", row, ROW) or _row_problem(f"row {i}", row)
        groups = {} if problem else grouped(found["rows"], lambda row: tuple(row[key] for key in CASE))
        cases = []
        for key, rows in groups.items():
            impls = [row["impl"] for row in rows]
            if OURS not in impls or len(set(impls)) < len(impls):
                problem = f"{' '.join(map(str, key))} needs one row of {OURS} and one of each other"
            cases.append(Case(**dict(zip(CASE, key, strict=True)), rows=dict(zip(impls, rows, strict=True))))
    except ValueError as error:
        problem = str(error)
    if problem:
        raise ValueError(f"{path} is not a results file: {problem}; measure again, or remove it")
    return Results(path, found["header"], cases)


def _problem(place: str, found: Any, fields: dict[str, tuple[type, ...]]) -> str:
    if not isinstance(found, dict):
        return f"{place} is no object"
    if lacking := [name for name in fields if name not in found]:
        return f"{place} lacks {', '.join(lacking)}"
    wrong = [
        f"{name} of {place} is {found[name]!r}"
        for name, types in fields.items()
        if type(found[name]) not in types
    ]
    return wrong[0][:200] if wrong else ""


def _header_problem(header: dict[str, Any]) -> str:
    if datetime.fromisoformat(header["date"]).tzinfo is None:
        return f"date of header is {header['date']!r}, without +00:00"
    problem = (
        ""
        if header["clocks"] is None
        else _problem("clocks", header["clocks"], {"sm_mhz": WHOLE, "memory_mhz": WHOLE})
    )
    for dtype, ceilings in header["ceilings"].items():
        problem = problem or _problem(
            f"ceilings of {dtype}", ceilings, {"bandwidth": NUMBER, "flops": NUMBER}
        )
        problem = problem or ("" if dtype in DTYPES else f"ceilings are of {dtype!r}")
    return problem


def _row_problem(place: str, row: Row) -> str:
    """Values of the right types that cannot be."""
    wrong = [
        key for key, known in (("layer", LAYERS), ("mode", MODES), ("dtype", DTYPES)) if row[key] not in known
    ]
    numbers = [key for key, types in ROW.items() if types[0] is int and row[key] is not None]
    wrong += [key for key in numbers if not (math.isfinite(row[key]) and row[key] >= 0)]
    wrong += [key for key in ("batch", *TIMES, *RATIOS, "roofline_ms", "first_step_ms") if row[key] == 0]
    for keys in (TIMES, RATIOS):
        middle, low, high = (row[key] for key in keys)
        known = [value for value in (low, middle, high) if value is not None]
        if len(known) not in (0, 3) or known != sorted(known):
            wrong.append(keys[0])
    return f"{wrong[0]} of {place} is {row[wrong[0]]!r}" if wrong else ""


def newest(files: Iterable[Results]) -> list[Device]:
    """A device for each name and number of threads, GPUs first, with the newest file of each layer."""
    devices: dict[Key, dict[str, Results]] = {}
    for file in sorted(files, key=lambda file: (file.date, file.path.name)):
        head = file.header
        device = devices.setdefault((head["device_type"] == "cpu", head["device"], head["threads"]), {})
        device.update({case.layer: file for case in file.cases})
    return [
        Device({layer: found[layer] for layer in LAYERS if layer in found})
        for _, found in sorted(devices.items())
    ]

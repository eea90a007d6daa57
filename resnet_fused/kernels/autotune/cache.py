"""What was measured, as files: the tables that are shipped, and a cache on disk that many processes share.

A file is used only if its header fits. One that is of no use is ignored with one warning, never an error: then the
problem is measured again.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from resnet_fused._version import __version__
from resnet_fused.kernels.launch import Config


class TuningKey(NamedTuple):
    """What distinguishes launches for which the fastest may differ.

    Args:
        kernel: "conv", "dgrad", ...
        sizes: every number that matters for speed.
        dtype: bf16, fp16, fp32 or tf32.
    """

    kernel: str
    sizes: tuple[int, ...]
    dtype: str


class Timing(NamedTuple):
    """What is known of a configuration for a problem.

    Args:
        config: None: the vendor.
        ms: None: it was not timed.
        refusal: why it may not be chosen.
    """

    config: Config | None
    ms: float | None = None
    refusal: str | None = None


#: All that was tried for a problem: the fastest first, what is refused last.
Times = tuple[Timing, ...]

TUNED = Path(__file__).parents[1] / "tuned"
_files: dict[Path, dict[TuningKey, Times]] = {}
_warned: set[str] = set()


def clear_cache() -> None:
    """Files are read again, and warned of again."""
    _files.clear()
    _warned.clear()
    device_name.cache_clear()


def fastest(times: Times, vendor_allowed: bool) -> Timing | None:
    return next((t for t in times if t.refusal is None and (t.config is not None or vendor_allowed)), None)


def is_foreign(config: Config | None, candidates: Sequence[Config]) -> bool:
    return config is not None and config not in candidates


def sorted_times(times: Iterable[Timing]) -> Times:
    """The fastest first; the vendor before configurations that are no faster."""
    return tuple(sorted(times, key=lambda t: (t.refusal is not None, t.ms or 0.0, t.config is not None)))


@functools.cache
def device_name(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


def look_up(
    device: torch.device, problem: TuningKey, candidates: Sequence[Config], vendor_allowed: bool
) -> Times | None:
    """From the table that is shipped for the device, or from the cache on disk."""
    ours = header(device)
    slug = _slug(ours["device"])
    for path, belongs in (
        (TUNED / f"{slug}.json", lambda found: _slug(str(found.get("device"))) == slug),
        (_cache_path(ours), lambda found: found == ours),
    ):
        if path not in _files:
            _files[path] = _read(path, belongs)
        times = _files[path].get(problem, ())
        found = fastest(times, vendor_allowed)
        if found is not None and is_foreign(found.config, candidates):
            warn(
                str(path), f"{path} has {found.config} for {problem}, which is no candidate: delete the file"
            )
        elif times:
            return times
    return None


def _slug(device_name: str) -> str:
    """h100 for "NVIDIA H100 80GB HBM3"; the whole name where no word of it is a model's."""
    model = re.search(r"\b[a-z]+\d+s?", device_name.lower())
    return model[0] if model else _in_file_name(device_name.lower())


def _in_file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text)


@functools.cache
def _source_hash() -> str:
    found = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def header(device: torch.device) -> dict[str, str]:
    """All that a time depends on beside the problem."""
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "device": device_name(device.index),
        "capability": f"{major}.{minor}",
        "torch": str(torch.__version__),
        "triton": str(triton.__version__),
        "resnet_fused": __version__,
        "source": _source_hash(),
    }


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "resnet_fused")


def _cache_path(header: Mapping[str, str]) -> Path:
    return cache_folder() / (_in_file_name("-".join(header.values())) + ".json")


def keep(device: torch.device, problem: TuningKey, times: Times) -> None:
    """Adds to the cache on disk, whoever else does the same."""
    ours = header(device)
    path = _cache_path(ours)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "a") as locked:
            fcntl.flock(locked, fcntl.LOCK_EX)
            _files[path] = _read(path, lambda found: found == ours) | {problem: times}
            write(path, ours, _files[path])
    except OSError as error:
        unkept = f"what is tuned is not kept in {path.parent}: {error}"
        warn(str(path.parent), f"{unkept}; set XDG_CACHE_HOME to a folder that can be written")


def write(path: Path, header: Mapping[str, str], rows: Mapping[TuningKey, Times]) -> None:
    """Whole or not at all; one problem a line."""
    lines = [json.dumps(_as_row(problem, rows[problem])) for problem in sorted(rows)]
    text = f'{{"header": {json.dumps(header)},\n"entries": [\n' + ",\n".join(lines) + "\n]}\n"
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _read(path: Path, belongs: Callable[[dict[str, Any]], bool]) -> dict[TuningKey, Times]:
    """The rows of a file; none where it is missing, and with a warning where it is of no use."""
    try:
        content = json.loads(path.read_bytes())
        _check(isinstance(content, dict) and isinstance(content.get("header"), dict), "it has no header")
        _check(belongs(content["header"]), "it was made by another version or for another device")
        _check(isinstance(content.get("entries"), list), "it has no entries")
        return dict(map(_parsed_row, content["entries"]))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        warn(str(path), f"{path} is ignored: {error}; delete it")
        return {}


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def rows_of(times: Times) -> list[dict[str, Any]]:
    return [
        {"config": "vendor" if config is None else config.as_dict()}
        | ({"ms": ms} if refusal is None else {"refused": refusal})
        for config, ms, refusal in times
    ]


def _as_row(problem: TuningKey, times: Times) -> dict[str, Any]:
    return problem._asdict() | {"times": rows_of(times)}


def _parsed_row(row: Any) -> tuple[TuningKey, Times]:
    _check(isinstance(row, dict) and row.keys() == {*TuningKey._fields, "times"}, "an entry has other fields")
    kernel, sizes, dtype = (row[field] for field in TuningKey._fields)
    _check(isinstance(kernel, str) and isinstance(dtype, str), "a kernel or dtype is no text")
    _check(isinstance(sizes, list) and all(type(size) is int for size in sizes), "sizes are no whole numbers")
    return TuningKey(kernel, tuple(sizes), dtype), times_of(row["times"])


def times_of(rows: Any) -> Times:
    _check(isinstance(rows, list) and bool(rows), "an entry has no times")
    return sorted_times(map(_parsed_time, rows))


def _parsed_time(row: Any) -> Timing:
    _check(isinstance(row, dict) and len(row) == 2 and "config" in row, "a time has other fields")
    config, ms, refusal = row["config"], row.get("ms"), row.get("refused")
    if refusal is None:
        _check(type(ms) in (int, float) and 0 <= ms < 1e9, "a time is no number of milliseconds")
        ms = float(ms)
    else:
        _check(isinstance(refusal, str) and config != "vendor", "a refusal is no reason of a configuration")
    if config == "vendor":
        return Timing(None, ms)
    _check(isinstance(config, dict) and config.keys() == Config().as_dict().keys(), "no configuration")
    _check(all(type(value) is int and value > 0 for value in config.values()), "no configuration")
    return Timing(Config(**config), ms, refusal)


def warn(about: str, text: str) -> None:
    if about not in _warned:
        _warned.add(about)
        warnings.warn(text, stacklevel=4)

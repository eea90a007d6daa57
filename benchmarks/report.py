"""Results in benchmarks/results/*.json as tables and charts: ``python -m benchmarks.report [--write]``.

Writes the tables of benchmarks/RESULTS.md and README.md and benchmarks/results/charts/*.svg, from the newest file of
each device and layer. A result that was not checked has a time at most: no ratio, no rate and no bar.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.page import COLOURS, ROOT, Chart, Page, markdown

RESULTS = ROOT / "benchmarks" / "results"
OURS, EAGER = "resnet_fused", "eager_channels_last"
LAYERS = {"model": "Models", "block": "Blocks", "op": "Ops"}
MODES = {"train": "training step", "eval": "evaluation", "fwd_bwd": "forward and backward"}
DTYPES = ("fp32", "tf32", "bf16", "fp16")
CASE = ["layer", "name", "mode", "dtype", "batch", "shape"]
TIME, RATIO = ["median_ms", "p20_ms", "p80_ms"], ["ratio", "ratio_p20", "ratio_p80"]
NUMBERS = [*TIME, *RATIO, "peak_mb", "first_step_ms", "roofline_ms"]
#: What the rows and the header of a results file have to hold.
ROW = {*CASE, *NUMBERS, "impl", "checked", "note"}
HEADER = {"device", "device_type", "threads", "torch", "commit", "clean", "date", "seconds", "ceilings"}
#: What README compares with, and its column.
BASELINES = {
    EAGER: "eager / fused",
    "compile_default": "`torch.compile` / fused",
    "compile_max_autotune": "`torch.compile` max-autotune / fused",
}


def read(path: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    """Header and rows of a results file; figures that do not count are NaN, and ``why`` says why.

    Raises:
        ValueError: it is no results file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        header, rows = content["header"], pd.DataFrame(content["rows"])
        if missing := (ROW - {*rows.columns}) | (HEADER - header.keys()):
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        if rows.duplicated([*CASE, "impl"]).any():
            raise ValueError("it has two rows of one implementation and case")
        for name, known in (("layer", LAYERS), ("mode", MODES), ("dtype", DTYPES)):
            if unknown := {*rows[name]} - {*known}:
                raise ValueError(f"{name} {', '.join(map(str, unknown))} is unknown")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a results file ({error}): measure again, or remove it") from error
    rows[NUMBERS] = rows[NUMBERS].astype(float)
    measured, accepted = rows.median_ms.notna(), rows.checked & rows.median_ms.notna()
    ours = rows[accepted & (rows.impl == OURS)].set_index(CASE).peak_mb
    cases = pd.MultiIndex.from_frame(rows[CASE])
    rows.loc[~(accepted & cases.isin(ours.index)), RATIO] = np.nan
    rows.loc[~accepted, ["peak_mb", "first_step_ms", "roofline_ms"]] = np.nan
    rows["rate"] = (1e3 * rows.batch / rows.median_ms).where(accepted)
    rows["memory"] = ours.reindex(cases).to_numpy() / rows.peak_mb
    rows["of_limit"] = rows.roofline_ms / rows.median_ms
    rows["why"] = np.select([accepted, measured], ["", "not checked"], "not measured")
    rows["family"] = rows.name.str.partition(" ")[0]
    for name, order in (("layer", LAYERS), ("mode", MODES), ("dtype", DTYPES)):
        rows[name] = pd.Categorical(rows[name], list(order))
    return header, rows.sort_values(["layer", "mode", "dtype"], kind="stable").reset_index(drop=True)


@dataclass(frozen=True)
class Device:
    """The rows of the newest file of each layer, of one device with so many threads."""

    title: str
    rows: pd.DataFrame
    #: Of the files that ``rows.path`` names.
    headers: dict[Path, dict[str, Any]]

    def sources(self) -> Iterator[tuple[Path, dict[str, Any], list[str]]]:
        """Each file with its header and the titles of its layers."""
        for (path,), rows in groups(self.rows, ["path"]):
            yield path, self.headers[path], [LAYERS[layer] for layer in rows.layer.unique()]

    @property
    def impls(self) -> list[str]:
        """Ours first."""
        return list(dict.fromkeys([OURS, *self.rows.impl]))

    def layer(self, name: str) -> pd.DataFrame:
        return self.rows[self.rows.layer == name]

    def chart_path(self, layer: str) -> Path:
        return RESULTS / "charts" / f"{re.sub('[^a-z0-9]+', '-', self.title.lower())}-{layer}s.svg"


def devices(folder: Path = RESULTS) -> list[Device]:
    """GPUs first.

    Raises:
        ValueError: there are no results, or a file has none.
    """
    files = {path: read(path) for path in sorted(folder.glob("*.json"))}
    if not files:
        raise ValueError(f"{folder} is empty: run `make bench RESULTS=benchmarks/results/NAME.json`")
    rows = pd.concat(
        rows.assign(
            path=path,
            date=pd.Timestamp(header["date"]),
            title=f"{header['device']}, {header['threads']} threads",
            is_cpu=header["device_type"] == "cpu",
        )
        for path, (header, rows) in files.items()
    )
    dates = rows.groupby(["title", "layer"], observed=True).date
    newest = rows[rows.date == dates.transform("max")].sort_values("layer", kind="stable")
    headers = {path: header for path, (header, _) in files.items()}
    return [Device(title, of_title, headers) for (_, title), of_title in newest.groupby(["is_cpu", "title"])]


# Cells


def ms(value: float) -> str:
    return "" if np.isnan(value) else f"{value:,.1f}" if value >= 1 else f"{value:.3f}"


def times(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.2f}x"


def amount(value: float) -> str:
    return "" if np.isnan(value) else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def of_limit(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.0%}{'*' if value < 0.5 else ''}"


def spread(row: Any, keys: list[str], written: Callable[[float], str]) -> str:
    """The median, and the 20th and 80th percentile; empty for nothing."""
    middle, low, high = (written(row[key]) for key in keys)
    return f"{middle} [{low.removesuffix('x')}-{high.removesuffix('x')}]" if middle else ""


def missing(row: Any) -> str:
    """Why there are no figures, in words that a table can hold."""
    note = " ".join(row.note.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return f"{row.why}: {note}" if row.why and note else row.why


def geometric_mean(cases: pd.DataFrame) -> str:
    """Of the ratios, the least of them, and how many cases have one; of a single case its ratio."""
    ratios = cases.ratio.dropna()
    if cases.empty:
        return ""
    if ratios.empty:
        return next(filter(None, cases.why), "not checked")  # else ours was not
    if len(cases) == 1:
        return spread(cases.iloc[0], RATIO, times)
    some = f", {len(ratios)} of {len(cases)}" if len(ratios) < len(cases) else ""
    return f"{times(np.exp(np.log(ratios).mean()))} (worst {times(ratios.min())}{some})"


def groups(frame: pd.DataFrame, by: list[str]) -> Iterator[tuple[tuple[Any, ...], pd.DataFrame]]:
    """In the order of the rows."""
    yield from frame.groupby(by, sort=False, observed=True)


# RESULTS.md


def results(of_devices: list[Device]) -> str:
    parts = []
    for device in of_devices:
        parts += [f"## {device.title}", "\n".join(provenance(device))]
        for layer, title in LAYERS.items():
            rows = device.layer(layer)
            if rows.empty:
                continue
            parts.append(f"### {title}")
            if chart_data(device, layer) is not None:
                place = device.chart_path(layer).relative_to(RESULTS.parent).as_posix()
                parts.append(f"![{title} on {device.title}, as bars]({place})")
            parts += models(rows) if layer == "model" else comparisons(rows, device.impls, layer)
    return "\n\n".join(parts)


def provenance(device: Device) -> Iterator[str]:
    """A line per file: what was measured, with what and when."""
    for path, header, titles in device.sources():
        ceilings = " and ".join(
            f"{dtype} {rates['bandwidth'] / 1e9:,.0f} GB/s, {rates['flops'] / 1e9:,.0f} GFLOP/s"
            for dtype, rates in header["ceilings"].items()
        )
        names = ("torch", "triton", "cuda", "cudnn", "driver", "python")
        facts = [
            *(f"{name} {header[name]}" for name in names if header.get(name)),
            f"{pd.Timestamp(header['date']).tz_convert('UTC'):%Y-%m-%d %H:%M} UTC",
            commit(header),
            f"ran for {header['seconds']:,.0f} s",
            f"ceilings {ceilings}" if ceilings else "",
        ]
        yield f"- {', '.join(titles)} ([{path.name}](results/{path.name})): {'; '.join(filter(None, facts))}"


def commit(header: dict[str, Any]) -> str:
    changes = "" if header["clean"] else " (with uncommitted changes)"
    return f"commit {header['commit'][:7] or 'unknown'}{changes}"


def models(rows: pd.DataFrame) -> Iterator[str]:
    """A table per mode, dtype and input."""
    for (mode, dtype, shape), cases in groups(rows, ["mode", "dtype", "shape"]):
        yield f"#### {MODES[mode]}, {dtype}, {shape}"
        table = pd.DataFrame(
            {
                "model": cases.name,
                "implementation": cases.impl,
                "ms": [spread(row, TIME, ms) for _, row in cases.iterrows()],
                "img/s": cases.rate.map(amount),
                "its ms / fused ms": [spread(row, RATIO, times) for _, row in cases.iterrows()],
                "peak MB": cases.peak_mb.map(amount),
                "fused MB / its MB": cases.memory.where(cases.impl != OURS).map(times),
                "first step ms": cases.first_step_ms.map(ms),
                "of the limit": cases.of_limit.map(of_limit),
                "note": [missing(row) for _, row in cases.iterrows()],
            }
        )
        yield markdown(table.loc[:, (table != "").any()])


def comparisons(rows: pd.DataFrame, impls: list[str], layer: str) -> Iterator[str]:
    """Blocks: a table per architecture and dtype; ops: one per dtype. With a mean for each architecture or op."""
    for keys, cases in groups(rows, ["mode", "dtype", "batch", *(["family"] if layer == "block" else [])]):
        mode, dtype, batch, *family = keys
        yield f"#### {', '.join([*family, MODES[mode], dtype, f'batch {batch}'])}"
        others = [impl for impl in impls if impl in {*cases.impl} and impl != OURS]
        lines, notes = [], []
        for (name,), members in groups(cases, ["family"]):
            for (case, shape), entries in groups(members, ["name", "shape"]):
                by_impl = {row.impl: row for _, row in entries.iterrows()}
                limit = of_limit(by_impl[OURS].of_limit) if OURS in by_impl else ""
                cells = [comparison(by_impl.get(impl)) for impl in (OURS, *others)]
                lines.append([case.partition(" ")[2] or case, shape, cells[0], limit, *cells[1:]])
                notes += [f"{impl}: {missing(row)}" for impl, row in by_impl.items() if row.why]
            if len(members) > len({*members.impl}):
                means = [geometric_mean(members[members.impl == impl]) for impl in others]
                lines.append([f"**{name}, geometric mean**", "", "", "", *means])
        yield markdown(pd.DataFrame(lines, columns=[layer, "shape", OURS, "of the limit", *others]))
        yield from dict.fromkeys(notes)


def comparison(row: Any) -> str:
    """Milliseconds and ratio of an implementation, or that they are missing."""
    if row is None:
        return ""
    return ", ".join(filter(None, [ms(row.median_ms), spread(row, RATIO, times), row.why]))


# README.md


def readme(of_devices: list[Device]) -> str:
    parts = [
        "Times and ratios are medians, with the 20th and the 80th percentile, or geometric means over the number of\n"
        "cases given in the row; above 1x fused is faster. Charts, other implementations and how close each is to\n"
        "the roofline: [benchmarks/RESULTS.md](benchmarks/RESULTS.md)."
    ]
    for device in of_devices:
        sources = [
            f"{', '.join(titles).lower()} {header['date'][:10]}, torch {header['torch']}, {commit(header)}"
            for _, header, titles in device.sources()
        ]
        parts.append(f"**{device.title}** ({'; '.join(sources)})")
        rows = device.rows
        parts += [table for table in (readme_models(rows), readme_families(rows)) if table]
    return "\n\n".join(parts)


def readme_models(rows: pd.DataFrame) -> str:
    lines = []
    training = rows[(rows.layer == "model") & (rows["mode"] == "train")]
    for (name, dtype, batch), entries in groups(training, ["name", "dtype", "batch"]):
        by_impl = {row.impl: row for _, row in entries.iterrows()}
        line = {"training step": f"{name}, batch {batch}", "dtype": dtype}
        ours = by_impl[OURS]
        line |= {"fused ms": ours.why or spread(ours, TIME, ms), "img/s": amount(ours.rate)}
        for impl, head in BASELINES.items():
            line[head] = (spread(by_impl[impl], RATIO, times) or by_impl[impl].why) if impl in by_impl else ""
        line["peak memory, fused / eager"] = times(by_impl[EAGER].memory) if EAGER in by_impl else ""
        lines.append(line)
    table = pd.DataFrame(lines)
    return markdown(table.loc[:, (table != "").any()]) if lines else ""


def readme_families(rows: pd.DataFrame) -> str:
    """A line for an architecture's blocks in each dtype, and for each op in all."""
    blocks, ops = rows[rows.layer == "block"], rows[rows.layer == "op"]
    families = [(f"{family} blocks", cases) for (family, _), cases in groups(blocks, ["family", "dtype"])]
    families += [(name, cases) for (name,), cases in groups(ops, ["name"])]
    lines = []
    for name, cases in families:
        count = len(cases[CASE].drop_duplicates())
        line = {MODES["fwd_bwd"]: f"{name}, {count}", "dtype": ", ".join(cases.dtype.unique())}
        lines.append(
            line | {head: geometric_mean(cases[cases.impl == impl]) for impl, head in BASELINES.items()}
        )
    table = pd.DataFrame(lines)
    return markdown(table.loc[:, (table != "").any()]) if lines else ""


# Charts


def chart_data(device: Device, layer: str) -> pd.DataFrame | None:
    """A row per bar: panel, case, impl and value; None where there is none."""
    rows = device.layer(layer)
    if layer == "model":
        rows = rows[rows["mode"] == "train"].assign(case=rows.name + " " + rows.dtype.astype(str))
        panels = {"images per second": "rate", "peak memory, MB": "peak_mb"}
        frames = [rows.assign(panel=panel, value=rows[key]) for panel, key in panels.items()]
    elif layer == "block":
        frames = [
            rows.assign(panel=rows.dtype.astype(str) + ", times as fast", case=rows.name, value=rows.ratio)
        ]
    else:
        return None
    data = pd.concat(frames)[["panel", "case", "impl", "value"]].dropna(subset="value")
    return None if data.empty else data.reset_index(drop=True)


def draw(data: pd.DataFrame) -> Any:
    """Horizontal bars, a panel beside the other."""
    from matplotlib.figure import Figure

    panels, cases, impls = (list(data[key].unique()) for key in ("panel", "case", "impl"))
    colours = dict(zip(dict.fromkeys([OURS, *impls]), COLOURS, strict=False))
    height = 1.2 + 0.17 * len(cases) * (len(impls) + 0.7)
    figure = Figure(figsize=(2 + 3.6 * len(panels), height), facecolor="white", layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        values = data[data.panel == panel].pivot(index="case", columns="impl", values="value")
        values = values.reindex(index=cases, columns=impls)
        values.plot.barh(ax=axes, color=[colours[impl] for impl in impls], width=0.85, legend=False)
        is_ratio = "times" in panel
        for bars, impl in zip(axes.containers, impls, strict=True):
            labels = values[impl].map(times if is_ratio else amount)
            axes.bar_label(bars, labels, fontsize=6, padding=2)
        if is_ratio:
            axes.axvline(1.0, color="black", linewidth=0.8, zorder=0)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set(title=panel, ylabel="")
        if panel != panels[0]:
            axes.set_yticklabels([])
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False)
    return figure


def charts() -> list[Chart]:
    data_of_charts = [
        (device.chart_path(layer), chart_data(device, layer)) for device in devices() for layer in LAYERS
    ]
    return [Chart(path, data, draw) for path, data in data_of_charts if data is not None]


COMMAND = "python -m benchmarks.report --write"
PAGES = (
    Page(ROOT / "README.md", COMMAND, lambda: {"results": readme(devices())}),
    Page(RESULTS.parent / "RESULTS.md", COMMAND, lambda: {"results": results(devices())}, charts),
)

if __name__ == "__main__":
    sys.exit(max(page.main(sys.argv[1:], __doc__) for page in PAGES))

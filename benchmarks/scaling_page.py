"""Tables and chart of docs/scaling.md: ``python -m benchmarks.scaling_page [--write]``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.page import COLOURS, ROOT, Chart, Page, markdown
from benchmarks.scaling import ALONE, DDP, SYNC
from resnet_fused.measure import EAGER, OURS

RESULTS = ROOT / "benchmarks" / "results" / "scaling"
AXES = {"batch": "images", "image_size": "pixels", "depth": "layers"}
NAMES = {OURS: "resnet_fused", EAGER: "eager"}
VARIANTS = {ALONE: "nothing", DDP: "gradients (DDP)", SYNC: "statistics (SyncBatchNorm)"}


def latest(folder: Path = RESULTS) -> tuple[dict[str, Any], pd.DataFrame]:
    """Header and checked rows of the latest results.

    Raises:
        ValueError: there are none, or a file has no results of ``benchmarks.scaling``.
    """
    files = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        if not content.keys() >= {"header", "curves"}:
            raise ValueError(f"{path} is no file of `python -m benchmarks.scaling`")
        files.append((content["header"], pd.DataFrame(content["curves"])))
    if not files:
        raise ValueError(f"{folder} has no results: run `python -m benchmarks.scaling {folder}/NAME.json`")
    header, rows = max(files, key=lambda pair: pair[0]["date"])
    return header, rows[rows.checked].reset_index(drop=True)


def machine(header: dict[str, Any], rows: pd.DataFrame) -> str:
    """Where the figures are from, in a paragraph."""
    base, of_rank = (rows[rows.curve == curve].iloc[0] for curve in ("depth", "ranks"))
    return (
        f"{header['device']}, {header['threads']} threads, torch {header['torch']}, {header['date'][:10]},"
        f" {base['dtype']}; resnet50, batch {base.batch} at {base.image_size}x{base.image_size} unless said otherwise;"
        f" ranks: one thread each, batch {of_rank.batch} each at {of_rank.image_size}x{of_rank.image_size}."
    )


def paired(rows: pd.DataFrame) -> pd.DataFrame:
    """Points that both implementations have, ours with the suffix _fused and eager's with _eager."""
    fused, eager = (rows[rows.impl == impl] for impl in (OURS, EAGER))
    return fused.merge(eager, on=["curve", "x", "variant"], suffixes=("_fused", "_eager"))


def spread(row: Any, impl: str) -> str:
    median, low, high = (row[f"{key}_{impl}"] for key in ("median_ms", "p20_ms", "p80_ms"))
    return f"{median:,.0f} ({low:,.0f} to {high:,.0f})"


def ratio(row: Any) -> str:
    return f"{row.ratio_eager:.2f}x ({row.ratio_p20_eager:.2f} to {row.ratio_p80_eager:.2f})"


def curves_table(rows: pd.DataFrame) -> str:
    """A row for each point of the curves of one process."""
    pairs, lines = paired(rows), []
    for curve in AXES:
        for _, row in pairs[pairs.curve == curve].sort_values("x").iterrows():
            memory = f"{row.peak_mb_fused:,.0f}", f"{row.peak_mb_eager:,.0f}"
            less = f"{row.peak_mb_fused / row.peak_mb_eager:.2f}x"
            name = f"{curve.replace('_', ' ')} {row.x}"
            lines.append((name, spread(row, "fused"), spread(row, "eager"), ratio(row), *memory, less))
    heads = ["", "fused ms", "eager ms", "eager / fused", "fused MB", "eager MB", "fused / eager"]
    return markdown(pd.DataFrame(lines, columns=heads))


def ranks_table(rows: pd.DataFrame) -> str:
    """A row for each number of ranks and what they share; eager's SyncBatchNorm needs a GPU."""
    lines = []
    for (x, variant), group in rows[rows.curve == "ranks"].groupby(["x", "variant"], sort=True):
        both = paired(group)
        ours = group[group.impl == OURS].iloc[0]
        theirs = (spread(both.iloc[0], "eager"), ratio(both.iloc[0])) if len(both) else ("", "")
        lines.append((x, VARIANTS[variant], spread(ours.add_suffix("_fused"), "fused"), *theirs))
    return markdown(pd.DataFrame(lines, columns=["ranks", "shared", "fused ms", "eager ms", "eager / fused"]))


def growth_table(rows: pd.DataFrame) -> str:
    """Exponents of time, and the straight line of memory over batch."""
    lines = []
    for impl, name in NAMES.items():
        points = {curve: rows[(rows.curve == curve) & (rows.impl == impl)] for curve in AXES}
        exponents = [
            np.polyfit(np.log(points[curve].x), np.log(points[curve].median_ms), 1)[0]
            for curve in ("batch", "image_size")
        ]
        memory = points["batch"].dropna(subset="peak_mb")
        slope, intercept = np.polyfit(memory.x, memory.peak_mb, 1)
        lines.append((name, *(f"{e:.2f}" for e in exponents), f"{slope:.1f}", f"{intercept:,.0f}"))
    heads = ["", "time ~ batch^", "time ~ image size^", "peak MB per image", "MB without images"]
    return markdown(pd.DataFrame(lines, columns=heads))


def draw(rows: pd.DataFrame) -> Any:
    """Time and memory over each axis, and time over ranks, as a matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.6), facecolor="white", layout="constrained")
    axes = figure.subplots(2, 4)
    for (impl, name), colour in zip(NAMES.items(), COLOURS, strict=False):
        own = rows[rows.impl == impl].sort_values("x")
        for column, (curve, unit) in enumerate(AXES.items()):
            points = own[own.curve == curve]
            axes[0, column].plot(points.x, points.median_ms, "o-", ms=3, color=colour, label=name)
            axes[0, column].fill_between(
                points.x, points.p20_ms, points.p80_ms, color=colour, alpha=0.2, lw=0
            )
            axes[1, column].plot(points.x, points.peak_mb, "o-", ms=3, color=colour, label=name)
            for row, label in enumerate(("ms per step", "peak memory, MB")):
                axes[row, column].set(xlabel=f"{curve.replace('_', ' ')}, {unit}", ylabel=label)
        for variant, style in ((ALONE, ":"), (DDP, "-"), (SYNC, "--")):
            points = own[(own.curve == "ranks") & (own.variant == variant)]
            if len(points):
                label = f"{name}, {VARIANTS[variant]}"
                axes[0, 3].plot(
                    points.x, points.median_ms, style, marker="o", ms=3, color=colour, label=label
                )
    axes[0, 3].set(xlabel="ranks", ylabel="ms per step", xticks=sorted({*rows[rows.curve == "ranks"].x}))
    axes[1, 3].set_axis_off()
    axes[1, 3].legend(*axes[0, 3].get_legend_handles_labels(), frameon=False, title="ranks, what they share")
    for each in axes.flat[:7]:
        each.grid(alpha=0.3)
        each.set_ylim(bottom=0)
        each.spines[["top", "right"]].set_visible(False)
    for each in axes[:, :3].flat:
        each.legend(frameon=False, fontsize=7)
    return figure


def tables(folder: Path = RESULTS) -> dict[str, str]:
    header, rows = latest(folder)
    return {
        "machine": machine(header, rows),
        "curves": curves_table(rows),
        "growth": growth_table(rows),
        "ranks": ranks_table(rows),
    }


PAGE = Page(
    path=ROOT / "docs" / "scaling.md",
    command="python -m benchmarks.scaling_page --write",
    tables=tables,
    charts=lambda: [Chart(ROOT / "docs" / "scaling.svg", latest()[1], draw)],
)

if __name__ == "__main__":
    sys.exit(PAGE.main(sys.argv[1:], __doc__))

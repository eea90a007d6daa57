"""Horizontal bars as SVG, the same bytes for the same figures: no date, no random names, no settings of a user."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.report_files import Case

#: Told apart by the colour-blind too; the first is for ours.
COLOURS = ("#0072b2", "#999999", "#e69f00", "#56b4e9", "#009e73", "#d55e00", "#cc79a7", "#f0e442", "#4d4d4d")
#: Inches.
BAR, GAP, PANEL, LABELS, RIGHT, TITLE, AXIS = 0.17, 0.12, 3.6, 1.9, 0.2, 0.8, 0.5
LEGEND_ROW, LEGEND_ENTRY = 0.22, 2.0

#: Middle, low and high end of the whisker; or a word for why there is no bar.
Bar = tuple[float, float, float] | str


@dataclass(frozen=True)
class Panel:
    """Bars by group and implementation; beside each is ``written`` what it says."""

    title: str
    bars: dict[tuple[str, str], Bar]
    written: Callable[[float], str]

    @property
    def longest(self) -> float:
        return max((bar[2] for bar in self.bars.values() if not isinstance(bar, str)), default=0.0)


def rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def models_chart(device: str, cases: list[Case], impls: list[str]) -> str:
    """Images per second and peak memory of each implementation; empty where none was accepted."""
    rates: dict[tuple[str, str], Bar] = {}
    peaks: dict[tuple[str, str], Bar] = {}
    for case in cases:
        for impl in case.rows:
            row, key = case.accepted(impl), (f"{case.name} {case.dtype}", impl)
            rates[key] = case.rate(impl) or case.why_not(impl)
            if row and row["peak_mb"]:
                peaks[key] = (row["peak_mb"],) * 3
    panels = [Panel("images per second", rates, rounded), Panel("peak memory, MB", peaks, rounded)]
    return bar_chart(f"Training steps on {device}", [panel for panel in panels if panel.bars], impls)


def blocks_chart(device: str, cases: list[Case], impls: list[str]) -> str:
    """How many times as fast ours is, a panel for each dtype; empty where it is compared with nothing."""
    panels: dict[str, Panel] = {}
    for case in cases:
        panel = panels.setdefault(case.dtype, Panel(case.dtype, {}, "{:.2f}x".format))
        for impl in case.rows:
            if impl != impls[0]:
                panel.bars[case.name, impl] = case.ratio(impl) or case.why_not(impl) or case.why_not(impls[0])
    title = f"Blocks on {device}: how many times as fast {impls[0]} is (line: equally fast)"
    return bar_chart(title, list(panels.values()), impls, ratios=True)


def bar_chart(title: str, panels: list[Panel], impls: list[str], ratios: bool = False) -> str:
    """Panels side by side over the same groups, as the text of an SVG with a white background; empty without bars.

    Args:
        title: above all.
        panels: one or more; together their groups, in order, are the rows.
        impls: all implementations, ours first, which gives each its colour; those without any bar are left out.
        ratios: one scale for all panels, with a line at 1, where both are equally fast.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    groups = list(dict.fromkeys(group for panel in panels for group, _ in panel.bars))
    found = {impl for panel in panels for (_, impl), bar in panel.bars.items() if not isinstance(bar, str)}
    if not found:
        return ""
    colours = {impl: COLOURS[i % len(COLOURS)] for i, impl in enumerate(impls) if impl in found}
    width = LABELS + len(panels) * PANEL + RIGHT
    columns = max(1, int((width - RIGHT) // LEGEND_ENTRY))
    top = TITLE + LEGEND_ROW * -(-len(colours) // columns)
    body = len(groups) * (len(colours) * BAR + GAP) + GAP
    height = top + body + AXIS
    with matplotlib.rc_context():
        # Whatever a matplotlibrc of the user or in the current folder says.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.hashsalt": "resnet_fused", "svg.fonttype": "none", "font.size": 8})
        figure = Figure(figsize=(width, height), facecolor="white")
        for i, panel in enumerate(panels):
            left = (LABELS + i * PANEL) / width
            axes = figure.add_axes((left, AXIS / height, (PANEL - 0.2) / width, body / height))
            longest = max(1.0, *(other.longest for other in panels)) if ratios else panel.longest
            _draw(axes, panel, groups, colours, 1.22 * longest or 1.0)  # room for what is written beside it
            axes.set_yticklabels(groups if i == 0 else [])
            if ratios:
                axes.axvline(1.0, color="black", linewidth=0.8)
        patches = [Patch(color=colour, label=impl) for impl, colour in colours.items()]
        place = (0.1 / width, 1 - 0.32 / height)
        figure.legend(handles=patches, loc="upper left", bbox_to_anchor=place, ncols=columns, frameon=False)
        figure.text(0.15 / width, 1 - 0.1 / height, title, va="top", fontsize=10)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def _draw(axes: Any, panel: Panel, groups: list[str], colours: dict[str, str], limit: float) -> None:
    pitch = len(colours) * BAR + GAP
    # Above lines, which must not strike it through.
    small = {
        "va": "center",
        "fontsize": 6,
        "zorder": 4,
        "bbox": {"facecolor": "white", "linewidth": 0, "pad": 0.4},
    }
    for (group, impl), bar in panel.bars.items():
        if impl not in colours:
            continue
        y = groups.index(group) * pitch + GAP + (list(colours).index(impl) + 0.5) * BAR
        if isinstance(bar, str):
            axes.text(0.01 * limit, y, bar, color="#555555", **small)
            continue
        middle, low, high = bar
        axes.barh(y, middle, height=0.85 * BAR, color=colours[impl])
        if low < high:
            axes.hlines(y, low, high, color="black", linewidth=0.8)
        axes.text(high + 0.015 * limit, y, panel.written(middle), **small)
    axes.set_xlim(0, limit)
    axes.set_ylim(len(groups) * pitch + GAP, 0)
    axes.set_yticks([i * pitch + GAP + len(colours) * BAR / 2 for i in range(len(groups))])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_title(panel.title, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)

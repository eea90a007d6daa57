"""Learning curves, and the bars of a benchmark, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from resnet_fused.cli.errors import require
from resnet_fused.cli.files import write_atomically
from resnet_fused.cli.metrics import Progress

_COLOURS = ("#0072b2", "#d55e00", "#009e73")
_STYLES = ("-", (0, (4, 3)))
_BESIDE: dict[str, Any] = {"textcoords": "offset points", "va": "center"}


def plot_curves(path: Path, runs: Mapping[str, Progress], title: str) -> None:
    """Draws the loss of every step and the accuracy after every epoch, training and held out.

    Args:
        path: the PNG to write.
        runs: one or two runs by name; the second is dashed, so that curves that coincide show both.
        title: above the picture.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
    """
    figure = _figure(11, 4.2)
    loss, accuracy = figure.subplots(1, 2)
    for (name, run), colour, style in zip(runs.items(), _COLOURS, _STYLES, strict=False):
        prefix = f"{name}, " if len(runs) > 1 else ""
        steps = range(1, len(run.losses) + 1)
        line: dict[str, Any] = {"color": colour, "linestyle": style}
        loss.plot(steps, run.losses, **line, linewidth=1, alpha=0.8, label=f"{prefix}training")
        if run.history:
            records = {key: [record[key] for record in run.history] for key in run.history[0]}
            dots: dict[str, Any] = {"color": colour, "linestyle": "none", "marker": "o", "markersize": 4}
            loss.plot(records["step"], records["val_loss"], **dots, label=f"{prefix}held out")
            line |= {"marker": "o", "markersize": 3}
            for key, label, alpha in (("train_accuracy", "training", 0.4), ("val_accuracy", "held out", 1.0)):
                percent = [100 * value for value in records[key]]
                accuracy.plot(records["epoch"], percent, **line, alpha=alpha, label=prefix + label)
    loss.set(xlabel="step", ylabel="cross entropy", yscale="log")
    accuracy.set(xlabel="epoch", ylabel="accuracy, %")
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
        if axes.get_lines():
            axes.legend()
    figure.suptitle(title)
    _save(figure, path)


def plot_bench(path: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Draws images a second, with a line from the 20th to the 80th percentile, and peak memory, a bar for each row.

    Args:
        path: the PNG to write.
        rows: of `bench.figures`.
        title: above the picture.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
    """
    figure = _figure(11, 1.6 + 0.6 * len(rows))
    speed, memory = figure.subplots(1, 2, sharey=True)
    for y, (row, colour) in enumerate(zip(rows, _COLOURS, strict=False)):
        median, low, high = row["rate"].values()
        gain, peak, relative = row["gain"]["median"], row["peak_mb"], row["relative_memory"]
        if median is not None:
            speed.barh(y, median, color=colour, height=0.6)
            speed.plot((low, high), (y, y), color="black", linewidth=1.5)
            beside = f"{median:.1f}" + ("" if gain is None else f", {gain:.2f}x eager")
            speed.annotate(beside, (high, y), (5, 0), **_BESIDE)
        else:
            speed.annotate("not shown: see the table", (0, y), (5, 0), **_BESIDE)
        if peak is not None:
            memory.barh(y, peak, color=colour, height=0.6)
            beside = f"{peak:,.0f}" + ("" if relative in (None, 1) else f", {relative:.2f}x eager")
            memory.annotate(beside, (peak, y), (5, 0), **_BESIDE)
        else:
            memory.annotate("not measured", (0, y), (5, 0), **_BESIDE)
    speed.set_yticks(range(len(rows)), [row["label"] for row in rows])
    speed.invert_yaxis()
    speed.set(title="images a second (more is better)")
    memory.set(title="peak memory of a training step, MB (less is better)")
    for axes in (speed, memory):
        axes.margins(x=0.35)  # for what is written beside the bars
        axes.set_xlim(left=0)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    _save(figure, path)


def _figure(width: float, height: float) -> Any:
    """An empty picture of that many inches."""
    figure = require("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    require("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))

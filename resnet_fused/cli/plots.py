"""Learning curves as a PNG."""

from collections.abc import Mapping
from pathlib import Path

from resnet_fused.cli.errors import require
from resnet_fused.cli.files import write_atomically
from resnet_fused.cli.metrics import Progress

_COLOURS = ("#0072b2", "#d55e00")
_STYLES = ("-", (0, (4, 3)))


def plot_curves(path: Path, runs: Mapping[str, Progress], title: str) -> None:
    """Draws the loss of every step and the accuracy after every epoch, training and held out.

    Args:
        path: the PNG to write.
        runs: one or two runs by name; the second is dashed, so that curves that coincide show both.
        title: above the picture.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
    """
    agg = require("matplotlib.backends.backend_agg")
    figure = require("matplotlib.figure").Figure(figsize=(11, 4.2), layout="constrained")
    agg.FigureCanvasAgg(figure)
    loss, accuracy = figure.subplots(1, 2)
    for (name, run), colour, style in zip(runs.items(), _COLOURS, _STYLES, strict=False):
        prefix = f"{name}, " if len(runs) > 1 else ""
        steps = range(1, len(run.losses) + 1)
        loss.plot(
            steps,
            run.losses,
            color=colour,
            linestyle=style,
            linewidth=1,
            alpha=0.8,
            label=f"{prefix}training",
        )
        if run.history:
            epochs = [record["epoch"] for record in run.history]
            ends = [record["step"] for record in run.history]
            held_out = [record["val_loss"] for record in run.history]
            loss.plot(
                ends,
                held_out,
                color=colour,
                marker="o",
                markersize=4,
                linestyle="none",
                label=f"{prefix}held out",
            )
            for key, label, alpha in (("train_accuracy", "training", 0.4), ("val_accuracy", "held out", 1.0)):
                values = [100 * record[key] for record in run.history]
                accuracy.plot(
                    epochs,
                    values,
                    color=colour,
                    alpha=alpha,
                    linestyle=style,
                    marker="o",
                    markersize=3,
                    label=prefix + label,
                )
    loss.set(xlabel="step", ylabel="cross entropy", yscale="log")
    accuracy.set(xlabel="epoch", ylabel="accuracy, %")
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
        if axes.get_lines():
            axes.legend()
    figure.suptitle(title)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))

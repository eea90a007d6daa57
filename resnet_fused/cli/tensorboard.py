"""`train --tensorboard`: scalars for TensorBoard, beside what every run writes."""

from __future__ import annotations

import statistics
from pathlib import Path

from resnet_fused.cli.errors import require
from resnet_fused.cli.metrics import Progress, Record

STEPS_BETWEEN_SCALARS = 10
NOT_SCALARS = ("epoch", "step", "seconds")


class Scalars:
    """Writes the scalars of one learner.

    Args:
        folder: of its event files. What they have of later steps is hidden: that run was interrupted or replaced.
        steps_done: since the start of the run.

    Raises:
        UserError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, steps_done: int) -> None:
        require("tensorboard", extra="tensorboard")
        writer = require("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(str(folder), purge_step=steps_done + 1)
        self._next = _next(steps_done)

    def steps(self, progress: Progress, learning_rate: float) -> None:
        """After some steps: the loss is the mean of the latest, accuracy and speed are of the epoch so far."""
        step = len(progress.losses)
        if step < self._next or not progress.images:
            return
        self._next = _next(step)
        values = {
            "loss": statistics.fmean(progress.losses[-STEPS_BETWEEN_SCALARS:]),
            "accuracy": progress.correct / progress.images,
            "learning_rate": learning_rate,
            "images_per_second": progress.images / max(progress.seconds, 1e-9),
        }
        for name, value in values.items():
            self._writer.add_scalar(f"steps/{name}", value, step)

    def epoch(self, record: Record) -> None:
        """After an epoch."""
        for name, value in record.items():
            if name not in NOT_SCALARS:
                self._writer.add_scalar(f"epochs/{name}", value, int(record["step"]))

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


def _next(step: int) -> int:
    """The next step with scalars."""
    return (step // STEPS_BETWEEN_SCALARS + 1) * STEPS_BETWEEN_SCALARS

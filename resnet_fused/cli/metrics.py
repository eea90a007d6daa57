"""What is counted while training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

Record = dict[str, float]  # one epoch
RECORD_KEYS = {
    "epoch",
    "step",
    "learning_rate",
    "train_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
    "images_per_second",
    "seconds",
}


@dataclass
class Progress:
    """How far a run has come. Part of every checkpoint; equal on all ranks.

    Attributes:
        epoch: epochs finished, evaluation included.
        step: steps done in the epoch after those.
        loss: sum over the images of that epoch so far.
        correct, images, seconds: of that epoch so far, over all ranks.
        best: highest held-out accuracy so far.
        history: one record per finished epoch.
        losses: mean loss of every step since the first.
        step_seconds: duration of the steps that were timed (with --impl compare only).
    """

    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    correct: int = 0
    images: int = 0
    seconds: float = 0.0
    best: float = -1.0
    history: list[Record] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)

    def count(self, losses: list[float], correct: int, batch: int) -> None:
        """Adds steps of `batch` images each: their mean losses, and the correct predictions of all together."""
        for loss in losses:  # one by one: the sum must not depend on how many steps are read at a time
            self.loss += batch * loss
        self.losses += losses
        self.correct += correct
        self.images += batch * len(losses)

    def finish_epoch(self, learning_rate: float, held_out_loss: float, held_out_accuracy: float) -> bool:
        """Closes the epoch with its record; returns whether it is the best so far."""
        self.history.append(
            {
                "epoch": self.epoch + 1,
                "step": len(self.losses),
                "learning_rate": learning_rate,
                "train_loss": self.loss / self.images,
                "train_accuracy": self.correct / self.images,
                "val_loss": held_out_loss,
                "val_accuracy": held_out_accuracy,
                "images_per_second": self.images / self.seconds if self.seconds else 0.0,
                "seconds": self.seconds,
            }
        )
        better = held_out_accuracy > self.best
        self.best = max(self.best, held_out_accuracy)
        self.epoch += 1
        self.step = self.correct = self.images = 0
        self.loss = self.seconds = 0.0
        return better

    def state(self) -> dict[str, Any]:
        """As a plain dictionary; the long lists as float64 tensors."""
        long = {name: torch.tensor(getattr(self, name), dtype=torch.float64) for name in _LONG}
        return vars(self) | {"history": [dict(record) for record in self.history]} | long

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Progress:
        """The inverse of `state`."""
        return cls(**(state | {name: state[name].tolist() for name in _LONG}))


_LONG = ("losses", "step_seconds")


def describe(record: Record, epochs: int) -> str:
    """One epoch as one line."""
    return (
        f"epoch {record['epoch']:.0f}/{epochs}  "
        f"loss {record['train_loss']:.4f}  accuracy {record['train_accuracy']:.2%}  "
        f"held-out loss {record['val_loss']:.4f}  accuracy {record['val_accuracy']:.2%}  "
        f"{record['images_per_second']:.0f} img/s"
    )

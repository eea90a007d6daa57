"""`--tensorboard`: which scalars there are, also of a run that is resumed or compared."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from resnet_fused.cli import tensorboard
from resnet_fused.cli.tensorboard import Scalars
from tests.cli.conftest import Cli, load
from tests.cli.test_bad_input import assert_refused

STEPS = {"loss", "accuracy", "learning_rate", "images_per_second"}
EPOCHS = {
    "learning_rate",
    "train_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
    "images_per_second",
}


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """By tag and step, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    found: dict[str, dict[int, float]] = {}
    for tag in events.Tags()["scalars"]:
        values: list[Any] = events.Scalars(tag)
        found[tag] = {event.step: event.value for event in values}
        assert len(found[tag]) == len(values), f"{tag} has a step twice"
    return found


def test_scalars(train: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed, they go on in the same curves."""
    monkeypatch.setattr(tensorboard, "STEPS_BETWEEN_SCALARS", 2)
    assert train("--tensorboard", "--epochs", 1, "--max-steps", 3).code == 0
    assert train("--resume", "--epochs", 1).code == 0
    found = scalars(tmp_path / "out" / "tensorboard")
    assert found.keys() == {f"steps/{name}" for name in STEPS} | {f"epochs/{name}" for name in EPOCHS}
    progress = load(tmp_path / "out" / "last.pt")["progress"]
    losses, (record,) = progress["losses"].tolist(), progress["history"]
    assert found["steps/loss"] == pytest.approx({2: sum(losses[:2]) / 2, 4: sum(losses[2:]) / 2}, rel=1e-5)
    for name in EPOCHS:
        assert found[f"epochs/{name}"] == pytest.approx({4: record[name]}, rel=1e-5)
    assert found["steps/learning_rate"][4] < found["steps/learning_rate"][2]


def test_later_steps_are_hidden(tmp_path: Path) -> None:
    """Those of a run that was replaced, or that ended before it could save them."""
    record = {"epoch": 1.0, "step": 4.0, "seconds": 1.0, "train_loss": 0.0}
    for steps_done, step in ((0, 4), (4, 8), (4, 9), (0, 4)):
        writer = Scalars(tmp_path, steps_done)
        writer.epoch(record | {"step": step, "train_loss": float(step)})
        writer.close()
        shown = scalars(tmp_path)
        assert shown == {"epochs/train_loss": {at: float(at) for at in ({4, step} if steps_done else {step})}}


def test_without_tensorboard(train: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    result = train("--tensorboard")
    assert_refused(result, "tensorboard is not installed", "pip install 'resnet_fused[tensorboard]'")
    assert not (tmp_path / "out").exists()

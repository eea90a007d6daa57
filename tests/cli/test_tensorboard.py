"""`--tensorboard`: which scalars there are, also of a run that is resumed or compared."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from resnet_fused.cli import tensorboard
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
    monkeypatch.setattr(tensorboard, "STEPS_BETWEEN_SCALARS", 3)
    assert train("--tensorboard", "--max-steps", 5).code == 0
    assert train("--resume").code == 0
    found = scalars(tmp_path / "out" / "tensorboard")
    assert found.keys() == {f"steps/{name}" for name in STEPS} | {f"epochs/{name}" for name in EPOCHS}
    progress = load(tmp_path / "out" / "last.pt")["progress"]
    losses, history = progress["losses"].tolist(), progress["history"]
    assert found["steps/loss"] == pytest.approx({3: sum(losses[:3]) / 3, 6: sum(losses[3:6]) / 3}, rel=1e-5)
    for name in EPOCHS:
        expected = {record["step"]: record[name] for record in history}
        assert found[f"epochs/{name}"] == pytest.approx(expected, rel=1e-5)
    assert found["steps/learning_rate"][6] < found["steps/learning_rate"][3]


def test_what_is_replaced_is_hidden(train: Cli, tmp_path: Path) -> None:
    """Of a run that --overwrite replaces nothing is left."""
    few = ("--tensorboard", "--epochs", 1)
    assert train(*few, "--seed", 1).code == 0
    assert train(*few, "--overwrite", "--impl", "compare").code == 0
    assert train(*few, "--overwrite", "--impl", "fused").code == 0
    history = load(tmp_path / "out" / "last.pt")["progress"]["history"]
    found = scalars(tmp_path / "out" / "tensorboard")["epochs/train_loss"]
    assert found == pytest.approx({4: history[0]["train_loss"]}, rel=1e-5)
    for name in ("fused", "reference"):
        assert scalars(tmp_path / "out" / name / "tensorboard")["epochs/train_loss"].keys() == {4}


def test_without_tensorboard(train: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    result = train("--tensorboard")
    assert_refused(result, "tensorboard is not installed", "pip install 'resnet_fused[tensorboard]'")
    assert not (tmp_path / "out").exists()

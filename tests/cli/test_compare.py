"""`--impl compare`: its table, its picture, and what it counts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import resnet_fused
from resnet_fused import native
from resnet_fused.backend import summary
from resnet_fused.cli import compare
from resnet_fused.cli.compare import timed_steps
from resnet_fused.cli.data import open_source
from resnet_fused.cli.distributed import World
from resnet_fused.cli.learner import Learner
from resnet_fused.cli.settings import make_settings
from tests.cli.conftest import Cli, load


def test_table_and_picture(train: Cli, tmp_path: Path) -> None:
    result = train("--impl", "compare", "--epochs", 3)
    assert result.code == 0, result.err
    out = tmp_path / "out"
    for words in (
        "img/s at 16x16, median of steps",
        "against reference",
        "paired steps",
        "memory saved for backward",
        "held-out accuracy",
        "points",
    ):
        assert words in result.out
    assert f"resnet_fused {summary('cpu')}" in result.out.splitlines()
    table = json.loads((out / "compare.json").read_text())
    assert result.out.splitlines()[-1] == compare.conclusion(table)
    assert table["timed_steps"] == 3 * 4 - compare.WARM_UP
    for name in ("fused", "reference"):
        row, progress = table[name], load(out / name / "last.pt")["progress"]
        rate = row["images_per_second"]
        assert 0 < rate["p20"] <= rate["median"] <= rate["p80"]
        assert row["held_out_accuracy"] == progress["history"][-1]["val_accuracy"]
        assert len(progress["step_seconds"]) == table["timed_steps"]
        assert len((out / name / "metrics.jsonl").read_text().splitlines()) == 3
    assert 0 < table["speedup"]["p20"] <= table["speedup"]["median"] <= table["speedup"]["p80"]
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_few_steps_still_end_with_a_table(train: Cli, tmp_path: Path) -> None:
    result = train("--impl", "compare", "--max-steps", 2)
    assert result.code == 0
    assert "not timed" in result.out and "held-out accuracy" in result.out
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["timed_steps"] == 0


def test_what_is_not_fused_is_not_called_so(
    train: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "is_loaded", False)
    monkeypatch.setattr(native, "missing_reason", "the extension is on holiday")
    result = train("--impl", "compare", "--max-steps", 2)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert "resnet_fused runs plain PyTorch, nothing fused: the extension is on holiday" in lines
    assert any(re.search(r" unfused +reference +unfused against reference$", line) for line in lines)
    assert lines[-1] == "Nothing ran fused, both columns are eager PyTorch: the extension is on holiday."
    with_backend = tmp_path / "backend"
    with resnet_fused.backend("reference"):
        result = train("--max-steps", 1, out="backend")
    assert result.out.startswith("resnet18, unfused, ") and with_backend.is_dir()
    assert "resnet_fused runs plain PyTorch, nothing fused: forced by the backend setting" in result.out


def _summary(accuracies: tuple[float, float], size: int = 32, speedup: float = 0.9) -> dict[str, Any]:
    rows = {
        name: {"held_out_accuracy": accuracy, "held_out_images": 900, "saved_for_backward_bytes": held}
        for name, accuracy, held in zip(("fused", "reference"), accuracies, (60, 100), strict=True)
    }
    return {
        "why_not_fused": None,
        "image_size": size,
        "timed_steps": 9,
        "speedup": {"median": speedup},
        **rows,
    }


def test_conclusion() -> None:
    same = compare.conclusion(_summary((0.98, 0.97)))
    assert (
        "reaches the same accuracy as eager PyTorch (98.00% and 97.00% of 900 held-out images, within" in same
    )
    assert (
        "autograd saves 0.60x as many bytes for backward, at 0.90x the speed on images of 32x32. So small, "
        in same
    )
    assert same.endswith("for speed at 224x224 run `python -m resnet_fused bench`.")
    other = compare.conclusion(_summary((0.98, 0.96), size=224, speedup=1.2))
    assert "another accuracy than eager PyTorch (98.00% and 96.00% of 900 held-out images, more than" in other
    assert other.endswith("at 1.20x the speed on images of 224x224.")


def _learner(name: str, size: int = 32) -> Learner:
    settings = make_settings({"image_size": size, "batch_size": 4}, {})
    return Learner(name, settings, open_source("digits", size, 0), 10, torch.device("cpu"), World())


def test_both_start_with_the_same_weights() -> None:
    fused, reference = _learner("fused"), _learner("reference")
    for (name, a), (other, b) in zip(
        fused.model.state_dict().items(), reference.model.state_dict().items(), strict=True
    ):
        assert name == other and torch.equal(a, b)


def test_steps_alternate_and_share_their_batch() -> None:
    turns: list[tuple[str, int]] = []

    class Stub(Learner):
        def __init__(self, name: str) -> None:
            full = _learner(name)
            self.__dict__.update(full.__dict__)

        def step(self, images: Tensor, labels: Tensor) -> None:
            turns.append((self.name, id(images)))
            self.progress.step += 1

    learners = [Stub("fused"), Stub("reference")]
    for number in range(4):
        timed_steps(learners, torch.zeros(number + 1), torch.zeros(1), record=number > 0)
    assert [name for name, _ in turns] == ["fused", "reference", "reference", "fused"] * 2
    assert [a == b for (_, a), (_, b) in zip(turns[::2], turns[1::2], strict=True)] == [True] * 4
    assert [len(learner.progress.step_seconds) for learner in learners] == [3, 3]


def test_measuring_leaves_the_model_as_it_is() -> None:
    learner = _learner("fused")
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    images, labels = learner.prepare(
        (torch.zeros(4, 32, 32, 3, dtype=torch.uint8), torch.zeros(4, dtype=torch.long))
    )
    held = {name: compare.memory(_learner(name), images, labels)[0] for name in ("fused", "reference")}
    compare.memory(learner, images, labels)
    assert all(torch.equal(value, before[name]) for name, value in learner.model.state_dict().items())
    assert 0 < held["fused"] < held["reference"]

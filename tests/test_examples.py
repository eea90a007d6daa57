"""The scripts in examples/ run with their smallest settings, and their results are right."""

from __future__ import annotations

import argparse
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_fused import reference
from tests import torchvision_ops  # noqa: F401  # an example takes torchvision where it is installed

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> dict[str, Any]:
    """The functions of a script."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_finetune_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From pretrained weights of another number of classes to a checkpoint that the plain model loads."""
    weights, out = tmp_path / "weights.pt", tmp_path / "out.pt"
    torch.save(reference.resnet18().state_dict(), weights)
    arguments = ["--epochs", "1", "--image-size", "32", "--device", "cpu", "--flip"]
    load("finetune_folder")["main"]([*arguments, "--weights", str(weights), "--out", str(out)])
    printed = capsys.readouterr().out
    assert "epoch 1: loss " in printed and "not fused" not in printed
    trained = torch.load(out, weights_only=True)
    reference.resnet18(num_classes=3).load_state_dict(trained)
    before = torch.load(weights, weights_only=True)
    # 72 images in batches of 12.
    assert trained["bn1.num_batches_tracked"] == before["bn1.num_batches_tracked"] + 6
    assert not torch.equal(trained["conv1.weight"], before["conv1.weight"])


def test_finetune_folder_without_classes(tmp_path: Path) -> None:
    main = load("finetune_folder")["main"]
    with pytest.raises(SystemExit, match="has no folder train/"):
        main([str(tmp_path)])
    for part in ("train", "val"):
        (tmp_path / part / "one").mkdir(parents=True)
    with pytest.raises(SystemExit, match="has 1 class folders"):
        main([str(tmp_path)])
    (tmp_path / "train" / "two").mkdir()
    with pytest.raises(SystemExit, match=r"has no \.jpg, \.jpeg, \.png files"):
        main([str(tmp_path)])


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_convert_and_compare(arch: str, capsys: pytest.CaptureFixture[str]) -> None:
    errors = load("convert_and_compare")["compare"](arch, 4, 64, None, 0)
    assert "explain(fused, images): {}" in capsys.readouterr().out
    assert errors["logits"] < 1e-3
    assert max(errors.values()) < 0.2


def test_profile_block(capsys: pytest.CaptureFixture[str]) -> None:
    script = load("profile_block")
    settings = {"planes": 16, "size": 14, "batch": 2, "rounds": 1, "dtype": "fp32", "device": "cpu"}
    saved = script["profile_block"](argparse.Namespace(**settings))
    printed = capsys.readouterr().out
    assert "explain: {}" in printed
    assert "resnet_fused::" in printed  # an op, in the profiler's table
    # The block's input, the outputs of its three convolutions, and relu(bn(.)) of the first two.
    assert saved["plain"] >= 4 * 2 * 14 * 14 * (64 + 16 + 16 + 64 + 16 + 16)
    assert saved["fused"] < 0.5 * saved["plain"]

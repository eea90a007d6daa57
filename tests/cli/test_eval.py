"""`eval`: the figures of training again, of any part of the data, in any order of its classes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resnet_fused.cli.trained import open_trained
from tests.cli.conftest import Cli, load, make_images
from tests.cli.test_bad_input import assert_refused
from tests.cli.test_initial_weights import save_weights


def evaluate(cli: Cli, tmp_path: Path, *arguments: object) -> dict[str, Any]:
    file = tmp_path / "results.json"
    result = cli("eval", *arguments, "--device", "cpu", "--workers", 0, "--json", file)
    assert result.code == 0, result.err
    results: dict[str, Any] = json.loads(file.read_text())
    assert f"{results['loss']:.4f}" in result.out and f"{results['top1']:.2%}" in result.out
    return results


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_same_as_in_training(precision: str, train: Cli, cli: Cli, tmp_path: Path) -> None:
    """With nothing given but the checkpoint."""
    assert train("--epochs", 1, "--precision", precision, "--image-size", 48).code == 0
    (record,) = load(tmp_path / "out" / "best.pt")["progress"]["history"]
    for path in (tmp_path / "out" / "best.pt", tmp_path / "out"):
        results = evaluate(cli, tmp_path, path)
        assert (results["loss"], results["top1"]) == (record["val_loss"], record["val_accuracy"])
        assert (results["images"], results["top5"], results["precision"]) == (9, None, precision)


def test_digits(cli: Cli, tmp_path: Path) -> None:
    """More than five classes, and options that replace those of the training."""
    run = ("--epochs", 1, "--batch-size", 300, "--image-size", 16, "--device", "cpu", "--out", tmp_path)
    assert cli("train", *run).code == 0
    (record,) = load(tmp_path / "best.pt")["progress"]["history"]
    results = evaluate(cli, tmp_path, tmp_path, "--batch-size", 64)
    assert results["top1"] == record["val_accuracy"]
    assert results["loss"] == pytest.approx(record["val_loss"], rel=1e-4)
    assert results["top1"] < results["top5"] <= 1
    results = evaluate(cli, tmp_path, tmp_path, "--split", "train", "--precision", "bf16")
    assert (results["images"], results["precision"]) == (901, "bf16")


def test_checkpoint_without_normalization(begun: Path, cli: Cli, tmp_path: Path) -> None:
    """Of before it was saved: it follows from the data."""
    before = evaluate(cli, tmp_path, begun)
    state = load(begun)
    assert (state.pop("mean"), state.pop("std")) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.save(state, begun)
    assert evaluate(cli, tmp_path, begun) | {"seconds": 0} == before | {"seconds": 0}
    torch.save(state | {"mean": [0.5] * 3, "std": [2.0] * 3}, begun)
    trained = replace(open_trained({"checkpoint": begun}), model=nn.Identity())
    white = trained.classifier(torch.device("cpu"), "fp32")(torch.full((1, 2, 2, 3), 255, dtype=torch.uint8))
    assert torch.equal(white, torch.full((1, 3, 2, 2), 0.25))


def favour(path: Path, name: str) -> None:
    """Makes a checkpoint's model find that class in every image."""
    state = load(path)
    bias: Tensor = state["model"]["fc.bias"]
    bias.zero_()[state["classes"].index(name)] = 1e6
    torch.save(state, path)


def test_classes_are_matched_by_name(begun: Path, cli: Cli, tmp_path: Path) -> None:
    """Also in a folder that has some of them."""
    favour(begun, "dark")
    data = make_images(tmp_path / "data")
    assert evaluate(cli, tmp_path, begun, "--data", data)["top1"] == 5 / 9
    assert evaluate(cli, tmp_path, begun, "--data", data, "--split", "train")["top1"] == 0.5
    assert evaluate(cli, tmp_path, begun, "--data", data / "train", "--split", ".")["images"] == 18
    shutil.rmtree(data / "val" / "bright")
    results = evaluate(cli, tmp_path, begun, "--data", data)
    assert (results["top1"], results["images"]) == (1, 5)


def test_weights_without_names_are_matched_in_order(cli: Cli, tmp_path: Path) -> None:
    state = save_weights(tmp_path / "mine.pt", classes=2)
    state["fc.bias"].zero_()[1] = 1e6
    torch.save(state, tmp_path / "mine.pt")
    data = make_images(tmp_path / "data")
    given = ("--weights", tmp_path / "mine.pt", "--arch", "resnet18", "--image-size", 16, "--data", data)
    assert evaluate(cli, tmp_path, *given)["top1"] == 5 / 9


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ["give a checkpoint", "--weights and --arch"]),
        (("no.pt",), ["no checkpoint at no.pt"]),
        (("empty",), ["no checkpoint at empty/best.pt"]),
        (("out/last.pt", "--weights", "mine.pt"), ["out/last.pt", "not both"]),
        (("out/last.pt", "--arch", "resnet18"), ["--arch belongs to --weights"]),
        (("out/last.pt", "--image-size", 8), ["--image-size 8", "at least 16"]),
        (("out/last.pt", "--split", "test"), ["test: no such folder", "--split"]),
        (("out/last.pt", "--data", "nowhere"), ["nowhere/val: no such folder"]),
        (("out/last.pt", "--data", "empty", "--split", "."), ["holds no class folders"]),
        (("out/last.pt", "--data", "digits"), ["10 classes (0, 1,", "2 classes (bright, dark)"]),
        (("out/last.pt", "--json", "nowhere/at.json"), ["--json nowhere/at.json cannot be written"]),
        (("--weights", "mine.pt"), ["--weights needs the --arch"]),
        (("--weights", "mine.pt", "--arch", "resnet18"), ["--weights need --data"]),
        (("--weights", "mine.pt", "--arch", "resnet34"), ["mine.pt does not fit a resnet34 (Missing key"]),
        (("--weights", "V3", "--arch", "resnet18"), ["--weights: resnet18 has no weights 'V3'"]),
        (("--weights", "no.pt", "--arch", "resnet18"), ["--weights no.pt: no such file"]),
        (
            ("--weights", "mine.pt", "--arch", "resnet18", "--data", "digits"),
            ["10 classes", "mine.pt has 3 outputs without names"],
        ),
    ],
)
def test_mistakes(
    arguments: tuple[object, ...],
    words: list[str],
    begun: Path,
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    save_weights(tmp_path / "mine.pt", classes=3)
    (tmp_path / "empty").mkdir()
    result = cli("eval", *arguments)
    assert_refused(result, *words)
    assert result.out == ""


def test_class_that_the_model_does_not_know(begun: Path, cli: Cli, tmp_path: Path) -> None:
    data = make_images(tmp_path / "data")
    (data / "val" / "dark").rename(data / "val" / "grim")
    assert_refused(
        cli("eval", begun, "--data", data), "1 classes (grim)", "2 classes (bright, dark)", "rename"
    )


def test_corrupt_image(begun: Path, cli: Cli, tmp_path: Path) -> None:
    bad = make_images(tmp_path / "data") / "val" / "dark" / "3.png"
    bad.write_bytes(b"not an image at all")
    assert_refused(cli("eval", begun, "--data", tmp_path / "data"), str(bad), "replace or remove")


def test_under_torchrun(begun: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert_refused(cli("eval", begun), "without torchrun")

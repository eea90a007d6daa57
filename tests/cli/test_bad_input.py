"""Every mistake at the command line: one line on stderr that names it, exit code 2, nothing lost."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from resnet_fused.cli import precision as precisions
from tests.cli.conftest import Cli, Result, load, make_images


def assert_refused(result: Result, *words: str) -> None:
    assert result.code == 2
    assert result.err.startswith("resnet_fused: error: ")
    assert result.err.count("\n") == 1, result.err
    for word in words:
        assert word in result.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ["COMMAND", "--help"]),
        (("trian",), ["trian", "train", "info"]),
        (("train", "--arch", "resnet17"), ["resnet17", "resnet18", "wide_resnet101_2"]),
        (("train", "--impl", "fast"), ["fast", "compare"]),
        (("train", "--precision", "fp8"), ["fp8", "bf16"]),
        (("train", "--epochs", "0"), ["--epochs", "'0'", "above 0"]),
        (("train", "--epochs", "many"), ["--epochs", "'many'"]),
        (("train", "--lr", "nan"), ["--lr", "'nan'"]),
        (("train", "--lr", "-1"), ["--lr"]),
        (("train", "--momentum", "1"), ["--momentum", "below 1"]),
        (("train", "--colour"), ["--colour"]),
        (("train", "--accumulate", "0"), ["--accumulate", "above 0"]),
        (("train", "--optimizer", "lion"), ["--optimizer", "lion", "adamw"]),
        (("train", "--schedule", "linear"), ["--schedule", "linear", "cosine"]),
        (("train", "--gamma", "2"), ["--gamma", "up to 1"]),
        (("train", "--step-size", "0"), ["--step-size", "above 0"]),
        (("train", "--clip-grad", "-1"), ["--clip-grad", "0 or more"]),
        (("train", "--ema", "1"), ["--ema", "below 1"]),
        (("train", "--mixup", "-1"), ["--mixup", "0 or more"]),
        (("train", "--cutmix", "inf"), ["--cutmix", "0 or more"]),
        (("train", "--augment", "auto"), ["--augment", "auto", "trivial"]),
        (("train", "--label-smoothing", "1"), ["--label-smoothing", "below 1"]),
        (("train", "--cuda-graph", "--accumulate", "2"), ["--cuda-graph", "--accumulate", "leave one"]),
        (("train", "--cuda-graph", "--compile"), ["--cuda-graph", "--compile", "leave one"]),
        (("train", "--cuda-graph", "--optimizer", "rmsprop"), ["--cuda-graph", "--optimizer rmsprop"]),
        (
            ("train", "--cuda-graph", "--precision", "fp16", "--clip-grad", "1"),
            ["--cuda-graph", "fp16", "--clip-grad"],
        ),
        (("train", "--batch-size", "1"), ["--batch-size 1", "at least 2"]),
        (("train", "--batch-size", "902"), ["--batch-size 902", "901 images", "at most 901"]),
        (("train", "--image-size", "15"), ["--image-size 15", "at least 16"]),
        (("train", "--device", "tpu-ish"), ["tpu-ish", "cuda:N"]),
        (("train", "--device", "meta"), ["meta", "not supported"]),
        (("train", "--data", "nowhere"), ["nowhere", "no such folder"]),
        (("bench", "--arch", "resnet51"), ["resnet51", "resnet50"]),
        (("bench", "--batch", "1"), ["--batch 1", "at least 2"]),
        (("bench", "--image-size", "8"), ["--image-size 8", "at least 16"]),
        (("bench", "--seconds", "0"), ["--seconds", "above 0"]),
        (("bench", "--json", "nowhere/at/all.json"), ["nowhere/at/all.json", "cannot be written"]),
        (("bench", "--out", "/dev/null/out"), ["/dev/null/out", "choose another folder"]),
        (("info", "--batch", "8"), ["--batch", "add --plan"]),
        (("info", "--plan", "resnet51"), ["resnet51"]),
        (("info", "--plan", "resnet18", "--precision", "int8"), ["choose one of bf16"]),
    ],
)
def test_arguments(
    arguments: tuple[str, ...], words: list[str], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli(*arguments)
    assert_refused(result, *words)
    assert result.out == "" and not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_missing_gpu(cli: Cli) -> None:
    assert_refused(cli("train", "--device", "cuda"), "--device cuda", "--device cpu")


def _remove(path: str) -> Callable[[Path], None]:
    return lambda root: shutil.rmtree(root / path)


def _empty(path: str) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        shutil.rmtree(root / path)
        (root / path).mkdir()

    return spoil


def _rename(old: str, new: str) -> Callable[[Path], None]:
    return lambda root: (root / old).rename(root / new) and None


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_remove("train"), ["train/ is missing"]),
        (_remove("val"), ["val/ is missing"]),
        (_empty("train"), ["train holds no class folders"]),
        (_remove("train/dark"), ["one class (bright)"]),
        (_empty("train/dark"), ["dark holds no images", ".png"]),
        (_empty("val/dark"), ["val", "dark holds no images"]),
        (_rename("val/dark", "val/grim"), ["missing dark", "only in val grim"]),
        (_remove("val/dark"), ["one class"]),
    ],
)
def test_folder(spoil: Callable[[Path], None], words: list[str], cli: Cli, tmp_path: Path) -> None:
    spoil(make_images(tmp_path / "data"))
    assert_refused(
        cli("train", "--data", tmp_path / "data", "--out", tmp_path / "out"), str(tmp_path), *words
    )


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not an image at all"),
        lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 50),
    ],
    ids=["truncated", "empty", "text", "header only"],
)
def test_corrupt_image(damage: Callable[[Path], None], workers: int, cli: Cli, tmp_path: Path) -> None:
    bad = make_images(tmp_path / "data") / "train" / "dark" / "3.png"
    damage(bad)
    arguments = ("--data", tmp_path / "data", "--image-size", 16, "--batch-size", 4, "--workers", workers)
    assert_refused(cli("train", *arguments, "--out", tmp_path / "out"), str(bad), "replace or remove")


def test_unwritable_out(train: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert_refused(train("--out", tmp_path / "file" / "out"), "--out", "cannot be written", "another")


def test_overwriting(train: Cli, begun: Path) -> None:
    assert train("--max-steps", 1, "--overwrite").code == 0


def test_loss_that_is_not_finite(train: Cli, begun: Path) -> None:
    before = begun.read_bytes()
    result = train("--resume", "--lr", "1e38")
    assert_refused(result, "fused", "epoch 1, step 3", "untouched", "--lr (it is 1e+38)")
    assert begun.read_bytes() == before
    assert all(value.isfinite().all() for value in load(begun)["model"].values())


@pytest.mark.parametrize("damage", ["missing", "text", "truncated", "flipped", "pickle", "foreign", "format"])
def test_checkpoint(damage: str, train: Cli, begun: Path) -> None:
    whole = begun.read_bytes()
    words = [str(begun)]
    if damage == "missing":
        begun.unlink()
        words = [str(begun.parent), "no checkpoint"]
    elif damage == "text":
        begun.write_text("hello")
    elif damage == "truncated":
        begun.write_bytes(whole[: len(whole) // 2])
    elif damage == "flipped":
        middle = len(whole) // 2
        begun.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        words.append("damaged")
    elif damage == "pickle":
        torch.save({"model": torch.nn.Linear(1, 1)}, begun)
    elif damage == "foreign":
        torch.save(load(begun)["model"], begun)
        words += ["lacks", "optimizer"]
    else:
        torch.save(load(begun) | {"format": "resnet_fused training 0"}, begun)
        words.append("resnet_fused training 0")
    left = begun.read_bytes() if begun.exists() else None
    assert_refused(train("--resume"), *words)
    assert (begun.read_bytes() if begun.exists() else None) == left


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--resume", "--arch", "resnet34"), ["resnet18", "resnet34"]),
        (("--resume", "--batch-size", 8), ["step 1 of an epoch of 4", "2 steps", "--batch-size"]),
        (("--resume", "--accumulate", 2), ["step 1", "--accumulate 2 does not divide", "--accumulate 1"]),
        (("--resume", "--optimizer", "adamw"), ["--optimizer", "leave it out"]),
        (("--resume", "--impl", "compare"), ["--impl fused", "--impl compare"]),
        (("--resume", "--max-steps", 1), ["--max-steps 1", "already", "larger"]),
        (("--max-steps", 1), ["already holds a run", "--resume", "--overwrite"]),
    ],
)
def test_options_that_a_checkpoint_forbids(
    arguments: tuple[object, ...], words: list[str], train: Cli, begun: Path
) -> None:
    before = begun.read_bytes()
    assert_refused(train(*arguments), *words)
    assert begun.read_bytes() == before


def test_checkpoint_of_other_classes(train: Cli, begun: Path, tmp_path: Path) -> None:
    data = make_images(tmp_path / "data")
    for part in ("train", "val"):
        shutil.copytree(data / part / "dark", data / part / "middling")
    assert_refused(
        train("--resume", "--data", data), "2 classes (bright, dark)", "3 classes (bright, dark, middling)"
    )


def test_checkpoint_that_does_not_fit(train: Cli, begun: Path, tmp_path: Path) -> None:
    state = load(begun)
    del state["model"]["fc.bias"]
    torch.save(state, begun)
    assert_refused(train("--resume"), str(begun), "resnet18", "fc.bias")


@pytest.mark.parametrize(("command", "precision"), [("train", "bf16"), ("train", "fp16"), ("bench", "fp16")])
def test_precision_without_a_kernel(
    command: str, precision: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise RuntimeError("not implemented for this dtype")

    monkeypatch.setattr(precisions.F, "conv2d", missing)
    result = cli(command, "--device", "cpu", "--precision", precision, "--out", tmp_path / "out")
    assert_refused(result, f"--precision {precision}", "cpu", "--precision fp32")


@pytest.mark.parametrize(
    ("module", "name", "data"),
    [
        ("tqdm", "tqdm", "folder"),
        ("matplotlib", "matplotlib", "folder"),
        ("numpy", "numpy", "folder"),
        ("PIL", "Pillow", "folder"),
        ("sklearn", "scikit-learn", "digits"),
    ],
)
def test_missing_package(
    module: str, name: str, data: str, cli: Cli, train: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for loaded in [key for key in sys.modules if key.split(".")[0] == module]:
        monkeypatch.setitem(sys.modules, loaded, None)
    monkeypatch.setitem(sys.modules, module, None)
    result = train() if data == "folder" else cli("train", "--out", tmp_path / "out")
    assert_refused(result, f"{name} is not installed", "pip install 'resnet_fused[train]'")


def test_under_torchrun(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """What every process runs into is said once; bench does not run there."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert cli("train", "--batch-size", 1) == Result(2, "", "")
    monkeypatch.setenv("RANK", "0")
    assert_refused(cli("bench"), "without torchrun")


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "first", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": ""},
        {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "-1"},
    ],
    ids=str,
)
def test_ranks_that_torchrun_does_not_set(
    variables: dict[str, str], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun's variables with values that are no ranks: one line."""
    monkeypatch.chdir(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for command in ("train", "bench"):
        assert_refused(cli(command), f"RANK={variables['RANK']}, WORLD_SIZE=", "or none of them")

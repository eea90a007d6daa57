"""`train --weights`, `--finetune` and `--freeze-backbone`: what a run starts from, and what it leaves as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fused
from resnet_fused import reference, weights
from resnet_fused.cli.compare import memory
from resnet_fused.cli.data import open_source
from resnet_fused.cli.distributed import World
from resnet_fused.cli.learner import Learner
from resnet_fused.cli.settings import make_settings
from tests.cli.conftest import SMALL, Cli, assert_same_run, digests, load, torchrun
from tests.cli.test_bad_input import assert_refused
from tests.published_weights import publish

State = dict[str, Tensor]
IMPLEMENTATIONS = {"fused": ("",), "reference": ("",), "compare": ("fused", "reference")}
implementations = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


def save_weights(path: Path, classes: int, arch: str = "resnet18") -> State:
    """Random ones, with running statistics that no fresh model has."""
    torch.manual_seed(7)
    state: State = getattr(reference, arch)(num_classes=classes).state_dict()
    for name, value in state.items():
        if "running" in name:
            value.uniform_(0.5, 2)
    torch.save(state, path)
    return state


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, State]:
    """What each model was before its first step."""
    states: dict[str, State] = {}
    step = Learner.step

    def first_step(self: Learner, images: Tensor, labels: Tensor) -> None:
        now = {name: value.clone() for name, value in self.model.state_dict().items()}
        states.setdefault(self.name, now)
        step(self, images, labels)

    monkeypatch.setattr(Learner, "step", first_step)
    return states


def differing(one: State, two: State) -> set[str]:
    assert one.keys() == two.keys()
    return {name for name, value in one.items() if not torch.equal(value, two[name])}


@implementations
def test_starts_from_a_file(impl: str, train: Cli, started: dict[str, State], tmp_path: Path) -> None:
    state = save_weights(tmp_path / "mine.pt", classes=2)
    result = train("--impl", impl, "--weights", tmp_path / "mine.pt", "--max-steps", 1)
    assert result.code == 0, result.err
    said, headline, *_ = result.out.splitlines()
    assert said == f"weights: {tmp_path / 'mine.pt'}, with the head for 2 classes; all of it is trained"
    assert ", from mine.pt, " in headline and "frozen" not in headline
    assert len(started) == len(IMPLEMENTATIONS[impl])
    for found in started.values():
        assert not differing(found, state)
    for part in IMPLEMENTATIONS[impl]:
        assert len(differing(load(tmp_path / "out" / part / "last.pt")["model"], state)) > 60
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["settings"]
    assert settings["weights"] == str(tmp_path / "mine.pt")
    assert (settings["finetune"], settings["freeze_backbone"]) == (False, False)


def test_starts_from_a_checkpoint(begun: Path, train: Cli, started: dict[str, State]) -> None:
    """Its model, and nothing else of it."""
    assert train("--weights", begun, "--max-steps", 1, out="next").code == 0
    assert not differing(started["fused"], load(begun)["model"])
    progress = load(begun.parents[1] / "next" / "last.pt")["progress"]
    assert len(progress["losses"]) == 1


@pytest.mark.parametrize("given", ["DEFAULT", "IMAGENET1K_V1", "ResNet18_Weights.DEFAULT"])
def test_named_weights(
    given: str, train: Cli, started: dict[str, State], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a new head, which is that of a run from random weights."""
    state = save_weights(tmp_path / "file", classes=1000)
    name = publish({"IMAGENET1K_V1": state}, tmp_path, monkeypatch)["IMAGENET1K_V1"]
    result = train("--weights", given, "--finetune", "--seed", 5, "--max-steps", 1)
    assert result.code == 0, result.err
    words = f"weights: {given} ({name}), with a new head for 2 classes instead of 1000; all of it is trained"
    assert words in result.out.splitlines() and f", from {given}, " in result.out
    torch.manual_seed(5)
    fresh = resnet_fused.resnet18(num_classes=2).state_dict()
    expected = state | {key: fresh[key] for key in ("fc.weight", "fc.bias")}
    assert not differing(started["fused"], expected)
    assert (tmp_path / "torch" / "hub" / "checkpoints" / name).is_file()
    assert load(tmp_path / "out" / "last.pt")["settings"]["weights"] == given


@implementations
def test_frozen_backbone(impl: str, train: Cli, tmp_path: Path) -> None:
    """Not a bit of it changes, running statistics included, while the head learns."""
    state = save_weights(tmp_path / "mine.pt", classes=5)
    result = train("--impl", impl, "--weights", tmp_path / "mine.pt", "--finetune", "--freeze-backbone")
    assert result.code == 0, result.err
    assert "a new head for 2 classes instead of 5; only the head is trained" in result.out
    assert ", backbone frozen, " in result.out
    for part in IMPLEMENTATIONS[impl]:
        found = load(tmp_path / "out" / part / "last.pt")
        assert differing(found["model"], state) == {"fc.weight", "fc.bias"}
        assert len(found["optimizer"]["state"]) == 2
        first, last = (record["train_loss"] for record in found["progress"]["history"])
        assert last < first


def test_finetune_keeps_a_head_that_fits(train: Cli, started: dict[str, State], tmp_path: Path) -> None:
    state = save_weights(tmp_path / "mine.pt", classes=2)
    assert train("--weights", tmp_path / "mine.pt", "--finetune", "--max-steps", 1).code == 0
    assert not differing(started["fused"], state)


@pytest.mark.parametrize("options", [(), ("--freeze-backbone",)], ids=["all", "frozen"])
@pytest.mark.parametrize("impl", ["fused", "compare"])
def test_resumed_equals_uninterrupted(
    options: tuple[str, ...], impl: str, train: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From any folder, with or without the options repeated, and without the file, which is not read again."""
    save_weights(tmp_path / "mine.pt", classes=1000)
    monkeypatch.chdir(tmp_path)
    options = ("--impl", impl, "--weights", "mine.pt", "--finetune", *options)
    assert train(*options, out="whole").code == 0
    assert train(*options, "--max-steps", 3).code == 0
    (tmp_path / "mine.pt").unlink()
    result = train(*options, "--resume", "--max-steps", 6)
    assert result.code == 0, result.err
    assert "weights: " not in result.out and ", from mine.pt, " in result.out
    monkeypatch.chdir("/")
    assert train("--resume").code == 0
    for part in IMPLEMENTATIONS[impl]:
        assert_same_run(tmp_path / "whole" / part / "last.pt", tmp_path / "out" / part / "last.pt")


def test_two_processes(images: Path, tmp_path: Path) -> None:
    """Every rank starts from the weights, and freezes the backbone."""
    state = save_weights(tmp_path / "mine.pt", classes=3)
    small = ("--data", images, *SMALL, "--epochs", 1)
    how = ("--weights", tmp_path / "mine.pt", "--finetune", "--freeze-backbone")
    printed = torchrun("-m", "resnet_fused", "train", *small, *how, "--out", tmp_path / "out")
    assert printed.out.count("weights: /") == 1
    assert differing(load(tmp_path / "out" / "last.pt")["model"], state) == {"fc.weight", "fc.bias"}
    first, second = digests(printed.out)
    assert first == second


def test_resuming_with_another_start(begun: Path, train: Cli) -> None:
    before = begun.read_bytes()
    for arguments in (
        ("--weights", begun),
        ("--weights", "DEFAULT"),
        ("--finetune",),
        ("--freeze-backbone",),
    ):
        result = train("--resume", *arguments)
        assert_refused(result, f"{arguments[0]} says how a run starts", "leave it out with --resume")
    assert begun.read_bytes() == before


def mistakes(folder: Path) -> dict[str, tuple[tuple[Any, ...], list[str]]]:
    """{name: (options, words of the message)}; the files are in the folder."""
    return {
        "a name": (
            ("--weights", "IMAGENET1K_V2"),
            ["resnet18 has no weights 'IMAGENET1K_V2'", "IMAGENET1K_V1"],
        ),
        "another model's": (
            ("--weights", "ResNet50_Weights.DEFAULT"),
            ["no weights 'ResNet50_Weights.DEFAULT'"],
        ),
        "no file": (("--weights", folder / "no.pt"), [f"--weights {folder / 'no.pt'}: no such file"]),
        "a folder": (("--weights", folder), ["cannot be loaded", "Is a directory"]),
        "no checkpoint": (("--weights", folder / "text.pt"), ["text.pt cannot be loaded: it is damaged, or"]),
        "a damaged one": (
            ("--weights", folder / "short.pt"),
            ["short.pt cannot be loaded: it is damaged, or"],
        ),
        "no state_dict": (("--weights", folder / "list.pt"), ["holds no state_dict"]),
        "code": (("--weights", folder / "code.pt"), ["holds more than tensors"]),
        "another hash": (
            ("--weights", "IMAGENET1K_V1", "--arch", "resnet34"),
            ["invalid hash", "delete", "0.pth"],
        ),
        "safetensors": (("--weights", folder / "x.safetensors"), ["safetensors.torch.load_file"]),
        "another architecture": (
            ("--weights", folder / "two.pt", "--arch", "resnet34"),
            ["two.pt are not those of a resnet34", "Missing key", "give the --arch"],
        ),
        "another architecture, other classes": (
            ("--weights", folder / "three.pt", "--arch", "resnet50"),
            ["three.pt are not those of a resnet50", "give the --arch"],
        ),
        "other classes": (
            ("--weights", folder / "three.pt"),
            ["tell 3 classes apart", "--data has 2", "add --finetune"],
        ),
        "finetune alone": (("--finetune",), ["--finetune needs --weights"]),
        "freeze alone": (("--freeze-backbone",), ["--freeze-backbone needs --weights"]),
        "offline": (
            ("--weights", "DEFAULT", "--finetune"),
            [
                f"cannot download file://{folder}/served/",
                f"save it as {folder / 'torch/hub/checkpoints/resnet18-'}",
            ],
        ),
    }


@pytest.mark.parametrize("mistake", mistakes(Path()))
def test_mistakes(
    mistake: str, train: Cli, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, and the run that would have been overwritten is still there."""
    save_weights(tmp_path / "two.pt", classes=2)
    save_weights(tmp_path / "three.pt", classes=3)
    (tmp_path / "text.pt").write_text("no weights")
    (tmp_path / "short.pt").write_bytes((tmp_path / "two.pt").read_bytes()[:100_000])
    (tmp_path / "x.safetensors").touch()
    torch.save([1], tmp_path / "list.pt")
    torch.save({"model": reference.resnet18}, tmp_path / "code.pt")
    (tmp_path / "served").mkdir()
    torch.save({}, tmp_path / "served" / "resnet34-00000000.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(weights, "URL", f"file://{tmp_path}/served/")
    published = weights.Published("ResNet34_Weights", {"IMAGENET1K_V1": "resnet34-00000000.pth"})
    monkeypatch.setitem(weights.PUBLISHED, "resnet34", published)
    options, words = mistakes(tmp_path)[mistake]
    result = train(*options, "--overwrite")
    assert_refused(result, *words)
    assert len(result.err) < 500 and begun.is_file()


def test_memory_of_a_frozen_backbone_is_measured_frozen() -> None:
    """In evaluation mode, as it trains: batch norms in training mode use other memory."""
    settings = make_settings({"weights": "any.pt", "freeze_backbone": True, "batch_size": 4}, {})
    source = open_source("digits", 32, 0)
    learner = Learner("fused", settings, source, 10, torch.device("cpu"), World())
    modes = {}
    for name, module in learner.model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_pre_hook(
                lambda module, args, name=name: modes.update({name: module.training})
            )
    measure = torch.zeros(4, 32, 32, 3, dtype=torch.uint8), torch.arange(4)
    saved, _ = memory(learner, *learner.prepare(measure))
    assert modes.pop("fc") is True and len(modes) == 20 and not any(modes.values())
    assert saved < 4 * 1024 * 4  # the input of the head and its results, nothing of the backbone's

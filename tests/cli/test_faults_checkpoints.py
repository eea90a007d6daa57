"""Checkpoints with other contents than `train` writes, truncated ones, and ones with flipped bits."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_fused.cli import checkpoint
from resnet_fused.cli.errors import UserError
from resnet_fused.cli.optimizers import load_optimizer, make_optimizer
from resnet_fused.cli.settings import Settings
from tests.cli.conftest import KILLS, Cli, load
from tests.cli.test_bad_input import assert_refused

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def good(_one_step: Path) -> dict[str, Any]:
    """The contents of a checkpoint in mid-epoch; not to be changed."""
    return load(_one_step / "last.pt")


def put(*keys: Any, value: Any) -> Change:
    """Replaces a value, by the keys of nested dictionaries and lists."""

    def change(state: dict[str, Any]) -> None:
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return change


def drop(*keys: Any) -> Change:
    """Removes a value."""

    def change(state: dict[str, Any]) -> None:
        for key in keys[:-1]:
            state = state[key]
        del state[keys[-1]]

    return change


#: What each command refuses, and a word of the message.
FOR_ALL: list[tuple[Change, str]] = [
    (put("format", value=torch.zeros(3)), "format"),
    (put("arch", value="resnet17"), "arch"),
    (put("arch", value=["resnet18"]), "arch"),
    (put("arch", value="resnet34"), "arch"),
    (put("classes", value="bright"), "classes"),
    (put("classes", value=[0, 1]), "classes"),
    (put("classes", value=["dark", "dark"]), "classes"),
    (put("classes", value=[]), "classes"),
    (put("mean", value=[0.5, "a", 0.5]), "mean"),
    (put("std", value=[0.5, 0.5]), "std"),
    (put("std", value=[0.5, 0.0, 0.5]), "std"),
    (put("steps_per_epoch", value=0), "steps_per_epoch"),
    (put("steps_per_epoch", value="4"), "steps_per_epoch"),
    (put("n_averaged", value=torch.ones(2)), "n_averaged"),
    (put("model", value=[]), "model"),
    (put("model", value={}), "model"),
    (put("model", "fc.bias", value="none"), "fc.bias"),
    (put("model", "fc.bias", value=torch.ones(2, dtype=torch.complex64)), "fc.bias"),
    (put("model", "fc.bias", value=torch.ones(2).to_sparse()), "fc.bias"),
    (put("model", "fc.bias", value=torch.ones(2, device="meta")), "fc.bias"),
    (put("model", "fc.bias", value=torch.tensor([0, torch.nan])), "fc.bias is not finite"),
    (put("trained", value={"fc.bias": 1}), "trained"),
    (put("settings", value=None), "settings"),
    (put("settings", value={1: 2}), "settings"),
    (drop("settings", "impl"), "impl"),
    (put("settings", "arch", value="resnet34"), "arch"),
    (put("settings", "impl", value="fast"), "impl"),
    (put("settings", "batch_size", value="64"), "batch_size"),
    (put("settings", "batch_size", value=0), "batch_size"),
    (put("settings", "lr", value=-1.0), "lr"),
    (put("settings", "lr", value=torch.ones(3)), "lr"),
    (put("settings", "epochs", value=2.5), "epochs"),
    (put("settings", "image_size", value=8), "image_size"),
    (put("settings", "precision", value="fp8"), "precision"),
    (put("settings", "channels_last", value=1), "channels_last"),
    (put("settings", "data", value=None), "data"),
    (put("optimizer", value=1), "optimizer"),
    (drop("optimizer", "param_groups"), "param_groups"),
    (put("optimizer", "param_groups", value={}), "param_groups"),
    (put("optimizer", "param_groups", 0, value=None), "param_groups"),
    (drop("optimizer", "param_groups", 0), "param_groups"),
    (put("optimizer", "param_groups", 0, "params", value=[0, 0]), "param_groups"),
    (drop("optimizer", "param_groups", 0, "params"), "param_groups"),
    (drop("optimizer", "state", 0), "lacks {0}"),
    (put("optimizer", "state", 99, value={}), "has {99}"),
    (put("optimizer", "state", 0, value=None), "state: 0"),
    (put("optimizer", "state", 0, "momentum_buffer", value=1), "momentum_buffer"),
    (put("scaler", value={"scale": 1.0}), "scaler lacks"),
    (put("scaler", value=None), "scaler"),
    (put("progress", value=[]), "progress"),
    (drop("progress", "epoch"), "epoch"),
    (put("progress", "extra", value=1), "extra"),
    (put("progress", "epoch", value=-1), "epoch"),
    (put("progress", "epoch", value=3), "epoch"),
    (put("progress", "epoch", value=True), "epoch"),
    (put("progress", "epoch", value=1), "history"),
    (put("progress", "step", value=5), "step"),
    (put("progress", "step", value=1.0), "step"),
    (put("progress", "images", value=0), "images"),
    (put("progress", "correct", value=10**6), "correct"),
    (put("progress", "loss", value=float("nan")), "loss"),
    (put("progress", "best", value="high"), "best"),
    (put("progress", "best", value=0.5), "best"),
    (put("progress", "history", value={}), "history"),
    (put("progress", "history", value=[{}]), "history"),
    (put("progress", "losses", value=[1.0]), "losses"),
    (put("progress", "losses", value=torch.ones(2, dtype=torch.float64)), "losses"),
    (put("progress", "losses", value=torch.ones(1)), "losses"),
    (put("progress", "step_seconds", value=torch.ones(1, 1, dtype=torch.float64)), "step_seconds"),
    (put("random", value=torch.zeros(3)), "random"),
    (drop("random", "cuda"), "random"),
    (put("random", "cpu", value=torch.zeros(7, dtype=torch.uint8)), "random: cpu"),
    (put("random", "cpu", value=torch.zeros(5056)), "random: cpu"),
    (put("random", "cuda", value=[1]), "random: cuda"),
]

#: What only a run that is resumed can tell.
FOR_TRAINING: list[tuple[Change, str]] = [
    (put("random", "cpu", value=torch.full((5056,), 255, dtype=torch.uint8)), "mt19937"),
    (put("optimizer", "state", 0, "momentum_buffer", value=torch.ones(3)), "momentum_buffer"),
    (put("optimizer", value={"state": {}, "param_groups": [{"params": []}] * 2}), "does not fit"),
    (put("model", "fc.bias", value=torch.ones(5)), "fc.bias"),
    (drop("model", "fc.bias"), "fc.bias"),
]


def copied(part: Any) -> Any:
    """Other dictionaries and lists, with the same tensors."""
    if isinstance(part, dict):
        return {key: copied(value) for key, value in part.items()}
    return [*map(copied, part)] if isinstance(part, list) else part


def damaged(good: dict[str, Any], change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the changed contents read from every checkpoint."""
    state = copied(good)
    change(state)
    monkeypatch.setattr(checkpoint.torch, "load", lambda *_, **__: state)


@pytest.mark.parametrize(("change", "word"), FOR_ALL + FOR_TRAINING)
def test_other_contents(
    change: Change,
    word: str,
    good: dict[str, Any],
    train: Cli,
    _one_step: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Resuming from a checkpoint with one value that `train` would not write."""
    damaged(good, change, monkeypatch)
    assert_refused(train("--resume", _one_step), str(_one_step / "last.pt"), word)
    assert {path.name for path in tmp_path.glob("out/*")} <= {".lock"}


@pytest.mark.parametrize("command", ["eval", "predict", "export"])
@pytest.mark.parametrize(("change", "word"), [*FOR_ALL[1::12], *FOR_TRAINING[-2:]])
def test_other_contents_in_other_commands(
    change: Change,
    word: str,
    command: str,
    good: dict[str, Any],
    cli: Cli,
    images: Path,
    _one_step: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """eval, predict and export of a checkpoint with one value that `train` would not write."""
    damaged(good, change, monkeypatch)
    more = {"predict": [images], "export": ["--format", "state_dict", "--out", tmp_path / "x"]}
    path = _one_step / "last.pt"
    assert_refused(cli(command, path, *more.get(command, [])), str(path), word)


@pytest.mark.parametrize(
    ("optimizer", "lost"),
    [("adamw", "step"), ("adamw", "exp_avg_sq"), ("rmsprop", "square_avg"), ("rmsprop", "momentum_buffer")],
)
def test_optimizer_without_a_buffer(optimizer: str, lost: str) -> None:
    """The state of an optimizer that lacks what its next step needs."""
    model = torch.nn.Linear(2, 2)
    one = make_optimizer(model, Settings(optimizer=optimizer), captured=False)
    model(torch.ones(1, 2)).sum().backward()
    one.step()
    state = one.state_dict()
    load_optimizer(one, state)
    del state["state"][1][lost]
    with pytest.raises((ValueError, KeyError), match=lost):  # PyTorch itself looks for "step"
        load_optimizer(one, state)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b and type(a) is type(b))


@pytest.fixture
def small(good: dict[str, Any], tmp_path: Path) -> Path:
    """A checkpoint of a few kilobytes, so that half of it is structure."""
    state = copied(good)
    state["model"] = {"fc.bias": torch.ones(2)}
    state["optimizer"]["state"] = {}
    checkpoint.save({tmp_path / "last.pt": state})
    return tmp_path / "last.pt"


def read_or_refuse(path: Path, expected: dict[str, Any]) -> None:
    """The file is refused in words, or it holds what was written."""
    try:
        state = checkpoint.load(path)
    except UserError as error:
        assert str(path) in str(error)
    else:
        assert same(state, expected)


@pytest.mark.parametrize("flips", range(2 * KILLS))
def test_flipped_bits(flips: int, small: Path) -> None:
    """Checkpoints with one to three flipped bits: refused, or with the same contents."""
    expected, whole = checkpoint.load(small), small.read_bytes()
    draw = random.Random(f"{os.environ['RESNET_FUSED_TEST_SEED']} {flips}")
    for _ in range(100):
        content = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        small.write_bytes(content)
        read_or_refuse(small, expected)


def test_flipped_compression(small: Path) -> None:
    """A checkpoint in which a flipped bit says that a part is compressed."""
    content = bytearray(small.read_bytes())
    content[content.index(b"PK\1\2") + 10] ^= (
        8  # the method in the central directory, from stored to deflated
    )
    small.write_bytes(content)
    with pytest.raises(UserError, match=r"last\.pt is damaged"):
        checkpoint.load(small)


def test_truncated_anywhere(small: Path) -> None:
    """Checkpoints that end early: refused."""
    whole = small.read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // (20 * KILLS))):
        small.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"last\.pt"):
            checkpoint.load(small)

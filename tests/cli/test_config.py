"""`--config`: what a file may hold, and what comes before what."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from resnet_fused.cli.config import read_config
from resnet_fused.cli.main import make_parser
from tests.cli.conftest import Cli, load
from tests.cli.test_bad_input import assert_refused

PARSER = make_parser().parse_args(["train"]).parser


def test_values(tmp_path: Path) -> None:
    """As the parser returns them on the command line."""
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "# a recipe\n"
        "arch: resnet34\nepochs: 3\nlr: 1e-3\nweight-decay: 0\nlabel_smoothing: 0.1\noptimizer: adamw\n"
        "channels_last: false\nfinetune: true\nout: runs/mine\ndata: 2024\n"
    )
    command = (
        "--arch resnet34 --epochs 3 --lr 1e-3 --weight-decay 0 --label-smoothing 0.1 --optimizer adamw "
        "--no-channels-last --finetune --out runs/mine --data 2024"
    )
    expected = vars(make_parser().parse_args(["train", *command.split()]))
    del expected["command"], expected["parser"]
    assert read_config(file, PARSER) == expected
    file.write_text("")
    assert read_config(file, PARSER) == {}


def test_precedence(train: Cli, tmp_path: Path) -> None:
    """The command line, then the file, then the checkpoint, then the defaults."""
    file = tmp_path / "recipe.yaml"
    file.write_text("lr: 0.5\nseed: 3\nmomentum: 0.25\nmax-steps: 1\n")
    assert train("--config", file, "--seed", 4).code == 0
    settings = load(tmp_path / "out" / "last.pt")["settings"]
    assert (settings["lr"], settings["seed"], settings["momentum"], settings["warmup"]) == (0.5, 4, 0.25, 0.1)
    file.write_text("lr: 0.25\n")
    assert train("--resume", "--config", file, "--max-steps", 2).code == 0
    state = load(tmp_path / "out" / "last.pt")
    assert state["progress"]["step"] == 2
    assert (state["settings"]["lr"], state["settings"]["seed"]) == (0.25, 4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("colour: blue", ["colour", "no such option", "--help"]),
        ("epo: 3", ["epo", "no such option"]),
        ("no-channels-last: true", ["no-channels-last", "no such option"]),
        ("help: true", ["help", "no such option"]),
        ("config: other.yaml", ["config", "no such option"]),
        ("1: 2", ["1", "no such option"]),
        ("epochs: 0", ["epochs", "'0'", "above 0"]),
        ("epochs: 2.5", ["epochs", "'2.5'", "whole number"]),
        ("epochs: [1, 2]", ["epochs", "[1, 2]", "a number or a text"]),
        ("epochs: true", ["epochs", "True", "a number or a text"]),
        ("epochs:", ["epochs", "None", "a number or a text"]),
        ("lr: fast", ["lr", "'fast'"]),
        ("optimizer: lion", ["optimizer", "'lion'", "adamw"]),
        ("channels-last: 1", ["channels-last", "1", "true or false"]),
        ("weight-decay: 0\nweight_decay: 1", ["weight_decay", "twice"]),
        ("- epochs", ["mapping"]),
        ("epochs: 'three", ["is not YAML"]),
    ],
)
def test_mistakes(text: str, words: list[str], train: Cli, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text + "\n")
    assert_refused(train("--config", file), str(file), *words)
    assert not (tmp_path / "out").exists()


def test_unreadable(train: Cli, tmp_path: Path) -> None:
    assert_refused(train("--config", tmp_path / "none.yaml"), "none.yaml", "No such file")
    file = tmp_path / "latin.yaml"
    file.write_bytes(b"data: \xe9")
    assert_refused(train("--config", file), "latin.yaml", "is not YAML")


def test_without_pyyaml(train: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    result = train("--config", tmp_path / "recipe.yaml")
    assert_refused(result, "PyYAML is not installed", "pip install 'resnet_fused[train]'")

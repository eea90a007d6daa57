"""Checkpoints are whole or not there, and plain."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import IO

import pytest
import torch

import resnet_fused
from resnet_fused.cli import checkpoint
from resnet_fused.cli.errors import UserError
from resnet_fused.cli.files import write_atomically
from tests.cli.conftest import Cli, load


class Crash(BaseException):
    """The process would be gone."""


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_crash_leaves_the_old_checkpoint(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save({path: {"model": torch.ones(3)}})
    old = path.read_bytes()

    def crash(*_: object) -> None:
        raise Crash

    monkeypatch.setattr(os, moment, crash)
    with pytest.raises(Crash):
        checkpoint.save({path: {"model": torch.zeros(3)}})
    assert path.read_bytes() == old
    assert torch.equal(load(path)["model"], torch.ones(3))


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")]
)
def test_failed_write_leaves_the_old_file_and_nothing_else(error: Exception, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    path.write_text("old")

    def write(file: IO[bytes]) -> None:
        file.write(b"half of the new")
        raise error

    with pytest.raises(UserError, match=r"cannot write .*last.pt .*(No space|unexpected pos)"):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["last.pt"]


def test_bytes_are_on_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (calls.append(name), real(*a)))
    write_atomically(tmp_path / "file", lambda file: file.write(b"new"))
    assert calls == ["fsync", "replace"]
    assert (tmp_path / "file").read_bytes() == b"new"
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


def test_model_loads_into_the_library(train: Cli, tmp_path: Path) -> None:
    assert train().code == 0
    assert sorted(os.listdir(tmp_path / "out")) == [
        ".lock",
        "best.pt",
        "config.json",
        "curves.png",
        "last.pt",
        "metrics.jsonl",
    ]
    for name in ("last.pt", "best.pt"):
        state = load(tmp_path / "out" / name)
        assert state["arch"] == "resnet18"
        assert state["classes"] == ["bright", "dark"]
        for module in (resnet_fused, resnet_fused.reference):
            module.resnet18(num_classes=2).load_state_dict(state["model"], strict=True)


def test_random_state_comes_back() -> None:
    state = checkpoint.random_state()
    first = torch.rand(1)
    checkpoint.set_random_state(state)
    assert torch.equal(torch.rand(1), first)

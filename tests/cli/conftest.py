"""A small folder of images, and a way to run the command line in this process."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_fused.cli.main import main

#: How often a run is killed; `make faults` does so more often, and tries more than fits into `make test`.
KILLS = int(os.environ.get("RESNET_FUSED_TEST_KILLS", "2"))
MANY = KILLS > 9
only_many = pytest.mark.skipif(not MANY, reason="`make faults` runs it")
Cli = Callable[..., "Result"]
SMALL = ["--image-size", "16", "--batch-size", "4", "--epochs", "2", "--workers", "0", "--device", "cpu"]


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str


def make_images(root: Path, train: int = 9) -> Path:
    """Bright and dark images: `train` of each, 9 held out in all; PNG and JPEG, of odd sizes and modes."""
    from PIL import Image

    draw = random.Random(0)
    modes = ("RGB", "L", "RGB", "P")
    for part, counts in (("train", (train, train)), ("val", (4, 5))):
        for (name, low), count in zip((("bright", 130), ("dark", 0)), counts, strict=True):
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                size = draw.randint(18, 40), draw.randint(18, 40)
                pixels = bytes(low + draw.randrange(120) for _ in range(3 * size[0] * size[1]))
                image = Image.frombytes("RGB", size, pixels)
                image = image.convert(modes[index % 4])
                image.save(folder / f"{index}.{'png' if index % 2 else 'JPEG'}")
    return root


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`make_images`, once; not to be changed."""
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def _one_step(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("begun") / "out"
    assert main(["train", "--data", str(images), *SMALL, "--out", str(out), "--max-steps", "1"]) == 0
    return out


@pytest.fixture
def begun(_one_step: Path, tmp_path: Path) -> Path:
    """The `last.pt` of a run of `train` into `tmp_path / out` that stopped after its first step."""
    shutil.copytree(_one_step, tmp_path / "out")
    return tmp_path / "out" / "last.pt"


@pytest.fixture(autouse=True)
def _spare_the_disk(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """A hundred checkpoints of 90 MB need not reach the disk, nor stay on it."""
    if request.module.__name__ != "tests.cli.test_checkpoint":
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    yield
    shutil.rmtree(tmp_path)


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    """Runs `python -m resnet_fused ARGUMENTS` in this process."""

    def call(*arguments: object) -> Result:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return Result(code, *capfd.readouterr())

    return call


@pytest.fixture
def train(cli: Cli, images: Path, tmp_path: Path) -> Cli:
    """Trains on the small folder, 4 steps an epoch, into `tmp_path / out`."""

    def call(*arguments: object, out: str = "out") -> Result:
        return cli("train", "--data", images, *SMALL, "--out", tmp_path / out, *arguments)

    return call


def torchrun(*arguments: object) -> Result:
    """Runs torchrun's module with two processes of one thread each; they succeed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return Result(done.returncode, done.stdout, done.stderr)


def digests(printed: str) -> list[str]:
    """Of the weights that each rank ends with, as `train` prints them."""
    return re.findall(r"rank \d ([0-9a-f]{16})", printed)


def load(path: Path) -> dict[str, Any]:
    """A checkpoint, read as a user would."""
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def assert_same_run(one: Path, two: Path) -> None:
    """Two checkpoints stand at the same place with the same bits; times aside."""
    a, b = load(one), load(two)
    assert a.keys() == b.keys() and a.get("n_averaged") == b.get("n_averaged")
    for part in {"model", "trained"} & a.keys():
        assert a[part].keys() == b[part].keys()
        for name, value in a[part].items():
            assert torch.equal(value, b[part][name]), (part, name)
    for index, buffers in a["optimizer"]["state"].items():
        for name, value in buffers.items():
            assert torch.equal(value, b["optimizer"]["state"][index][name]), (index, name)
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    first, second = a["progress"], b["progress"]
    for key in ("epoch", "step", "loss", "correct", "images", "best"):
        assert first[key] == second[key], key
    assert torch.equal(first["losses"], second["losses"])
    timeless = [
        [{k: v for k, v in record.items() if "second" not in k} for record in run["history"]]
        for run in (first, second)
    ]
    assert timeless[0] == timeless[1]

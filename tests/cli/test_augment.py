"""`--augment`: what each does, and that it depends on seed, epoch and index alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from resnet_fused.cli import augment
from resnet_fused.cli.augment import Policy
from resnet_fused.cli.data import Batches, Source, open_source
from resnet_fused.cli.distributed import World
from resnet_fused.cli.errors import UserError
from tests import torchvision_ops  # noqa: F401  before torchvision
from tests.cli.conftest import Cli


def pixels(source: Source, epoch: int = 0) -> Tensor:
    """The first training images."""
    return torch.stack([source.train[epoch, index][0] for index in range(8)])  # type: ignore[misc]


@pytest.mark.parametrize("data", ["digits", "folder"])
@pytest.mark.parametrize("name", ["trivial", "rand"])
def test_policies(name: str, data: str, images: Path) -> None:
    """Follow the standard augmentation; training images alone; no other draw is disturbed."""
    where = data if data == "digits" else str(images)
    source, standard = open_source(where, 32, 0, name), open_source(where, 32, 0)
    before = torch.get_rng_state()
    first = pixels(source)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.dtype == torch.uint8 and first.shape == (8, 32, 32, 3)
    torch.manual_seed(5)
    assert torch.equal(pixels(source), first)
    assert torch.equal(pixels(open_source(where, 32, 0, name)), first)
    assert not torch.equal(pixels(source, epoch=1), first)
    assert not torch.equal(pixels(open_source(where, 32, 1, name)), first)
    assert not torch.equal(pixels(standard), first)
    for index in range(4):
        assert torch.equal(source.held_out[0, index][0], standard.held_out[0, index][0])  # type: ignore[misc]


def test_policies_are_torchvisions() -> None:
    """Of many images some come back as they were, inverted or without colour: no crop or flip does that."""
    image = torch.randint(256, (24, 24, 3), dtype=torch.uint8)
    trivial = [Policy("trivial")(image, str(key)) for key in range(200)]
    assert any(torch.equal(one, image) for one in trivial)
    assert any(one.float().std() < 0.9 * image.float().std() for one in trivial)
    assert type(Policy("rand")._transform).__name__ == "RandAugment"


@pytest.mark.parametrize("data", ["digits", "folder"])
def test_none(data: str, images: Path) -> None:
    """Every epoch has the same images."""
    source = open_source(data if data == "digits" else str(images), 32, 0, "none")
    assert torch.equal(pixels(source), pixels(source, epoch=1))


def test_workers_make_no_difference(images: Path) -> None:
    source = open_source(str(images), 16, 0, "trivial")
    runs = [list(Batches(source, 4, 0, workers, World(), pin=False).training(1, 0)) for workers in (0, 2)]
    for one, two in zip(*runs, strict=True):
        assert torch.equal(one[0], two[0])


def test_without_torchvision(train: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    result = train("--augment", "rand")
    assert result.code == 2
    assert "torchvision is not installed: run pip install 'resnet_fused[augment]'" in result.err


def test_torchvision_of_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(module: str, extra: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(augment, "require", fail)
    with pytest.raises(UserError, match=r"--augment rand needs a torchvision that fits torch .*nms"):
        Policy("rand")

"""`--mixup` and `--cutmix`: images and labels are mixed in equal parts, and the same way in a resumed run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fused.cli.data import open_source
from resnet_fused.cli.distributed import World
from resnet_fused.cli.learner import Learner
from resnet_fused.cli.mixing import dominant, mix
from resnet_fused.cli.settings import Settings, make_settings

LABELS = torch.arange(6)


def images(size: tuple[int, int] = (16, 24)) -> Tensor:
    """Of one value each, its label."""
    return LABELS.float().view(6, 1, 1, 1).expand(6, 3, *size).contiguous(memory_format=torch.channels_last)


def mixed(place: str, **options: Any) -> tuple[Tensor, Tensor]:
    return mix(images(), LABELS, 7, Settings(**options), place)


@pytest.mark.parametrize("options", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_labels_are_mixed_as_pixels_are(options: dict[str, Any]) -> None:
    """The mean of an image is that of its labels, weighted by their probabilities."""
    parts = set()
    for step in range(20):
        pixels, labels = mixed(f"0/{step}/0", **options)
        assert pixels.shape == (6, 3, 16, 24) and pixels.is_contiguous(memory_format=torch.channels_last)
        assert labels.dtype == torch.float32 and labels.shape == (6, 7)
        torch.testing.assert_close(labels.sum(1), torch.ones(6))
        torch.testing.assert_close(labels @ torch.arange(7.0), pixels.mean((1, 2, 3)))
        assert torch.equal(labels.nonzero()[:, 1].unique(), LABELS)
        parts.add(round(float(labels[0, 0]), 6))
        assert torch.equal(dominant(labels), LABELS if labels[0, 0] > 0.5 else LABELS.roll(1))
    assert len(parts) > 10


def test_which() -> None:
    """MixUp changes every pixel alike, CutMix replaces a rectangle; with both, each has its turn."""

    def kinds(**options: Any) -> list[int]:
        """Values in an image: 2 where a rectangle was replaced."""
        return [len(mixed(f"0/{step}/0", **options)[0][1].unique()) for step in range(20)]

    assert set(kinds(mixup=1.0)) == {1}
    assert kinds(cutmix=1.0).count(2) > 15
    both = kinds(mixup=1.0, cutmix=1.0)
    assert both.count(1) > 3 and both.count(2) > 3


def test_place_and_seed_alone_decide() -> None:
    one = mixed("1/2/0", mixup=1.0)
    assert all(map(torch.equal, one, mixed("1/2/0", mixup=1.0)))
    for place, seed in (("1/3/0", 0), ("2/2/0", 0), ("1/2/1", 0), ("1/2/0", 1)):
        assert not torch.equal(one[1], mixed(place, mixup=1.0, seed=seed)[1])


def test_nothing_is_mixed_by_default() -> None:
    given = images()
    pixels, labels = mix(given, LABELS, 7, Settings(), "0/0/0")
    assert pixels is given and labels is LABELS and dominant(labels) is LABELS


def test_contiguous_layout_stays() -> None:
    pixels, _ = mix(images().contiguous(), LABELS, 7, Settings(mixup=1.0), "0/0/0")
    assert pixels.is_contiguous()


def test_training_alone_is_mixed() -> None:
    settings = make_settings({"image_size": 16, "batch_size": 4, "mixup": 1.0}, {})
    learner = Learner("fused", settings, open_source("digits", 16, 0), 3, torch.device("cpu"), World())
    pixels = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 16, 16, 3)
    batch = (pixels, torch.arange(4))
    images, labels = learner.prepare(batch)
    for step in range(2):
        one, two = learner.prepare_training(batch)
        expected = mix(images, labels, 10, settings, f"0/{step}/0")
        assert torch.equal(one, expected[0]) and torch.equal(two, expected[1])
        learner.step(one, two)
    learner.count_steps()
    assert len(learner.progress.losses) == 2 and learner.progress.images == 8

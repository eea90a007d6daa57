"""The data: who sees which image when."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from resnet_fused.cli.data import Batches, HeldOutOrder, TrainingOrder, open_source
from resnet_fused.cli.distributed import World


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_divide_an_epoch(size: int) -> None:
    orders = [TrainingOrder(50, 4, seed=7, world=World(rank, size)) for rank in range(size)]
    drawn = [key for order in orders for batch in order for key in batch]
    steps = 50 // (4 * size)
    assert all(len(order) == steps == len(list(order)) for order in orders)
    assert len(drawn) == len(set(drawn)) == steps * 4 * size


def test_order_depends_on_seed_and_epoch_alone() -> None:
    order = TrainingOrder(50, 4, seed=7, world=World())
    first = list(order)
    assert list(order) == first
    order.start = 5
    assert list(order) == first[5:]
    order.start, order.epoch = 0, 1
    second = list(order)
    assert [[i for _, i in batch] for batch in second] != [[i for _, i in batch] for batch in first]
    assert {epoch for batch in second for epoch, _ in batch} == {1}
    assert list(TrainingOrder(50, 4, seed=8, world=World())) != first


@pytest.mark.parametrize("length", [1, 8, 9, 15])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_held_out_images_are_seen_once(length: int, size: int) -> None:
    batches = [list(HeldOutOrder(length, 4, World(rank, size))) for rank in range(size)]
    assert len({len(own) for own in batches}) == 1
    assert Counter(i for own in batches for batch in own for _, i in batch) == Counter(range(length))


def test_digits_are_split_the_same_whatever_the_seed() -> None:
    one, two = open_source("digits", 32, 0), open_source("digits", 32, 1)
    assert (len(one.train), len(one.held_out)) == (901, 896)
    labels = Counter(one.held_out[0, i][1] for i in range(896))
    assert set(labels) == set(range(10)) and min(labels.values()) >= 87 and max(labels.values()) <= 91
    for index in range(0, 896, 50):
        a, b = one.held_out[0, index], two.held_out[3, index]
        assert torch.equal(a[0], b[0]) and a[0].shape == (32, 32, 3) and a[0].dtype == torch.uint8


def test_no_held_out_digit_is_trained_on() -> None:
    source = open_source("digits", 16, 0)
    trained = {image.numpy().tobytes() for image in source.train.images}  # type: ignore[attr-defined]
    held_out = {image.numpy().tobytes() for image in source.held_out.images}  # type: ignore[attr-defined]
    assert len(trained) == 901 and len(held_out) == 896
    assert not trained & held_out


def test_augmentation_depends_on_seed_epoch_and_index_alone(images: Path) -> None:
    for name in ("digits", str(images)):
        views, again, other = (
            {epoch: open_source(name, 32, seed).train[epoch, 3][0] for epoch in epochs}
            for seed, epochs in ((0, range(6)), (0, reversed(range(6))), (1, range(6)))
        )
        assert all(torch.equal(views[epoch], again[epoch]) for epoch in views)
        assert len({view.numpy().tobytes() for view in views.values()}) > 1
        assert any(not torch.equal(views[epoch], other[epoch]) for epoch in views)


def test_held_out_image_is_resized_and_cropped_in_the_middle(tmp_path: Path) -> None:
    from PIL import Image

    # 64 wide, 32 high: red outside the central square of 28, which is what 7/8 of the shorter side leaves.
    image = Image.new("RGB", (64, 32), (255, 0, 0))
    image.paste((0, 0, 255), (18, 2, 46, 30))
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            image.save(tmp_path / part / name / "image.png")
    sample = open_source(str(tmp_path), 16, 0).held_out[0, 1]
    assert sample[1] == 1
    red, _, blue = sample[0].unbind(-1)
    assert (blue[1:-1, 1:-1] == 255).all()
    # The filter looks a little over the edge: less than half a pixel.
    for edge in (red[0], red[-1], red[:, 0], red[:, -1]):
        assert (edge > 0).all() and (edge < 128).all()


def test_folders_within_and_hidden_ones(images: Path, tmp_path: Path) -> None:
    for part in ("train", "val"):
        for name in ("bright", "dark"):
            (tmp_path / part / name / "deeper").mkdir(parents=True)
            for source in (images / part / name).iterdir():
                (tmp_path / part / name / "deeper" / source.name).symlink_to(source)
        (tmp_path / part / ".cache").mkdir()
    opened = open_source(str(tmp_path), 16, 0)
    assert (opened.classes, len(opened.train), len(opened.held_out)) == (["bright", "dark"], 18, 9)


def test_batches_are_bytes_with_labels(images: Path) -> None:
    batches = Batches(open_source(str(images), 16, 0), 4, 0, 0, World(), pin=False)
    assert batches.steps == 4
    for pixels, labels in batches.training(0, 0):
        assert pixels.shape == (4, 16, 16, 3) and pixels.dtype == torch.uint8
        bright = pixels.float().mean((1, 2, 3)) > 125
        assert torch.equal(bright, labels == 0)
    assert [None if batch is None else len(batch[1]) for batch in batches.held_out()] == [4, 4, 1]

"""Images: scikit-learn's digits or a folder, and the order and augmentation of every epoch.

Order is a function of (seed, epoch), augmentation of (seed, epoch, index): no state is carried between images,
so neither the number of workers nor an interruption can change what the model sees. A resumed epoch starts its order
at the next step, which needs no state of a DataLoader and lets the number of workers change.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from resnet_fused.cli.augment import make_policy
from resnet_fused.cli.distributed import World
from resnet_fused.cli.errors import UserError, require
from resnet_fused.cli.image_files import class_files, class_names
from resnet_fused.cli.normalization import Channels, normalization
from resnet_fused.cli.signals import detach_worker

CROP = 7 / 8  # of the shorter side, as torchvision evaluates: 256 pixels, of which 224 are seen

Key = tuple[int, int]  # epoch, index
Batch = tuple[Tensor, Tensor]  # uint8 [N, S, S, 3], int64 [N]


@dataclass(frozen=True)
class BadImage:
    """An image that could not be read, as a value: an exception would leave a worker with its traceback."""

    path: str
    reason: str


Sample = tuple[Tensor, int] | BadImage  # uint8 [S, S, 3], label


class Digits(Dataset[Sample]):
    """The digits, upsampled; each training image turned, scaled and shifted a little.

    By up to 12 degrees, 12 % and an eighth of the side: a digit stays what it is.

    Args:
        images: uint8 [N, S, S].
        labels: int64 [N].
        seed: of the augmentation.
        augment: as `--augment`.
    """

    def __init__(self, images: Tensor, labels: Tensor, seed: int, augment: str) -> None:
        self.images = images
        self.labels = labels.tolist()
        self.seed = seed
        self.augment = augment != "none"
        self.policy = make_policy(augment)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Key) -> Sample:
        epoch, index = key
        image = self.images[index]
        if self.augment:
            draw = random.Random(_key(self.seed, epoch, index))
            angle, scale = math.radians(draw.uniform(-12, 12)), math.exp(draw.uniform(-0.12, 0.12))
            right, down = scale * math.cos(angle), scale * math.sin(angle)
            # Coordinates run from -1 to 1, so an eighth of the side is 1/4.
            shift = draw.uniform(-0.25, 0.25), draw.uniform(-0.25, 0.25)
            affine = torch.tensor([[[right, -down, shift[0]], [down, right, shift[1]]]])
            grid = F.affine_grid(affine, [1, 1, *image.shape], align_corners=False)
            moved = F.grid_sample(image[None, None].float(), grid, align_corners=False)
            image = moved[0, 0].round().to(torch.uint8)
        pixels = image[..., None].expand(-1, -1, 3)
        if self.policy is not None:
            pixels = self.policy(pixels, _key(self.seed, epoch, index))
        return pixels, self.labels[index]


class Folder(Dataset[Sample]):
    """The images of a folder with one folder a class.

    Training images: random resized crop (8 to 100 % of the area, sides 3:4 to 4:3) and flip. Held-out images:
    shorter side to 8/7 of the size, centre crop; or the largest centred square, for ``crop`` 1.

    Args:
        files: paths and labels.
        size: of an image's sides.
        seed: of the augmentation.
        augment: as `--augment`.
        crop: part of the shorter side that held-out images show.
    """

    def __init__(
        self, files: Sequence[tuple[str, int]], size: int, seed: int, augment: str, crop: float = CROP
    ) -> None:
        self.files = files
        self.size = size
        self.seed = seed
        self.augment = augment != "none"
        self.policy = make_policy(augment)
        self.crop = crop

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: Key) -> Sample:
        epoch, index = key
        path, label = self.files[index]
        pillow = require("PIL.Image")
        try:
            with pillow.open(path) as file:
                image = file.convert("RGB")
        # Pillow's decoders raise all of these on a damaged file.
        except (
            OSError,
            SyntaxError,
            ValueError,
            EOFError,
            IndexError,
            pillow.DecompressionBombError,
        ) as error:
            return BadImage(path, str(error) or type(error).__name__)
        box, flip = _centre_box(image.size, self.crop), False
        if self.augment:
            draw = random.Random(_key(self.seed, epoch, index))
            box, flip = _random_box(image.size, draw), draw.random() < 0.5
        image = image.resize((self.size, self.size), pillow.Resampling.BILINEAR, box=box, reducing_gap=2.0)
        if flip:
            image = image.transpose(pillow.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        pixels = pixels.view(self.size, self.size, 3)
        if self.policy is not None:
            pixels = self.policy(pixels, _key(self.seed, epoch, index))
        return pixels, label


def _key(seed: int, epoch: int, index: int) -> str:
    """All that the augmentation of an image depends on."""
    return f"{seed}/{epoch}/{index}"


def _centre_box(size: tuple[int, int], crop: float = CROP) -> tuple[float, float, float, float]:
    """The middle of the largest centred square: resizing it is resize and centre crop in one pass."""
    side = min(size) * crop
    left, top = (size[0] - side) / 2, (size[1] - side) / 2
    return left, top, left + side, top + side


def _random_box(size: tuple[int, int], draw: random.Random) -> tuple[float, float, float, float]:
    width, height = size
    for _ in range(10):
        area = width * height * draw.uniform(0.08, 1)
        ratio = (3 / 4) * (16 / 9) ** draw.random()  # log-uniform in 3:4 to 4:3
        w, h = (area * ratio) ** 0.5, (area / ratio) ** 0.5
        if w <= width and h <= height:
            left, top = draw.uniform(0, width - w), draw.uniform(0, height - h)
            return left, top, left + w, top + h
    return _centre_box(size)


@dataclass(frozen=True)
class Source:
    """A training set, a held-out set, and what to do to their bytes before the model sees them."""

    classes: list[str]
    train: Digits | Folder
    held_out: Digits | Folder
    mean: Channels
    std: Channels


def open_source(data: str, size: int, seed: int, augment: str = "standard") -> Source:
    """`digits`, or the folder of that name.

    Args:
        data: as `--data`.
        size: of an image's sides.
        seed: of the augmentation.
        augment: of the training images: none; standard, which fits the data; or standard and a policy of torchvision's.

    Raises:
        UserError: the folder is missing, empty, or its `train` and `val` do not fit together.
    """
    return _digits(size, seed, augment) if data == "digits" else _folder(Path(data), size, seed, augment)


def _digits(size: int, seed: int, augment: str) -> Source:
    digits = require("sklearn.datasets").load_digits()
    levels = torch.from_numpy(digits.images).float()  # [1797, 8, 8], 0 to 16
    labels = torch.from_numpy(digits.target).long()
    large = F.interpolate(levels[:, None], size=(size, size), mode="bilinear", align_corners=False)[:, 0]
    images = (large * (255 / 16)).round().clamp(0, 255).to(torch.uint8)
    # Stratified and fixed: every second image of each digit is held out, whatever the seed. Half of them, because
    # two accuracies are compared to half a percentage point, and that should be several images.
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        held_out[(labels == digit).nonzero()[1::2, 0]] = True
    return Source(
        [str(digit) for digit in range(10)],
        Digits(images[~held_out], labels[~held_out], seed, augment),
        Digits(images[held_out], labels[held_out], seed, "none"),
        *normalization("digits"),
    )


def _folder(root: Path, size: int, seed: int, augment: str) -> Source:
    require("PIL.Image")
    if not root.is_dir():
        raise UserError(
            f"--data {root}: no such folder; give 'digits' or a folder that holds train/ and val/"
        )
    train, val = root / "train", root / "val"
    for part in (train, val):
        if not part.is_dir():
            raise UserError(f"--data {root}: {part.name}/ is missing; it must hold one folder per class")
    classes, held_out = class_names(train), class_names(val)
    if classes != held_out:
        missing = ", ".join(sorted(set(classes) - set(held_out))) or "none"
        extra = ", ".join(sorted(set(held_out) - set(classes))) or "none"
        raise UserError(
            f"{val} must have the classes of {train}: missing {missing}; only in val {extra}. "
            "Rename or move those folders"
        )
    return Source(
        classes,
        Folder(class_files(train, classes), size, seed, augment),
        Folder(class_files(val, classes), size, seed, "none"),
        *normalization(str(root)),
    )


class TrainingOrder(Sampler[list[Key]]):
    """The batches of one rank in one epoch, from a given step on; an incomplete last batch is dropped.

    Set `epoch` and `start` before iterating.
    """

    def __init__(self, length: int, batch_size: int, seed: int, world: World) -> None:
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.world = world
        self.epoch = 0
        self.start = 0
        self.steps = length // (batch_size * world.size)

    def __iter__(self) -> Iterator[list[Key]]:
        seed = random.Random(f"{self.seed}/{self.epoch}").getrandbits(62)
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(seed)).tolist()
        for step in range(self.start, self.steps):
            first = (step * self.world.size + self.world.rank) * self.batch_size
            yield [(self.epoch, index) for index in order[first : first + self.batch_size]]

    def __len__(self) -> int:
        return self.steps - self.start


class HeldOutOrder(Sampler[list[Key]]):
    """Every image once over all ranks, in equally many batches a rank; the last may be empty."""

    def __init__(self, length: int, batch_size: int, world: World) -> None:
        self.length = length
        self.batch = batch_size * world.size
        self.world = world

    def __iter__(self) -> Iterator[list[Key]]:
        for first in range(0, self.length, self.batch):
            batch = range(first, min(first + self.batch, self.length))
            yield [(0, index) for index in batch[self.world.rank :: self.world.size]]

    def __len__(self) -> int:
        return -(-self.length // self.batch)


def collate(samples: list[Sample]) -> Batch | BadImage | None:
    """Stacks samples; the first bad image instead, None for no samples."""
    images, labels = [], []
    for sample in samples:
        if isinstance(sample, BadImage):
            return sample
        images.append(sample[0])
        labels.append(sample[1])
    return (torch.stack(images), torch.tensor(labels)) if images else None


class Batches:
    """The batches of a source for one rank.

    Attributes:
        steps: training steps in an epoch.
    """

    def __init__(
        self, source: Source, batch_size: int, seed: int, workers: int, world: World, pin: bool
    ) -> None:
        self.source = source
        self.order = TrainingOrder(len(source.train), batch_size, seed, world)
        self.steps = self.order.steps
        if not self.steps:
            largest = len(source.train) // world.size
            raise UserError(
                f"--batch-size {batch_size} with {world.size} process(es) is larger than the training set of "
                f"{len(source.train)} images: use at most {largest}"
            )
        shared: dict[str, Any] = {
            "num_workers": workers,
            "collate_fn": collate,
            "pin_memory": pin,
            # Workers that outlive an epoch would be ended by the garbage collector, which takes 5 s for each.
            "persistent_workers": False,
            "worker_init_fn": detach_worker,
            # Its own: a loader draws a seed when it starts, and the global generator belongs to the model.
            "generator": torch.Generator().manual_seed(seed),
        }
        held_out = HeldOutOrder(len(source.held_out), batch_size, world)
        self._train = DataLoader[Any](source.train, batch_sampler=self.order, **shared)
        self._held_out = DataLoader[Any](source.held_out, batch_sampler=held_out, **shared)

    def training(self, epoch: int, start: int) -> Iterator[Batch]:
        """The batches of `epoch` from step `start` on.

        Raises:
            UserError: an image cannot be read.
        """
        self.order.epoch, self.order.start = epoch, start
        for batch in self._train:
            yield good(batch)

    def held_out(self) -> Iterator[Batch | None]:
        """The held-out batches; None where this rank has no image in a batch that another has.

        Raises:
            UserError: an image cannot be read.
        """
        for batch in self._held_out:
            yield None if batch is None else good(batch)


def good(batch: Batch | BadImage) -> Batch:
    """The batch.

    Raises:
        UserError: an image could not be read.
    """
    if isinstance(batch, BadImage):
        raise UserError(
            f"cannot read the image {batch.path} ({batch.reason}): replace or remove it", everywhere=False
        )
    return batch

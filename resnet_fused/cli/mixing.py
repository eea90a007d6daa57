"""`--mixup` and `--cutmix`: each image mixed with another of its batch.

How, is a function of (seed, epoch, step, rank), as in `data`: a run that is resumed mixes on as if it had not stopped.
Batches are in random order, so the other image is the one before it.
"""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.cli.settings import Settings


def mix(
    images: Tensor, labels: Tensor, classes: int, settings: Settings, place: str
) -> tuple[Tensor, Tensor]:
    """MixUp or CutMix of a batch; with both, one of them at random.

    Args:
        images: [N, C, H, W].
        labels: int64 [N].
        classes: that labels tell apart.
        settings: `mixup` and `cutmix` are the parameters of their Beta distributions; 0 for one that is not used.
        place: of the batch in the run; batches of equal places are mixed alike.

    Returns:
        Images in the layout of those given, and the probability of each class as float32 [N, classes]. Without
        either, what was given.
    """
    used = [name for name in ("mixup", "cutmix") if getattr(settings, name)]
    if not used:
        return images, labels
    draw = random.Random(f"{settings.seed}/{place}/mix")
    name = draw.choice(used)
    alpha = getattr(settings, name)
    part = draw.betavariate(alpha, alpha)  # of the image itself
    if name == "mixup":
        mixed = images * part + images.roll(1, 0) * (1 - part)
    else:
        height, width = images.shape[2:]
        top, bottom = _interval(height, (1 - part) ** 0.5, draw)
        left, right = _interval(width, (1 - part) ** 0.5, draw)
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = images.roll(1, 0)[:, :, top:bottom, left:right]
        part = 1 - (bottom - top) * (right - left) / (height * width)
    layout = torch.contiguous_format if images.is_contiguous() else torch.channels_last
    one = F.one_hot(labels, classes).float()
    return mixed.contiguous(memory_format=layout), one * part + one.roll(1, 0) * (1 - part)


def dominant(labels: Tensor) -> Tensor:
    """The labels that predictions are compared with: of mixed images those of the larger part."""
    return labels if labels.ndim == 1 else labels.argmax(1)


def _interval(length: int, part: float, draw: random.Random) -> tuple[int, int]:
    """About `part` of an image's height or width; around a random pixel, so less at the borders."""
    centre, half = draw.randrange(length), round(part * length) // 2
    return max(0, centre - half), min(length, centre + half)

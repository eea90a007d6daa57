"""From the pixels of images to what a model takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Channels = tuple[float, float, float]  # red, green, blue


def normalization(data: str) -> tuple[Channels, Channels]:
    """Mean and standard deviation of the channels: of the digits, or for a folder ImageNet's."""
    if data == "digits":
        return (0.3, 0.3, 0.3), (0.35, 0.35, 0.35)
    return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Normalize:
    """Moves images to a device, subtracts the mean and divides by the standard deviation of each channel.

    Args:
        mean, std: of a channel, for pixels between 0 and 1.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], device: torch.device, layout: torch.memory_format
    ) -> None:
        self._mean, self._std = (torch.tensor(x, device=device).view(1, 3, 1, 1) * 255 for x in (mean, std))
        self._layout = layout

    def __call__(self, pixels: Tensor) -> Tensor:
        """Of uint8 [N, S, S, 3] float32 [N, 3, S, S], in the layout."""
        pixels = pixels.to(self._mean.device, non_blocking=True)
        images = (pixels.permute(0, 3, 1, 2).float() - self._mean) / self._std
        return images.contiguous(memory_format=self._layout)

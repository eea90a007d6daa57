"""Taps of a kernel that see only padding, which a convolution on a CPU leaves out.

At the end of a ResNet for small images, activations of 1x1 or 2x2 pixels meet kernels of 3x3: five or eight taps of
nine see only padding, and their gradient is zero. The vendor reads and writes them all the same. In 16 bits oneDNN even
reads memory that nobody has written for the weight gradient of images that are narrower than the stride.
"""

from __future__ import annotations

from torch import Tensor

from resnet_fused.ops.dispatch import runs_triton
from resnet_fused.types import ConvGeometry, pair


def _taps_of_dimension(
    size: int, outputs: int, kernel: int, stride: int, padding: int, dilation: int
) -> range:
    """The taps of one dimension that see a pixel, if a convolution with them alone has as many outputs; else all."""

    def sees_a_pixel(tap: int) -> bool:
        place = tap * dilation - padding  # of the first output; output k's is k * stride further
        k = max(0, -(place // stride))  # the first whose place is not negative
        return k < outputs and place + k * stride < size

    inside = [tap for tap in range(kernel) if sees_a_pixel(tap)]
    if not inside or inside[0] * dilation > padding:
        return range(kernel)
    taps = range(inside[0], inside[-1] + 1)
    extent = size + 2 * (padding - taps[0] * dilation) - dilation * (len(taps) - 1) - 1
    return taps if extent // stride + 1 == outputs else range(kernel)


def taps_inside(
    x: Tensor, weight: Tensor, geometry: ConvGeometry
) -> tuple[tuple[slice, slice], ConvGeometry] | None:
    """Rows and columns of taps that see a pixel of ``x``, and the geometry for them; None where all do, or on a GPU."""
    if x.device.type != "cpu" or runs_triton(x):
        return None
    if x.shape[2] >= weight.shape[2] and x.shape[3] >= weight.shape[3]:
        return None
    per_dimension = zip(
        x.shape[2:], geometry.out_size(x, weight), weight.shape[2:], *geometry[:3], strict=True
    )
    taps = [_taps_of_dimension(*numbers) for numbers in per_dimension]
    rows, cols = (slice(t.start, t.stop) for t in taps)
    if [*map(len, taps)] == [*weight.shape[2:]]:
        return None
    padding = [p - t.start * d for p, t, d in zip(geometry.padding, taps, geometry.dilation, strict=True)]
    return (rows, cols), geometry._replace(padding=pair(padding))

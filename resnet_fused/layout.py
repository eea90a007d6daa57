"""How an activation lies in memory, and the one-bit masks that are stored in the same order.

An activation is a tensor of shape (N, C, H, W), and dense when it is contiguous or channels_last-contiguous.
Seen as a matrix it has N*H*W rows of C in channels_last and N*C rows of H*W otherwise; masks keep that order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: The dtype of statistics, sums, per-channel vectors and arithmetic, by that of activations.
STATISTICS_DTYPES = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, sums, per-channel vectors and arithmetic for activations of ``dtype``.

    Raises:
        TypeError: ``dtype`` is not float32, float64, bfloat16 or float16.
    """
    if dtype not in STATISTICS_DTYPES:
        raise TypeError(f"expected float32, float64, bfloat16 or float16 activations, got {dtype}")
    return STATISTICS_DTYPES[dtype]


def is_channels_last(x: Tensor) -> bool:
    """Whether a dense activation counts as channels_last.

    If both layouts fit, 1x1 images count as channels_last and single-channel images as contiguous.
    """
    pixels = x.shape[2] * x.shape[3]
    return x.is_contiguous(memory_format=torch.channels_last) and not (x.is_contiguous() and pixels > 1)


def memory_format(x: Tensor) -> torch.memory_format:
    """torch.channels_last or torch.contiguous_format, for a dense activation."""
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def dense(x: Tensor) -> Tensor:
    """``x`` itself where it is dense, else a copy in the dense layout nearest to its strides.

    Raises:
        ValueError: ``x`` does not have four dimensions.
    """
    if x.dim() != 4:
        raise ValueError(f"expected 4D input (got {x.dim()}D input)")
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    channels_are_innermost = x.stride(1) == 1 and x.shape[1] > 1
    return x.contiguous(
        memory_format=torch.channels_last if channels_are_innermost else torch.contiguous_format
    )


def subsample(x: Tensor, input_stride: Sequence[int]) -> Tensor:
    """Every input_stride-th pixel of ``x`` down and across, channels_last; ``x`` itself where that is all of them."""
    if tuple(input_stride) == (1, 1):
        return x
    return x[:, :, :: input_stride[0], :: input_stride[1]].contiguous(memory_format=torch.channels_last)


def like_layout(x: Tensor, y: Tensor) -> Tensor:
    """``x`` in the layout of the dense activation ``y``: itself where it has that layout, else a copy."""
    return x.contiguous(memory_format=memory_format(y))


def widened(x: Tensor) -> Tensor:
    """``x`` in the dtype that arithmetic on it is done in."""
    return x.to(statistics_dtype(x.dtype))


def stored(values: Tensor, y: Tensor) -> Tensor:
    """``values`` (the shape of ``y``) rounded to the dtype of the dense ``y``, with exactly its strides."""
    out = values.to(y.dtype)
    # Elementwise ops may choose other strides for dimensions of size 1, and a kernel would not.
    return out if out.stride() == y.stride() else torch.empty_like(y).copy_(out)


def fresh_like(
    x: Tensor, n: int | None = None, c: int | None = None, h: int | None = None, w: int | None = None
) -> Tensor:
    """An uninitialised activation with dtype and layout of dense(x), and its sizes where none are given."""
    x = dense(x)
    sizes = [own if given is None else given for own, given in zip(x.shape, (n, c, h, w), strict=True)]
    return torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def new_activation(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Uninitialized (N, channels, height, width), channels_last, with N, dtype and device of ``like``."""
    size = (like.shape[0], channels, height, width)
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def check_given(out: Tensor, y: Tensor) -> None:
    """Refuses an output of the caller's that is not like the dense ``y``: nothing is copied to another layout.

    Raises:
        ValueError: it has another shape, dtype or layout.
    """
    if out.shape != y.shape or out.dtype != y.dtype:
        raise ValueError(
            f"out must be {y.dtype} of shape {tuple(y.shape)}, got {out.dtype} of shape {tuple(out.shape)}"
        )
    if not out.is_contiguous(memory_format=memory_format(y)):
        raise ValueError("out must be dense, in the activation's layout")


def per_channel(vector: Tensor, y: Tensor) -> Tensor:
    """A vector of C elements as (1, C, 1, 1), to broadcast against the activation ``y``.

    Raises:
        ValueError: ``vector`` does not hold one element per channel of ``y``.
    """
    if vector.shape != (y.shape[1],):
        raise ValueError(
            f"expected one element per channel ({y.shape[1]} channels), got shape {tuple(vector.shape)}"
        )
    return vector.view(1, -1, 1, 1)


def mask_shape(y: Tensor) -> tuple[int, int]:
    """(rows, ceil(cols / 8)) of the mask of a dense activation."""
    n, c, h, w = y.shape
    rows, cols = (n * h * w, c) if is_channels_last(y) else (n * c, h * w)
    return rows, (cols + 7) // 8


def pack_mask(mask: Tensor, y: Tensor) -> Tensor:
    """One bit per element, in the order in which the dense activation ``y`` lies in memory.

    Args:
        mask: bool, the shape of ``y``, any layout.

    Returns:
        uint8 (rows, ceil(cols / 8)); bit j of byte i stands for column 8*i + j, unused bits are zero.
    """
    n, c, h, w = y.shape
    by_pixels = is_channels_last(y)
    rows, cols = (n * h * w, c) if by_pixels else (n * c, h * w)
    matrix = (mask.permute(0, 2, 3, 1) if by_pixels else mask).reshape(rows, cols)
    padded = torch.nn.functional.pad(matrix.to(torch.uint8), (0, -cols % 8))
    columns = padded.view(rows, (cols + 7) // 8, 8)
    packed = columns[..., 0].clone(memory_format=torch.contiguous_format)
    for bit in range(1, 8):
        packed |= columns[..., bit] << bit
    return packed


def unpack_mask(mask: Tensor, y: Tensor) -> Tensor:
    """The inverse of pack_mask: bool, with the shape and layout of the dense activation ``y``."""
    n, c, h, w = y.shape
    bits = torch.arange(8, dtype=torch.uint8, device=mask.device)
    columns = ((mask.unsqueeze(-1) >> bits) & 1).to(torch.bool).flatten(1)
    if is_channels_last(y):
        return columns[:, :c].contiguous().view(n, h, w, c).permute(0, 3, 1, 2)
    return columns[:, : h * w].contiguous().view(n, c, h, w)

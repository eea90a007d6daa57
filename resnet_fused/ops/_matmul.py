"""Products of pixels and channels by the vendor's library, and how a batch is gone through in pieces.

A dense channels_last activation is a matrix of rows = N*H*W pixels. Its pieces are small enough to stay in the cache
between one kernel and the next, so that what is written for the next kernel alone costs no memory traffic.

On the CPU torch.mm is oneDNN for bfloat16 but MKL for float32, which reaches half of oneDNN's rate on processors that
are not Intel's; a 1x1 convolution is the same product and oneDNN for both.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from resnet_fused.reference.layout import statistics_dtype

#: Bytes of the widest activation in a piece: measured on a CPU; on a GPU only a bound on the memory of a piece.
PIECE_BYTES = {"cpu": 3 << 20, "cuda": 256 << 20}


def rows_of(x: Tensor) -> Tensor:
    """A dense channels_last activation (N, C, H, W) as a matrix (N*H*W, C), without a copy."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])


def activation(rows: Tensor) -> Tensor:
    """A matrix (P, C) as a channels_last activation (1, C, 1, P), without a copy."""
    return rows[None, None].permute(0, 3, 1, 2)


def pieces(rows: int, widest: int, like: Tensor) -> Iterator[slice]:
    """Slices that cover ``rows`` rows, of which the widest activation has ``widest`` channels."""
    bytes_per_row = widest * like.element_size()
    count = max(1, -(-rows * bytes_per_row // PIECE_BYTES.get(like.device.type, 1 << 62)))
    for i in range(count):
        yield slice(rows * i // count, rows * (i + 1) // count)


def _by_convolution(a: Tensor) -> bool:
    return a.dtype == torch.float32 and a.device.type == "cpu" and torch.backends.mkldnn.is_available()


def times(a: Tensor, weight: Tensor) -> Tensor:
    """a weight^T: (P, K) and (N, K) to (P, N)."""
    if _by_convolution(a):
        return rows_of(_convolution(activation(a), weight))
    return a @ weight.t()


def times_into(out: Tensor, a: Tensor, weight: Tensor) -> None:
    """out = a weight^T, for ``out`` (P, N) with dense rows."""
    if _by_convolution(a):
        out.copy_(rows_of(_convolution(activation(a), weight)))
    else:
        torch.mm(a, weight.t(), out=out)


def accumulate(out: Tensor, a: Tensor, weight: Tensor, vector: Tensor | None = None) -> None:
    """out += a weight^T + vector, for ``out`` (P, N) with dense rows."""
    if _by_convolution(a):
        conv = weight[:, :, None, None]
        _convolve_onto(activation(out), activation(a), conv, vector, *_PLAIN, 1, "add", 1.0, None, [], None)
    else:
        if vector is not None:
            out += vector
        out.addmm_(a, weight.t())


def inner(a: Tensor, b: Tensor) -> Tensor:
    """a^T b: (P, N) and (P, K) to (N, K), in the dtype of ``a``."""
    if not _by_convolution(a):
        return a.t() @ b
    n, k = a.shape[1], b.shape[1]
    weight = a.new_empty(n, k, 1, 1)
    found = torch.ops.aten.convolution_backward.default(
        activation(a), activation(b), weight, None, *_GEOMETRY, 1, [False, True, False]
    )
    return found[1].view(n, k)


def sum_of_inner(a: Tensor, b: Tensor) -> Tensor:
    """a^T b of two activations (N, C, H, W) and (N, K, H, W): (C, K) in the statistics dtype."""
    left, right = rows_of(a), rows_of(b)
    total = a.new_zeros(a.shape[1], b.shape[1], dtype=statistics_dtype(a.dtype))
    for piece in pieces(len(left), max(a.shape[1], b.shape[1]), a):
        total += inner(left[piece], right[piece])
    return total


_PLAIN: tuple[list[int], ...] = ([0, 0], [1, 1], [1, 1])  # padding, stride, dilation
_GEOMETRY = ([1, 1], [0, 0], [1, 1], False, [0, 0])
_convolve_onto = (
    torch.ops.mkldnn._convolution_pointwise_.binary if torch.backends.mkldnn.is_available() else None
)


def _convolution(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.aten.convolution.default(x, weight[:, :, None, None], None, *_GEOMETRY, 1)

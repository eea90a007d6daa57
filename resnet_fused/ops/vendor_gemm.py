"""GEMMs of the vendor's library over the pixels of activations, and how a batch is split into cache-sized chunks.

A dense channels_last activation is a matrix with a row for each of its N*H*W pixels. A chunk is some of its rows, as an
image (1, C, 1, rows): small enough to stay in the cache between one kernel and the next, so that what is written for
the next kernel alone costs no memory traffic. Weights are (N, K, 1, 1).

On the CPU torch.mm is oneDNN for bfloat16 but MKL for float32, which reaches half of oneDNN's rate on processors that
are not Intel's; a 1x1 convolution is the same GEMM and oneDNN for both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused.layout import statistics_dtype

#: Bytes of the widest activation in a chunk: measured on a CPU; on a GPU only a bound on the memory of a chunk.
CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}

HAS_ONEDNN = torch.backends.mkldnn.is_available()
_GEOMETRY = (
    [1, 1],
    [0, 0],
    [1, 1],
    False,
    [0, 0],
    1,
)  # stride, padding, dilation, transposed, output padding, groups


def rows_of(x: Tensor) -> Tensor:
    """A dense channels_last activation (N, C, H, W) as a matrix (N*H*W, C), without a copy."""
    return x.permute(0, 2, 3, 1).view(-1, x.shape[1])


def rows_per_chunk(x: Tensor, widest: int) -> int:
    """Rows of a chunk of a batch whose widest activation has ``widest`` channels.

    At least ``widest`` rows: with fewer a GEMM moves more bytes of weights than of activations.
    """
    budget = CHUNK_BYTES.get(x.device.type, 1 << 62) // (widest * x.element_size())
    pixels = x.numel() // x.shape[1]
    count = max(1, -(-pixels // max(budget, widest)))
    return max(1, -(-pixels // count))


def chunks(x: Tensor, rows: int) -> tuple[Tensor, ...]:
    """A dense channels_last activation as images (1, C, 1, rows) of its memory; the last may have fewer rows."""
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).view(1, 1, n * h * w, c).permute(0, 3, 1, 2).split(rows, 3)


def _uses_convolution(a: Tensor) -> bool:
    return a.dtype == torch.float32 and a.device.type == "cpu" and HAS_ONEDNN


def mm_nt(a: Tensor, weight: Tensor) -> Tensor:
    """a weight^T, pixel by pixel: (1, K, 1, P) and (N, K, 1, 1) to (1, N, 1, P)."""
    if _uses_convolution(a):
        return torch.conv2d(a, weight)
    return (rows_of(a) @ weight.flatten(1).t())[None, None].permute(0, 3, 1, 2)


def mm_nt_out(out: Tensor, a: Tensor, weight: Tensor, vector: Tensor | None = None) -> None:
    """out = a weight^T + vector, pixel by pixel, in place."""
    vector = None if vector is None else vector.to(a.dtype)
    if _uses_convolution(a):
        out.copy_(torch.conv2d(a, weight, vector))
    elif vector is None:
        torch.mm(rows_of(a), weight.flatten(1).t(), out=rows_of(out))
    else:
        torch.addmm(vector, rows_of(a), weight.flatten(1).t(), out=rows_of(out))


def addmm_nt_(out: Tensor, a: Tensor, weight: Tensor) -> None:
    """out += a weight^T, pixel by pixel, in place, with one rounding."""
    if _uses_convolution(a):
        # oneDNN's sum post-op: the only way to accumulate in place.
        torch.ops.mkldnn._convolution_pointwise_.binary(
            out, a, weight, None, [0, 0], [1, 1], [1, 1], 1, "add", 1.0, None, [], None
        )
    else:
        rows_of(out).addmm_(rows_of(a), weight.flatten(1).t())


def mm_tn(a: Tensor, b: Tensor) -> Tensor:
    """a^T b, summed over the pixels: (1, N, 1, P) and (1, K, 1, P) to (N, K), in their dtype or float32."""
    n, k = a.shape[1], b.shape[1]
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        # With a single chunk a result rounded to 16 bits would not average out.
        return torch.mm(rows_of(a).t(), rows_of(b), out_dtype=torch.float32)
    if a.dtype == torch.float16:
        return mm_tn(a.float(), b.float())  # a sum over many pixels is soon above 65504
    if not _uses_convolution(a):
        return rows_of(a).t() @ rows_of(b)
    if n < k:  # oneDNN is up to twice as fast with more outputs than inputs
        return mm_tn(b, a).t()
    _, grad_weight, _ = torch.ops.aten.convolution_backward.default(
        a, b, a.new_empty(n, k, 1, 1), None, *_GEOMETRY, [False, True, False]
    )
    return grad_weight.view(n, k)


def conv1x1_backward(
    dy: Tensor, x: Tensor, weight: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """(dx, dweight) of a 1x1 convolution, by the vendor alone; dweight is None where it isn't needed."""
    dx, dweight, _ = torch.ops.aten.convolution_backward.default(
        dy, x, weight, None, *_GEOMETRY, [True, needs_weight, False]
    )
    return dx, dweight


def chunked_mm_tn(a: Tensor, b: Tensor) -> Tensor:
    """a^T b of two activations (N, C, H, W) and (N, K, H, W): (C, K) in the statistics dtype."""
    rows = rows_per_chunk(a, max(a.shape[1], b.shape[1]))
    total = a.new_zeros(a.shape[1], b.shape[1], dtype=statistics_dtype(a.dtype))
    for left, right in zip(chunks(a, rows), chunks(b, rows), strict=True):
        total += mm_tn(left, right)
    return total


def matrix_mm_nt(a: Tensor, b: Tensor) -> Tensor:
    """a b^T of two float matrices (N, K) and (M, K): (N, M), at the rate of ``mm_nt``."""
    image = a[None, None].permute(0, 3, 1, 2)
    return rows_of(mm_nt(image, b[:, :, None, None]))


def matrix_mm_tn(a: Tensor, b: Tensor) -> Tensor:
    """a^T b of two float matrices (P, N) and (P, K): (N, K), at the rate of ``mm_tn``."""
    return mm_tn(a[None, None].permute(0, 3, 1, 2), b[None, None].permute(0, 3, 1, 2))

"""The accuracy rule: a result's error may be 1.5 times the vendor's, plus four roundings.

With e = |x - exact| / |exact| for a result x and the same computation in more bits on the same (rounded) inputs, a
result passes if e <= 1.5 * e_vendor + 4 * eps(dtype). It holds for the result as a vector and elementwise.
Tensors may be as large as memory nearly allows: they are compared in parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

#: Elements that are compared at a time.
PART = 2**24
#: Bytes of a mask whose bits are also counted on their own, so that a wrong tile shows among many right ones.
MASK_PART = 1024
#: Of TF32, which has no dtype: ten bits of mantissa.
TF32_EPS = 2.0**-10


def limit(vendor_error: float, eps: float) -> float:
    """The largest error that a result may have."""
    return 1.5 * vendor_error + 4 * eps


def size_of(x: Tensor) -> float:
    """The Euclidean norm."""
    return math.hypot(*(_norm(part) for part in _parts(x)))


def relative_error(x: Tensor, exact: Tensor, size: float | None = None) -> float:
    """|x - exact| / |exact|, Euclidean norms; 0 where both are zero, inf where only ``exact`` is.

    Args:
        size: of ``exact``, where it is known. Differences are taken in the dtype of ``exact``.
    """
    pairs = zip(_parts(x), _parts(exact, like=x), strict=True)
    error = math.hypot(*(_norm(_difference(a, b)) for a, b in pairs))
    size = size_of(exact) if size is None else size
    return error / size if size else (math.inf if error else 0.0)


def element_error(x: Tensor, exact: Tensor, size: float | None = None) -> float:
    """The sixth-power mean of |x - exact| / (|exact| + rms) over all elements, with rms = sqrt(mean(exact^2)).

    Rounding moves an element by up to eps/2 of its own size, and what it was summed from by some eps of the typical
    size: the denominator is the sum of both scales, so that neither a large nor a cancelled element counts as wrong
    for having been rounded. A high mean stands in for the maximum, which luck decides where errors are far above eps:
    two results of equal accuracy differ in it by more than 1.5 in one of a hundred draws. One element that is off by
    its own size and the rms still shows among 1e7 in bfloat16: (1e7)^(-1/6) = 0.068, twice 4 * eps = 0.031.
    """
    if exact.numel() == 0:
        return 0.0
    size = size_of(exact) if size is None else size
    if size == 0:
        return relative_error(x, exact, size)
    rms = size / exact.numel() ** 0.5
    norms = [
        _norm(_difference(a, b).abs_().div_(b.abs().add_(rms)), 6)
        for a, b in zip(_parts(x), _parts(exact, like=x), strict=True)
    ]
    return _norm(torch.tensor(norms, dtype=torch.float64), 6) / exact.numel() ** (1 / 6)


def bits_that_differ(mask: Tensor, exact: Tensor) -> Tensor:
    """Of two masks (uint8, eight elements a byte), in each ``MASK_PART`` bytes."""
    bits = torch.bitwise_xor(mask, exact).flatten()
    bits -= (bits >> 1) & 0x55
    bits = (bits & 0x33) + ((bits >> 2) & 0x33)
    bits = (bits + (bits >> 4)) & 0x0F
    return torch.nn.functional.pad(bits, (0, -len(bits) % MASK_PART)).view(-1, MASK_PART).sum(1)


def why_mask_is_wrong(different: Tensor, by_vendor: Tensor | int, size: int) -> str | None:
    """Why a mask of ``size`` bytes breaks the rule, by what ``bits_that_differ`` says of it and of the vendor's.

    A bit may differ where the rounded sum is next to zero: one of a thousand, and one of twenty in a part.
    """
    allowed = 1.5 * torch.as_tensor(by_vendor, dtype=torch.float64, device=different.device)
    bits, most = int(different.sum()), float(allowed.sum()) + 1e-3 * 8 * size
    if bits > most:
        return f"{bits} bits of a mask differ, {most:.0f} may"
    # The last part may be a few bytes, in which one bit is much.
    over = different - allowed - 0.05 * 8 * MASK_PART
    over[-1] += 0.05 * 8 * (-size % MASK_PART) - 8
    if bool((over > 0).any()):
        worst = int(over.argmax())
        bits, start = int(different[worst]), worst * MASK_PART
        return f"{bits} bits of a mask differ in {MASK_PART} bytes from {start} on"
    return None


def _parts(x: Tensor, like: Tensor | None = None) -> Iterator[Tensor]:
    """Along the outermost dimension in memory, of ``like`` where that is given."""
    x, like = x.detach(), x if like is None else like
    outer = max(range(x.dim()), key=lambda i: like.stride(i) if like.shape[i] > 1 else -1, default=None)
    if outer is None or x.numel() <= PART:
        yield x
    else:
        yield from x.split(max(1, PART * x.shape[outer] // x.numel()), outer)


def _difference(x: Tensor, exact: Tensor) -> Tensor:
    return x.to(exact.dtype) - exact


def _norm(x: Tensor, order: int = 2) -> float:
    return float(torch.linalg.vector_norm(x, order, dtype=torch.float64))

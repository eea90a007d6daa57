"""What the kernels should compute, in float64 and as plainly as possible, with the error that rounding allows.

Every function takes float64 tensors and returns values with their magnitude: the sum of the absolute values of
the terms that were added up. A float32 result may be off by a few float32 epsilons of that magnitude, however much
of it cancelled, and by half a unit in the last place of the dtype it is stored in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Value:
    value: Tensor
    magnitude: Tensor


@dataclass
class BatchNorm:
    """Per-channel vectors in the statistics dtype; weight and bias may be None."""

    mean: Tensor
    invstd: Tensor
    weight: Tensor | None
    bias: Tensor | None

    def arguments(self) -> list[Tensor | None]:
        return [self.mean, self.invstd, self.weight, self.bias]

    def scale(self) -> Tensor:
        invstd = self.invstd.double()
        return per_channel(invstd if self.weight is None else invstd * self.weight.double())


def per_channel(vector: Tensor) -> Tensor:
    return vector.double().view(1, -1, 1, 1)


def affine(y: Tensor, norm: BatchNorm) -> Value:
    product = (y - per_channel(norm.mean)) * norm.scale()
    bias = torch.zeros(()) if norm.bias is None else per_channel(norm.bias)
    return Value(product + bias, product.abs() + bias.abs())


def add(a: Value, b: Value) -> Value:
    return Value(a.value + b.value, a.magnitude + b.magnitude)


def exactly(values: Tensor) -> Value:
    return Value(values.double(), values.double().abs())


def relu(z: Value) -> Value:
    return Value(torch.where(z.value <= 0, 0.0, z.value), z.magnitude)


def normalized(y: Tensor, norm: BatchNorm) -> Tensor:
    return (y - per_channel(norm.mean)) * per_channel(norm.invstd)


def channel_sum(terms: Tensor) -> Value:
    return Value(terms.sum((0, 2, 3)), terms.abs().sum((0, 2, 3)))


def input_gradient(dz: Value, y: Tensor, norm: BatchNorm, sums: tuple[Tensor, Tensor] | None) -> Value:
    parts = [dz.value]
    if sums is not None:
        pixels = y.numel() // y.shape[1]
        parts.append(-per_channel(sums[0]) / pixels)
        parts.append(-normalized(y, norm) * per_channel(sums[1]) / pixels)
    magnitude = dz.magnitude + sum((p.abs() for p in parts[1:]), torch.zeros(()))
    total = parts[0] + sum(parts[1:], torch.zeros(()))
    return Value(total * norm.scale(), magnitude * norm.scale().abs())


def unpack(mask: Tensor, size: torch.Size, channels_last: bool) -> Tensor:
    """The bits of a mask as bool (N, C, H, W); fails where an unused bit is set."""
    n, c, h, w = size
    cols = c if channels_last else h * w
    bits = (mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
    bits = bits.view(mask.shape[0], -1)
    assert not bits[:, cols:].any(), "unused bits of the mask are set"
    bits = bits[:, :cols].bool()
    return bits.reshape(n, h, w, c).permute(0, 3, 1, 2) if channels_last else bits.reshape(n, c, h, w)


def pool(activation: Tensor) -> tuple[Tensor, Tensor]:
    """max_pool2d(3, 2, 1) and kh*3+kw of each maximum, 9 where it is not above zero."""
    out, position = F.max_pool2d(activation, 3, stride=2, padding=1, return_indices=True)
    width = activation.shape[3]
    top = 2 * torch.arange(out.shape[2]).view(-1, 1) - 1
    left = 2 * torch.arange(out.shape[3]) - 1
    taps = (position // width - top) * 3 + position % width - left
    return out, torch.where(out <= 0, 9, taps).to(torch.uint8)


def spread(grad: Tensor, indices: Tensor, size: torch.Size, any_index: bool = False) -> Value:
    """The pooled gradient at the pixels that the indices name; with ``any_index`` some may name none."""
    n, c, h, w = size
    height, width = grad.shape[2:]
    value = torch.zeros(n, c, 2 * height + 1, 2 * width + 1, dtype=torch.float64)  # with the padding
    magnitude = torch.zeros_like(value)
    for tap in range(9):
        top, left = divmod(tap, 3)
        at = (..., slice(top, top + 2 * height, 2), slice(left, left + 2 * width, 2))
        dz = torch.where(indices == tap, grad, 0.0)
        value[at] += dz
        magnitude[at] += dz.abs()
    inside = value[:, :, 1 : h + 1, 1 : w + 1].count_nonzero()
    assert any_index or value.count_nonzero() == inside, "an index names the padding"
    return Value(value[:, :, 1 : h + 1, 1 : w + 1], magnitude[:, :, 1 : h + 1, 1 : w + 1])


def assert_rounds_to(actual: Tensor, expected: Value, statistics: torch.dtype, terms: float = 8.0) -> None:
    """``actual`` is ``expected`` after arithmetic in the statistics dtype and one rounding to its own.

    Args:
        terms: float epsilons of the magnitude that the arithmetic may be off by.
    """
    stored, computed = torch.finfo(actual.dtype), torch.finfo(statistics)
    error = (actual.double() - expected.value).abs()
    # Below the smallest normal number the spacing is constant.
    rounding = 0.51 * stored.eps * expected.value.abs().clamp_min(stored.tiny)
    allowed = rounding + terms * computed.eps * expected.magnitude
    wrong = ~(error <= allowed)  # NaN is wrong
    if wrong.any():
        worst = int((error - allowed).nan_to_num(torch.inf).argmax())
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} wrong; {actual.flatten()[worst]} should be "
            f"{expected.value.flatten()[worst]} +- {allowed.flatten()[worst]}"
        )

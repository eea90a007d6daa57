"""Which results of convolutions may not be finite, if operands are not.

Eager's convolutions don't agree about that themselves. Zeros of the padding times an infinite weight or gradient are
NaN where a library multiplies them, as im2col does; oneDNN's direct convolutions skip them. And where infinities of a
sum have one sign, it is infinite or NaN, by the algorithm: Winograd's adds and subtracts each input. After a batch norm
in evaluation that matters: the ReLU makes zero of -inf, and NaN of NaN.

So plain PyTorch runs twice with convolutions of this file, as *least* and as *most*: least skips the padding and sums
as in exact arithmetic; most multiplies the padding, in the gradient of the weight also that of dy, and is NaN wherever
anything infinite or NaN enters a sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight


def _not_finite(x: Tensor) -> Tensor:
    return (~x.isfinite()).to(x.dtype)


def _finite(x: Tensor) -> Tensor:
    return x.nan_to_num(0.0, 0.0, 0.0)


def _reached(combine: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """Where a bilinear function of two operands has a term with an element that is not finite."""
    by_a = combine(_not_finite(a), torch.ones_like(b))
    return (by_a + combine(torch.ones_like(a), _not_finite(b))) > 0


def _signed(conv: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
    """A convolution whose finite terms add up to ``y``, by counts of the others, in which padding counts as nothing."""

    def count(*pairs: tuple[Tensor, Tensor]) -> Tensor:
        total: Tensor = sum(conv(a.to(x.dtype), b.to(x.dtype)) for a, b in pairs)  # type: ignore[assignment]
        return total > 0

    (up, down), (grows, falls) = (((t > 0) & t.isinf(), (t < 0) & t.isinf()) for t in (x, weight))
    rises = count((up, weight > 0), (down, weight < 0), (x > 0, grows), (x < 0, falls))
    sinks = count((up, weight < 0), (down, weight > 0), (x > 0, falls), (x < 0, grows))
    everywhere = torch.ones_like(x), torch.ones_like(weight)
    nan = count((x.isnan(), everywhere[1]), (everywhere[0], weight.isnan()))
    nan |= count((x.isinf(), weight == 0), (x == 0, weight.isinf()))
    y = y.masked_fill(rises, torch.inf).masked_fill(sinks, -torch.inf)
    return y.masked_fill(nan | (rises & sinks), torch.nan)


_conv2d = F.conv2d  # which tests replace by what is below


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, geometry: tuple[Any, ...], most: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.most = geometry, most

        def conv(x: Tensor, weight: Tensor) -> Tensor:
            return _conv2d(x, weight, None, *geometry)

        y = conv(_finite(x), _finite(weight))
        if not most:
            return _signed(conv, x, weight, y)
        reached = _reached(conv, x, weight) | _not_finite(weight).flatten(1).any(1).view(1, -1, 1, 1)
        return y.masked_fill(reached, torch.nan)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors

        def dgrad(dy: Tensor, weight: Tensor) -> Tensor:
            return conv2d_input(x.shape, weight, dy, *ctx.geometry)

        def wgrad(dy: Tensor, x: Tensor) -> Tensor:
            return conv2d_weight(x, weight.shape, dy, *ctx.geometry)

        reached_x, reached_weight = _reached(dgrad, dy, weight), _reached(wgrad, dy, x)
        if ctx.most:
            inputs = weight.shape[1]
            by_input = _not_finite(weight).flatten(2).any(2).unflatten(0, (x.shape[1] // inputs, -1))
            reached_x |= by_input.any(1).view(1, -1, 1, 1)
            of_dy, of_x = (_not_finite(t).any(3).any(2).any(0) for t in (dy, x))
            by_group = of_x.view(-1, 1, inputs).expand_as(by_input)
            reached_weight |= (of_dy.view(-1, 1) | by_group.flatten(0, 1))[:, :, None, None]
        dx = dgrad(_finite(dy), _finite(weight)).masked_fill(reached_x, torch.nan)
        dweight = wgrad(_finite(dy), _finite(x)).masked_fill(reached_weight, torch.nan)
        return dx, dweight, None, None


def least(x: Tensor, weight: Tensor, bias: None, *geometry: Any) -> Tensor:
    y: Tensor = _Convolution.apply(x, weight, geometry, False)
    return y


def most(x: Tensor, weight: Tensor, bias: None, *geometry: Any) -> Tensor:
    y: Tensor = _Convolution.apply(x, weight, geometry, True)
    return y

"""3x3 convolutions of lazy operands on the CPU, by Winograd's algorithm: when they run, and the calls into csrc.

Of stride 1 and padding 1, float32, channels_last. 16 multiplications compute what direct convolution takes 36 for, and
batch norm, ReLU, statistics and sums cost no pass of their own. See csrc/cpu/conv/winograd.h.

They are not always faster than oneDNN: the weight is transformed in every call, which few pixels don't repay, and
images of odd size waste half of their last row and column of tiles: cpu_rules says when they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backend import choice, why_plain
from resnet_fused.ops.cpu_rules import is_faster
from resnet_fused.types import Activation, ConvGeometry, Gradient

_GEOMETRY = ConvGeometry(padding=(1, 1))


def supports_conv3x3(x: Tensor, weight: Tensor, geometry: Sequence[Any]) -> bool:
    """Whether there are kernels for a convolution, whatever its sizes.

    Args:
        x: any activation with the device and dtype of the convolution's input.
        geometry: a ConvGeometry.
    """
    return (
        weight.shape[2:] == (3, 3)
        and tuple(geometry) == _GEOMETRY
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and min(weight.shape[:2]) > 1  # of one channel channels_last is ambiguous
        and choice() == "auto"
        and why_plain("cpu") is None
    )


def runs_conv3x3(name: str, x: Tensor, weight: Tensor, geometry: Sequence[Any]) -> bool:
    """Whether there is a kernel for a pass of a convolution of ``x``, and it is faster than the vendor's.

    Args:
        name: forward, dgrad, wgrad or inference.
    """
    channels = round(math.sqrt(x.shape[1] * len(weight)))
    return supports_conv3x3(x, weight, geometry) and is_faster("convolutions", name, x.shape, channels)


def conv3x3_bn_stats(a: Activation, weight: Tensor, eps: float, training: bool) -> tuple[Tensor, ...]:
    """y = conv(a) and, in training, mean, biased variance and invstd of its channels; else three empty vectors."""
    results: tuple[Tensor, ...] = torch.ops.resnet_fused.conv3x3_forward(*a[:5], weight, eps, training)
    return results


def conv3x3_dgrad(
    dy: Gradient, weight: Tensor, a: Activation, residual: Tensor | None, residual_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """da, the gradient w.r.t. ``a``, plus the masked residual, and sum_dz and sum_dz_xhat of a's batch norm."""
    results: tuple[Tensor, Tensor, Tensor] = torch.ops.resnet_fused.conv3x3_dgrad(
        *dy[:9], weight, *a[:5], residual, residual_mask
    )
    return results


def conv3x3_wgrad(dy: Gradient, a: Activation) -> Tensor:
    """The gradient w.r.t. the weight, (outputs, inputs, 3, 3), channels_last."""
    dweight: Tensor = torch.ops.resnet_fused.conv3x3_wgrad(*dy[:9], *a[:5])
    return dweight


def conv3x3_filters(weight: Tensor) -> Tensor:
    """A weight (outputs, inputs, 3, 3) transformed for ``conv3x3_inference``: a vector, for this machine's kernels."""
    filters: Tensor = torch.ops.resnet_fused.conv3x3_filters.default(weight)
    return filters


def conv3x3_inference(x: Tensor, filters: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    """relu(conv(x) + bias + residual)."""
    out: Tensor = torch.ops.resnet_fused.conv3x3_inference.default(x, filters, bias, residual)
    return out

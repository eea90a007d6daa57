"""Weight gradients of lazy operands on the CPU, by implicit GEMM: when they run, and the call into csrc.

Of convolutions without groups that have no Winograd kernel (conv3x3), float32, channels_last. Both operands are
computed while they are packed: neither has to exist in memory. See csrc/cpu/conv/implicit_wgrad.h.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from resnet_fused.backend import choice, why_plain
from resnet_fused.ops.cpu_rules import is_faster
from resnet_fused.types import Activation, ConvGeometry, Gradient

POINTWISE = ConvGeometry()


def supports_conv_wgrad(x: Tensor, weight_shape: Sequence[int], groups: int) -> bool:
    """Whether there is a kernel for a convolution of ``x``, whatever its sizes."""
    return (
        groups == 1
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and min(weight_shape[:2]) > 1  # of one channel channels_last is ambiguous
        and choice() == "auto"
        and why_plain("cpu") is None
    )


def runs_conv_wgrad(dy: Tensor, weight_shape: Sequence[int], groups: int = 1) -> bool:
    """Whether there is a kernel, and it is faster than the vendor's for a gradient of the shape of ``dy``."""
    channels = round(math.sqrt(weight_shape[0] * weight_shape[1]))
    name = "wgrad_1x1" if tuple(weight_shape[2:]) == (1, 1) else "wgrad_3x3"  # which stands for all others
    return supports_conv_wgrad(dy, weight_shape, groups) and is_faster(
        "convolutions", name, dy.shape, channels
    )


def conv_wgrad(
    dy: Gradient, a: Activation, kernel_size: Sequence[int], geometry: ConvGeometry, sums: bool = False
) -> tuple[Tensor, Tensor]:
    """The gradient w.r.t. the weight, (N, K, kh, kw), channels_last, and dy summed over the pixels, (N,).

    Args:
        a: without a shift.
        sums: whether dy is summed; else the second result is empty.
    """
    results: tuple[Tensor, Tensor] = torch.ops.resnet_fused.conv_wgrad.default(
        *dy[:9], *a[:5], list(kernel_size), *(list(each) for each in geometry[:3]), sums
    )
    return results

"""The mean of relu(bn(y)) before y is known, as if y were normally distributed: the shift that centers it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.kernels.launch import Config, Launch, cdiv


@triton.jit
def rectified_mean_kernel(
    weight,  # (channels,) float32
    bias,  # (channels,) float32
    mean,  # (channels,) float32
    channels,
    BLOCK: tl.constexpr,
):
    channel_offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel_valid = channel_offs < channels
    std = tl.abs(tl.load(weight + channel_offs, channel_valid, 0.0))
    center = tl.load(bias + channel_offs, channel_valid, 0.0)
    # Clamped, so that nothing overflows: at the bounds both terms have reached their limits.
    ratio = tl.minimum(tl.maximum(center / tl.maximum(std, 1e-30), -30.0), 30.0)
    density = tl.exp(-0.5 * ratio * ratio) * 0.3989422804014327  # 1 / sqrt(2 pi)
    probability = 0.5 * (1.0 + tl.erf(ratio * 0.7071067811865476))  # 1 / sqrt(2)
    tl.store(mean + channel_offs, center * probability + std * density, channel_valid)


def rectified_mean(weight: Tensor, bias: Tensor) -> Tensor:
    """reference.folded_conv_bn.rectified_mean of two (C,), float32."""
    mean, block = torch.empty_like(weight), 128
    Launch(
        rectified_mean_kernel,
        (cdiv(weight.shape[0], block),),
        {"weight": weight, "bias": bias, "mean": mean, "channels": weight.shape[0]},
        {"BLOCK": block},
        Config(warps=4, stages=1),
    ).start()
    return mean

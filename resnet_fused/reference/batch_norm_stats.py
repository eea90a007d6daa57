"""Mean, variance and 1/sqrt(variance + eps) of every channel of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused.layout import dense, statistics_dtype


def batch_norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics over the pixels of each channel.

    Args:
        x: activation (N, C, H, W).
        eps: added to the variance under the root.

    Returns:
        mean, var (biased), invstd: (C,) each, in the statistics dtype. An empty batch has mean 0 and var 0.
    """
    # In float64 and rounded once, as eager PyTorch does on a CPU: backward cancels what the statistics agree on.
    exact = dense(x).double()
    if exact.numel() == 0:
        mean, var = exact.new_zeros(exact.shape[1]), exact.new_zeros(exact.shape[1])
    else:
        # Welford's recurrence: mean(x^2) - mean(x)^2 would lose the variance where |mean| >> std.
        var, mean = torch.var_mean(exact, (0, 2, 3), correction=0)
    dtype = statistics_dtype(x.dtype)
    return mean.to(dtype), var.to(dtype), torch.rsqrt(var + eps).to(dtype)

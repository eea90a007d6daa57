"""Batch statistics: what a batch norm needs to know before it is an affine map.

``Norm`` is one batch norm as F.batch_norm sees it; ``statistics`` turns it and its input into mean and invstd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from resnet_fused.ops._primitive import primitive
from resnet_fused.reference import batch_norm_stats as reference
from resnet_fused.reference.layout import statistics_dtype


def _fake(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean, var, invstd = (x.new_empty(x.shape[1], dtype=statistics_dtype(x.dtype)) for _ in range(3))
    return mean, var, invstd


batch_norm_stats = primitive(
    "batch_norm_stats(Tensor x, float eps) -> (Tensor mean, Tensor var, Tensor invstd)",
    reference.batch_norm_stats,
    _fake,
)


class Norm(NamedTuple):
    """One batch norm: its parameters, buffers and mode, as torch.nn.functional.batch_norm takes them.

    Vectors have one element per channel. ``group`` is the process group to share statistics with (SyncBatchNorm);
    ``counter`` counts the batches that the running statistics were updated with.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    training: bool
    momentum: float
    eps: float
    group: dist.ProcessGroup | None = None
    counter: Tensor | None = None


class Statistics(NamedTuple):
    """Mean and 1/sqrt(var + eps) per channel, in the statistics dtype.

    ``share``: this process's part of the pixels that the statistics were taken over, a scalar tensor; None when
    they are all its own. ``terms``: what kernels need of them beside the mean (reference.operands.norm_terms), where
    that is known.
    """

    mean: Tensor
    invstd: Tensor
    share: Tensor | None = None
    terms: Tensor | None = None


def statistics(y: Tensor, norm: Norm) -> Statistics:
    """Statistics for normalizing ``y`` (N, C, H, W), from the batch in training and from the buffers otherwise.

    In training updates the running statistics in place, with the unbiased variance, as F.batch_norm does.
    """
    check_norm(norm, y.shape[1])
    if not norm.training:
        return frozen_statistics(norm, statistics_dtype(y.dtype))
    check_pixels(y.shape, norm.group)
    with torch.no_grad():
        mean, var, invstd = batch_norm_stats(y, norm.eps)
        pixels = y.numel() // y.shape[1]
        total: int | Tensor = pixels
        share = None
        if norm.group is not None:
            mean, var, total = merge_across(norm.group, mean, var, pixels)
            invstd = torch.rsqrt(var + norm.eps)
            share = pixels / total
        update_running([norm], [mean, var * (total / (total - 1))])
    return Statistics(mean, invstd, share)


def check_norm(norm: Norm, channels: int) -> None:
    """Raises what F.batch_norm does: kernels read as many elements as there are channels, and look no further."""
    if norm.training and (norm.running_mean is None) != (norm.running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    for name in ("running_mean", "running_var", "weight", "bias"):
        vector = getattr(norm, name)
        if vector is None:
            if name.startswith("running") and not norm.training:
                raise RuntimeError(f"{name} must be defined in evaluation mode")
        elif vector.numel() != channels:
            raise RuntimeError(f"{name} should contain {channels} elements not {vector.numel()}")


def check_pixels(shape: Sequence[int], group: dist.ProcessGroup | None) -> None:
    """Raises ValueError, as F.batch_norm does, where a batch of (N, C, H, W) has no variance."""
    if group is None and shape[0] * shape[2] * shape[3] <= 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {torch.Size(shape)}"
        )


def frozen_statistics(norm: Norm, dtype: torch.dtype) -> Statistics:
    """The statistics of the buffers, in the statistics dtype."""
    assert norm.running_mean is not None and norm.running_var is not None
    invstd = torch.rsqrt(norm.running_var.to(dtype) + norm.eps).contiguous()
    return Statistics(norm.running_mean.to(dtype).contiguous(), invstd)


@torch.no_grad()
def update_running(norms: Sequence[Norm], moments: Sequence[Tensor]) -> None:
    """running = (1 - momentum) * running + momentum * batch and a batch more, in place.

    Args:
        moments: of each norm in turn mean and unbiased variance.
    """
    if counters := [norm.counter for norm in norms if norm.counter is not None]:
        torch._foreach_add_(counters, 1)
    buffers: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    for norm, mean, var in zip(norms, moments[::2], moments[1::2], strict=True):
        if norm.running_mean is None or norm.running_var is None:
            continue
        running, batch = buffers.setdefault(norm.momentum, ([], []))
        running += [norm.running_mean, norm.running_var]
        batch += [mean.to(norm.running_mean.dtype), var.to(norm.running_var.dtype)]
    for momentum, (running, batch) in buffers.items():
        torch._foreach_lerp_(running, batch, momentum)  # one kernel on a GPU


def merge_across(
    group: dist.ProcessGroup, mean: Tensor, var: Tensor, pixels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and pixel count over all processes of a group.

    One sum, whose latency grows with the logarithm of their number, where a gather's grows with it. In float64, where
    the squares of float32 means cancel no digit that a float32 variance has.
    """
    wide = mean.double()
    sums = torch.cat([wide, var + wide.square(), wide.new_ones(1)]) * pixels
    dist.all_reduce(sums, group=group)
    total = sums[-1]
    merged, squares = (sums[:-1] / total).split(len(mean))
    spread = (squares - merged.square()).clamp_min_(0)
    return merged.to(mean.dtype), spread.to(var.dtype), total.to(mean.dtype)


def shared_sums(
    sums: tuple[Tensor, ...], group: dist.ProcessGroup | None, share: Tensor | None
) -> list[Tensor]:
    """The backward reductions over all processes, scaled so that a kernel may divide them by its own pixels."""
    if group is None or share is None:
        return list(sums)
    stacked = torch.stack(sums)
    dist.all_reduce(stacked, group=group)
    return list((stacked * share).unbind())


def in_statistics_dtype(vector: Tensor | None, y: Tensor) -> Tensor | None:
    """A parameter of the batch norm of ``y`` as kernels take it; differentiable."""
    return None if vector is None else vector.to(statistics_dtype(y.dtype)).contiguous()


def bias_for_backward(bias: Tensor | None, y: Tensor) -> Tensor | None:
    """``in_statistics_dtype``, and a copy where backward may need it.

    Backward finds the ReLU's mask with the bias of forward, while eager does not save it: there it may be changed in
    place before backward.
    """
    found = in_statistics_dtype(bias, y)
    return found.clone() if found is not None and found is bias and torch.is_grad_enabled() else found

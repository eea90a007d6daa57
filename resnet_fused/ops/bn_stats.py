"""Batch statistics: with mean and invstd a batch norm is an affine map per channel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from resnet_fused.layout import statistics_dtype
from resnet_fused.ops.registry import register_op
from resnet_fused.reference import batch_norm_stats as reference
from resnet_fused.types import BatchNorm, BatchStats


def _fake(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean, var, invstd = (x.new_empty(x.shape[1], dtype=statistics_dtype(x.dtype)) for _ in range(3))
    return mean, var, invstd


batch_norm_stats = register_op(
    "batch_norm_stats(Tensor x, float eps) -> (Tensor mean, Tensor var, Tensor invstd)",
    reference.batch_norm_stats,
    _fake,
)


class BnMode(NamedTuple):
    """Whether a batch norm normalizes with the statistics of the batch, and the processes that share them."""

    training: bool
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, bn: BatchNorm) -> BnMode:
        return cls(bn.training, bn.group)


class FinalizedStats(NamedTuple):
    """Statistics of one batch norm: to normalize with, and what the running ones are updated with.

    mean, var: (C,), of the batch over all processes, var biased; None where ``stats`` are the running ones. pixels:
    of all processes.
    """

    stats: BatchStats
    mean: Tensor | None = None
    var: Tensor | None = None
    pixels: int | Tensor = 0


def finalize_stats(
    mean: Tensor,
    true_mean: Tensor,
    var: Tensor,
    invstd: Tensor,
    pixels: int,
    eps: float,
    group: dist.ProcessGroup | None,
) -> FinalizedStats:
    """The statistics of this process's ``pixels``, over all processes of ``group``.

    Args:
        mean: relative to a shift that ``true_mean`` is not relative to.
    """
    if group is None:
        return FinalizedStats(BatchStats(mean, invstd), true_mean, var, pixels)
    merged, var, count = merge_across(group, true_mean, var, pixels)
    mean, invstd = mean + (merged - true_mean), torch.rsqrt(var + eps)
    return FinalizedStats(BatchStats(mean, invstd, pixels / count), merged, var, count)


def unbiased_stats(finalized: Sequence[FinalizedStats]) -> list[Tensor]:
    """Mean and unbiased variance of each in turn, skipping batch norms that use running statistics."""
    means = [each.mean for each in finalized if each.mean is not None]
    variances = [each.var for each in finalized if each.var is not None]
    factors = [each.pixels / (each.pixels - 1) for each in finalized if each.mean is not None]
    plain = [factor for factor in factors if isinstance(factor, float)]
    unbiased: Sequence[Tensor]
    if (
        means and len(plain) == len(means) and not torch.compiler.is_compiling()
    ):  # there factors may be symbols
        unbiased = torch._foreach_mul(variances, plain)  # one kernel on a GPU
    else:
        unbiased = [variance * factor for variance, factor in zip(variances, factors, strict=True)]
    return [x for pair in zip(means, unbiased, strict=True) for x in pair]


def stats_for(y: Tensor, bn: BatchNorm) -> BatchStats:
    """Statistics for normalizing ``y`` (N, C, H, W), from the batch in training and from the buffers otherwise.

    In training updates the running statistics in place, with the unbiased variance, as F.batch_norm does.
    """
    check_bn(bn, y.shape[1])
    if not bn.training:
        return running_stats(bn, statistics_dtype(y.dtype))
    check_pixels(y.shape, bn.group)
    with torch.no_grad():
        mean, var, invstd = batch_norm_stats(y, bn.eps)
        finalized = finalize_stats(mean, mean, var, invstd, y.numel() // y.shape[1], bn.eps, bn.group)
        update_running_stats([bn], unbiased_stats([finalized]))
    return finalized.stats


def check_bn(bn: BatchNorm, channels: int) -> None:
    """Raises what F.batch_norm does: kernels read as many elements as there are channels, without checking."""
    if bn.training and (bn.running_mean is None) != (bn.running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    for name in ("running_mean", "running_var", "weight", "bias"):
        vector = getattr(bn, name)
        if vector is None:
            if name.startswith("running") and not bn.training:
                raise RuntimeError(f"{name} must be defined in evaluation mode")
        elif vector.numel() != channels:
            raise RuntimeError(f"{name} should contain {channels} elements not {vector.numel()}")
        elif not vector.is_floating_point():
            raise RuntimeError(f"{name} should be of a floating-point dtype not {vector.dtype}")


def check_pixels(shape: Sequence[int], group: dist.ProcessGroup | None) -> None:
    """Raises ValueError, as F.batch_norm does, where a batch of (N, C, H, W) has no variance."""
    if group is None and shape[0] * shape[2] * shape[3] <= 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {torch.Size(shape)}"
        )


def running_stats(bn: BatchNorm, dtype: torch.dtype) -> BatchStats:
    """The statistics of the buffers, in the statistics dtype."""
    assert bn.running_mean is not None and bn.running_var is not None
    invstd = torch.rsqrt(bn.running_var.to(dtype) + bn.eps).contiguous()
    return BatchStats(bn.running_mean.to(dtype).contiguous(), invstd)


@torch.no_grad()
def update_running_stats(bns: Sequence[BatchNorm], stats: Sequence[Tensor]) -> None:
    """running = (1 - momentum) * running + momentum * batch and num_batches_tracked += 1, in place.

    Args:
        stats: of each batch norm in turn mean and unbiased variance (``unbiased_stats``).
    """
    if counters := [bn.num_batches_tracked for bn in bns if bn.num_batches_tracked is not None]:
        torch._foreach_add_(counters, 1)
    buffers: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    for bn, mean, var in zip(bns, stats[::2], stats[1::2], strict=True):
        if bn.running_mean is None or bn.running_var is None:
            continue
        running, batch = buffers.setdefault(bn.momentum, ([], []))
        running += [bn.running_mean, bn.running_var]
        batch += [mean.to(bn.running_mean.dtype), var.to(bn.running_var.dtype)]
    for momentum, (running, batch) in buffers.items():
        torch._foreach_lerp_(running, batch, momentum)  # one kernel on a GPU


def merge_across(
    group: dist.ProcessGroup, mean: Tensor, var: Tensor, pixels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and pixel count over all processes of a group.

    One all-reduce (latency grows with log(processes), a gather's linearly), in float64 so that cancellation costs no
    float32 precision.
    """
    wide = mean.double()
    sums = torch.cat([wide, var + wide.square(), wide.new_ones(1)]) * pixels
    dist.all_reduce(sums, group=group)
    total = sums[-1]
    merged, squares = (sums[:-1] / total).split(len(mean))
    spread = (squares - merged.square()).clamp_min_(0)
    return merged.to(mean.dtype), spread.to(var.dtype), total.to(mean.dtype)


def shared_sums(
    sums: tuple[Tensor, ...], group: dist.ProcessGroup | None, count_fraction: Tensor | None
) -> list[Tensor]:
    """The backward reductions over all processes, scaled so that a kernel may divide them by its own pixels."""
    if group is None or count_fraction is None:
        return list(sums)
    stacked = torch.stack(sums)
    dist.all_reduce(stacked, group=group)
    return list((stacked * count_fraction).unbind())


def parameter_gradients(
    reduce: Callable[[], tuple[Tensor, Tensor]],
    needs: Sequence[bool],
    mode: BnMode,
    count_fraction: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """dweight and dbias of a batch norm, and the two sums that the gradient w.r.t. its input is computed from.

    Args:
        reduce: returns sum_dz and sum_dz_xhat of this process; called where they are needed.
        needs: whether dweight is needed, and dbias.
    """
    if not (mode.training or any(needs)):
        return None, None, [None, None]
    sum_dz, sum_dz_xhat = reduce()
    sums: list[Tensor | None] = [None, None]
    if mode.training:
        sums = [*shared_sums((sum_dz, sum_dz_xhat), mode.group, count_fraction)]
    return sum_dz_xhat if needs[0] else None, sum_dz if needs[1] else None, sums


def in_statistics_dtype(vector: Tensor | None, y: Tensor) -> Tensor | None:
    """A parameter of the batch norm of ``y`` as kernels take it; differentiable."""
    return None if vector is None else vector.to(statistics_dtype(y.dtype)).contiguous()


def bias_for_backward(bias: Tensor | None, y: Tensor) -> Tensor | None:
    """``in_statistics_dtype``, and a copy where backward may need it.

    Backward finds the ReLU's mask with the bias of forward, while eager does not save it: there it may be changed in
    place before backward.
    """
    vector = in_statistics_dtype(bias, y)
    return vector.clone() if vector is not None and vector is bias and torch.is_grad_enabled() else vector

"""The algebra of a folded convolution between the passes over pixels: on weights and vectors alone.

For a block of Triton kernels whose statistics are those of this process; for others _branch has it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from resnet_fused.ops import _checks
from resnet_fused.ops._primitive import primitive
from resnet_fused.ops.passes import kernels, runs_triton
from resnet_fused.reference import folded as reference
from resnet_fused.reference.operands import MaybeTensor


def _by_triton(name: str, like: Tensor, *arguments: Any) -> Any:
    home = kernels("fold") if runs_triton(like) else reference
    return getattr(home, name)(*arguments)


fold_statistics = primitive(
    "fold_statistics(Tensor weight, Tensor mean, Tensor covariance, Tensor? shift, float eps)"
    " -> (Tensor mean_y, Tensor true_mean, Tensor var, Tensor invstd)",
    reference.fold_statistics,
    lambda weight, mean, *_: tuple(mean.new_empty(weight.shape[0]) for _ in range(4)),
    lambda weight, *rest: _by_triton("fold_statistics", weight, weight, *rest),
    triton=True,
    check=_checks.fold_statistics,
)


def _fold_gradients(weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *found, matrix, vector = _by_triton("fold_gradients", weight, weight, *rest)
    if matrix is None:
        matrix, vector = weight.new_empty(0), found[0].new_empty(0)
    return *found, matrix, vector


def _fake_fold_gradients(
    weight: Tensor, gamma: MaybeTensor, mean_y: Tensor, invstd: Tensor, mean: MaybeTensor, *_: Any
) -> tuple[Tensor, ...]:
    n, k = weight.shape
    added = (0,) if mean is None else (k, k)
    return (
        mean_y.new_empty(n, k),
        mean_y.new_empty(n),
        weight.new_empty(n, k),
        weight.new_empty(added),
        mean_y.new_empty(added[:1]),
    )


fold_gradients = primitive(
    "fold_gradients(Tensor weight, Tensor? gamma, Tensor mean_y, Tensor invstd, Tensor? mean, Tensor? covariance,"
    " Tensor sum_dz, Tensor product, int pixels)"
    " -> (Tensor dweight, Tensor dgamma, Tensor scaled, Tensor matrix, Tensor vector)",
    reference.fold_gradients,
    _fake_fold_gradients,
    _fold_gradients,
    triton=True,
    check=_checks.fold_gradients,
)
rectified_mean = primitive(
    "rectified_mean(Tensor weight, Tensor bias) -> Tensor",
    reference.rectified_mean,
    lambda weight, bias: weight.new_empty(weight.shape),
    lambda weight, bias: _by_triton("rectified_mean", weight, weight, bias),
    triton=True,
    check=_checks.rectified_mean,
)

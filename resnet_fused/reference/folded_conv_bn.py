"""A 1x1 convolution folded with the batch norm after it, in training: the output of the convolution is never stored.

With c the centered input of the convolution, P x K, and W its weight, N x K, the output y = c W^T has, over the pixels,
the mean W m and the variances diag(W S W^T), where m and S are mean and covariance of c: the statistics are known
before the convolution has run. Backward needs of y only Q = dz^T c. See docs/training-fold.md.

Activations are (N, C, H, W); the weight of a 1x1 convolution is (N, K, 1, 1) in the activations' dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.layout import dense, pack_mask, stored, subsample, widened
from resnet_fused.reference.batch_norm import affine, relu_mask, scale
from resnet_fused.reference.bn_add_relu import relu_backward
from resnet_fused.reference.conv_bn import activation_value, bn_sums, channels_last
from resnet_fused.types import Activation, BatchStats, DgradFactors, InputCovariance, Pair


def input_covariance(a: Activation, input_stride: Pair) -> tuple[Tensor, Tensor]:
    """Mean (C,) and biased covariance (C, C) of the channels of an activation, over every input_stride-th pixel.

    In the statistics dtype; 0 where there are no pixels.
    """
    rows = _rows(widened(subsample(activation_value(a), input_stride)))
    mean = rows.sum(0) if len(rows) == 0 else rows.mean(0)
    centered = rows - mean
    return mean, centered.t() @ centered / max(len(rows), 1)


def conv1x1_bn_add_relu(
    a: Activation,
    weight: Tensor | None,
    bn: tuple[Tensor | None, ...],
    skip: Activation,
    skip_weight: Tensor | None,
    skip_bn: tuple[Tensor | None, ...],
    input_stride: Pair,
) -> tuple[Tensor, Tensor]:
    """relu(bn(conv(a)) + shortcut) and the mask of its ReLU.

    Args:
        a: input of the 1x1 convolution ``weight``, (N, K, H, W); without weight its output, (N, C, H, W).
        bn: mean, invstd, weight and bias of the batch norm after the convolution, (C,).
        skip: the shortcut, (N, C, H, W); with ``skip_weight`` the input of its 1x1 convolution, of which it reads
            every input_stride-th pixel.
        skip_bn: as ``bn``, of the shortcut's batch norm; all None where it has none.

    Returns:
        out: (N, C, H, W), channels_last; mask: uint8, see layout.pack_mask.
    """
    like = _convolved(activation_value(a), weight)
    z = affine(widened(like), *bn)  # type: ignore[arg-type]
    other = widened(_convolved(subsample(activation_value(skip), input_stride), skip_weight))
    if skip_bn[0] is not None:
        other = affine(other, *skip_bn)  # type: ignore[arg-type]
    z = z + other
    return channels_last(stored(torch.relu(z), like)), pack_mask(relu_mask(z), like)


def folded_wgrad(
    grad: Tensor,
    mask: Tensor,
    a: Activation,
    input_stride: Pair,
    skip: Activation | None,
    skip_input_stride: Pair,
) -> tuple[Tensor, ...]:
    """What backward of one or two folded convolutions sums over the pixels, with dz = grad * mask.

    Args:
        grad: (N, outputs, H, W), w.r.t. the output of ``conv1x1_bn_add_relu``; mask: its mask.
        a, skip: the inputs of the convolutions, C and K channels; ``skip`` has no statistics.

    Returns:
        Q = dz^T a: (outputs, C); that of skip: (outputs, K), or empty; dz summed over the pixels: (outputs,).
    """
    dz = relu_backward(grad, mask, dense(grad))
    rows = _rows(dz)

    def q_of(operand: Activation, stride: Pair) -> Tensor:
        return rows.t() @ _rows(widened(subsample(activation_value(operand), stride)))

    skip_q = dz.new_empty(0) if skip is None else q_of(skip, skip_input_stride)
    return q_of(a, input_stride), skip_q, dz.sum((0, 2, 3), dtype=torch.float64).to(dz.dtype)


def folded_dgrad(
    grad: Tensor,
    mask: Tensor,
    factors: DgradFactors,
    a: Activation,
    input_stride: Pair,
    skip_factors: DgradFactors,
    skip: Activation | None,
    skip_input_stride: Pair,
) -> tuple[Tensor, ...]:
    """da = dz scaled + a matrix^T + vector of one or two folded convolutions, and the sums that ``dgrad`` returns.

    Args:
        grad, mask, a, skip: as for ``folded_wgrad``.

    Returns:
        da: (N, C, H, W), w.r.t. a; that w.r.t. skip, or empty; sum_dz, sum_dz_xhat and dy_coeffs of a's batch norm.
    """
    dz = relu_backward(grad, mask, dense(grad))

    def input_gradient(x: Activation, stride: Pair, factors: DgradFactors) -> Tensor:
        scaled, matrix, vector = factors
        assert scaled is not None
        da = F.conv2d(dz, widened(scaled).transpose(0, 1))
        if matrix is not None and vector is not None:
            da = da + F.conv2d(widened(subsample(activation_value(x), stride)), widened(matrix))
            da = da + vector.view(1, -1, 1, 1)
        return channels_last(da.to(grad.dtype))

    da, dskip = input_gradient(a, input_stride, factors), grad.new_empty(0)
    if skip is not None:
        dskip = input_gradient(skip, skip_input_stride, skip_factors)
    return da, dskip, *bn_sums(da, a)


def fold_statistics(
    weight: Tensor, mean: Tensor, covariance: Tensor, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics of y = c W^T from those of c: W mean, var = diag(W S W^T), invstd = 1 / sqrt(var + eps).

    Args:
        weight: (N, K); mean: (K,) and covariance: S, (K, K), statistics dtype.
        shift: (K,), what was taken from the convolution's input to make c.

    Returns:
        mean_y, that of (c + shift) W^T, var, invstd: (N,) each.
    """
    wide = weight.to(mean.dtype)
    mean_y = wide @ mean
    var = (wide @ covariance * wide).sum(1).clamp_min(0)
    true_mean = mean_y.clone() if shift is None else mean_y + wide @ shift
    return mean_y, true_mean, var, torch.rsqrt(var + eps)


def fold_gradients(
    weight: Tensor,
    gamma: Tensor | None,
    stats: BatchStats,
    fold: InputCovariance,
    sum_dz: Tensor,
    q: Tensor,
    pixels: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a folded convolution's parameters, and what dc = dz scaled + c matrix^T + vector is made of.

    Args:
        weight: W, (N, K), in the activations' dtype; all else in the statistics dtype.
        stats: of c W^T, (N,).
        fold: mean and covariance of c; None where the statistics are constants.
        gamma, sum_dz: (N,); q: Q = dz^T c, (N, K); pixels: P.

    Returns:
        dweight: (N, K); dgamma: (N,); scaled: (N, K) and matrix: (K, K), in the weight's dtype; vector: (K,). The last
        two are empty where the statistics are constants.
    """
    mean_y, invstd, *_ = stats
    wide, factor = weight.to(invstd.dtype), scale(invstd, gamma)[:, None]
    dgamma = invstd * ((wide * q).sum(1) - sum_dz * mean_y)
    scaled = (factor * wide).to(weight.dtype)
    if fold.mean is None or fold.covariance is None:
        return factor * q, dgamma, scaled, weight.new_empty(0), invstd.new_empty(0)
    slope, offset = -invstd * dgamma / pixels, -sum_dz / pixels
    # A covariance is symmetric. Kernels read its rows, and so does this, for operands that are none.
    by_rows = wide @ fold.covariance.t()
    dweight = factor * (q + (slope * pixels)[:, None] * by_rows - torch.outer(sum_dz, fold.mean))
    matrix = (wide.t() @ (factor * slope[:, None] * wide)).to(weight.dtype)
    # Of both matrices as they are rounded: then dc sums to zero over the pixels as dy does.
    vector = offset @ scaled.to(wide.dtype) - matrix.to(wide.dtype) @ fold.mean
    return dweight, dgamma, scaled, matrix, vector


def rectified_mean(weight: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """E[relu(bias + weight * g)], g a standard normal: near the mean of relu(bn(y)), and known before y is.

    bias * Phi(bias/|weight|) + |weight| * phi(bias/|weight|); zero where that is infinite or NaN, so that it can be
    subtracted: relu of a bias of -inf is zero. None where the batch norm has no parameters.
    """
    if weight is None or bias is None:
        return None
    spread = weight.abs()
    ratio = bias / spread.clamp_min(torch.finfo(weight.dtype).tiny)
    density = (
        torch.exp(-0.5 * ratio.square()) / 6.283185307179586**0.5
    )  # torch.compile makes a symbol of a named 2 pi
    mean = bias * torch.special.ndtr(ratio) + spread * density
    return mean.nan_to_num(0.0, 0.0, 0.0)


def _rows(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _convolved(x: Tensor, weight: Tensor | None) -> Tensor:
    return dense(x) if weight is None else F.conv2d(x, weight)

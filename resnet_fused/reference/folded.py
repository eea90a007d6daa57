"""A 1x1 convolution and the batch norm behind it, folded in training: the output of the convolution is never kept.

With c the centred input of the convolution, P x K, and W its weight, N x K, the output y = c W^T has, over the pixels,
the mean W m and the variances diag(W S W^T), where m and S are mean and covariance of c: the batch norm is known
before the convolution has run. Backward needs of y only Q = dz^T c. See docs/training-fold.md.

Activations are (N, C, H, W); the weight of a 1x1 convolution is (N, K, 1, 1) in the activations' dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused.reference.batch_norm import affine, is_kept, scale
from resnet_fused.reference.bn_add_relu import behind_relu
from resnet_fused.reference.layout import dense, pack_mask, stored, widened


def gram(c: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (K,) and biased covariance (K, K) of the channels of ``c`` over its pixels, in the statistics dtype; 0 where
    there are none.
    """
    rows = _rows(widened(c))
    mean = rows.sum(0) if len(rows) == 0 else rows.mean(0)
    centred = rows - mean
    return mean, centred.t() @ centred / max(len(rows), 1)


def folded_add_relu(
    y: Tensor,
    conv: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    skip: Tensor,
    skip_conv: Tensor | None,
    skip_mean: Tensor | None,
    skip_invstd: Tensor | None,
    skip_weight: Tensor | None,
    skip_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """relu(bn(y) + skip), or relu(bn(y) + bn(skip)) where skip has statistics.

    Args:
        y: (N, C, H, W), or with ``conv`` the input (N, K, H, W) of the 1x1 convolution that makes it.
        conv: (C, K, 1, 1) or None.
        mean, invstd, weight, bias: (C,), statistics dtype, of what the convolution makes.
        skip, skip_...: the same for the shortcut.

    Returns:
        out: (N, C, H, W); mask: uint8, see layout.pack_mask.
    """
    like = _convolved(y, conv)
    z = affine(widened(like), mean, invstd, weight, bias)
    other = widened(_convolved(skip, skip_conv))
    if skip_mean is not None:
        assert skip_invstd is not None
        other = affine(other, skip_mean, skip_invstd, skip_weight, skip_bias)
    z = z + other
    return stored(torch.relu(z), like), pack_mask(is_kept(z), like)


def folded_backward(
    grad: Tensor, mask: Tensor, inputs: list[Tensor], matrices: list[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """What backward takes from dz, the gradient behind the ReLU, for one or two folded convolutions.

    Args:
        grad: (N, C, H, W), of the output of folded_add_relu; mask: its mask, in channels_last.
        inputs: c of each, (N, K, H, W).
        matrices: of each the transposed weight times the batch norm's scale, (K, C, 1, 1).

    Returns:
        sum_dz: (C,), statistics dtype.
        products: of each Q = dz^T c, (C, K), statistics dtype.
        gradients: of each dz matrix^T, (N, K, H, W): the part of the gradient of c that needs no sums.
    """
    grad = grad.contiguous(memory_format=torch.channels_last)
    dz = behind_relu(grad, mask, grad)
    rows = _rows(dz)
    products = [rows.t() @ _rows(widened(c)) for c in inputs]
    gradients = [
        _convolved(dz.to(grad.dtype), matrix).contiguous(memory_format=torch.channels_last)
        for matrix in matrices
    ]
    return dz.sum((0, 2, 3), dtype=torch.float64).to(dz.dtype), products, gradients


def add_product_(out: Tensor, a: Tensor, matrix: Tensor, vector: Tensor) -> None:
    """out += a matrix^T + vector, pixel by pixel, in place.

    Args:
        out: (N, M, H, W); a: (N, K, H, W); matrix: (M, K, 1, 1), as activations; vector: (M,), statistics dtype.
    """
    wide = _convolved(widened(a), widened(matrix)) + vector.view(1, -1, 1, 1)
    out.copy_(widened(out) + wide)


def conv1x1_backward(
    dy: Tensor, x: Tensor, conv: Tensor, residual: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Backward of y = conv1x1(x), with the gradient that reaches x by the shortcut added.

    Args:
        dy: (N, K, H, W); x: (N, C, H, W); conv: (K, C, 1, 1).
        residual: (N, C, H, W), or None for none.
        mask: residual counts where its bits are set, in channels_last; None: everywhere.

    Returns:
        dx: (N, C, H, W); dconv: (K, C), statistics dtype.
    """
    dx = _convolved(widened(dy), widened(conv).transpose(0, 1))
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
        dx = dx + (widened(residual) if mask is None else behind_relu(residual, mask, residual))
    return stored(dx, dense(x)), _rows(widened(dy)).t() @ _rows(widened(x))


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
    mean_y: Tensor,
    invstd: Tensor,
    mean: Tensor | None,
    covariance: Tensor | None,
    sum_dz: Tensor,
    product: Tensor,
    pixels: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a folded convolution's parameters, and what dc = dz scaled + c matrix^T + vector is made of.

    Args:
        weight: W, (N, K), in the activations' dtype; all else in the statistics dtype.
        gamma, mean_y, invstd, sum_dz: (N,); product: Q = dz^T c, (N, K); pixels: P.
        mean, covariance: (K,) and (K, K), of c; None where the statistics are constants.

    Returns:
        dweight: (N, K); dgamma: (N,); scaled: (N, K) and matrix: (K, K), in the weight's dtype; vector: (K,). The last
        two are empty where the statistics are constants.
    """
    wide, factor = weight.to(invstd.dtype), scale(invstd, gamma)[:, None]
    dgamma = invstd * ((wide * product).sum(1) - sum_dz * mean_y)
    scaled = (factor * wide).to(weight.dtype)
    if mean is None or covariance is None:
        return factor * product, dgamma, scaled, weight.new_empty(0), invstd.new_empty(0)
    slope, offset = -invstd * dgamma / pixels, -sum_dz / pixels
    dweight = factor * (product + (slope * pixels)[:, None] * (wide @ covariance) - torch.outer(sum_dz, mean))
    matrix = (wide.t() @ (factor * slope[:, None] * wide)).to(weight.dtype)
    return dweight, dgamma, scaled, matrix, (factor[:, 0] * (offset - slope * mean_y)) @ wide


def rectified_mean(weight: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """E[relu(bias + weight * g)], g a standard normal: what the mean behind a batch norm and a ReLU is near.

    bias * Phi(bias/|weight|) + |weight| * phi(bias/|weight|). None where the batch norm has no parameters.
    """
    if weight is None or bias is None:
        return None
    spread = weight.abs()
    ratio = bias / spread.clamp_min(torch.finfo(weight.dtype).tiny)
    density = (
        torch.exp(-0.5 * ratio.square()) / 6.283185307179586**0.5
    )  # torch.compile makes a symbol of a named 2 pi
    return bias * torch.special.ndtr(ratio) + spread * density


def _rows(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _convolved(x: Tensor, conv: Tensor | None) -> Tensor:
    if conv is None:
        return dense(x)
    return torch.nn.functional.conv2d(x, conv)

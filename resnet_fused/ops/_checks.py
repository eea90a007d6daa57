"""Whether the operands of an op without a native kernel fit each other: Triton kernels and the vendor do not check.

Each function has the arguments of the op of its name. It raises ValueError where sizes, dtypes, devices or layouts do
not fit, and returns whether the reference has to run: without pixels there is nothing to launch, and the mask of a
single channel may have a row for each plane, where kernels expect one for each pixel.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from resnet_fused.layout import STATISTICS_DTYPES
from resnet_fused.ops._operands import (
    MOST,
    Operand,
    activation,
    device_of,
    given,
    gradient,
    outputs_of,
    refuse,
)

#: Where strides reach further, oneDNN's gradient of a convolution's input ends the process (torch 2.13, also in eager).
_MOST_APART = 2**18


def _output_shape(
    op: str,
    x: Operand,
    weight: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[int, int, int, int]:
    """The shape of what ``weight`` makes of ``x``."""
    if weight is None or weight.dim() != 4:
        refuse(op, "weight", "a weight (outputs, C / groups, kh, kw)", weight)
    if (
        len(stride) != 2
        or len(padding) != 2
        or len(dilation) != 2
        or not (0 < stride[0] < MOST and 0 < stride[1] < MOST)
        or not (0 <= padding[0] < MOST and 0 <= padding[1] < MOST)
        or not (0 < dilation[0] < MOST and 0 < dilation[1] < MOST)
        or not 0 < groups < MOST
    ):
        geometry = (*map(tuple, (stride, padding, dilation)), groups)
        refuse(op, "geometry", "two strides, paddings and dilations of a convolution, and groups", geometry)
    outputs, _, down, across = weight.shape
    x.check_weight(op, "weight", weight, (outputs, x.channels // groups, down, across))
    if max(stride) > 1 and max(stride) * max(x.channels, outputs, 16) >= _MOST_APART:
        refuse(op, "stride", f"of fewer than {_MOST_APART} elements, channels of a pixel counted", stride)
    height = (x.height + 2 * padding[0] - dilation[0] * (down - 1) - 1) // stride[0] + 1
    width = (x.width + 2 * padding[1] - dilation[1] * (across - 1) - 1) // stride[1] + 1
    if (
        not (outputs and down and across)
        or x.channels % groups
        or outputs % groups
        or height < 1
        or width < 1
    ):
        size = (x.count, x.channels, x.height, x.width)
        refuse(op, "weight", f"a weight that convolves {groups} groups of an input of shape {size}", weight)
    return x.count, outputs, height, width


def conv_bn_stats(
    a: Sequence[Tensor | None],
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    eps: float,
    training: bool,
    gamma: Tensor | None,
    beta: Tensor | None,
    coeffs: bool,
) -> bool:
    x = activation("conv_bn_stats", "a", a)
    _, outputs, _, _ = _output_shape("conv_bn_stats", x, weight, stride, padding, dilation, groups)
    x.check_vectors("conv_bn_stats", "", ("gamma", "beta"), (gamma, beta), outputs)
    return x.is_empty


def input_covariance(a: Sequence[Tensor | None], input_stride: Sequence[int]) -> bool:
    x = activation("input_covariance", "a", a)
    x.subsampled("input_covariance", "input_stride", input_stride)
    return x.is_empty


def conv1x1_bn_add_relu(
    a: Sequence[Tensor | None],
    weight: Tensor | None,
    bn: Sequence[Tensor | None],
    skip: Tensor,
    skip_shift: Tensor | None,
    skip_weight: Tensor | None,
    skip_bn: Sequence[Tensor | None],
    input_stride: Sequence[int],
) -> bool:
    op = "conv1x1_bn_add_relu"
    x, other = activation(op, "a", a), Operand(op, "skip", skip)
    outputs = x.channels if weight is None else outputs_of(weight)
    if weight is not None:
        x.check_weight(op, "weight", weight, (outputs, x.channels, 1, 1))
    elif any(field is not None for field in a[1:]):
        refuse(op, "a", "an activation alone where there is no weight", given(a))
    height, width = other.subsampled(op, "input_stride", input_stride)
    if (x.count, x.height, x.width, x.dtype) != (other.count, height, width, other.dtype):
        size = x.count, other.channels, x.height, x.width
        expected = f"{x.dtype} of shape {size} after subsampling by {(*input_stride,)}"
        refuse(op, "skip", expected, skip)
    if skip_weight is not None:
        x.check_weight(op, "skip_weight", skip_weight, (outputs, other.channels, 1, 1))
        x.check_vectors(op, "", ("skip_shift",), (skip_shift,), other.channels)
    elif (
        skip_shift is not None or other.channels != outputs or (height, width) != (other.height, other.width)
    ):
        expected = f"of shape {(x.count, outputs, x.height, x.width)}, without skip_shift, as there is no skip_weight"
        refuse(op, "skip", expected, skip)
    x.check_bn(op, "bn", bn, outputs)
    x.check_bn(op, "skip_bn", skip_bn, outputs, required=False)
    return x.is_empty or outputs == 1


def _folded_branch(
    op: str, operand: str, grad: Operand, fields: Sequence[Tensor | None], input_stride: Sequence[int]
) -> Operand:
    """The input of a folded convolution whose output has the pixels of ``grad``."""
    x = activation(op, operand, fields)
    height, width = x.subsampled(op, "input_stride" if operand == "a" else "skip_input_stride", input_stride)
    if (x.count, height, width, x.dtype) != (grad.count, grad.height, grad.width, grad.dtype):
        size = (grad.count, x.channels, grad.height, grad.width)
        refuse(
            op,
            f"{operand}.x",
            f"{grad.dtype} of shape {size} after subsampling by {(*input_stride,)}",
            fields[0],
        )
    if len(fields) > 1 and fields[1] is not None and (operand == "skip" or tuple(input_stride) != (1, 1)):
        refuse(op, operand, "an activation without statistics, or at all pixels", given(fields))
    return x


def folded_wgrad(
    grad: Tensor,
    mask: Tensor,
    a: Sequence[Tensor | None],
    input_stride: Sequence[int],
    skip: Sequence[Tensor | None],
    skip_input_stride: Sequence[int],
) -> bool:
    op = "folded_wgrad"
    g = Operand(op, "grad", grad)
    g.check_mask(op, "mask", mask, g.channels)
    _folded_branch(op, "a", g, a, input_stride)
    if skip:
        _folded_branch(op, "skip", g, skip, skip_input_stride)
    else:
        g.subsampled(op, "skip_input_stride", skip_input_stride)
    return g.is_empty or g.channels == 1


def _check_factors(
    op: str, operand: str, factors: Sequence[Tensor | None], g: Operand, channels: int
) -> None:
    if len(factors) != 3 or (factors[1] is None) != (factors[2] is None):
        refuse(op, operand, "scaled, and both or neither of matrix and vector", given(factors))
    scaled, matrix, vector = factors
    g.check_weight(op, operand, scaled, (g.channels, channels, 1, 1))
    if matrix is not None:
        g.check_weight(op, operand, matrix, (channels, channels, 1, 1))
        g.check_vectors(op, operand, ("vector",), (vector,), channels)


def folded_dgrad(
    grad: Tensor,
    mask: Tensor,
    factors: Sequence[Tensor | None],
    a: Sequence[Tensor | None],
    input_stride: Sequence[int],
    skip_factors: Sequence[Tensor | None],
    skip: Sequence[Tensor | None],
    skip_input_stride: Sequence[int],
) -> bool:
    op = "folded_dgrad"
    g = Operand(op, "grad", grad)
    g.check_mask(op, "mask", mask, g.channels)
    x = _folded_branch(op, "a", g, a, input_stride)
    _check_factors(op, "factors", factors, g, x.channels)
    if skip:
        other = _folded_branch(op, "skip", g, skip, skip_input_stride)
        _check_factors(op, "skip_factors", skip_factors, g, other.channels)
    elif skip_factors:
        refuse(op, "skip_factors", "empty where there is no skip", given(skip_factors))
    else:
        g.subsampled(op, "skip_input_stride", skip_input_stride)
    return g.is_empty or g.channels == 1


def conv_backward(
    dy: Sequence[Tensor | None],
    a: Sequence[Tensor | None],
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None,
    residual_mask: Tensor | None,
    input_stride: Sequence[int],
    needs: Sequence[bool],
) -> bool:
    op = "conv_backward"
    g, x = gradient(op, dy), activation(op, "a", a)
    expected = _output_shape(op, x, weight, stride, padding, dilation, groups)
    if (g.count, g.channels, g.height, g.width) != expected or g.dtype is not x.dtype or g.device != x.device:
        refuse(op, "dy.g", f"{x.dtype} of shape {expected}, on the input's device", dy[0])
    if len(needs) != 2:
        refuse(op, "needs", "two flags", needs)
    height, width = x.subsampled(op, "input_stride", input_stride)
    if residual is not None:
        x.check_activation(op, "residual", residual, (x.count, x.channels, height, width))
        if residual_mask is not None:
            Operand(op, "residual", residual).check_mask(op, "residual_mask", residual_mask, x.channels)
    elif residual_mask is not None:
        refuse(op, "residual_mask", "None where there is no residual", residual_mask)
    planes = len(dy) > 1 and dy[1] is not None and g.channels == 1
    return x.is_empty or planes or (residual_mask is not None and x.channels == 1)


def _matrix(op: str, weight: Tensor | None) -> tuple[int, int]:
    if weight is None or weight.dim() != 2 or weight.dtype not in STATISTICS_DTYPES or weight.numel() == 0:
        refuse(op, "weight", "a matrix (outputs, inputs) in a floating-point dtype", weight)
    return weight.shape[0], weight.shape[1]


def _check_wide(
    op: str,
    weight: Tensor,
    names: Sequence[str],
    operands: Sequence[Tensor | None],
    size: tuple[int, ...],
    optional: int = 0,
) -> None:
    """``operands``: vectors or matrices of ``size`` in the statistics dtype of ``weight``; the first may be None."""
    wide, device = STATISTICS_DTYPES[weight.dtype], device_of(weight)
    for i, x in enumerate(operands):
        if x is None:
            fits = i < optional
        else:
            fits = (
                x.shape == size
                and x.dtype is wide
                and x.is_contiguous()
                and (device is None or x.get_device() == device)
            )
        if not fits:
            refuse(op, names[i], f"contiguous {wide} of shape {size}, on the weight's device", x)


def fold_statistics(
    weight: Tensor, mean: Tensor, covariance: Tensor, shift: Tensor | None, eps: float
) -> bool:
    op = "fold_statistics"
    _, k = _matrix(op, weight)
    _check_wide(op, weight, ("shift", "mean"), (shift, mean), (k,), optional=1)
    _check_wide(op, weight, ("covariance",), (covariance,), (k, k))
    return False


def fold_gradients(
    weight: Tensor,
    gamma: Tensor | None,
    mean_y: Tensor,
    invstd: Tensor,
    mean: Tensor | None,
    covariance: Tensor | None,
    sum_dz: Tensor,
    q: Tensor,
    pixels: int,
) -> bool:
    op = "fold_gradients"
    n, k = _matrix(op, weight)
    of_outputs = (gamma, mean_y, invstd, sum_dz)
    _check_wide(op, weight, ("gamma", "mean_y", "invstd", "sum_dz"), of_outputs, (n,), optional=1)
    _check_wide(op, weight, ("q",), (q,), (n, k))
    if (mean is None) != (covariance is None):
        refuse(op, "covariance", "None where mean is, and nowhere else", covariance)
    if mean is not None:
        _check_wide(op, weight, ("mean",), (mean,), (k,))
        _check_wide(op, weight, ("covariance",), (covariance,), (k, k))
    if not (mean is None or 0 < pixels < 2**63):
        refuse(op, "pixels", "at least 1", pixels)
    return False


def rectified_mean(weight: Tensor, bias: Tensor) -> bool:
    op = "rectified_mean"
    if weight is None or weight.dim() != 1 or STATISTICS_DTYPES.get(weight.dtype) is not weight.dtype:
        refuse(op, "weight", "a float32 or float64 vector", weight)
    _check_wide(op, weight, ("weight", "bias"), (weight, bias), tuple(weight.shape))
    return weight.numel() == 0

"""Whether the operands of a composition fit each other, once for whatever runs it: Triton kernels do not ask.

Each function has the arguments of the op of its name. It raises ValueError where sizes, dtypes, devices or layouts do
not fit, and returns whether the reference has to run: without pixels there is nothing to launch, and the mask of a
single channel may have a row for each plane, where kernels expect one for each pixel.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from resnet_fused.ops._operands import (
    MOST,
    Fields,
    Image,
    MaybeTensor,
    activation,
    device_of,
    given,
    gradient,
    outputs_of,
    refuse,
)
from resnet_fused.reference.layout import STATISTICS_DTYPES

#: Where strides reach further, oneDNN's gradient of a convolution's input ends the process (torch 2.13, also in eager).
_MOST_APART = 2**18


def _convolved(
    op: str,
    x: Image,
    conv: MaybeTensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[int, int, int, int]:
    """The shape of what ``conv`` makes of ``x``."""
    if conv is None or conv.dim() != 4:
        refuse(op, "conv", "a weight (outputs, C / groups, kh, kw)", conv)
    if (
        len(stride) != 2
        or len(padding) != 2
        or len(dilation) != 2
        or not (0 < stride[0] < MOST and 0 < stride[1] < MOST)
        or not (0 <= padding[0] < MOST and 0 <= padding[1] < MOST)
        or not (0 < dilation[0] < MOST and 0 < dilation[1] < MOST)
        or not 0 < groups < MOST
    ):
        found = (*map(tuple, (stride, padding, dilation)), groups)
        refuse(op, "geometry", "two strides, paddings and dilations of a convolution, and groups", found)
    outputs, _, down, across = conv.shape
    x.check_weight(op, "conv", conv, (outputs, x.channels // groups, down, across))
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
        refuse(op, "conv", f"a weight that convolves {groups} groups of an input of shape {size}", conv)
    return x.count, outputs, height, width


def conv_stats(
    source: Fields,
    conv: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    eps: float,
    measure: bool,
    gamma: MaybeTensor = None,
    beta: MaybeTensor = None,
) -> bool:
    x = activation("conv_stats", "source", source)
    _, outputs, _, _ = _convolved("conv_stats", x, conv, stride, padding, dilation, groups)
    x.check_vectors("conv_stats", "", ("gamma", "beta"), (gamma, beta), outputs)
    return x.is_empty


def gram_of(source: Fields, every: Sequence[int]) -> bool:
    x = activation("gram_of", "source", source)
    x.subsampled("gram_of", "every", every)
    return x.is_empty


def expand(
    source: Fields,
    conv: MaybeTensor,
    norm: Fields,
    skip: Tensor,
    skip_shift: MaybeTensor,
    skip_conv: MaybeTensor,
    skip_norm: Fields,
    every: Sequence[int],
) -> bool:
    op = "expand"
    x, other = activation(op, "source", source), Image(op, "skip", skip)
    outputs = x.channels if conv is None else outputs_of(conv)
    if conv is not None:
        x.check_weight(op, "conv", conv, (outputs, x.channels, 1, 1))
    elif any(field is not None for field in source[1:]):
        refuse(op, "source", "an activation alone where there is no conv", given(source))
    height, width = other.subsampled(op, "every", every)
    if (x.count, x.height, x.width, x.dtype) != (other.count, height, width, other.dtype):
        expected = f"{x.dtype} of shape {(x.count, other.channels, x.height, x.width)} at its pixels {(*every,)} apart"
        refuse(op, "skip", expected, skip)
    if skip_conv is not None:
        x.check_weight(op, "skip_conv", skip_conv, (outputs, other.channels, 1, 1))
        x.check_vectors(op, "", ("skip_shift",), (skip_shift,), other.channels)
    elif (
        skip_shift is not None or other.channels != outputs or (height, width) != (other.height, other.width)
    ):
        expected = (
            f"of shape {(x.count, outputs, x.height, x.width)}, without skip_shift, as there is no skip_conv"
        )
        refuse(op, "skip", expected, skip)
    x.check_norm(op, "norm", norm, outputs)
    x.check_norm(op, "skip_norm", skip_norm, outputs, required=False)
    return x.is_empty or outputs == 1


def _folded_branch(op: str, operand: str, grad: Image, fields: Fields, every: Sequence[int]) -> Image:
    """The input of a folded convolution whose output has the pixels of ``grad``."""
    x = activation(op, operand, fields)
    height, width = x.subsampled(op, "every" if operand == "source" else "skip_every", every)
    if (x.count, height, width, x.dtype) != (grad.count, grad.height, grad.width, grad.dtype):
        size = (grad.count, x.channels, grad.height, grad.width)
        refuse(op, f"{operand}.x", f"{grad.dtype} of shape {size} at its pixels {(*every,)} apart", fields[0])
    if len(fields) > 1 and fields[1] is not None and (operand == "skip" or tuple(every) != (1, 1)):
        refuse(op, operand, "an activation without statistics, or at all pixels", given(fields))
    return x


def folded_wgrad(
    grad: Tensor, bits: Tensor, source: Fields, every: Sequence[int], skip: Fields, skip_every: Sequence[int]
) -> bool:
    op = "folded_wgrad"
    g = Image(op, "grad", grad)
    g.check_mask(op, "bits", bits, g.channels)
    _folded_branch(op, "source", g, source, every)
    if skip:
        _folded_branch(op, "skip", g, skip, skip_every)
    else:
        g.subsampled(op, "skip_every", skip_every)
    return g.is_empty or g.channels == 1


def _check_factors(op: str, operand: str, factors: Fields, g: Image, channels: int) -> None:
    if len(factors) != 3 or (factors[1] is None) != (factors[2] is None):
        refuse(op, operand, "scaled, and both or neither of square and vector", given(factors))
    scaled, square, vector = factors
    g.check_weight(op, operand, scaled, (g.channels, channels, 1, 1))
    if square is not None:
        g.check_weight(op, operand, square, (channels, channels, 1, 1))
        g.check_vectors(op, operand, ("vector",), (vector,), channels)


def folded_dgrad(
    grad: Tensor,
    bits: Tensor,
    factors: Fields,
    source: Fields,
    every: Sequence[int],
    skip_factors: Fields,
    skip: Fields,
    skip_every: Sequence[int],
) -> bool:
    op = "folded_dgrad"
    g = Image(op, "grad", grad)
    g.check_mask(op, "bits", bits, g.channels)
    x = _folded_branch(op, "source", g, source, every)
    _check_factors(op, "factors", factors, g, x.channels)
    if skip:
        other = _folded_branch(op, "skip", g, skip, skip_every)
        _check_factors(op, "skip_factors", skip_factors, g, other.channels)
    elif skip_factors:
        refuse(op, "skip_factors", "empty where there is no skip", given(skip_factors))
    else:
        g.subsampled(op, "skip_every", skip_every)
    return g.is_empty or g.channels == 1


def conv_backward(
    dy: Fields,
    source: Fields,
    conv: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: MaybeTensor,
    residual_bits: MaybeTensor,
    every: Sequence[int],
    needs: Sequence[bool],
) -> bool:
    op = "conv_backward"
    g, x = gradient(op, dy), activation(op, "source", source)
    expected = _convolved(op, x, conv, stride, padding, dilation, groups)
    if (g.count, g.channels, g.height, g.width) != expected or g.dtype is not x.dtype or g.device != x.device:
        refuse(op, "dy.g", f"{x.dtype} of shape {expected}, on the input's device", dy[0])
    if len(needs) != 2:
        refuse(op, "needs", "two flags", needs)
    height, width = x.subsampled(op, "every", every)
    if residual is not None:
        x.check_activation(op, "residual", residual, (x.count, x.channels, height, width))
        if residual_bits is not None:
            Image(op, "residual", residual).check_mask(op, "residual_bits", residual_bits, x.channels)
    elif residual_bits is not None:
        refuse(op, "residual_bits", "None where there is no residual", residual_bits)
    planes = len(dy) > 1 and dy[1] is not None and g.channels == 1
    return x.is_empty or planes or (residual_bits is not None and x.channels == 1)


def gram(c: Tensor) -> bool:
    return Image("gram", "c", c).is_empty


def folded_add_relu(
    y: Tensor,
    conv: MaybeTensor,
    mean: Tensor,
    invstd: Tensor,
    weight: MaybeTensor,
    bias: MaybeTensor,
    skip: Tensor,
    skip_conv: MaybeTensor,
    skip_mean: MaybeTensor,
    skip_invstd: MaybeTensor,
    skip_weight: MaybeTensor,
    skip_bias: MaybeTensor,
) -> bool:
    op = "folded_add_relu"
    x = Image(op, "y", y)
    outputs = x.channels if conv is None else outputs_of(conv)
    if conv is not None:
        x.check_weight(op, "conv", conv, (outputs, x.channels, 1, 1))
    others = outputs if skip_conv is None else Image(op, "skip", skip).channels
    x.check_activation(op, "skip", skip, (x.count, others, x.height, x.width))
    if skip_conv is not None:
        x.check_weight(op, "skip_conv", skip_conv, (outputs, others, 1, 1))
    x.check_norm(op, "y", (mean, invstd, weight, bias), outputs)
    x.check_norm(op, "skip", (skip_mean, skip_invstd, skip_weight, skip_bias), outputs, required=False)
    return x.is_empty or outputs == 1


def folded_backward(grad: Tensor, mask: Tensor, inputs: Sequence[Tensor], matrices: Sequence[Tensor]) -> bool:
    op = "folded_backward"
    g = Image(op, "grad", grad, any_layout=True)  # copied
    g.check_mask(op, "mask", mask, g.channels)
    if len(inputs) != len(matrices):
        refuse(op, "matrices", f"{len(inputs)}, one for each of the inputs", len(matrices))
    for c, matrix in zip(inputs, matrices, strict=True):
        channels = Image(op, "inputs", c).channels
        g.check_activation(op, "inputs", c, (g.count, channels, g.height, g.width))
        g.check_weight(op, "matrices", matrix, (channels, g.channels, 1, 1))
    return g.is_empty or g.channels == 1


def add_product_(out: Tensor, a: Tensor, matrix: Tensor, vector: Tensor) -> bool:
    op = "add_product_"
    to, x = Image(op, "out", out), Image(op, "a", a)
    to.check_activation(op, "a", a, (to.count, x.channels, to.height, to.width))
    to.check_weight(op, "matrix", matrix, (to.channels, x.channels, 1, 1))
    to.check_vectors(op, "", ("vector",), (vector,), to.channels)
    if vector is None:
        refuse(op, "vector", "a vector", vector)
    return to.is_empty


def conv1x1_backward(dy: Tensor, x: Tensor, conv: Tensor, residual: MaybeTensor, mask: MaybeTensor) -> bool:
    op = "conv1x1_backward"
    g, source = Image(op, "dy", dy), Image(op, "x", x)
    source.check_activation(op, "dy", dy, (source.count, g.channels, source.height, source.width))
    source.check_weight(op, "conv", conv, (g.channels, source.channels, 1, 1))
    if residual is not None:
        # Of any layout: it is copied to that of x.
        source.check_in_any_layout(op, "residual", residual, tuple(x.shape))
    if mask is not None:
        if residual is None:
            refuse(op, "mask", "None where there is no residual", mask)
        source.check_mask(op, "mask", mask, source.channels)
    return source.is_empty or (mask is not None and source.channels == 1)


def _matrix(op: str, weight: MaybeTensor) -> tuple[int, int]:
    if weight is None or weight.dim() != 2 or weight.dtype not in STATISTICS_DTYPES or weight.numel() == 0:
        refuse(op, "weight", "a matrix (outputs, inputs) in a floating-point dtype", weight)
    return weight.shape[0], weight.shape[1]


def _check_wide(
    op: str, weight: Tensor, names: Sequence[str], operands: Fields, size: tuple[int, ...], optional: int = 0
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


def fold_statistics(weight: Tensor, mean: Tensor, covariance: Tensor, shift: MaybeTensor, eps: float) -> bool:
    op = "fold_statistics"
    _, k = _matrix(op, weight)
    _check_wide(op, weight, ("shift", "mean"), (shift, mean), (k,), optional=1)
    _check_wide(op, weight, ("covariance",), (covariance,), (k, k))
    return False


def fold_gradients(
    weight: Tensor,
    gamma: MaybeTensor,
    mean_y: Tensor,
    invstd: Tensor,
    mean: MaybeTensor,
    covariance: MaybeTensor,
    sum_dz: Tensor,
    product: Tensor,
    pixels: int,
) -> bool:
    op = "fold_gradients"
    n, k = _matrix(op, weight)
    of_outputs = (gamma, mean_y, invstd, sum_dz)
    _check_wide(op, weight, ("gamma", "mean_y", "invstd", "sum_dz"), of_outputs, (n,), optional=1)
    _check_wide(op, weight, ("product",), (product,), (n, k))
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

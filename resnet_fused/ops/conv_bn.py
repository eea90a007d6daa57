"""A convolution with the statistics of its output, and its backward, for lazy operands (types).

``conv_bn_stats`` and ``conv_backward`` have Triton kernels, and native ones for 3x3 convolutions on the CPU (conv3x3),
that compute the operands' values in their prologues; the vendor's implementation materializes them first. See
reference.conv_bn for what they compute.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.layout import new_activation, statistics_dtype
from resnet_fused.ops import _checks
from resnet_fused.ops.bn_relu import bn_relu_backward_reduce
from resnet_fused.ops.bn_stats import batch_norm_stats
from resnet_fused.ops.conv3x3 import conv3x3_bn_stats, conv3x3_dgrad, conv3x3_wgrad, runs_conv3x3
from resnet_fused.ops.conv_wgrad import conv_wgrad, runs_conv_wgrad
from resnet_fused.ops.cpu_rules import supported
from resnet_fused.ops.dispatch import (
    MAX_KERNEL_SIZE,
    MAX_NUMEL,
    are_given,
    coefficient_kernels,
    fastest,
    fastest_sharing,
    operand_is_given,
    runs_triton,
    tunable,
)
from resnet_fused.ops.padding_taps import taps_inside
from resnet_fused.ops.registry import register_op
from resnet_fused.ops.vendor_conv import (
    is_pointwise,
    materialize,
    materialize_gradient,
    vendor_conv1x1_backward,
    vendor_dgrad,
    vendor_wgrad,
)
from resnet_fused.reference import conv_bn as reference
from resnet_fused.types import (
    Activation,
    ConvGeometry,
    Gradient,
    Pair,
    make_bn_coeffs,
    make_dy_coeffs,
    pair,
)

_GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups"


def empty_vectors(like: Tensor, count: int) -> tuple[Tensor, ...]:
    """Vectors without elements, since an op always has as many results."""
    return tuple(like.new_empty(0, dtype=statistics_dtype(like.dtype)) for _ in range(count))


def new_vectors(like: Tensor, channels: int, count: int) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(channels, dtype=statistics_dtype(like.dtype)) for _ in range(count))


def new_coeffs(like: Tensor, channels: int) -> Tensor:
    return like.new_empty(3, channels, dtype=statistics_dtype(like.dtype))


def _geometry(
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> ConvGeometry:
    return ConvGeometry(pair(stride), pair(padding), pair(dilation), groups)


def _sizes(x: Tensor, weight: Tensor, geometry: ConvGeometry) -> tuple[int, ...]:
    """What distinguishes convolutions for the autotuner."""
    return *x.shape, *weight.shape, *geometry.stride, *geometry.padding, *geometry.dilation


def bn_sums(da: Tensor, a: Activation) -> tuple[Tensor, ...]:
    """What backward of the batch norm of ``a`` needs of da: sum_dz, sum_dz_xhat and dy_coeffs; empty without one."""
    if a.mean is None or a.invstd is None:
        return empty_vectors(da, 3)
    sums: tuple[Tensor, Tensor] = bn_relu_backward_reduce(da, *a[:5])
    return *sums, _dy_coeffs(a, *sums)


def _dy_coeffs(a: Activation, sum_dz: Tensor, sum_dz_xhat: Tensor) -> Tensor:
    """``make_dy_coeffs`` of the batch norm of ``a``."""
    assert a.mean is not None and a.invstd is not None
    norm = a.mean, a.invstd, a.weight, a.bias
    coeffs = _bn_coeffs(a.x, *norm) if a.bn_coeffs is None else a.bn_coeffs
    make = coefficient_kernels().dy_coeffs_of if runs_triton(a.x) else make_dy_coeffs
    made: Tensor = make(sum_dz, sum_dz_xhat, a.mean, a.invstd, coeffs, a.x.numel() // a.x.shape[1])
    return made


def fake_bn_sums(a: Activation) -> tuple[Tensor, ...]:
    if a.mean is None:
        return empty_vectors(a.x, 3)
    channels = a.x.shape[1]
    return *new_vectors(a.x, channels, 2), new_coeffs(a.x, channels)


def _bn_coeffs(y: Tensor, mean: Tensor, invstd: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    """``make_bn_coeffs`` of a batch norm of ``y``."""
    make = coefficient_kernels().bn_coeffs_of if runs_triton(y) else make_bn_coeffs
    coeffs: Tensor = make(mean, invstd, gamma, beta)
    return coeffs


# Forward


def _conv_bn_stats(
    a: Activation,
    weight: Tensor,
    geometry: ConvGeometry,
    eps: float,
    training: bool,
    gamma: Tensor | None,
    beta: Tensor | None,
    coeffs: bool,
) -> tuple[Tensor, ...]:
    if (crop := taps_inside(a.x, weight, geometry)) is not None:
        (rows, cols), geometry = crop
        weight = weight[:, :, rows, cols].contiguous(memory_format=torch.channels_last)

    def vendor() -> tuple[Tensor, ...]:
        conv = weight, None, *geometry[:3], False, [0, 0], geometry.groups
        y = torch.ops.aten.convolution.default(materialize(a), *conv)
        y = y.contiguous(memory_format=torch.channels_last)
        if not training:
            return y, *empty_vectors(y, 4)
        mean, var, invstd = batch_norm_stats(y, eps)
        bn_coeffs = _bn_coeffs(y, mean, invstd, gamma, beta) if coeffs else empty_vectors(y, 1)[0]
        return y, mean, var, invstd, bn_coeffs

    if not coeffs and a.shift is None and runs_conv3x3("forward", a.x, weight, geometry):
        return *conv3x3_bn_stats(a, weight, eps, training), empty_vectors(a.x, 1)[0]
    height, width = geometry.out_size(a.x, weight)
    addressable = len(a.x) * height * width * len(weight) < MAX_NUMEL
    has_kernel = runs_triton(a.x, geometry.groups) and max(weight.shape[2:]) <= MAX_KERNEL_SIZE
    if not (coeffs and has_kernel and addressable):
        return vendor()
    sizes = (*_sizes(a.x, weight, geometry), *operand_is_given(a), training)
    arguments = (a, weight, geometry, eps, training, gamma, beta)
    exact = functools.partial(reference.conv_bn_stats, coeffs=True)
    candidate = tunable("conv_bn_stats", a.x, sizes, arguments, vendor, exact)
    results: tuple[Tensor, ...] = fastest(candidate, a.x.device)
    return results


def _fake_conv_bn_stats(
    a: Activation,
    weight: Tensor,
    geometry: ConvGeometry,
    eps: float,
    training: bool,
    gamma: Tensor | None,
    beta: Tensor | None,
    coeffs: bool,
) -> tuple[Tensor, ...]:
    x, outputs = a.x, len(weight)
    y = new_activation(x, outputs, *geometry.out_size(x, weight))
    if not training:
        return y, *empty_vectors(x, 4)
    return y, *new_vectors(x, outputs, 3), new_coeffs(x, outputs) if coeffs else empty_vectors(x, 1)[0]


def _forward_operands(
    a: list[Tensor], weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int, *bn: Any
) -> tuple[Any, ...]:
    return Activation(*a), weight, _geometry(stride, padding, dilation, groups), *bn


#: y = conv(a) and the statistics of its channels.
conv_bn_stats = register_op(
    f"conv_bn_stats(Tensor?[] a, Tensor weight, {_GEOMETRY}, float eps, bool training, Tensor? gamma, Tensor? beta,"
    " bool coeffs) -> (Tensor y, Tensor mean, Tensor var, Tensor invstd, Tensor bn_coeffs)",
    reference.conv_bn_stats,
    _fake_conv_bn_stats,
    _conv_bn_stats,
    triton=True,
    check=_checks.conv_bn_stats,
    operands=_forward_operands,
    on_cpu=supported("3x3 of stride 1"),
)


# Backward


def _conv_backward(
    dy: Gradient,
    a: Activation,
    weight: Tensor,
    geometry: ConvGeometry,
    residual: Tensor | None,
    residual_mask: Tensor | None,
    input_stride: Pair,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    if (crop := taps_inside(a.x, weight, geometry)) is not None:
        (rows, cols), geometry = crop
        inside = weight[:, :, rows, cols].contiguous(memory_format=torch.channels_last)
        *results, dinside = _conv_backward(
            dy, a, inside, geometry, residual, residual_mask, input_stride, needs
        )
        if not needs[1]:
            return *results, dinside
        dweight = torch.empty(weight.shape, dtype=dinside.dtype, memory_format=torch.channels_last).zero_()
        dweight[:, :, rows, cols] = dinside
        return *results, dweight
    rest = residual, residual_mask, input_stride
    needs_input, needs_weight = needs
    gradients: list[Any]
    if runs_triton(a.x, geometry.groups) and dy.g.numel() < MAX_NUMEL:
        gradients = _fastest_gradients(dy, a, weight, geometry, rest, needs)
    else:
        gradients = _gradients(dy, a, weight, geometry, rest, needs)
    dweight = gradients[0] if needs_weight else empty_vectors(a.x, 1)[0]
    da, *sums = gradients[-1] if needs_input else (a.x.new_empty(0), None)
    return da, *(empty_vectors(a.x, 3) if sums[0] is None else sums), dweight


def _gradients(
    dy: Gradient,
    a: Activation,
    weight: Tensor,
    geometry: ConvGeometry,
    rest: tuple[Tensor | None, Tensor | None, Pair],
    needs: list[bool],
) -> list[Any]:
    """The gradients that are needed, the weight's first: each by a native kernel or by the vendor."""
    by_dgrad, by_winograd = (
        needed and rest[2] == (1, 1) and a.shift is None and runs_conv3x3(name, a.x, weight, geometry)
        for name, needed in zip(("dgrad", "wgrad"), needs, strict=True)
    )
    by_gemm = needs[1] and not by_winograd and _runs_wgrad(dy, a, weight, geometry)
    if (by_dgrad, by_winograd or by_gemm) != tuple(needs):
        dy = Gradient(materialize_gradient(dy))
    dweight, dinput = None, None
    if by_winograd:
        dweight = conv3x3_wgrad(dy, a)
    elif by_gemm:
        dweight = conv_wgrad(dy, a, weight.shape[2:], geometry)[0]
    is_chunked = needs[0] and is_pointwise(weight, geometry) and geometry.stride == rest[2] == (1, 1)
    missing = needs[1] and dweight is None
    if missing and not is_chunked:
        dweight = vendor_wgrad(dy.g, a, weight, geometry)
    if by_dgrad:
        da, *sums = conv3x3_dgrad(dy, weight, a, *rest[:2])
        dinput = (da, *sums, _dy_coeffs(a, *sums) if sums[0].numel() else sums[0])
    elif is_chunked:
        x = materialize(a) if missing else a.x
        da, by_chunks = vendor_conv1x1_backward(dy.g, x, weight, *rest[:2], missing)
        dweight = by_chunks if missing else dweight
        dinput = (da, *bn_sums(da, a))
    elif needs[0]:
        da = vendor_dgrad(dy.g, a.x, weight, geometry, *rest)
        dinput = (da, *bn_sums(da, a))
    return [gradient for gradient in (dweight, dinput) if gradient is not None]


def _runs_wgrad(dy: Gradient, a: Activation, weight: Tensor, geometry: ConvGeometry) -> bool:
    return a.shift is None and runs_conv_wgrad(dy.g, weight.shape, geometry.groups)


def _fastest_gradients(
    dy: Gradient,
    a: Activation,
    weight: Tensor,
    geometry: ConvGeometry,
    rest: tuple[Tensor | None, Tensor | None, Pair],
    needs: list[bool],
) -> list[Any]:
    """The gradients that are needed, the weight's first: each by Triton or by the vendor, which share dy in memory."""
    # Once for both gradients.
    dy, a = coefficient_kernels().with_dy_coeffs(dy), coefficient_kernels().with_bn_coeffs(a)

    def materialize_dy(config: Any = None) -> Tensor:
        return materialize_gradient(dy)

    value = functools.cache(materialize_dy)

    def run_dgrad() -> tuple[Tensor, ...]:
        da = vendor_dgrad(value(), a.x, weight, geometry, *rest)
        return da, *bn_sums(da, a)

    def run_wgrad() -> Tensor:
        return vendor_wgrad(value(), a, weight, geometry)

    x, (residual, residual_mask, input_stride) = a.x, rest
    sizes = _sizes(x, weight, geometry)
    candidates = []
    if needs[1]:
        flags = operand_is_given(dy) + operand_is_given(a)
        arguments: tuple[Any, ...] = (dy, a, weight, geometry)
        candidates.append(tunable("wgrad", x, (*sizes, *flags), arguments, run_wgrad, reference.wgrad))
    if needs[0]:
        flags = operand_is_given(dy) + operand_is_given(a) + are_given((residual, residual_mask))
        has_kernel = max(weight.shape[2:]) <= MAX_KERNEL_SIZE
        has_kernel = has_kernel and (max(geometry.stride) == 1 or max(geometry.dilation) == 1)
        key, arguments = (*sizes, *input_stride, *flags), (dy, weight, geometry, a, *rest)
        candidates.append(tunable("dgrad", x, key, arguments, run_dgrad, reference.dgrad, has_kernel))
    flags = operand_is_given(dy)
    shared = tunable(
        "gradient", dy.g, (*dy.g.shape, *flags), (), materialize_dy, materialize_dy, has_kernel=False
    )
    return fastest_sharing(candidates, shared, x.device)


def _fake_conv_backward(dy: Gradient, a: Activation, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    x, dtype, (needs_input, needs_weight) = a.x, statistics_dtype(a.x.dtype), rest[-1]
    da, sums, dweight = x.new_empty(0), empty_vectors(x, 3), empty_vectors(x, 1)[0]
    if needs_input:
        da, sums = torch.empty_like(x), fake_bn_sums(a)
    if needs_weight:
        dweight = torch.empty(weight.shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
    return da, *sums, dweight


def _backward_operands(dy: list[Tensor], *args: Any) -> tuple[Any, ...]:
    *forward, residual, residual_mask, input_stride, needs = args
    return Gradient(*dy), *_forward_operands(*forward), residual, residual_mask, pair(input_stride), needs


#: The gradients w.r.t. a convolution's input and weight, and the sums that backward of the input's batch norm needs.
conv_backward = register_op(
    f"conv_backward(Tensor?[] dy, Tensor?[] a, Tensor weight, {_GEOMETRY}, Tensor? residual, Tensor? residual_mask,"
    " int[] input_stride, bool[] needs) -> (Tensor da, Tensor sum_dz, Tensor sum_dz_xhat, Tensor dy_coeffs,"
    " Tensor dweight)",
    reference.conv_backward,
    _fake_conv_backward,
    _conv_backward,
    triton=True,
    check=_checks.conv_backward,
    operands=_backward_operands,
    on_cpu=supported("3x3 of stride 1 and weight gradients"),
)

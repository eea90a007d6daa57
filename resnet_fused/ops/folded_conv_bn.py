"""A 1x1 convolution folded with the batch norm after it: forward and backward never store the convolution's output.

See docs/training-fold.md for the mathematics, and reference.folded_conv_bn for what the ops compute. The vendor's
implementation goes through the batch in cache-sized chunks: a GEMM of the vendor's library, then a native op on what it
computed. What remains per channel is in fold_algebra.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.layout import mask_shape, new_activation, statistics_dtype
from resnet_fused.ops import _checks
from resnet_fused.ops.bn_add_relu import bn_add_relu_out
from resnet_fused.ops.bn_bn_add_relu import bn_bn_add_relu_out
from resnet_fused.ops.bn_stats import batch_norm_stats
from resnet_fused.ops.conv_bn import (
    bn_sums,
    empty_vectors,
    fake_bn_sums,
    new_vectors,
)
from resnet_fused.ops.conv_wgrad import POINTWISE, conv_wgrad, runs_conv_wgrad
from resnet_fused.ops.cpu_rules import supported
from resnet_fused.ops.dispatch import (
    MAX_NUMEL,
    are_given,
    fastest,
    operand_is_given,
    runs_triton,
    tunable,
)
from resnet_fused.ops.masked_grad import fresh_like, masked_grad
from resnet_fused.ops.registry import register_op
from resnet_fused.ops.vendor_conv import materialize
from resnet_fused.ops.vendor_gemm import (
    addmm_nt_,
    chunked_mm_tn,
    chunks,
    mm_nt,
    mm_nt_out,
    mm_tn,
    rows_per_chunk,
)
from resnet_fused.reference import folded_conv_bn as reference
from resnet_fused.types import Activation, DgradFactors, Gradient, Pair, pair


def _operand(fields: Sequence[Tensor]) -> Activation | None:
    return Activation(*fields) if fields else None


# Statistics


def _input_covariance(a: Activation, input_stride: Pair) -> tuple[Tensor, Tensor]:
    def vendor() -> tuple[Tensor, Tensor]:
        c = materialize(a, input_stride)
        mean, var, _ = batch_norm_stats(c, 0.0)
        pixels = c.numel() // c.shape[1]
        if runs_conv_wgrad(c, (c.shape[1], c.shape[1], 1, 1)):
            products = conv_wgrad(Gradient(c), Activation(c), (1, 1), POINTWISE)[0].flatten(1)
        else:
            products = chunked_mm_tn(c, c)
        covariance = (products / pixels).addr_(mean, mean, alpha=-1)
        # After a ReLU half of the pixels may have one value, whose square a GEMM sums with the same rounding error
        # each time. The variances of the outputs are mostly made of the diagonal.
        covariance.diagonal().copy_(var)
        return mean, covariance

    if not runs_triton(a.x):
        return vendor()
    sizes = (*a.x.shape, *input_stride, *operand_is_given(a))
    arguments = (a, input_stride)
    results: tuple[Tensor, Tensor] = fastest(
        tunable("input_covariance", a.x, sizes, arguments, vendor, reference.input_covariance), a.x.device
    )
    return results


def _fake_input_covariance(a: Activation, input_stride: Pair) -> tuple[Tensor, Tensor]:
    channels, dtype = a.x.shape[1], statistics_dtype(a.x.dtype)
    return a.x.new_empty(channels, dtype=dtype), a.x.new_empty(channels, channels, dtype=dtype)


#: Mean and covariance of the channels of a folded convolution's input.
input_covariance = register_op(
    "input_covariance(Tensor?[] a, int[] input_stride) -> (Tensor mean, Tensor covariance)",
    reference.input_covariance,
    _fake_input_covariance,
    _input_covariance,
    triton=True,
    check=_checks.input_covariance,
    on_cpu=supported("its GEMM"),
    operands=lambda a, input_stride: (Activation(*a), pair(input_stride)),
)


# Forward


def _vendor_conv1x1_bn_add_relu(
    a: Tensor,
    weight: Tensor | None,
    bn: Sequence[Tensor | None],
    skip: Tensor,
    skip_weight: Tensor | None,
    skip_bn: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor]:
    n, channels, height, width = a.shape
    out = fresh_like(a, n, channels if weight is None else weight.shape[0], height, width)
    mask = out.new_empty(mask_shape(out), dtype=torch.uint8)
    rows = rows_per_chunk(out, out.shape[1])
    for main, other, *outputs in zip(
        chunks(a, rows), chunks(skip, rows), chunks(out, rows), mask.split(rows), strict=True
    ):
        if weight is not None:
            main = mm_nt(main, weight)
        if skip_weight is not None:
            other = mm_nt(other, skip_weight)
        if skip_bn[0] is None:
            bn_add_relu_out(main, *bn, other, *outputs)
        else:
            bn_bn_add_relu_out(main, *bn, other, *skip_bn, *outputs)
    return out, mask


def _conv1x1_bn_add_relu(
    a: Activation,
    weight: Tensor | None,
    bn: tuple[Tensor | None, ...],
    skip: Activation,
    skip_weight: Tensor | None,
    skip_bn: tuple[Tensor | None, ...],
    input_stride: Pair,
) -> tuple[Tensor, Tensor]:
    def vendor() -> tuple[Tensor, Tensor]:
        shortcut = materialize(skip, input_stride)
        return _vendor_conv1x1_bn_add_relu(materialize(a), weight, bn, shortcut, skip_weight, skip_bn)

    outputs = a.x.shape[1] if weight is None else len(weight)
    largest = max(a.x.numel() // a.x.shape[1] * outputs, skip.x.numel())
    if not runs_triton(a.x) or largest >= MAX_NUMEL:
        return vendor()
    flags = operand_is_given(a) + are_given((weight, *bn, skip_weight, *skip_bn))
    sizes = (*a.x.shape, outputs, *skip.x.shape, *input_stride, *flags)
    arguments = (a, weight, bn, skip, skip_weight, skip_bn, input_stride)
    results: tuple[Tensor, Tensor] = fastest(
        tunable("conv1x1_bn_add_relu", a.x, sizes, arguments, vendor, reference.conv1x1_bn_add_relu),
        a.x.device,
    )
    return results


def _fake_conv1x1_bn_add_relu(a: Activation, weight: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    x = a.x
    out = new_activation(x, x.shape[1] if weight is None else weight.shape[0], x.shape[2], x.shape[3])
    return out, out.new_empty(mask_shape(out), dtype=torch.uint8)


def _forward_operands(
    a: list[Tensor],
    weight: Tensor | None,
    bn: list[Tensor],
    skip: Tensor,
    skip_shift: Tensor | None,
    skip_weight: Tensor | None,
    skip_bn: list[Tensor],
    input_stride: list[int],
) -> tuple[Any, ...]:
    shortcut = Activation(skip, shift=skip_shift), skip_weight, tuple(skip_bn), pair(input_stride)
    return Activation(*a), weight, tuple(bn), *shortcut


#: relu(bn(conv(a)) + shortcut) and the mask of its ReLU.
conv1x1_bn_add_relu = register_op(
    "conv1x1_bn_add_relu(Tensor?[] a, Tensor? weight, Tensor?[] bn, Tensor skip, Tensor? skip_shift,"
    " Tensor? skip_weight, Tensor?[] skip_bn, int[] input_stride) -> (Tensor out, Tensor mask)",
    reference.conv1x1_bn_add_relu,
    _fake_conv1x1_bn_add_relu,
    _conv1x1_bn_add_relu,
    triton=True,
    check=_checks.conv1x1_bn_add_relu,
    operands=_forward_operands,
)


# Backward: sums over the pixels, then the gradients w.r.t. the inputs
#
# dz is computed chunk by chunk in both, so it never exists in memory.


def _dz_chunks(grad: Tensor, mask: Tensor, rows: int, sum_dz: Tensor | None = None) -> Iterator[Tensor]:
    """dz = grad * mask in chunks of rows, in memory that the next chunk reuses; ``sum_dz``, (C,), is accumulated."""
    scratch = torch.empty_like(chunks(grad, rows)[0])
    for grad_chunk, mask_chunk in zip(chunks(grad, rows), mask.split(rows), strict=True):
        dz = scratch if grad_chunk.shape == scratch.shape else torch.empty_like(grad_chunk)
        masked_grad(grad_chunk, mask_chunk, dz, False, sum_dz)
        yield dz


def _sums_over_pixels(grad: Tensor, mask: Tensor, values: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """dz^T c for each input c, and dz summed over the pixels."""
    channels, dtype = grad.shape[1], statistics_dtype(grad.dtype)
    if all(runs_conv_wgrad(grad, (channels, c.shape[1], 1, 1)) for c in values):
        dz = Gradient(grad, mask)
        results = [conv_wgrad(dz, Activation(c), (1, 1), POINTWISE, c is values[0]) for c in values]
        return [q.flatten(1) for q, _ in results], results[0][1]
    sum_dz = grad.new_zeros(channels, dtype=torch.float64)
    qs = [grad.new_zeros(channels, c.shape[1], dtype=dtype) for c in values]
    rows = rows_per_chunk(grad, channels)
    c_chunks = zip(*(chunks(c, rows) for c in values), strict=True)
    for dz_chunk, cs in zip(_dz_chunks(grad, mask, rows, sum_dz), c_chunks, strict=True):
        for q, c in zip(qs, cs, strict=True):
            q += mm_tn(dz_chunk, c)
    return qs, sum_dz.to(dtype)


def _folded_wgrad(
    grad: Tensor,
    mask: Tensor,
    a: Activation,
    input_stride: Pair,
    skip: Activation | None,
    skip_input_stride: Pair,
) -> tuple[Tensor, ...]:
    def vendor() -> tuple[Tensor | None, ...]:
        values = [materialize(a, input_stride)]
        values += [] if skip is None else [materialize(skip, skip_input_stride)]
        qs, sum_dz = _sums_over_pixels(grad, mask, values)
        return qs[0], qs[1] if len(qs) > 1 else None, sum_dz

    largest = max(a.x.numel(), 0 if skip is None else skip.x.numel())
    if not runs_triton(grad) or largest >= MAX_NUMEL:
        q, skip_q, sum_dz = vendor()
    else:
        skip_sizes = [] if skip is None else skip.x.shape
        flags = operand_is_given(a)
        sizes = (*grad.shape, *a.x.shape, *input_stride, *flags, *skip_sizes, *skip_input_stride)
        arguments = (grad, mask, a, input_stride, skip, skip_input_stride)
        q, skip_q, sum_dz = fastest(
            tunable("folded_wgrad", grad, sizes, arguments, vendor, reference.folded_wgrad), grad.device
        )
    assert q is not None and sum_dz is not None
    return q, empty_vectors(grad, 1)[0] if skip_q is None else skip_q, sum_dz


def _fake_folded_wgrad(
    grad: Tensor, mask: Tensor, a: Activation, input_stride: Pair, skip: Activation | None, *_: Any
) -> tuple[Tensor, ...]:
    outputs, dtype = grad.shape[1], statistics_dtype(grad.dtype)
    skip_q = empty_vectors(grad, 1)[0]
    if skip is not None:
        skip_q = grad.new_empty(outputs, skip.x.shape[1], dtype=dtype)
    return grad.new_empty(outputs, a.x.shape[1], dtype=dtype), skip_q, new_vectors(grad, outputs, 1)[0]


def _wgrad_operands(
    grad: Tensor, mask: Tensor, a: list[Tensor], stride: list[int], skip: list[Tensor], skip_stride: list[int]
) -> tuple[Any, ...]:
    return grad, mask, Activation(*a), pair(stride), _operand(skip), pair(skip_stride)


#: Q = dz^T a of one or two folded convolutions, and dz summed over the pixels.
folded_wgrad = register_op(
    "folded_wgrad(Tensor grad, Tensor mask, Tensor?[] a, int[] input_stride, Tensor?[] skip, int[] skip_input_stride)"
    " -> (Tensor q, Tensor skip_q, Tensor sum_dz)",
    reference.folded_wgrad,
    _fake_folded_wgrad,
    _folded_wgrad,
    triton=True,
    check=_checks.folded_wgrad,
    on_cpu=supported("its GEMM"),
    operands=_wgrad_operands,
)


def _vendor_folded_dgrad(
    grad: Tensor, mask: Tensor, values: Sequence[Tensor], factors: Sequence[DgradFactors]
) -> list[Tensor]:
    """dz scaled + c matrix^T + vector for each input c.

    c matrix^T + vector, which is small beside dz scaled, comes first: added to what is rounded to 16 bits already it
    would be lost.
    """
    gradients = [fresh_like(c) for c in values]
    rows = rows_per_chunk(grad, grad.shape[1])
    transposed = [f.scaled.transpose(0, 1).contiguous() for f in factors if f.scaled is not None]
    c_chunks = zip(*(chunks(c, rows) for c in values), strict=True)
    da_chunks = zip(*(chunks(da, rows) for da in gradients), strict=True)
    for dz, cs, das in zip(_dz_chunks(grad, mask, rows), c_chunks, da_chunks, strict=True):
        for c, da, scaled, (_, matrix, vector) in zip(cs, das, transposed, factors, strict=True):
            if matrix is None:
                mm_nt_out(da, dz, scaled)
            else:
                mm_nt_out(da, c, matrix, vector)
                addmm_nt_(da, dz, scaled)
    return gradients


def _folded_dgrad(
    grad: Tensor,
    mask: Tensor,
    factors: DgradFactors,
    a: Activation,
    input_stride: Pair,
    skip_factors: DgradFactors,
    skip: Activation | None,
    skip_input_stride: Pair,
) -> tuple[Tensor, ...]:
    def vendor() -> tuple[Tensor | None, ...]:
        values = [materialize(a, input_stride)]
        if skip is not None:
            values.append(materialize(skip, skip_input_stride))
        da, *dskip = _vendor_folded_dgrad(grad, mask, values, [factors, skip_factors][: len(values)])
        return da, dskip[0] if dskip else None, *bn_sums(da, a)

    largest = max(a.x.numel(), 0 if skip is None else skip.x.numel())
    if not runs_triton(grad) or largest >= MAX_NUMEL:
        da, dskip, *sums = vendor()
    else:
        flags = operand_is_given(a) + are_given(factors)
        skip_sizes = [] if skip is None else [*are_given(skip_factors), *skip.x.shape]
        sizes = (*grad.shape, *a.x.shape, *input_stride, *flags, *skip_sizes, *skip_input_stride)
        arguments = (grad, mask, factors, a, input_stride, skip_factors, skip, skip_input_stride)
        da, dskip, *sums = fastest(
            tunable("folded_dgrad", grad, sizes, arguments, vendor, reference.folded_dgrad), grad.device
        )
    assert da is not None
    dskip = grad.new_empty(0) if dskip is None else dskip
    given = [x for x in sums if x is not None]
    return da, dskip, *(given or empty_vectors(da, 3))


def _fake_folded_dgrad(
    grad: Tensor,
    mask: Tensor,
    factors: DgradFactors,
    a: Activation,
    input_stride: Pair,
    skip_factors: DgradFactors,
    skip: Activation | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    size = grad.shape[2:]
    dskip = grad.new_empty(0) if skip is None else new_activation(grad, skip.x.shape[1], *size)
    return new_activation(grad, a.x.shape[1], *size), dskip, *fake_bn_sums(a)


def _dgrad_operands(grad: Tensor, mask: Tensor, factors: list[Tensor], *rest: Any) -> tuple[Any, ...]:
    a, input_stride, skip_factors, skip, skip_input_stride = rest
    shortcut = DgradFactors(*skip_factors), _operand(skip), pair(skip_input_stride)
    return grad, mask, DgradFactors(*factors), Activation(*a), pair(input_stride), *shortcut


#: da = dz scaled + a matrix^T + vector of one or two folded convolutions, and the sums of a's batch norm.
folded_dgrad = register_op(
    "folded_dgrad(Tensor grad, Tensor mask, Tensor?[] factors, Tensor?[] a, int[] input_stride,"
    " Tensor?[] skip_factors, Tensor?[] skip, int[] skip_input_stride)"
    " -> (Tensor da, Tensor dskip, Tensor sum_dz, Tensor sum_dz_xhat, Tensor dy_coeffs)",
    reference.folded_dgrad,
    _fake_folded_dgrad,
    _folded_dgrad,
    triton=True,
    check=_checks.folded_dgrad,
    operands=_dgrad_operands,
)

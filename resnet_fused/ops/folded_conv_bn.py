"""A 1x1 convolution folded with the batch norm after it: forward and backward never store the convolution's output.

See docs/training-fold.md for the mathematics, and reference.folded_conv_bn for what the ops compute. The vendor's
implementation goes through the batch in cache-sized chunks: a GEMM of the vendor's library, then a native op on what it
computed. What remains per channel is in fold_algebra.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.layout import mask_shape, statistics_dtype
from resnet_fused.ops import _checks
from resnet_fused.ops.bn_add_relu import bn_add_relu_out
from resnet_fused.ops.bn_bn_add_relu import bn_bn_add_relu_out
from resnet_fused.ops.bn_stats import batch_norm_stats
from resnet_fused.ops.conv_bn import (
    activation_of,
    bn_sums,
    empty_vectors,
    fake_bn_sums,
    materialize,
    materialize_gradient,
    new_activation,
    new_vectors,
)
from resnet_fused.ops.dispatch import (
    MAX_NUMEL,
    are_given,
    exactly,
    fastest,
    operand_is_given,
    runs_triton,
    tunable,
)
from resnet_fused.ops.masked_grad import fresh_like, masked_grad
from resnet_fused.ops.registry import register_op
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
from resnet_fused.types import Activation, DgradFactors, Gradient, Pair

Fields = list[Tensor | None]


def _pair(input_stride: Sequence[int]) -> Pair:
    return input_stride[0], input_stride[1]


# Statistics


def _input_covariance(fields: Fields, input_stride: list[int]) -> tuple[Tensor, Tensor]:
    a = activation_of(fields)

    def vendor() -> tuple[Tensor, Tensor]:
        c = materialize(a, input_stride)
        mean, var, _ = batch_norm_stats(c, 0.0)
        pixels = c.numel() // c.shape[1]
        covariance = (chunked_mm_tn(c, c) / pixels).addr_(mean, mean, alpha=-1)
        # After a ReLU half of the pixels may have one value, whose square a GEMM sums with the same rounding error
        # each time. The variances of the outputs are mostly made of the diagonal.
        covariance.diagonal().copy_(var)
        return mean, covariance

    if not runs_triton(a.x):
        return vendor()
    sizes = (*a.x.shape, *input_stride, *operand_is_given(a))
    exact = exactly(reference.input_covariance, a.x, fields, input_stride)
    arguments = (a, _pair(input_stride))
    found: tuple[Tensor, Tensor] = fastest(
        tunable("input_covariance", a.x, sizes, arguments, vendor, exact), a.x.device
    )
    return found


def _fake_input_covariance(fields: Fields, input_stride: list[int]) -> tuple[Tensor, Tensor]:
    x = activation_of(fields).x
    channels, dtype = x.shape[1], statistics_dtype(x.dtype)
    return x.new_empty(channels, dtype=dtype), x.new_empty(channels, channels, dtype=dtype)


#: Mean and covariance of the channels of a folded convolution's input.
input_covariance = register_op(
    "input_covariance(Tensor?[] a, int[] input_stride) -> (Tensor mean, Tensor covariance)",
    reference.input_covariance,
    _fake_input_covariance,
    _input_covariance,
    triton=True,
    check=_checks.input_covariance,
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
    fields: Fields,
    weight: Tensor | None,
    bn: Fields,
    skip: Tensor,
    skip_shift: Tensor | None,
    skip_weight: Tensor | None,
    skip_bn: Fields,
    input_stride: list[int],
) -> tuple[Tensor, Tensor]:
    a = activation_of(fields)

    def vendor() -> tuple[Tensor, Tensor]:
        shortcut = materialize(Activation(skip, shift=skip_shift), input_stride)
        return _vendor_conv1x1_bn_add_relu(materialize(a), weight, bn, shortcut, skip_weight, skip_bn)

    outputs = a.x.shape[1] if weight is None else len(weight)
    largest = max(a.x.numel() // a.x.shape[1] * outputs, skip.numel())
    if not runs_triton(a.x) or largest >= MAX_NUMEL:
        return vendor()
    flags = operand_is_given(a) + are_given((weight, *bn, skip_weight, *skip_bn))
    sizes = (*a.x.shape, outputs, *skip.shape, *input_stride, *flags)
    arguments = (a, weight, tuple(bn), skip, skip_shift, skip_weight, tuple(skip_bn), _pair(input_stride))
    rest = fields, weight, bn, skip, skip_shift, skip_weight, skip_bn, input_stride
    exact = exactly(reference.conv1x1_bn_add_relu, a.x, *rest)
    found: tuple[Tensor, Tensor] = fastest(
        tunable("conv1x1_bn_add_relu", a.x, sizes, arguments, vendor, exact), a.x.device
    )
    return found


def _fake_conv1x1_bn_add_relu(fields: Fields, weight: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    x = activation_of(fields).x
    out = new_activation(x, x.shape[1] if weight is None else weight.shape[0], x.shape[2], x.shape[3])
    return out, out.new_empty(mask_shape(out), dtype=torch.uint8)


#: relu(bn(conv(a)) + shortcut) and the mask of its ReLU.
conv1x1_bn_add_relu = register_op(
    "conv1x1_bn_add_relu(Tensor?[] a, Tensor? weight, Tensor?[] bn, Tensor skip, Tensor? skip_shift,"
    " Tensor? skip_weight, Tensor?[] skip_bn, int[] input_stride) -> (Tensor out, Tensor mask)",
    reference.conv1x1_bn_add_relu,
    _fake_conv1x1_bn_add_relu,
    _conv1x1_bn_add_relu,
    triton=True,
    check=_checks.conv1x1_bn_add_relu,
)


# Backward of lazy operands: sums over the pixels, then the gradients w.r.t. the inputs


def _folded_wgrad(
    grad: Tensor,
    mask: Tensor,
    fields: Fields,
    input_stride: list[int],
    skip_fields: Fields,
    skip_input_stride: list[int],
) -> tuple[Tensor, ...]:
    a, skip = activation_of(fields), activation_of(skip_fields) if skip_fields else None

    def vendor() -> tuple[Tensor | None, ...]:
        dz = materialize_gradient(Gradient(grad, mask))
        sum_dz = dz.sum((0, 2, 3), dtype=statistics_dtype(dz.dtype))
        skip_q = None if skip is None else chunked_mm_tn(dz, materialize(skip, skip_input_stride))
        return chunked_mm_tn(dz, materialize(a, input_stride)), skip_q, sum_dz

    largest = max(a.x.numel(), 0 if skip is None else skip.x.numel())
    if not runs_triton(grad) or largest >= MAX_NUMEL:
        q, skip_q, sum_dz = vendor()
    else:
        skip_sizes = [] if skip is None else skip.x.shape
        flags = operand_is_given(a)
        sizes = (*grad.shape, *a.x.shape, *input_stride, *flags, *skip_sizes, *skip_input_stride)
        arguments = (grad, mask, a, _pair(input_stride), skip, _pair(skip_input_stride))
        operands = fields, input_stride, skip_fields, skip_input_stride
        exact = exactly(reference.folded_wgrad, grad, grad, mask, *operands)
        q, skip_q, sum_dz = fastest(
            tunable("folded_wgrad", grad, sizes, arguments, vendor, exact), grad.device
        )
    assert q is not None and sum_dz is not None
    return q, empty_vectors(grad, 1)[0] if skip_q is None else skip_q, sum_dz


def _fake_folded_wgrad(
    grad: Tensor, mask: Tensor, fields: Fields, input_stride: list[int], skip_fields: Fields, *_: Any
) -> tuple[Tensor, ...]:
    outputs, dtype = grad.shape[1], statistics_dtype(grad.dtype)
    q, skip_q = (
        grad.new_empty(outputs, x[0].shape[1], dtype=dtype) if x and x[0] is not None else None
        for x in (fields, skip_fields)
    )
    assert q is not None
    skip_q = empty_vectors(grad, 1)[0] if skip_q is None else skip_q
    return q, skip_q, new_vectors(grad, outputs, 1)[0]


#: Q = dz^T a of one or two folded convolutions, and dz summed over the pixels.
folded_wgrad = register_op(
    "folded_wgrad(Tensor grad, Tensor mask, Tensor?[] a, int[] input_stride, Tensor?[] skip, int[] skip_input_stride)"
    " -> (Tensor q, Tensor skip_q, Tensor sum_dz)",
    reference.folded_wgrad,
    _fake_folded_wgrad,
    _folded_wgrad,
    triton=True,
    check=_checks.folded_wgrad,
)


def _vendor_input_gradient(
    dz: Tensor,
    a: Activation,
    input_stride: list[int],
    scaled: Tensor | None,
    matrix: Tensor | None,
    vector: Tensor | None,
) -> Tensor:
    """dz scaled + a matrix^T + vector."""
    assert scaled is not None
    da: Tensor = fresh_like(dz, None, scaled.shape[1])
    rows, transposed = rows_per_chunk(dz, dz.shape[1]), scaled.transpose(0, 1).contiguous()
    for da_chunk, dz_chunk in zip(chunks(da, rows), chunks(dz, rows), strict=True):
        mm_nt_out(da_chunk, dz_chunk, transposed)
    if matrix is not None and vector is not None:
        _add_gemm_(da, materialize(a, input_stride), matrix, vector)
    return da


def _folded_dgrad(
    grad: Tensor,
    mask: Tensor,
    factors: Fields,
    fields: Fields,
    input_stride: list[int],
    skip_factors: Fields,
    skip_fields: Fields,
    skip_input_stride: list[int],
) -> tuple[Tensor, ...]:
    a, skip = activation_of(fields), activation_of(skip_fields) if skip_fields else None

    def vendor() -> tuple[Tensor | None, ...]:
        dz = materialize_gradient(Gradient(grad, mask))
        da = _vendor_input_gradient(dz, a, input_stride, *factors)
        dskip = None if skip is None else _vendor_input_gradient(dz, skip, skip_input_stride, *skip_factors)
        return da, dskip, *bn_sums(da, a)

    largest = max(a.x.numel(), 0 if skip is None else skip.x.numel())
    if not runs_triton(grad) or largest >= MAX_NUMEL:
        da, dskip, *sums = vendor()
    else:
        flags = operand_is_given(a) + are_given((*factors, *skip_factors))
        skip_sizes = [] if skip is None else skip.x.shape
        sizes = (*grad.shape, *a.x.shape, *input_stride, *flags, *skip_sizes, *skip_input_stride)
        step, skip_step = _pair(input_stride), _pair(skip_input_stride)
        arguments = (
            grad,
            mask,
            DgradFactors(*factors),
            a,
            step,
            DgradFactors(*skip_factors),
            skip,
            skip_step,
        )
        operands = factors, fields, input_stride, skip_factors, skip_fields, skip_input_stride
        exact = exactly(reference.folded_dgrad, grad, grad, mask, *operands)
        da, dskip, *sums = fastest(
            tunable("folded_dgrad", grad, sizes, arguments, vendor, exact), grad.device
        )
    assert da is not None
    dskip = grad.new_empty(0) if dskip is None else dskip
    given = [x for x in sums if x is not None]
    return da, dskip, *(given or empty_vectors(da, 3))


def _fake_folded_dgrad(
    grad: Tensor,
    mask: Tensor,
    factors: Fields,
    fields: Fields,
    input_stride: list[int],
    skip_factors: Fields,
    *_: Any,
) -> tuple[Tensor, ...]:
    scaled = [f[0] for f in (factors, skip_factors) if f and f[0] is not None]
    found = [new_activation(grad, matrix.shape[1], grad.shape[2], grad.shape[3]) for matrix in scaled]
    sums = fake_bn_sums(activation_of(fields))
    return found[0], found[1] if len(found) > 1 else grad.new_empty(0), *sums


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
)


# Backward of operands in memory: one pass in which dz is read from the cache by both GEMMs


def _folded_backward(
    grad: Tensor, mask: Tensor, inputs: list[Tensor], matrices: list[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    grad = grad.contiguous(memory_format=torch.channels_last)
    sum_dz, qs, gradients = _new_gradients(grad, inputs, torch.float64)
    rows = rows_per_chunk(grad, grad.shape[1])
    scratch = torch.empty_like(chunks(grad, rows)[0])
    c_chunks = zip(*(chunks(c, rows) for c in inputs), strict=True)
    dc_chunks = zip(*(chunks(dc, rows) for dc in gradients), strict=True)
    for grad_chunk, mask_chunk, cs, dcs in zip(
        chunks(grad, rows), mask.split(rows), c_chunks, dc_chunks, strict=True
    ):
        dz = scratch if grad_chunk.shape == scratch.shape else torch.empty_like(grad_chunk)
        masked_grad(grad_chunk, mask_chunk, dz, False, sum_dz)
        for c, dc, matrix, q in zip(cs, dcs, matrices, qs, strict=True):
            q += mm_tn(dz, c)
            mm_nt_out(dc, dz, matrix)
    return sum_dz.to(statistics_dtype(grad.dtype)), qs, gradients


def _new_gradients(
    grad: Tensor, inputs: list[Tensor], sum_dtype: torch.dtype
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    channels, dtype = grad.shape[1], statistics_dtype(grad.dtype)
    return (
        grad.new_zeros(channels, dtype=sum_dtype),
        [grad.new_zeros(channels, c.shape[1], dtype=dtype) for c in inputs],
        [torch.empty_like(c, memory_format=torch.channels_last) for c in inputs],
    )


#: ``folded_wgrad``, and of ``folded_dgrad`` dz matrix^T, the part that needs no sums.
folded_backward = register_op(
    "folded_backward(Tensor grad, Tensor mask, Tensor[] inputs, Tensor[] matrices)"
    " -> (Tensor sum_dz, Tensor[] qs, Tensor[] gradients)",
    reference.folded_backward,
    lambda grad, mask, inputs, matrices: _new_gradients(grad, inputs, statistics_dtype(grad.dtype)),
    _folded_backward,
    check=_checks.folded_backward,
)


def _add_gemm_(out: Tensor, a: Tensor, matrix: Tensor, vector: Tensor) -> None:
    rows, vector = rows_per_chunk(out, max(out.shape[1], a.shape[1])), vector.to(out.dtype)
    for out_chunk, a_chunk in zip(chunks(out, rows), chunks(a, rows), strict=True):
        addmm_nt_(out_chunk, a_chunk, matrix, vector)


#: out += a matrix^T + vector: the rest of ``folded_dgrad``.
add_gemm_ = register_op(
    "add_gemm_(Tensor(a!) out, Tensor a, Tensor matrix, Tensor vector) -> ()",
    reference.add_gemm_,
    lambda *_: None,
    _add_gemm_,
    check=_checks.add_gemm_,
)

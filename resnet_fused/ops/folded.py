"""The passes of a block over its pixels where a 1x1 convolution is folded with the batch norm behind it.

Each goes through the batch in pieces, a product by the vendor's library and our own pass over what it made. See
docs/training-fold.md for the mathematics; what is left of it per channel is in _branch.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused.ops._matmul import (
    accumulate,
    activation,
    inner,
    pieces,
    rows_of,
    sum_of_inner,
    times,
    times_into,
)
from resnet_fused.ops._primitive import primitive
from resnet_fused.ops.batch_norm_stats import batch_norm_stats
from resnet_fused.ops.bn_add_relu import forward_pass_into as bn_add_relu_into
from resnet_fused.ops.bn_bn_add_relu import forward_pass_into as bn_bn_add_relu_into
from resnet_fused.ops.masked_grad import fresh, masked_grad
from resnet_fused.reference import folded as reference
from resnet_fused.reference.layout import mask_shape, statistics_dtype


def _gram(c: Tensor) -> tuple[Tensor, Tensor]:
    mean, _, _ = batch_norm_stats(c, 0.0)
    pixels = c.numel() // c.shape[1]
    return mean, (sum_of_inner(c, c) / pixels).addr_(mean, mean, alpha=-1)


def _fake_gram(c: Tensor) -> tuple[Tensor, Tensor]:
    channels, dtype = c.shape[1], statistics_dtype(c.dtype)
    return c.new_empty(channels, dtype=dtype), c.new_empty(channels, channels, dtype=dtype)


gram = primitive("gram(Tensor c) -> (Tensor mean, Tensor covariance)", reference.gram, _fake_gram, _gram)


def _new_output(y: Tensor, conv: Tensor | None) -> tuple[Tensor, Tensor]:
    n, c, h, w = y.shape
    out = fresh(y, n, c if conv is None else conv.shape[0], h, w)
    return out, out.new_empty(mask_shape(out), dtype=torch.uint8)


def _folded_add_relu(
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
    out, mask = _new_output(y, conv)
    main_rows, skip_rows, out_rows = rows_of(y), rows_of(skip), rows_of(out)
    for piece in pieces(len(out_rows), out.shape[1], out):
        main, other = main_rows[piece], skip_rows[piece]
        main = activation(main if conv is None else times(main, conv))
        other = activation(other if skip_conv is None else times(other, skip_conv))
        norm, to = (mean, invstd, weight, bias), (activation(out_rows[piece]), mask[piece])
        if skip_mean is None:
            bn_add_relu_into(main, *norm, other, *to)
        else:
            bn_bn_add_relu_into(main, *norm, other, skip_mean, skip_invstd, skip_weight, skip_bias, *to)
    return out, mask


folded_add_relu = primitive(
    "folded_add_relu(Tensor y, Tensor? conv, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias,"
    " Tensor skip, Tensor? skip_conv, Tensor? skip_mean, Tensor? skip_invstd, Tensor? skip_weight, Tensor? skip_bias)"
    " -> (Tensor out, Tensor mask)",
    reference.folded_add_relu,
    lambda y, conv, *_: _new_output(y, conv),
    _folded_add_relu,
)


def _folded_backward(
    grad: Tensor, mask: Tensor, inputs: list[Tensor], matrices: list[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    grad = grad.contiguous(memory_format=torch.channels_last)
    sums, products, gradients = _new_results(grad, inputs, torch.float64)
    grad_rows = rows_of(grad)
    for piece in pieces(len(grad_rows), grad.shape[1], grad):
        dz = torch.empty_like(grad_rows[piece])
        masked_grad(activation(grad_rows[piece]), mask[piece], activation(dz), False, sums)
        for c, matrix, product, gradient in zip(inputs, matrices, products, gradients, strict=True):
            product += inner(dz, rows_of(c)[piece])
            times_into(rows_of(gradient)[piece], dz, matrix)
    return sums.to(statistics_dtype(grad.dtype)), products, gradients


def _new_results(
    grad: Tensor, inputs: list[Tensor], sum_dtype: torch.dtype
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    channels, dtype = grad.shape[1], statistics_dtype(grad.dtype)
    return (
        grad.new_zeros(channels, dtype=sum_dtype),
        [grad.new_zeros(channels, c.shape[1], dtype=dtype) for c in inputs],
        [torch.empty_like(c, memory_format=torch.channels_last) for c in inputs],
    )


folded_backward = primitive(
    "folded_backward(Tensor grad, Tensor mask, Tensor[] inputs, Tensor[] matrices)"
    " -> (Tensor sum_dz, Tensor[] products, Tensor[] gradients)",
    reference.folded_backward,
    lambda grad, mask, inputs, matrices: _new_results(grad, inputs, statistics_dtype(grad.dtype)),
    _folded_backward,
)


def _add_product(out: Tensor, a: Tensor, matrix: Tensor, vector: Tensor) -> None:
    out_rows, rows = rows_of(out), rows_of(a)
    for piece in pieces(len(rows), max(out.shape[1], a.shape[1]), a):
        accumulate(out_rows[piece], rows[piece], matrix, vector.to(out.dtype))


add_product_ = primitive(
    "add_product_(Tensor(a!) out, Tensor a, Tensor matrix, Tensor vector) -> ()",
    reference.add_product_,
    lambda *_: None,
    _add_product,
)


def _conv1x1_backward(
    dy: Tensor, x: Tensor, conv: Tensor, residual: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    dx, dconv = _new_gradients(dy, x, conv)
    dconv.zero_()
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    transposed = conv.t().contiguous()
    dx_rows, dy_rows, x_rows = rows_of(dx), rows_of(dy), rows_of(x)
    for piece in pieces(len(x_rows), max(x.shape[1], dy.shape[1]), x):
        part, dy_part = dx_rows[piece], dy_rows[piece]
        if residual is None:
            times_into(part, dy_part, transposed)
        else:
            source = rows_of(residual)[piece]
            if mask is None:
                part.copy_(source)
            else:
                masked_grad(activation(source), mask[piece], activation(part), False, None)
            accumulate(part, dy_part, transposed)
        dconv += inner(dy_part, x_rows[piece])
    return dx, dconv


def _new_gradients(dy: Tensor, x: Tensor, conv: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor]:
    return fresh(x, *x.shape), torch.empty_like(conv, dtype=statistics_dtype(conv.dtype))


conv1x1_backward = primitive(
    "conv1x1_backward(Tensor dy, Tensor x, Tensor conv, Tensor? residual, Tensor? mask)"
    " -> (Tensor dx, Tensor dconv)",
    reference.conv1x1_backward,
    _new_gradients,
    _conv1x1_backward,
)

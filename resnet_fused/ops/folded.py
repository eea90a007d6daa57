"""The passes of a block over its pixels where a 1x1 convolution is folded with the batch norm behind it.

Each goes through the batch in pieces, a product by the vendor's library and our own pass over what it made. See
docs/training-fold.md for the mathematics; what is left of it per channel is in _branch.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused.ops import _checks
from resnet_fused.ops._matmul import (
    accumulate,
    convolution_backward,
    inner,
    pieces,
    rows_in_piece,
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
    mean, var, _ = batch_norm_stats(c, 0.0)
    pixels = c.numel() // c.shape[1]
    covariance = (sum_of_inner(c, c) / pixels).addr_(mean, mean, alpha=-1)
    # Behind a ReLU half of the pixels may have one value, whose square a product adds up with the same rounding error
    # each time. The variances of the outputs are mostly made of the diagonal.
    covariance.diagonal().copy_(var)
    return mean, covariance


def fake_gram(c: Tensor) -> tuple[Tensor, Tensor]:
    channels, dtype = c.shape[1], statistics_dtype(c.dtype)
    return c.new_empty(channels, dtype=dtype), c.new_empty(channels, channels, dtype=dtype)


gram = primitive(
    "gram(Tensor c) -> (Tensor mean, Tensor covariance)", reference.gram, fake_gram, _gram, check=_checks.gram
)


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
    rows = rows_in_piece(out, out.shape[1])
    norm, skip_norm = (mean, invstd, weight, bias), (skip_mean, skip_invstd, skip_weight, skip_bias)
    for main, other, *to in zip(
        pieces(y, rows), pieces(skip, rows), pieces(out, rows), mask.split(rows), strict=True
    ):
        if conv is not None:
            main = times(main, conv)
        if skip_conv is not None:
            other = times(other, skip_conv)
        if skip_mean is None:
            bn_add_relu_into(main, *norm, other, *to)
        else:
            bn_bn_add_relu_into(main, *norm, other, *skip_norm, *to)
    return out, mask


folded_add_relu = primitive(
    "folded_add_relu(Tensor y, Tensor? conv, Tensor mean, Tensor invstd, Tensor? weight, Tensor? bias,"
    " Tensor skip, Tensor? skip_conv, Tensor? skip_mean, Tensor? skip_invstd, Tensor? skip_weight, Tensor? skip_bias)"
    " -> (Tensor out, Tensor mask)",
    reference.folded_add_relu,
    lambda y, conv, *_: _new_output(y, conv),
    _folded_add_relu,
    check=_checks.folded_add_relu,
)


def _folded_backward(
    grad: Tensor, mask: Tensor, inputs: list[Tensor], matrices: list[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    grad = grad.contiguous(memory_format=torch.channels_last)
    sums, products, gradients = _new_results(grad, inputs, torch.float64)
    rows = rows_in_piece(grad, grad.shape[1])
    scratch = torch.empty_like(pieces(grad, rows)[0])
    c_pieces = zip(*(pieces(c, rows) for c in inputs), strict=True)
    dc_pieces = zip(*(pieces(dc, rows) for dc in gradients), strict=True)
    for part, bits, cs, dcs in zip(pieces(grad, rows), mask.split(rows), c_pieces, dc_pieces, strict=True):
        dz = scratch if part.shape == scratch.shape else torch.empty_like(part)
        masked_grad(part, bits, dz, False, sums)
        for c, dc, matrix, product in zip(cs, dcs, matrices, products, strict=True):
            product += inner(dz, c)
            times_into(dc, dz, matrix)
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
    check=_checks.folded_backward,
)


def _add_product(out: Tensor, a: Tensor, matrix: Tensor, vector: Tensor) -> None:
    rows, vector = rows_in_piece(out, max(out.shape[1], a.shape[1])), vector.to(out.dtype)
    for part, source in zip(pieces(out, rows), pieces(a, rows), strict=True):
        accumulate(part, source, matrix, vector)


add_product_ = primitive(
    "add_product_(Tensor(a!) out, Tensor a, Tensor matrix, Tensor vector) -> ()",
    reference.add_product_,
    lambda *_: None,
    _add_product,
    check=_checks.add_product_,
)


def _conv1x1_backward(
    dy: Tensor, x: Tensor, conv: Tensor, residual: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    rows = rows_in_piece(x, max(x.shape[1], dy.shape[1]))
    if rows * x.shape[1] >= x.numel():
        return _conv1x1_backward_at_once(dy, x, conv, residual, mask)
    dx, dconv = _new_gradients(dy, x, conv)
    dconv.zero_()
    transposed = conv.transpose(0, 1).contiguous()
    residuals = [None] * len(pieces(x, rows)) if residual is None else pieces(residual, rows)
    masks = [None] * len(residuals) if mask is None else mask.split(rows)
    for part, dy_part, x_part, added, bits in zip(
        pieces(dx, rows), pieces(dy, rows), pieces(x, rows), residuals, masks, strict=True
    ):
        if added is None:
            times_into(part, dy_part, transposed)
        else:
            if bits is None:
                part.copy_(added)
            else:
                masked_grad(added, bits, part, False, None)
            accumulate(part, dy_part, transposed)
        dconv += inner(dy_part, x_part)
    return dx, dconv


def _conv1x1_backward_at_once(
    dy: Tensor, x: Tensor, conv: Tensor, residual: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Where all of the batch is in the cache: without the copies of the weights that pieces take."""
    found, dconv = convolution_backward(dy, x, conv)
    dx = found.contiguous(memory_format=torch.channels_last)
    if mask is not None:
        masked_grad(residual, mask, dx, True, None)
    elif residual is not None:
        dx += residual
    return dx, dconv.flatten(1).to(statistics_dtype(dy.dtype))


def _new_gradients(dy: Tensor, x: Tensor, conv: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor]:
    return fresh(x, *x.shape), conv.new_empty(conv.shape[:2], dtype=statistics_dtype(conv.dtype))


conv1x1_backward = primitive(
    "conv1x1_backward(Tensor dy, Tensor x, Tensor conv, Tensor? residual, Tensor? mask)"
    " -> (Tensor dx, Tensor dconv)",
    reference.conv1x1_backward,
    _new_gradients,
    _conv1x1_backward,
    check=_checks.conv1x1_backward,
)

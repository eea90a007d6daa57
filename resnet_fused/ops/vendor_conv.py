"""The vendor's gradients of a convolution, and lazy operands (types) in memory, as the vendor's library takes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resnet_fused.layout import statistics_dtype, subsample
from resnet_fused.ops.bn_add_relu import bn_add_relu_backward_dy
from resnet_fused.ops.bn_relu import bn_relu_backward, bn_relu_forward
from resnet_fused.ops.masked_grad import fresh_like, masked_grad
from resnet_fused.ops.vendor_gemm import (
    addmm_nt_,
    chunked_mm_tn,
    chunks,
    conv1x1_backward,
    mm_nt_out,
    mm_tn,
    rows_per_chunk,
)
from resnet_fused.types import Activation, ConvGeometry, Gradient, Pair


def materialize(a: Activation, input_stride: Sequence[int] = (1, 1)) -> Tensor:
    """The value of an activation at every input_stride-th pixel, in memory."""
    x = subsample(a.x, input_stride)
    if a.mean is not None:
        value: Tensor = bn_relu_forward(x, a.mean, a.invstd, a.weight, a.bias, a.shift)
        return value
    return x if a.shift is None else x - a.shift.to(x.dtype).view(1, -1, 1, 1)


def materialize_gradient(dy: Gradient) -> Tensor:
    """The value of a gradient, in memory."""
    value: Tensor
    if dy.mean is None:
        if dy.mask is None:
            return dy.g
        value = fresh_like(dy.g)
        masked_grad(dy.g, dy.mask, value, False, None)
    elif dy.mask is None:
        value = bn_relu_backward(dy.g, *dy[2:9])
    else:
        value = bn_add_relu_backward_dy(dy.g, dy.mask, *dy[2:6], *dy[7:9])
    return value


def is_pointwise(weight: Tensor, geometry: ConvGeometry) -> bool:
    """A 1x1 convolution without padding and groups; of any stride."""
    return weight.shape[2:] == (1, 1) and geometry.padding == (0, 0) and geometry.groups == 1


def as_conv_weight(q: Tensor) -> Tensor:
    """(N, K) as (N, K, 1, 1), with the strides of a channels_last tensor."""
    return q[:, None, None].permute(0, 3, 1, 2)


def add_residual(da: Tensor, residual: Tensor, mask: Tensor | None, input_stride: Pair) -> None:
    if mask is not None and input_stride == (1, 1):
        masked_grad(residual, mask, da, True, None)
    else:
        da[:, :, :: input_stride[0], :: input_stride[1]] += materialize_gradient(Gradient(residual, mask))


def vendor_dgrad(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    geometry: ConvGeometry,
    residual: Tensor | None,
    residual_mask: Tensor | None,
    input_stride: Pair,
) -> Tensor:
    """The gradient w.r.t. the convolution's input ``x``, which is given for its shape."""
    grad_input, _, _ = torch.ops.aten.convolution_backward.default(
        dy, x, weight, None, *geometry[:3], False, [0, 0], geometry.groups, [True, False, False]
    )
    da: Tensor = grad_input.contiguous(memory_format=torch.channels_last)
    if residual is not None:
        add_residual(da, residual, residual_mask, input_stride)
    return da


def vendor_wgrad(dy: Tensor, a: Activation, weight: Tensor, geometry: ConvGeometry) -> Tensor:
    if is_pointwise(weight, geometry):
        return as_conv_weight(chunked_mm_tn(dy, materialize(a, geometry.stride)))
    _, grad_weight, _ = torch.ops.aten.convolution_backward.default(
        dy, materialize(a), weight, None, *geometry[:3], False, [0, 0], geometry.groups, [False, True, False]
    )
    return grad_weight.to(statistics_dtype(dy.dtype)).contiguous(memory_format=torch.channels_last)


def vendor_conv1x1_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    residual_mask: Tensor | None,
    needs_weight: bool,
) -> tuple[Tensor, Tensor | None]:
    """(da, dweight) of a 1x1 convolution of stride 1, chunk by chunk: what GEMMs share is in the cache.

    Args:
        x: the convolution's input; without ``needs_weight`` only its shape counts.
    """
    rows = rows_per_chunk(x, max(x.shape[1], dy.shape[1]))
    if rows * x.shape[1] >= x.numel():  # all of the batch is in the cache
        da, dweight = conv1x1_backward(dy, x, weight, needs_weight)
        da = da.contiguous(memory_format=torch.channels_last)
        if residual is not None:
            add_residual(da, residual, residual_mask, (1, 1))
        if dweight is None:
            return da, None
        return da, as_conv_weight(dweight.flatten(1).to(statistics_dtype(dy.dtype)))
    da = fresh_like(x)
    dweight = None
    if needs_weight:
        dweight = weight.new_zeros(weight.shape[:2], dtype=statistics_dtype(weight.dtype))
    transposed = weight.transpose(0, 1).contiguous()
    residuals = [None] * len(chunks(x, rows)) if residual is None else chunks(residual, rows)
    masks = [None] * len(residuals) if residual_mask is None else residual_mask.split(rows)
    for da_chunk, dy_chunk, x_chunk, added, mask in zip(
        chunks(da, rows), chunks(dy, rows), chunks(x, rows), residuals, masks, strict=True
    ):
        if added is None:
            mm_nt_out(da_chunk, dy_chunk, transposed)
        else:
            if mask is None:
                da_chunk.copy_(added)
            else:
                masked_grad(added, mask, da_chunk, False, None)
            addmm_nt_(da_chunk, dy_chunk, transposed)
        if dweight is not None:
            dweight += mm_tn(dy_chunk, x_chunk)
    return da, None if dweight is None else as_conv_weight(dweight)

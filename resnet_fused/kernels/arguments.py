"""Arguments of kernels that launchers derive from their operands: pointers, sizes, precision, bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused.kernels.bn_coeffs import with_bn_coeffs, with_dy_coeffs
from resnet_fused.layout import statistics_dtype
from resnet_fused.types import Activation, ConvGeometry, Gradient, Pair


def precision(dtype: torch.dtype) -> str:
    """input_precision of tl.dot: TF32 for float32 only where PyTorch's own convolutions may use it."""
    if dtype != torch.float32:
        return "tf32"  # without effect on 16-bit operands
    return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"


def is_pointwise(weight: Tensor, geometry: ConvGeometry) -> bool:
    """Whether an output pixel depends on the input pixel of the same index alone."""
    return weight.shape[2:] == (1, 1) and geometry.stride == (1, 1) and geometry.padding == (0, 0)


def weight_matrix(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight (outputs, C, kh, kw) in ``dtype`` and channels_last: in memory (outputs, kh, kw, C)."""
    return weight.to(dtype).contiguous(memory_format=torch.channels_last)


def new_sums(like: Tensor, *sizes: int) -> Tensor:
    """Uninitialized, in the statistics dtype of the activation ``like``."""
    return torch.empty(sizes, dtype=statistics_dtype(like.dtype), device=like.device)


def mask_words(mask: Tensor | None, channels: int, block: int) -> Tensor | None:
    """A mask (pixels, ceil(channels / 8)) as words of 32 bits where tiles of ``block`` channels consist of whole words.

    Bytes cannot be copied asynchronously. The order of the bits stays: the first byte of a word is its lowest.
    """
    if mask is None or channels % 32 or block % 32:
        return mask
    return mask.view(torch.int32)


def size_arguments(x: Tensor) -> dict[str, int]:
    return {"height": x.shape[2], "width": x.shape[3], "channels": x.shape[1]}


def conv_size_arguments(x: Tensor, y: Tensor) -> dict[str, int]:
    """Sizes of a convolution's input and output."""
    outputs = {"out_height": y.shape[2], "out_width": y.shape[3], "outputs": y.shape[1]}
    return {**size_arguments(x), **outputs}


def geometry_arguments(geometry: ConvGeometry) -> dict[str, int]:
    (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w), _ = geometry
    return {
        "stride_h": stride_h, "stride_w": stride_w, "pad_h": pad_h, "pad_w": pad_w,
        "dilation_h": dilation_h, "dilation_w": dilation_w,
    }  # fmt: skip


def activation_arguments(a: Activation) -> dict[str, Tensor | None]:
    """An activation, with its bn_coeffs computed where they are not given."""
    a = with_bn_coeffs(a)
    return {"x": a.x, "x_mean": a.mean, "x_bn_coeffs": a.bn_coeffs, "x_shift": a.shift}


def gradient_arguments(dy: Gradient, block: int) -> dict[str, Tensor | None]:
    """A gradient, with its coefficients computed where they are not given, for tiles of ``block`` channels."""
    dy = with_dy_coeffs(dy)
    return {
        "g": dy.g,
        "mask": mask_words(dy.mask, dy.g.shape[1], block),
        "y": dy.y,
        "y_mean": dy.mean,
        "y_bn_coeffs": dy.bn_coeffs,
        "dy_coeffs": dy.dy_coeffs,
    }


def skip_arguments(skip: Activation | None) -> dict[str, Tensor | None]:
    """The input of a shortcut's folded convolution, which has no statistics."""
    return {"skip": None if skip is None else skip.x, "skip_shift": None if skip is None else skip.shift}


def folded_size_arguments(
    a: Activation, input_stride: Pair, skip: Activation | None, skip_input_stride: Pair, grad: Tensor
) -> dict[str, int]:
    """Sizes of the inputs of one or two folded convolutions, and of the gradient w.r.t. their output."""
    images, outputs, out_height, out_width = grad.shape
    skip_channels, skip_height, skip_width = (0, 0, 0) if skip is None else skip.x.shape[1:]
    return {
        **size_arguments(a.x),
        "skip_height": skip_height, "skip_width": skip_width, "skip_channels": skip_channels,
        "out_height": out_height, "out_width": out_width, "outputs": outputs,
        "pixels": images * out_height * out_width,
        "input_stride_h": input_stride[0], "input_stride_w": input_stride[1],
        "skip_input_stride_h": skip_input_stride[0], "skip_input_stride_w": skip_input_stride[1],
    }  # fmt: skip


def subsampled_size(x: Tensor, input_stride: Pair) -> Pair:
    """Height and width of ``layout.subsample`` of ``x``."""
    return (x.shape[2] - 1) // input_stride[0] + 1, (x.shape[3] - 1) // input_stride[1] + 1


def subsampled_bytes(height: int, width: int, **tensors: Tensor | None) -> dict[str, int]:
    """By name the bytes of height x width pixels of each image; without tensors that have no more than those."""
    return {
        name: x.shape[0] * x.shape[1] * height * width * x.element_size()
        for name, x in tensors.items()
        if x is not None and (height, width) != tuple(x.shape[2:])
    }

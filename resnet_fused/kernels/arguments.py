"""What a launcher derives from its tensors: sizes, precision, which bytes a strided kernel touches."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_fused.layout import statistics_dtype
from resnet_fused.types import Activation, ConvGeometry, Gradient, Pair


def precision(dtype: torch.dtype) -> str:
    """Of products: TF32 for float32 only where PyTorch's own convolutions may use it."""
    if dtype != torch.float32:
        return "tf32"  # without effect on 16-bit operands
    return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"


def dtype_name(dtype: torch.dtype) -> str:
    """bf16, fp16, fp32 or tf32: what products of activations of ``dtype`` are made in."""
    if dtype == torch.float32:
        return "tf32" if precision(dtype) == "tf32" else "fp32"
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def is_pointwise(conv: Tensor, window: ConvGeometry) -> bool:
    """Whether every output pixel is made of the input pixel at its own place."""
    return conv.shape[2:] == (1, 1) and window.stride == (1, 1) and window.padding == (0, 0)


def row_matrix(conv: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight with a row for each output, and in it the taps, and in them the input's channels."""
    return conv.to(dtype).contiguous(memory_format=torch.channels_last)


def new_activation(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    return torch.empty(
        (len(like), channels, height, width),
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )


def mask_words(mask: Tensor | None, channels: int, block: int) -> Tensor | None:
    """A mask (pixels, ceil(channels / 8)) as 32-bit words where whole words are read: bytes cannot be copied
    asynchronously. The bits stay in place: the first byte of a word is its lowest."""
    if mask is None or channels % 32 or block % 32:
        return mask
    return mask.view(torch.int32)


def new_float(like: Tensor, *sizes: int) -> Tensor:
    return torch.empty(sizes, dtype=statistics_dtype(like.dtype), device=like.device)


def input_sizes(x: Tensor) -> dict[str, int]:
    return {"HEIGHT": x.shape[2], "WIDTH": x.shape[3], "CHANNELS": x.shape[1]}


def window_sizes(window: ConvGeometry) -> dict[str, int]:
    (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w), _ = window
    return {
        "STRIDE_H": stride_h, "STRIDE_W": stride_w, "PAD_H": pad_h, "PAD_W": pad_w,
        "DILATION_H": dilation_h, "DILATION_W": dilation_w,
    }  # fmt: skip


def every_sizes(input_stride: Pair, prefix: str = "") -> dict[str, int]:
    return {f"{prefix}EVERY_H": input_stride[0], f"{prefix}EVERY_W": input_stride[1]}


def activation_fields(source: Activation, prefix: str = "") -> dict[str, Tensor | None]:
    """An activation, with its terms, as arguments of a kernel."""
    names = {name: f"{prefix}{name}" for name in ("mean", "bn_coeffs", "shift")}
    return {prefix.rstrip("_") or "x": source.x, **{to: getattr(source, name) for name, to in names.items()}}


def gradient_fields(dy: Gradient, block: int) -> dict[str, Tensor | None]:
    """A gradient, with its terms and slopes, as arguments of a kernel that takes ``block`` channels at a time."""
    mask = mask_words(dy.mask, dy.g.shape[1], block)
    return {
        "g": dy.g,
        "mask": mask,
        "y": dy.y,
        "mean": dy.mean,
        "bn_coeffs": dy.bn_coeffs,
        "dy_coeffs": dy.dy_coeffs,
    }


def skip_fields(skip: Activation | None) -> dict[str, Tensor | None]:
    """The input of a folded shortcut, which has no statistics, as arguments of a kernel."""
    return {"skip": None if skip is None else skip.x, "skip_shift": None if skip is None else skip.shift}


def touched_of_both(source: Activation, skip: Activation | None, height: int, width: int) -> dict[str, int]:
    found = touched("x", source.x, height, width) or {}
    return found | (touched("skip", skip.x, height, width) or {} if skip is not None else {})


def size_at(x: Tensor, input_stride: Pair) -> Pair:
    """Height and width of every so-manyth pixel of ``x``."""
    return (x.shape[2] - 1) // input_stride[0] + 1, (x.shape[3] - 1) // input_stride[1] + 1


def touched(name: str, x: Tensor, height: int, width: int) -> dict[str, int] | None:
    """Bytes of those pixels of ``x`` that height x width of them are; None where those are all."""
    if (height, width) == tuple(x.shape[2:]):
        return None
    return {name: x.shape[0] * x.shape[1] * height * width * x.element_size()}

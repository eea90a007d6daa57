"""Checks of an op's operands: a ValueError names the operand that does not fit the others.

A training step makes some 200 calls on the host, so checks read as few attributes as possible (0.05 us each); the error
message is built only on failure.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from resnet_fused.layout import STATISTICS_DTYPES
from resnet_fused.types import Activation, Gradient

#: Sizes, strides and padding of a convolution are counted in 32 bits.
MOST = 2**31
_CHANNELS_LAST = torch.channels_last
_NORM = ("mean", "invstd", "weight", "bias")
_OF_ACTIVATION = Activation._fields[1:6]
_OF_GRADIENT = Gradient._fields[3:9]
_WITH_BN_COEFFS = ("mean", "invstd", "shift")
_WITH_DY_COEFFS = ("mean", "invstd", "sum_dz", "sum_dz_xhat")


def refuse(op: str, operand: str, expected: str, value: object) -> NoReturn:
    if isinstance(value, Tensor):
        layout = f"strides {tuple(value.stride())}" if value.layout == torch.strided else str(value.layout)
        value = f"{value.dtype} {tuple(value.shape)}, {layout}, on {value.device}"
    raise ValueError(f"{op}: {operand} must be {expected}, got {value}")


def given(fields: Sequence[Tensor | None]) -> str:
    return f"[{', '.join('None' if x is None else str(tuple(x.shape)) for x in fields)}]"


def outputs_of(weight: Tensor) -> int:
    """Of a weight whose shape is checked later."""
    return weight.shape[0] if weight.dim() > 0 else 0


@functools.cache
def _has_several_devices() -> bool:
    return torch.cuda.device_count() > 1


def device_of(x: Tensor) -> int | None:
    """The GPU that others have to be on. None where there is no second one: then kernels refuse what is not on it."""
    return x.get_device() if _has_several_devices() else None


class Operand:
    """Sizes, dtypes and device of an activation, and whether other operands fit to it."""

    __slots__ = ("channels", "count", "device", "dtype", "height", "wide", "width")

    def __init__(self, op: str, operand: str, x: Tensor | None, any_layout: bool = False) -> None:
        if (
            x is None
            or x.dim() != 4
            or x.dtype not in STATISTICS_DTYPES
            or not (any_layout or x.is_contiguous(memory_format=_CHANNELS_LAST))
        ):
            refuse(op, operand, "a channels_last activation (N, C, H, W) in a floating-point dtype", x)
        self.count, self.channels, self.height, self.width = x.shape
        if self.channels == 0:
            refuse(op, operand, "an activation with channels", x)
        self.dtype, self.device = x.dtype, device_of(x)
        self.wide = STATISTICS_DTYPES[self.dtype]

    @property
    def is_empty(self) -> bool:
        return self.count == 0 or self.height == 0 or self.width == 0

    def check_activation(self, op: str, operand: str, x: Tensor | None, size: tuple[int, ...]) -> None:
        """``x``: another activation, of ``size``, channels_last."""
        if (
            x is None
            or x.shape != size
            or x.dtype is not self.dtype
            or (self.device is not None and x.get_device() != self.device)
            or not x.is_contiguous(memory_format=_CHANNELS_LAST)
        ):
            refuse(op, operand, f"channels_last {self.dtype} of shape {size}", x)

    def check_in_any_layout(self, op: str, operand: str, x: Tensor | None, size: tuple[int, ...]) -> None:
        if (
            x is None
            or x.shape != size
            or x.dtype is not self.dtype
            or (self.device is not None and x.get_device() != self.device)
        ):
            refuse(op, operand, f"{self.dtype} of shape {size}, on the activation's device", x)

    def check_weight(self, op: str, operand: str, weight: Tensor | None, size: tuple[int, ...]) -> None:
        """``weight``: in the activations' dtype, in any layout, of a convolution that has inputs and outputs."""
        if 0 in size:
            refuse(op, operand, "a weight without dimensions of size 0", weight)
        self.check_in_any_layout(op, operand, weight, size)

    def check_vectors(
        self, op: str, operand: str, names: Sequence[str], vectors: Sequence[Tensor | None], channels: int
    ) -> None:
        """``vectors``: of ``channels`` numbers in the statistics dtype, or None; ``names`` of those of ``operand``."""
        size, wide, device = (channels,), self.wide, self.device
        for vector in vectors:
            if vector is not None and (
                vector.shape != size
                or vector.dtype is not wide
                or not vector.is_contiguous()
                or (device is not None and vector.get_device() != device)
            ):
                name = next(n for n, v in zip(names, vectors, strict=False) if v is vector)
                expected = f"a contiguous {wide} vector of {channels} channels, on the activation's device"
                refuse(op, f"{operand}.{name}" if operand else name, expected, vector)

    def check_bn(
        self, op: str, operand: str, bn: Sequence[Tensor | None], channels: int, required: bool = True
    ) -> None:
        """``bn``: mean, invstd, weight and bias, of which the last two may be None; or all of them, unless required."""
        if len(bn) != 4 or (bn[0] is None) != (bn[1] is None) or (required and bn[0] is None):
            refuse(op, operand, "mean, invstd, weight and bias of a batch norm", given(bn))
        self.check_vectors(op, operand, _NORM, bn, channels)

    def check_coeffs(self, op: str, operand: str, name: str, rows: Tensor) -> None:
        """``rows``: bn_coeffs or dy_coeffs, (3, C)."""
        size = (3, self.channels)
        if (
            rows.shape != size
            or rows.dtype is not self.wide
            or not rows.is_contiguous()
            or (self.device is not None and rows.get_device() != self.device)
        ):
            expected = f"contiguous {self.wide} of shape {size}, on the activation's device"
            refuse(op, f"{operand}.{name}", expected, rows)

    def check_mask(self, op: str, operand: str, mask: Tensor | None, channels: int) -> None:
        """``mask``: of the ReLU of an activation with these pixels, in channels_last."""
        pixels = self.height * self.width
        rows, columns = self.count * pixels, channels
        if pixels > 1 and (
            channels == 1 or self.count == 0
        ):  # contiguous as well, see layout.is_channels_last
            rows, columns = self.count * channels, pixels
        size = (rows, (columns + 7) // 8)
        if (
            mask is None
            or mask.shape != size
            or mask.dtype is not torch.uint8
            or not mask.is_contiguous()
            or (self.device is not None and mask.get_device() != self.device)
        ):
            refuse(op, operand, f"a contiguous torch.uint8 mask of shape {size}", mask)

    def subsampled(self, op: str, operand: str, input_stride: Sequence[int]) -> tuple[int, int]:
        """Height and width after subsampling by ``input_stride``."""
        if input_stride == [1, 1]:
            return self.height, self.width
        if len(input_stride) != 2 or not 0 < input_stride[0] < MOST or not 0 < input_stride[1] < MOST:
            refuse(op, operand, "two strides of at least 1", input_stride)
        return -(-self.height // input_stride[0]), -(-self.width // input_stride[1])


def activation(op: str, operand: str, fields: Sequence[Tensor | None]) -> Operand:
    """The x of an Activation whose vectors fit to it."""
    count = len(fields)
    if not 1 <= count <= 7:
        refuse(op, operand, "the fields of an Activation", given(fields))
    x = Operand(op, operand, fields[0])
    if count > 1:
        if count == 2 or (fields[1] is None) != (fields[2] is None):
            refuse(op, operand, "an Activation with both or neither of mean and invstd", given(fields))
        bn_coeffs = fields[6] if count == 7 else None
        if bn_coeffs is None:
            x.check_vectors(op, operand, _OF_ACTIVATION, fields[1:6], x.channels)
        elif fields[1] is None:
            refuse(op, operand, "an Activation without bn_coeffs where it has no mean", given(fields))
        else:  # computed from weight and bias: no kernel reads these
            x.check_vectors(op, operand, _WITH_BN_COEFFS, (fields[1], fields[2], fields[5]), x.channels)
            x.check_coeffs(op, operand, "bn_coeffs", bn_coeffs)
    return x


def gradient(op: str, fields: Sequence[Tensor | None]) -> Operand:
    """The g of the Gradient ``dy`` to which all else fits."""
    operand = "dy"
    count = len(fields)
    if not 1 <= count <= 11:
        refuse(op, operand, "the fields of a Gradient", given(fields))
    if count < 11:
        fields = (*fields, *(None,) * (11 - count))
    g = Operand(op, operand, fields[0])
    _, mask, y, mean, invstd, _, _, sum_dz, sum_dz_xhat, bn_coeffs, dy_coeffs = fields
    if mask is not None:
        g.check_mask(op, "dy.mask", mask, g.channels)
    if (y is None) != (mean is None) or (mean is None) != (invstd is None):
        refuse(op, operand, "a Gradient with all or none of y, mean and invstd", given(fields))
    if (sum_dz is None) != (sum_dz_xhat is None) or (sum_dz is None and dy_coeffs is not None):
        refuse(
            op, operand, "a Gradient with both sums or neither, and dy_coeffs only with them", given(fields)
        )
    if y is not None:
        g.check_activation(op, "dy.y", y, (g.count, g.channels, g.height, g.width))
    elif bn_coeffs is not None or dy_coeffs is not None:
        refuse(
            op,
            operand,
            "a Gradient without bn_coeffs and dy_coeffs where it has no statistics",
            given(fields),
        )
    if bn_coeffs is None:
        g.check_vectors(op, operand, _OF_GRADIENT, fields[3:9], g.channels)
    else:  # as for an Activation; dy_coeffs are computed from the sums
        sums = fields[7:9] if dy_coeffs is None else ()
        g.check_vectors(op, operand, _WITH_DY_COEFFS, (mean, invstd, *sums), g.channels)
        g.check_coeffs(op, operand, "bn_coeffs", bn_coeffs)
    if dy_coeffs is not None:
        g.check_coeffs(op, operand, "dy_coeffs", dy_coeffs)
    return g

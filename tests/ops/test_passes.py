"""The passes that Triton kernels serve, as ops: what they promise the dispatcher, and the vendor's way to do them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fused.ops import fold, passes
from resnet_fused.ops._primitive import TRITON
from resnet_fused.reference import folded as folded_reference
from resnet_fused.reference import passes as reference
from resnet_fused.reference.layout import pack_mask
from resnet_fused.reference.operands import Activation, Window
from tests.accuracy import relative_error
from tests.ops.test_opcheck import as_tuple

OPS = torch.ops.resnet_fused
Arguments = tuple[Any, ...]
NORMAL, STRIDED = Window(padding=(1, 1)), Window((2, 2), (1, 1))
IMAGES, INPUTS, OUTPUTS, OTHERS, SIZE = 3, 8, 12, 5, (7, 6)


class Maker:
    """Random arguments of one dtype, channels_last."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32

    def activation(self, channels: int, size: tuple[int, int] = SIZE) -> Tensor:
        x = torch.randn(IMAGES, channels, *size).to(self.dtype)
        # Where other strides would do as well, those that kernels give their results.
        return torch.empty_like(x, memory_format=torch.channels_last).copy_(x)

    def vector(self, count: int) -> Tensor:
        return torch.randn(count).to(self.wide)

    def norm(self, channels: int, affine: bool = True) -> list[Tensor | None]:
        invstd = 0.5 + torch.rand(channels).to(self.wide)
        more = [self.vector(channels), self.vector(channels)] if affine else [None, None]
        return [self.vector(channels), invstd, *more]

    def conv(self, outputs: int, inputs: int, kernel: int = 1) -> Tensor:
        return (torch.randn(outputs, inputs, kernel, kernel) / (inputs * kernel * kernel) ** 0.5).to(
            self.dtype
        )

    def bits(self, like: Tensor) -> Tensor:
        return pack_mask(torch.rand(like.shape) < 0.6, like)

    def source(self, channels: int = INPUTS, size: tuple[int, int] = SIZE) -> list[Tensor | None]:
        """relu(bn(x)) - shift."""
        return [self.activation(channels, size), *self.norm(channels), self.vector(channels)]

    def plain(self, channels: int = INPUTS, size: tuple[int, int] = SIZE) -> list[Tensor | None]:
        return [*Activation(self.activation(channels, size))]

    def gradient(
        self, window: Window, kernel: int, masked: bool, frozen: bool = False
    ) -> list[Tensor | None]:
        size = window.out_size(self.activation(1), self.conv(1, 1, kernel))
        g = self.activation(OUTPUTS, size)
        sums = [None, None] if frozen else [self.vector(OUTPUTS), self.vector(OUTPUTS)]
        return [
            g,
            self.bits(g) if masked else None,
            self.activation(OUTPUTS, size),
            *self.norm(OUTPUTS),
            *sums,
        ]

    def end(self) -> tuple[Tensor, Tensor]:
        """A gradient of a block's output, and its mask."""
        grad = self.activation(OUTPUTS)
        return grad, self.bits(grad)

    def factors(self, channels: int) -> list[Tensor | None]:
        return [self.conv(OUTPUTS, channels), self.conv(channels, channels), self.vector(channels)]


def _spread(size: tuple[int, int], every: tuple[int, int]) -> tuple[int, int]:
    """Of an image whose so-manyth pixels are ``size``."""
    return size[0] * every[0] - every[0] // 2, size[1] * every[1] - every[1] // 2


def _statistics(m: Maker) -> tuple[Tensor, Tensor, Tensor]:
    """Of a convolution's input: weight, mean and covariance."""
    c = torch.randn(50, INPUTS, dtype=m.wide)
    return m.conv(OUTPUTS, INPUTS).flatten(1), c.mean(0), torch.cov(c.t(), correction=0)


def _fold_gradients(m: Maker, affine: bool, frozen: bool) -> Arguments:
    weight, mean, covariance = _statistics(m)
    mean_y, invstd, gamma, sum_dz = m.norm(OUTPUTS)
    c = (None, None) if frozen else (mean, covariance)
    return (
        weight,
        gamma if affine else None,
        mean_y,
        invstd,
        *c,
        sum_dz,
        m.conv(OUTPUTS, INPUTS).flatten(1).to(m.wide),
        50,
    )


CASES: dict[str, Callable[[Maker], Arguments]] = {
    "conv_stats-normed": lambda m: (m.source(), m.conv(OUTPUTS, INPUTS, 3), *NORMAL, 1e-5, True),
    "conv_stats-plain": lambda m: (m.plain(), m.conv(OUTPUTS, INPUTS), *Window((2, 2)), 1e-5, False),
    "conv_stats-groups": lambda m: (m.source(), m.conv(OUTPUTS, 2, 3), *Window(padding=(1, 1), groups=4), 1e-5, True),
    "gram_of-normed": lambda m: (m.source(), (1, 1)),
    "gram_of-strided": lambda m: ([*Activation(m.activation(INPUTS), shift=m.vector(INPUTS))], (2, 3)),
    "expand-input": lambda m: (
        m.source(), m.conv(OUTPUTS, INPUTS), m.norm(OUTPUTS), m.activation(OUTPUTS), None, None, [None] * 4, (1, 1)
    ),
    "expand-folded": lambda m: (
        m.source(), m.conv(OUTPUTS, INPUTS), m.norm(OUTPUTS), m.activation(OTHERS, _spread(SIZE, (2, 2))),
        m.vector(OTHERS), m.conv(OUTPUTS, OTHERS), m.norm(OUTPUTS, False), (2, 2),
    ),
    "expand-made": lambda m: (
        m.plain(OUTPUTS), None, m.norm(OUTPUTS), m.activation(OTHERS), None, m.conv(OUTPUTS, OTHERS), m.norm(OUTPUTS),
        (1, 1),
    ),
    "folded_wgrad-one": lambda m: (*m.end(), m.source(), (1, 1), [], (1, 1)),
    "folded_wgrad-both": lambda m: (
        *m.end(), m.source(), (1, 1), m.plain(OTHERS, _spread(SIZE, (2, 2))), (2, 2)
    ),
    "folded_dgrad-one": lambda m: (*m.end(), m.factors(INPUTS), m.source(), (1, 1), [], [], (1, 1)),
    "folded_dgrad-both": lambda m: (
        *m.end(), m.factors(INPUTS), m.source(), (1, 1), m.factors(OTHERS), m.plain(OTHERS, _spread(SIZE, (2, 2))),
        (2, 2),
    ),
    "folded_dgrad-frozen": lambda m: (
        *m.end(), [m.conv(OUTPUTS, INPUTS), None, None], m.plain(INPUTS, _spread(SIZE, (1, 2))), (1, 2), [], [], (1, 1)
    ),
    "dgrad-normed": lambda m: (
        m.gradient(STRIDED, 3, False), m.conv(OUTPUTS, INPUTS, 3), *STRIDED, m.source(), None, None, (1, 1)
    ),
    "dgrad-residual": lambda m: (
        m.gradient(NORMAL, 3, True), m.conv(OUTPUTS, INPUTS, 3), *NORMAL, m.plain(),
        *(x := m.activation(INPUTS), m.bits(x)), (1, 1),
    ),
    "dgrad-sparse": lambda m: (
        m.gradient(Window(), 1, False, True), m.conv(OUTPUTS, INPUTS), *Window(), m.plain(),
        m.activation(INPUTS, (4, 3)), None, (2, 2),
    ),
    "wgrad-1x1": lambda m: (m.gradient(Window(), 1, True), m.source(), m.conv(OUTPUTS, INPUTS), *Window()),
    "wgrad-3x3": lambda m: (m.gradient(STRIDED, 3, False), m.source(), m.conv(OUTPUTS, INPUTS, 3), *STRIDED),
    "fold_statistics-shift": lambda m: (*_statistics(m), m.vector(INPUTS), 1e-5),
    "fold_statistics-none": lambda m: (*_statistics(m), None, 1e-5),
    "fold_gradients-affine": lambda m: _fold_gradients(m, True, False),
    "fold_gradients-frozen": lambda m: _fold_gradients(m, False, True),
    "rectified_mean": lambda m: (m.vector(INPUTS), m.vector(INPUTS)),
}  # fmt: skip


def test_every_pass_has_cases() -> None:
    assert {case.partition("-")[0] for case in CASES} == TRITON


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_opcheck(case: str, dtype: torch.dtype) -> None:
    """Schema, fake results with the strides of the real ones, and compilation."""
    arguments = CASES[case](Maker(dtype))
    torch.library.opcheck(getattr(OPS, case.partition("-")[0]).default, arguments)


@pytest.mark.parametrize("case", CASES)
def test_vendor_equals_reference(case: str) -> None:
    name = case.partition("-")[0]
    arguments = CASES[case](Maker(torch.float64))
    oracle = getattr(reference, {"gram_of": "gram"}.get(name, name), None) or getattr(folded_reference, name)
    ours, theirs = as_tuple(getattr(OPS, name)(*arguments)), as_tuple(oracle(*arguments))
    assert len(ours) == len(theirs)
    for found, expected in zip(ours, theirs, strict=True):
        assert found.shape == expected.shape and found.dtype == expected.dtype
        if found.dtype == torch.uint8:
            assert torch.equal(found, expected)
        else:
            assert relative_error(found, expected) < 1e-10


def test_one_pixel() -> None:
    """Images of one pixel count as channels_last, whatever their strides say."""
    m = Maker(torch.float32)
    x = m.activation(INPUTS, (1, 1))
    arguments = [*Activation(x)], m.conv(OUTPUTS, INPUTS), *Window(), 1e-5, True
    y, mean, *_ = passes.conv_stats(*arguments)
    torch.testing.assert_close(mean, y.mean((0, 2, 3)))
    torch.library.opcheck(OPS.conv_stats.default, arguments)


def test_float64_and_groups_are_left_to_the_vendor() -> None:
    assert not passes.runs_triton(torch.empty(2, 2, 2, 2, dtype=torch.float64))
    assert not passes.runs_triton(torch.empty(2, 2, 2, 2), groups=2)
    mean_y, *_ = fold.fold_statistics(*_statistics(Maker(torch.float64)), None, 1e-5)
    assert mean_y.dtype == torch.float64

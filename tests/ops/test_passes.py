"""The passes that Triton kernels serve, as ops: what they promise the dispatcher, and the vendor's way to do them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from resnet_fused.ops import fold, passes
from resnet_fused.ops._primitive import TRITON
from resnet_fused.reference import folded as folded_reference
from resnet_fused.reference import passes as reference
from resnet_fused.reference.layout import pack_mask
from resnet_fused.reference.operands import Activation, Window
from tests.accuracy import relative_error
from tests.ops.test_opcheck import as_tuple, copied

OPS = torch.ops.resnet_fused
Arguments = tuple[Any, ...]
NORMAL, STRIDED = Window(padding=(1, 1)), Window((2, 2), (1, 1))
IMAGES, INPUTS, OUTPUTS, OTHERS = 3, 8, 12, 5
BOTH = [True, True]
Size = tuple[int, int]
#: Of the images; in the last two, strides of whole dimensions mean nothing and are promised all the same.
SIZES: dict[str, Size] = {"odd": (7, 6), "even": (4, 8), "one_row": (1, 5), "one_pixel": (1, 1)}


class Maker:
    """Random arguments of one dtype, channels_last."""

    def __init__(self, dtype: torch.dtype, size: Size = SIZES["odd"]) -> None:
        self.dtype, self.size = dtype, size
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32

    def activation(self, channels: int, size: Size | None = None) -> Tensor:
        x = torch.randn(IMAGES, channels, *(size or self.size)).to(self.dtype)
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

    def source(self, channels: int = INPUTS, size: Size | None = None) -> list[Tensor | None]:
        """relu(bn(x)) - shift."""
        return [self.activation(channels, size), *self.norm(channels), self.vector(channels)]

    def plain(self, channels: int = INPUTS, size: Size | None = None) -> list[Tensor | None]:
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


def _spread(size: Size, every: tuple[int, int]) -> Size:
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
        m.source(), m.conv(OUTPUTS, INPUTS), m.norm(OUTPUTS), m.activation(OTHERS, _spread(m.size, (2, 2))),
        m.vector(OTHERS), m.conv(OUTPUTS, OTHERS), m.norm(OUTPUTS, False), (2, 2),
    ),
    "expand-made": lambda m: (
        m.plain(OUTPUTS), None, m.norm(OUTPUTS), m.activation(OTHERS), None, m.conv(OUTPUTS, OTHERS), m.norm(OUTPUTS),
        (1, 1),
    ),
    "folded_wgrad-one": lambda m: (*m.end(), m.source(), (1, 1), [], (1, 1)),
    "folded_wgrad-both": lambda m: (
        *m.end(), m.source(), (1, 1), m.plain(OTHERS, _spread(m.size, (2, 2))), (2, 2)
    ),
    "folded_dgrad-one": lambda m: (*m.end(), m.factors(INPUTS), m.source(), (1, 1), [], [], (1, 1)),
    "folded_dgrad-both": lambda m: (
        *m.end(), m.factors(INPUTS), m.source(), (1, 1), m.factors(OTHERS), m.plain(OTHERS, _spread(m.size, (2, 2))),
        (2, 2),
    ),
    "folded_dgrad-frozen": lambda m: (
        *m.end(), [m.conv(OUTPUTS, INPUTS), None, None], m.plain(INPUTS, _spread(m.size, (1, 2))), (1, 2), [], [],
        (1, 1),
    ),
    "conv_backward-3x3": lambda m: (
        m.gradient(STRIDED, 3, False), m.source(), m.conv(OUTPUTS, INPUTS, 3), *STRIDED, None, None, (1, 1), BOTH
    ),
    "conv_backward-1x1": lambda m: (
        m.gradient(Window(), 1, True), m.source(), m.conv(OUTPUTS, INPUTS), *Window(), None, None, (1, 1), BOTH
    ),
    "conv_backward-residual": lambda m: (
        m.gradient(NORMAL, 3, True), m.plain(), m.conv(OUTPUTS, INPUTS, 3), *NORMAL,
        *(x := m.activation(INPUTS), m.bits(x)), (1, 1), BOTH,
    ),
    "conv_backward-sparse": lambda m: (
        m.gradient(Window(), 1, False, True), m.plain(), m.conv(OUTPUTS, INPUTS), *Window(),
        m.activation(INPUTS, (-(-m.size[0] // 2), -(-m.size[1] // 2))), None, (2, 2), [True, False],
    ),
    "conv_backward-weight": lambda m: (
        m.gradient(NORMAL, 3, True), m.source(), m.conv(OUTPUTS, INPUTS, 3), *NORMAL, None, None, (1, 1),
        [False, True],
    ),
    "conv_backward-neither": lambda m: (
        m.gradient(NORMAL, 3, True), m.source(), m.conv(OUTPUTS, INPUTS, 3), *NORMAL, None, None, (1, 1),
        [False, False],
    ),
    "fold_statistics-shift": lambda m: (*_statistics(m), m.vector(INPUTS), 1e-5),
    "fold_statistics-none": lambda m: (*_statistics(m), None, 1e-5),
    "fold_gradients-affine": lambda m: _fold_gradients(m, True, False),
    "fold_gradients-frozen": lambda m: _fold_gradients(m, False, True),
    "rectified_mean": lambda m: (m.vector(INPUTS), m.vector(INPUTS)),
}  # fmt: skip


UNWRITTEN = ("conv_backward-3x3", "conv_backward-residual", "conv_backward-weight")


def test_every_pass_has_cases() -> None:
    assert {case.partition("-")[0] for case in CASES} == TRITON


@pytest.mark.parametrize("size", ["odd", "one_pixel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_opcheck(case: str, dtype: torch.dtype, size: str) -> None:
    """Schema, fake results with the strides of the real ones, and compilation."""
    if case in UNWRITTEN and (dtype, size) == (torch.bfloat16, "one_pixel"):
        pytest.skip("oneDNN leaves taps of this gradient unwritten that see no pixel, for eager PyTorch too")
    arguments = CASES[case](Maker(dtype, SIZES[size]))
    torch.library.opcheck(getattr(OPS, case.partition("-")[0]).default, arguments)


def told(x: Tensor) -> tuple[Any, ...]:
    """All that a fake result tells a compiler."""
    return x.shape, x.stride(), x.dtype, x.device


def check_promises(name: str, arguments: Arguments) -> None:
    """That fakes are laid out exactly as real results: opcheck lets strides of dimensions of size 1 pass."""
    op = getattr(OPS, name).default
    real = as_tuple(op(*arguments))
    with FakeTensorMode() as mode:
        fake = as_tuple(op(*tree_map_only(Tensor, mode.from_tensor, arguments)))
    assert [told(x) for x in fake] == [told(x) for x in real]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"]
)
@pytest.mark.parametrize("case", CASES)
def test_fakes_are_exact(case: str, dtype: torch.dtype, size: str) -> None:
    check_promises(case.partition("-")[0], CASES[case](Maker(dtype, SIZES[size])))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_vendor_equals_reference(case: str, size: str) -> None:
    """Bit for bit in the masks, to rounding in the rest, laid out alike; arguments stay as they are."""
    name = case.partition("-")[0]
    arguments = CASES[case](Maker(torch.float64, SIZES[size]))
    before = copied(arguments)
    oracle = getattr(reference, {"gram_of": "gram"}.get(name, name), None) or getattr(folded_reference, name)
    ours, theirs = as_tuple(getattr(OPS, name)(*arguments)), as_tuple(oracle(*arguments))
    assert len(ours) == len(theirs)
    for found, expected in zip(ours, theirs, strict=True):
        assert told(found) == told(expected)
        if found.dtype == torch.uint8:
            assert torch.equal(found, expected)
        else:
            assert relative_error(found, expected) < 1e-10
    torch.testing.assert_close(list(arguments), before, rtol=0, atol=0)


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


#: What is wrong: primitive, its arguments, what the error says. Not what torch says of its own, which versions reword.
BAD: dict[str, tuple[str, Callable[[Maker], Arguments], str]] = {
    "no fields": ("conv_stats", lambda m: ([], m.conv(OUTPUTS, INPUTS), *Window(), 1e-5, True), "fields of"),
    "a field too many": (
        "conv_stats", lambda m: ([*m.plain(), None], m.conv(OUTPUTS, INPUTS), *Window(), 1e-5, True), "fields of"
    ),
    "too few arguments": ("conv_stats", lambda m: (m.source(), m.conv(OUTPUTS, INPUTS)), "stride"),
    "no distance": ("gram_of", lambda m: (m.source(), None), "every"),
    "a weight of other inputs": (
        "conv_stats", lambda m: (m.plain(), m.conv(OUTPUTS, INPUTS + 1), *Window(), 1e-5, True), "conv must be"
    ),
    "a norm of fewer channels": (
        "conv_stats",
        lambda m: ([m.activation(INPUTS), *m.norm(INPUTS - 1)], m.conv(OUTPUTS, INPUTS), *Window(), 1e-5, True),
        "source.mean must be a contiguous torch.float32 vector of 8 channels",
    ),
    "a mask of fewer rows": (
        "folded_wgrad",
        lambda m: (*(x[i:] for i, x in enumerate(m.end())), m.source(), (1, 1), [], (1, 1)),
        "bits must be a contiguous torch.uint8 mask of shape",
    ),
    "a mask that is none": (
        "folded_dgrad",
        lambda m: (*(x.int() if i else x for i, x in enumerate(m.end())), m.factors(INPUTS), m.source(), (1, 1), [], [],
                   (1, 1)),
        "bits must be a contiguous torch.uint8 mask of shape",
    ),
    "a residual of other channels": (
        "conv_backward",
        lambda m: (m.gradient(NORMAL, 3, True), m.source(), m.conv(OUTPUTS, INPUTS, 3), *NORMAL,
                   m.activation(INPUTS + 1), None, (1, 1), BOTH),
        "residual must be channels_last torch.float32 of shape",
    ),
    "a shortcut of other channels": (
        "expand",
        lambda m: (m.source(), m.conv(OUTPUTS, INPUTS), m.norm(OUTPUTS), m.activation(OTHERS), None, None, [None] * 4,
                   (1, 1)),
        "skip must be of shape",
    ),
    "an input of other pixels": (
        "conv_backward",
        lambda m: (m.gradient(Window(), 1, True), m.source(INPUTS, (3, 3)), m.conv(OUTPUTS, INPUTS), *Window(), None,
                   None, (1, 1), [False, True]),
        "dy.g must be torch.float32 of shape",
    ),
    "a covariance of fewer rows": (
        "fold_statistics", lambda m: (*(x[i // 2 :] for i, x in enumerate(_statistics(m))), None, 1e-5), "contiguous"
    ),
    "a product of fewer columns": (
        "fold_gradients",
        lambda m: (*(x[:, 1:] if i == 7 else x for i, x in enumerate(_fold_gradients(m, True, False))),),
        "product must be contiguous",
    ),
    "a shift of fewer channels": ("rectified_mean", lambda m: (m.vector(INPUTS), m.vector(INPUTS - 1)), "bias must be"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused(what: str) -> None:
    name, make, message = BAD[what]
    arguments = make(Maker(torch.float32))
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
        getattr(OPS, name)(*arguments)

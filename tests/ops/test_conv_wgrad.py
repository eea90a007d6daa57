"""The native weight gradients by implicit GEMM: accuracy at every size and geometry, operands, threads, the rule."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import resnet_fused
from resnet_fused import native
from resnet_fused.ops import conv_wgrad, cpu_rules
from resnet_fused.ops.conv_bn import conv_backward
from resnet_fused.ops.folded_conv_bn import folded_wgrad, input_covariance
from resnet_fused.reference import conv_bn as reference
from resnet_fused.reference import folded_conv_bn
from resnet_fused.types import Activation, ConvGeometry, Gradient
from tests.accuracy import Results, assert_accurate
from tests.ops.convolutions import (
    GRADIENTS,
    SIDES,
    random_activation,
    random_gradient,
    random_mask,
    random_normed,
    run_with,
    widths_for,
)
from tests.threads import assert_independent_of_threads

pytestmark = pytest.mark.skipif(not native.is_loaded, reason="needs the extension")

OPS = torch.ops.resnet_fused
#: Kernel size and geometry: a ResNet's, then others.
CONVOLUTIONS = {
    "1x1": (1, ConvGeometry()),
    "2x2, stride 2": (
        2,
        ConvGeometry((2, 2)),
    ),  # of 1x1 and stride 2, oneDNN's gradient corrupts memory now and then
    "3x3, stride 2": (3, ConvGeometry((2, 2), (1, 1))),
    "3x3, dilation 2": (3, ConvGeometry((1, 1), (2, 2), (2, 2))),
    "1x1, padding": (1, ConvGeometry((1, 1), (1, 2))),
    "3x3, different in rows and columns": (3, ConvGeometry((1, 3), (0, 2), (2, 1))),
}


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The kernel runs whatever was measured; one element for each call."""
    called: list[int] = []
    run = conv_wgrad.conv_wgrad

    def note(*args: Any) -> Any:
        called.append(1)
        return run(*args)

    for module in ("conv_bn", "folded_conv_bn"):
        monkeypatch.setattr(f"resnet_fused.ops.{module}.conv_wgrad", note)
    monkeypatch.setattr(conv_wgrad, "is_faster", lambda *_: True)
    return called


def _cast(dtype: torch.dtype) -> Callable[[Tensor | None], Tensor | None]:
    return lambda x: x.to(dtype) if x is not None and x.is_floating_point() else x


def gradients(
    sizes: tuple[int, int, int, int],  # batch, inputs, height, width
    outputs: int,
    convolution: str,
    normed: bool = True,
    gradient: str = "bn",
) -> tuple[Results, Results, Results]:
    """All that ``conv_backward`` computes of random operands, of those that the names ask for."""
    size, geometry = CONVOLUTIONS[convolution]
    a = Activation(*random_normed(sizes)) if normed else Activation(random_activation(sizes))
    weight = (torch.randn(outputs, sizes[1], size, size) / size).contiguous(memory_format=torch.channels_last)
    dy = random_gradient((sizes[0], outputs, *geometry.out_size(a.x, weight)), gradient)
    rest = None, None, (1, 1), [True, True]

    def named(results: tuple[Tensor, ...]) -> dict[str, Tensor]:
        names = ("da", "sum_dz", "sum_dz_xhat", "dy_coeffs", "dweight")
        return {name: x for name, x in zip(names, results, strict=True) if x.numel()}

    def by_reference(dtype: torch.dtype) -> dict[str, Tensor]:
        cast = _cast(dtype)
        wide = Gradient(*map(cast, dy)), Activation(*map(cast, a)), weight.to(dtype)
        return named(reference.conv_backward(*wide, geometry, *rest))

    fused = named(conv_backward([*dy], [*a], weight, *geometry, *rest))
    return fused, by_reference(torch.float32), by_reference(torch.float64)


@pytest.mark.parametrize("convolution", CONVOLUTIONS)
@pytest.mark.parametrize("height", SIDES)
def test_every_size(convolution: str, height: int, calls: list[int]) -> None:
    """Images of up to 20x20, and channels that fill no vector."""
    size, geometry = CONVOLUTIONS[convolution]
    for width in widths_for(height):
        if min(geometry.out_size(torch.empty(1, 1, height, width), torch.empty(1, 1, size, size))) > 0:
            before = len(calls)
            assert_accurate(lambda: gradients((3, 6, height, width), 11, convolution))  # noqa: B023
            assert len(calls) > before


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("normed", [True, False], ids=["bn_relu", "plain"])
@pytest.mark.parametrize("convolution", ["1x1", "3x3, stride 2"])
def test_operands(convolution: str, normed: bool, gradient: str) -> None:
    assert_accurate(lambda: gradients((2, 19, 9, 6), 37, convolution, normed, gradient))


@pytest.mark.parametrize(
    ("sizes", "outputs"),
    [
        ((1, 2, 5, 5), 2),
        ((2, 130, 7, 7), 33),
        ((5, 64, 20, 28), 64),  # sums over parts of the batch
        ((2, 300, 10, 10), 1040),  # sums larger than that
        ((1, 16, 1, 1), 16),
    ],
    ids=str,
)
@pytest.mark.parametrize("convolution", ["1x1", "3x3, stride 2"])
def test_strategies(sizes: tuple[int, int, int, int], outputs: int, convolution: str) -> None:
    assert_accurate(lambda: gradients(sizes, outputs, convolution, gradient="masked_bn"))


@pytest.mark.parametrize("skip", [False, True], ids=["one", "two"])
def test_folded_wgrad(skip: bool, calls: list[int]) -> None:
    def draw() -> tuple[Results, Results, Results]:
        grad = random_activation((3, 40, 9, 7))
        mask, a, other = random_mask(grad), random_activation((3, 24, 9, 7)), random_activation((3, 19, 9, 7))

        def named(results: tuple[Tensor, ...]) -> dict[str, Tensor]:
            return {n: x for n, x in zip(("q", "skip_q", "sum_dz"), results, strict=True) if x.numel()}

        def by_reference(dtype: torch.dtype) -> dict[str, Tensor]:
            second = Activation(other.to(dtype)) if skip else None
            operands = grad.to(dtype), mask, Activation(a.to(dtype)), (1, 1), second, (1, 1)
            return named(folded_conv_bn.folded_wgrad(*operands))

        operands = [a, *[None] * 6], (1, 1), [other, *[None] * 6] if skip else [], (1, 1)
        return (
            named(folded_wgrad(grad, mask, *operands)),
            by_reference(torch.float32),
            by_reference(torch.float64),
        )

    assert_accurate(draw)
    assert len(calls) == 5 * (1 + skip)


def test_input_covariance(calls: list[int]) -> None:
    def draw() -> tuple[Results, Results, Results]:
        x = random_activation((3, 40, 9, 7))
        x -= x.mean((0, 2, 3), keepdim=True).round(decimals=1)  # the op is for centered inputs

        def by_reference(dtype: torch.dtype) -> dict[str, Tensor]:
            results = folded_conv_bn.input_covariance(Activation(x.to(dtype)), (1, 1))
            return dict(zip(("mean", "covariance"), results, strict=True))

        fused = dict(zip(("mean", "covariance"), input_covariance([x, *[None] * 6], (1, 1)), strict=True))
        return fused, by_reference(torch.float32), by_reference(torch.float64)

    assert_accurate(draw)
    assert calls


@pytest.mark.parametrize(
    ("sizes", "outputs"),
    [((4, 64, 28, 28), 256), ((3, 32, 14, 13), 96), ((4, 300, 7, 7), 1040), ((1, 16, 2, 2), 16)],
    ids=str,
)
def test_results_do_not_depend_on_the_threads(sizes: tuple[int, int, int, int], outputs: int) -> None:
    """Weight gradients of other convolutions in csrc: with 1, 2, 3 and 4 threads"""
    g = random_activation((sizes[0], outputs, *sizes[2:]))
    operands = Gradient(g, random_mask(g)), Activation(*random_normed(sizes)), (1, 1), ConvGeometry(), True
    assert_independent_of_threads(lambda: conv_wgrad.conv_wgrad(*operands))


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_instruction_sets(isa: str) -> None:
    run_with(isa, __file__)


def test_no_pixels() -> None:
    x, g, none = torch.empty(0, 6, 4, 4), torch.empty(0, 5, 4, 4), [None] * 4
    dweight, sums = OPS.conv_wgrad(g, *none, *none, x, *none, [1, 1], [1, 1], [0, 0], [1, 1], True)
    assert dweight.shape == (5, 6, 1, 1) and not dweight.any() and sums.shape == (5,) and not sums.any()


def test_what_is_supported() -> None:
    x = torch.empty(2, 8, 4, 4)
    for shape in ((8, 8, 1, 1), (4, 8, 3, 3), (4, 8, 1, 5)):
        assert conv_wgrad.supports_conv_wgrad(x, shape, 1)
    for shape, groups in (((8, 4, 3, 3), 2), ((8, 1, 1, 1), 1), ((1, 8, 1, 1), 1)):
        assert not conv_wgrad.supports_conv_wgrad(x, shape, groups)
    assert not conv_wgrad.supports_conv_wgrad(x.bfloat16(), (8, 8, 1, 1), 1)
    for choice in ("vendor", "reference"):
        with resnet_fused.backend(choice):
            assert not conv_wgrad.supports_conv_wgrad(x, (8, 8, 1, 1), 1)


def test_measured_rules_are_complete() -> None:
    for isa, name in itertools.product(("avx512", "avx2"), ("wgrad_1x1", "wgrad_3x3")):
        machines = cpu_rules.tables(isa, "convolutions", name)
        assert machines
        assert all(n > 0 for table in machines for sizes in table.values() for n in sizes.values())


def test_operands_that_do_not_fit_are_refused() -> None:
    x, g, none = random_activation((2, 8, 4, 4)), random_activation((2, 6, 4, 4)), [None] * 4

    def run(g: Tensor, x: Tensor, *geometry: list[int]) -> None:
        OPS.conv_wgrad(g, *none, *none, x, *none, *geometry, False)

    pointwise = [1, 1], [1, 1], [0, 0], [1, 1]
    run(g, x, *pointwise)
    for message, call in (
        ("x must be a 4-D float32", lambda: run(g, x.double(), *pointwise)),
        ("g must have the shape", lambda: run(g[:1], x, *pointwise)),
        ("g must have the shape", lambda: run(g, x, [3, 3], *pointwise[1:])),
        ("g must have the shape", lambda: run(g, x, [9, 9], *pointwise[1:])),
        ("must be positive", lambda: run(g, x, [1, 1], [0, 1], *pointwise[2:])),
        ("two numbers each", lambda: run(g, x, [1], *pointwise[1:])),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()

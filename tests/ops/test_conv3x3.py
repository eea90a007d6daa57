"""The native 3x3 convolutions of the CPU: accuracy at every size, operands, threads, instruction sets, and the rule."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import resnet_fused
from resnet_fused import native
from resnet_fused.ops import conv3x3, cpu_rules
from resnet_fused.ops.conv_bn import conv_backward, conv_bn_stats
from resnet_fused.reference import conv_bn as reference
from resnet_fused.types import Activation, ConvGeometry, Gradient
from tests.accuracy import Results, assert_accurate
from tests.ops.convolutions import (
    GRADIENTS,
    SIDES,
    random_activation,
    random_bn,
    random_gradient,
    random_mask,
    random_normed,
    run_with,
    widths_for,
)
from tests.threads import assert_independent_of_threads

pytestmark = pytest.mark.skipif(not native.is_loaded, reason="needs the extension")

GEOMETRY = ConvGeometry(padding=(1, 1))
OPS = torch.ops.resnet_fused
RESIDUALS = ("none", "plain", "masked")


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels run whatever was measured; which of them have."""
    called = []

    def noting(name: str) -> Callable[..., Any]:
        run = getattr(conv3x3, name)

        def note(*args: Any) -> Any:
            called.append(name)
            return run(*args)

        return note

    for name in ("conv3x3_bn_stats", "conv3x3_dgrad", "conv3x3_wgrad"):
        monkeypatch.setattr(f"resnet_fused.ops.conv_bn.{name}", noting(name))
    monkeypatch.setattr(conv3x3, "is_faster", lambda *_: True)
    return called


class Convolution:
    """Random operands of a convolution: what is given of them, by the names above."""

    def __init__(
        self,
        sizes: tuple[int, int, int, int],  # batch, inputs, height, width
        outputs: int,
        normed: bool = True,
        gradient: str = "bn",
        residual: str = "none",
        weight_format: torch.memory_format = torch.channels_last,
    ) -> None:
        batch, inputs, height, width = sizes
        self.a = Activation(*random_normed(sizes)) if normed else Activation(random_activation(sizes))
        self.weight = (torch.randn(outputs, inputs, 3, 3) / 3).contiguous(memory_format=weight_format)
        self.dy = random_gradient((batch, outputs, height, width), gradient)
        self.residual = None if residual == "none" else random_activation(sizes)
        self.mask = None if residual != "masked" or self.residual is None else random_mask(self.residual)

    def fused(self) -> dict[str, Tensor]:
        geometry = GEOMETRY
        forward = conv_bn_stats([*self.a], self.weight, *geometry, 1e-5, True, None, None, False)
        rest = self.residual, self.mask, (1, 1), [True, True]
        backward = conv_backward([*self.dy], [*self.a], self.weight, *geometry, *rest)
        return named(forward, backward)

    def by_reference(self, dtype: torch.dtype) -> dict[str, Tensor]:
        def cast(x: Tensor | None) -> Tensor | None:
            return x.to(dtype) if x is not None and x.is_floating_point() else x

        a, dy = Activation(*map(cast, self.a)), Gradient(*map(cast, self.dy))
        weight = self.weight.to(dtype)
        forward = reference.conv_bn_stats(a, weight, GEOMETRY, 1e-5, True, None, None, False)
        rest = cast(self.residual), self.mask, (1, 1), [True, True]
        return named(forward, reference.conv_backward(dy, a, weight, GEOMETRY, *rest))

    def results(self) -> tuple[Results, Results, Results]:
        return self.fused(), self.by_reference(torch.float32), self.by_reference(torch.float64)


def named(forward: tuple[Tensor, ...], backward: tuple[Tensor, ...]) -> dict[str, Tensor]:
    names = ("y", "mean", "var", "invstd", "bn_coeffs", "da", "sum_dz", "sum_dz_xhat", "dy_coeffs", "dweight")
    return {name: x for name, x in zip(names, (*forward, *backward), strict=True) if x.numel()}


# Of an image with one row, only the middle row of taps sees pixels: what is left is no 3x3 convolution.
@pytest.mark.parametrize("height", SIDES[1:])
def test_every_size(height: int, always: list[str]) -> None:
    """Images of 2x1 to 20x20, and channels that fill no vector."""
    for width in widths_for(height):
        assert_accurate(lambda: Convolution((3, 6, height, width), 11).results())  # noqa: B023
    assert {*always} == {"conv3x3_bn_stats", "conv3x3_dgrad", "conv3x3_wgrad"}


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("normed", [True, False], ids=["bn_relu", "plain"])
def test_operands(normed: bool, gradient: str, residual: str) -> None:
    assert_accurate(lambda: Convolution((2, 19, 9, 6), 37, normed, gradient, residual).results())


@pytest.mark.parametrize(
    ("sizes", "outputs"),
    [
        ((1, 2, 5, 5), 2),
        ((2, 130, 7, 7), 33),
        ((1, 16, 3, 500), 48),  # a row of tiles is cut into segments
        ((5, 64, 20, 28), 64),  # sums over parts of the batch
        ((2, 300, 10, 10), 520),  # weights larger than the cache, point by point
        ((1, 16, 1, 1), 16),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_strategies(sizes: tuple[int, int, int, int], outputs: int, layout: torch.memory_format) -> None:
    assert_accurate(lambda: Convolution(sizes, outputs, residual="masked", weight_format=layout).results())


@pytest.mark.parametrize(
    "geometry",
    [
        ConvGeometry(padding=(1, 1), dilation=(2, 1)),
        ConvGeometry(padding=(1, 1), dilation=(1, 2)),
        ConvGeometry(padding=(2, 1)),
        ConvGeometry((1, 2), (1, 1)),
        ConvGeometry(padding=(1, 1), groups=2),
    ],
    ids=str,
)
def test_other_geometries_are_the_vendors(geometry: ConvGeometry, always: list[str]) -> None:
    """The kernels know only stride 1, padding 1, dilation 1 and no groups."""
    x, weight = random_activation((2, 6, 9, 8)), torch.randn(4, 6 // geometry.groups, 3, 3)
    y, *_ = conv_bn_stats([*Activation(x)], weight, *geometry, 1e-5, True, None, None, False)
    torch.testing.assert_close(y, torch.conv2d(x, weight, None, *geometry))
    dy, rest = Gradient(torch.ones_like(y)), (None, None, (1, 1), [True, True])
    da, *_, dweight = conv_backward([*dy], [*Activation(x)], weight, *geometry, *rest)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    for ours, theirs in zip(
        (da, dweight), torch.autograd.grad(torch.conv2d(*leaves, None, *geometry).sum(), leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not always


def test_means_far_from_zero() -> None:
    """|mean| / std of 1e3, of the input and of the output."""

    def draw() -> tuple[Results, Results, Results]:
        convolution = Convolution((4, 8, 10, 9), 16)
        far = 1e3 * torch.randn(8).sign()
        a = convolution.a
        convolution.a = a._replace(x=a.x + far.view(-1, 1, 1), mean=far, bias=None)
        return convolution.results()

    assert_accurate(draw)

    def far_output() -> tuple[Results, Results, Results]:
        convolution = Convolution((4, 8, 10, 9), 16, normed=False)
        convolution.a = Activation(1 + 1e-3 * convolution.a.x)
        convolution.weight[:, :, 0], convolution.weight[:, :, 2] = (
            0,
            0,
        )  # so that rows of padding don't differ
        convolution.weight[..., 0], convolution.weight[..., 2] = 0, 0
        return convolution.results()

    assert_accurate(far_output)


def test_nan_goes_through_as_in_eager() -> None:
    """Into the 3x3 pixels around it, and through the ReLU of the prologue; a tile spreads it to its other pixels."""
    convolution = Convolution((1, 4, 9, 9), 4)
    convolution.a.x[0, 1, 4, 4] = math.nan
    y, by_eager = convolution.fused()["y"], convolution.by_reference(torch.float32)["y"]
    assert by_eager.isnan().sum() == 4 * 9
    assert y.isnan()[by_eager.isnan()].all()
    assert not y[..., :2].isnan().any() and not y[..., 8:].isnan().any()


@pytest.mark.parametrize(
    ("sizes", "outputs"),
    [((2, 64, 28, 28), 64), ((3, 32, 14, 13), 96), ((4, 300, 7, 7), 520), ((1, 16, 2, 2), 16)],
    ids=str,
)
def test_results_do_not_depend_on_the_threads(sizes: tuple[int, int, int, int], outputs: int) -> None:
    """3x3 convolutions in csrc, forward, dgrad and wgrad: with 1, 2, 3 and 4 threads"""
    convolution = Convolution(sizes, outputs, residual="masked")
    assert_independent_of_threads(lambda: [*convolution.fused().values()])


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_instruction_sets(isa: str) -> None:
    run_with(isa, __file__)


def test_instruction_set_can_be_limited() -> None:
    script = "from resnet_fused import native; print(native.cpu_isa())"
    for asked, expected in (("baseline", "baseline"), ("avx512", native.cpu_isa())):
        environment = {**os.environ, "RESNET_FUSED_CPU_ISA": asked}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        if "RESNET_FUSED_CPU_ISA" not in os.environ:
            assert done.stdout.strip() == expected, done.stderr


# Which convolutions they compute


def test_what_is_supported() -> None:
    x, weight = torch.empty(2, 8, 4, 4), torch.empty(8, 8, 3, 3)
    assert conv3x3.supports_conv3x3(x, weight, GEOMETRY)
    for geometry in (
        ConvGeometry(),
        ConvGeometry((2, 2), (1, 1)),
        ConvGeometry((1, 1), (2, 2), (2, 2)),
        ConvGeometry(padding=(1, 1), groups=2),
    ):
        assert not conv3x3.supports_conv3x3(x, weight, geometry)
    assert not conv3x3.supports_conv3x3(x, torch.empty(8, 8, 1, 1), GEOMETRY)
    assert not conv3x3.supports_conv3x3(x, torch.empty(8, 1, 3, 3), GEOMETRY)
    assert not conv3x3.supports_conv3x3(x.bfloat16(), weight, GEOMETRY)
    for choice in ("vendor", "reference"):
        with resnet_fused.backend(choice):
            assert not conv3x3.supports_conv3x3(x, weight, GEOMETRY)


def test_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {
        "some": [{64: {56: 1, 7: 2}, 512: {7: 1}}, {64: {56: 1, 7: 4}, 512: {7: 1 << 30}}],
        "another": [],
    }
    monkeypatch.setattr(cpu_rules, "tables", lambda isa, kind, name: measured[isa])
    cpu_rules._least_pixels.cache_clear()

    def runs(shape: tuple[int, ...], channels: int, isa: str = "some") -> bool:
        monkeypatch.setattr(native, "cpu_isa", lambda: isa)
        return cpu_rules.is_faster("convolutions", "forward", shape, channels)

    assert runs((1, 64, 56, 56), 64) and runs((4, 64, 7, 7), 64) and not runs((3, 64, 7, 7), 64)
    assert runs((2, 64, 10, 10), 64)  # as many pixels as four images of 7x7
    assert not runs((64, 512, 7, 7), 512)
    assert not runs((64, 64, 56, 56), 64, "another")
    assert not runs((0, 64, 7, 7), 64) and not runs((2, 64, 0, 7), 64)
    cpu_rules._least_pixels.cache_clear()


def test_measured_rules_are_complete() -> None:
    for isa, name in itertools.product(("avx512", "avx2"), ("forward", "dgrad", "wgrad", "inference")):
        machines = cpu_rules.tables(isa, "convolutions", name)
        assert machines
        for table in machines:
            assert table.keys() >= {64, 128, 256, 512}
            assert all(n > 0 for sizes in table.values() for n in sizes.values())


@pytest.mark.parametrize("names", [*itertools.product((True, False), repeat=2)], ids=str)
def test_passes_are_chosen_one_by_one(
    names: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch, always: list[str]
) -> None:
    chosen = {"forward": True, "dgrad": names[0], "wgrad": names[1]}
    monkeypatch.setattr(conv3x3, "is_faster", lambda kind, name, *_: chosen[name])
    assert_accurate(lambda: Convolution((2, 12, 6, 8), 20, gradient="masked_bn", residual="plain").results())
    assert ("conv3x3_dgrad" in always, "conv3x3_wgrad" in always) == names


# What they refuse


def test_operands_that_do_not_fit_are_refused() -> None:
    x, g, weight = random_activation((2, 8, 4, 4)), random_activation((2, 6, 4, 4)), torch.randn(6, 8, 3, 3)
    none = [None] * 4
    for message, call in (
        ("x must be a 4-D float32", lambda: OPS.conv3x3_forward(x.double(), *none, weight, 0.0, True)),
        ("weight must have the shape", lambda: OPS.conv3x3_forward(x, *none, weight[:, 1:], 0.0, True)),
        ("weight must be float32", lambda: OPS.conv3x3_forward(x, *none, weight.double(), 0.0, True)),
        ("both mean and invstd", lambda: OPS.conv3x3_forward(x, x[0, :, 0, 0], *none[1:], weight, 0.0, True)),
        ("g must have the shape", lambda: OPS.conv3x3_wgrad(g[1:], *none, *none, x, *none)),
        (
            "mask must be the contiguous uint8",
            lambda: OPS.conv3x3_wgrad(g, torch.zeros(3, 1, dtype=torch.uint8), *none, *none[1:], x, *none),
        ),
        (
            "needs its input y",
            lambda: OPS.conv3x3_wgrad(g, None, None, *random_bn(6), None, None, x, *none),
        ),
        (
            "residual must have the shape",
            lambda: OPS.conv3x3_dgrad(g, *none, *none, weight, x, *none, x[1:], None),
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()

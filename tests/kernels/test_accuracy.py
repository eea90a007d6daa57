"""Every GEMM-shaped Triton kernel by the accuracy rule, on a GPU or in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import resnet_fused
from resnet_fused.kernels.launch import observe_launches
from resnet_fused.layout import pack_mask
from resnet_fused.ops import conv_bn, folded_conv_bn
from resnet_fused.reference.conv_bn import activation_value
from resnet_fused.types import Activation, ConvGeometry, Gradient, Pair
from tests.accuracy import assert_accurate, relative_error
from tests.kernels.devices import DEVICES, DTYPES
from tests.ops.operands import Arguments, Maker, in_float64, reference_of

OPS = {
    "conv_bn_stats": conv_bn.conv_bn_stats,
    "conv_backward": conv_bn.conv_backward,
    "input_covariance": folded_conv_bn.input_covariance,
    "conv1x1_bn_add_relu": folded_conv_bn.conv1x1_bn_add_relu,
    "folded_wgrad": folded_conv_bn.folded_wgrad,
    "folded_dgrad": folded_conv_bn.folded_dgrad,
}
#: Name: (inputs, outputs, kernel height, kernel width, geometry, size).
CONVS = {
    "1x1": (19, 37, 1, 1, ConvGeometry(), (5, 7)),
    "1x1 stride": (24, 16, 1, 1, ConvGeometry((2, 2)), (7, 6)),
    "3x3": (16, 40, 3, 3, ConvGeometry(padding=(1, 1)), (6, 5)),
    "3x3 stride": (13, 21, 3, 3, ConvGeometry((2, 2), (1, 1)), (7, 6)),
    "3x3 dilation": (8, 16, 3, 3, ConvGeometry(padding=(2, 2), dilation=(2, 2)), (7, 6)),
    "3x1 uneven": (9, 17, 3, 1, ConvGeometry((1, 2), (1, 0)), (5, 8)),
}
Size = tuple[int, int]
on_devices = pytest.mark.parametrize("device", DEVICES)


def in_dtypes(names: str, cases: Sequence[Any]) -> pytest.MarkDecorator:
    """Parameters ``device``, ``dtype`` and ``names``: all dtypes on a GPU; in the interpreter one, in turns."""
    runs = []
    for i, case in enumerate(cases):
        values = case if isinstance(case, tuple) else (case,)
        interpreted = (torch.float32, torch.float16)[i % 2]
        runs.append(pytest.param("cpu", interpreted, *values, marks=pytest.mark.interpreter))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            runs.append(pytest.param("cuda", dtype, *values, marks=pytest.mark.gpu))
    return pytest.mark.parametrize(["device", "dtype", *names.split()], runs, ids=str)


class KindMaker(Maker):
    """Makes operands of all kinds, of two images."""

    def activation(self, channels: int, size: Size | None = None) -> Tensor:
        return super().activation(channels, size)[:2]

    def kind_of_a(self, kind: str, channels: int, size: Size) -> Activation:
        x = self.activation(channels, size)
        return {
            "plain": lambda: Activation(x),
            "shifted": lambda: Activation(x, shift=self.vector(channels)),
            "normed": lambda: Activation(x, *self.bn(channels)),
            "no affine": lambda: Activation(x, *self.bn(channels, False)),
            "normed shifted": lambda: Activation(x, *self.bn(channels), self.vector(channels)),
        }[kind]()

    def kind_of_dy(self, kind: str, channels: int, size: Size) -> Gradient:
        g, y = self.activation(channels, size), self.activation(channels, size)
        sums = self.vector(channels), self.vector(channels)
        return {
            "plain": lambda: Gradient(g),
            "masked": lambda: Gradient(g, self.mask(g)),
            "normed": lambda: Gradient(g, None, y, *self.bn(channels), *sums),
            "masked normed": lambda: Gradient(g, self.mask(g), y, *self.bn(channels), *sums),
            "running": lambda: Gradient(g, None, y, *self.bn(channels)),
            "masked running": lambda: Gradient(g, self.mask(g), y, *self.bn(channels, False)),
        }[kind]()

    def residual(self, kind: str, channels: int, size: Size) -> Arguments:
        """The residual, its mask and input stride."""
        if kind == "none":
            return None, None, (1, 1)
        if kind == "strided":
            return self.activation(channels, (-(-size[0] // 2), -(-size[1] // 3))), None, (2, 3)
        residual = self.activation(channels, size)
        return residual, self.mask(residual), (1, 1)


def check(name: str, make: Callable[[], Arguments], dtype: torch.dtype) -> None:
    """The rule for all results of an op: by Triton, by the vendor's library, and in float64."""

    def draw() -> tuple[dict[str, Tensor], ...]:
        arguments = make()
        with resnet_fused.backend("triton"):
            by_triton = OPS[name](*arguments)
        with resnet_fused.backend("vendor"):
            by_vendor = OPS[name](*arguments)
        exact = reference_of(name)(*in_float64(arguments))
        named: tuple[dict[str, Tensor], ...] = ({}, {}, {})
        for i, results in enumerate(zip(by_triton, by_vendor, exact, strict=True)):
            ours, theirs, truth = results
            assert ours.shape == theirs.shape == truth.shape and ours.stride() == theirs.stride(), (name, i)
            if ours.dtype == torch.uint8:
                # Of the kernel's own output: rounding decides on which side of zero it is.
                assert torch.equal(ours, pack_mask(by_triton[0] > 0, by_triton[0])), "not the output's mask"
            elif ours.numel():
                for result, values in zip(results, named, strict=True):
                    values[f"{name} result {i}"] = result
        return named

    # Sums are of values that were rounded to the activations' dtype before.
    assert_accurate(draw, dtype)  # type: ignore[arg-type]


def rotated(kinds: Sequence[Any], *shifts: int) -> list[tuple[str, Any]]:
    """Some kinds of operands for each of ``CONVS``, so that each kind is tested with several convolutions."""
    return [(conv, kinds[(i + shift) % len(kinds)]) for i, conv in enumerate(CONVS) for shift in shifts]


@in_dtypes("conv kind", rotated(["plain", "shifted", "normed", "no affine", "normed shifted"], 0, 2))
def test_conv_bn_stats(conv: str, kind: str, dtype: torch.dtype, device: str) -> None:
    m = KindMaker(dtype, device=device)
    inputs, outputs, kernel_h, kernel_w, geometry, size = CONVS[conv]

    def make() -> Arguments:
        weight = m.weight(outputs, inputs, kernel_h, kernel_w)
        bn = (m.vector(outputs), m.vector(outputs)) if kind == "normed" else (None, None)
        return [*m.kind_of_a(kind, inputs, size)], weight, *geometry, 1e-5, kind != "shifted", *bn, True

    check("conv_bn_stats", make, dtype)


#: Kinds of dy, a and residual.
BACKWARD = [
    ("plain", "plain", "none"),
    ("masked", "shifted", "masked"),
    ("normed", "normed", "strided"),
    ("masked normed", "no affine", "none"),
    ("running", "normed shifted", "masked"),
    ("masked running", "plain", "strided"),
]


@in_dtypes("conv kinds", rotated(BACKWARD, 0, 3))
def test_conv_backward(conv: str, kinds: tuple[str, str, str], dtype: torch.dtype, device: str) -> None:
    dy, a, residual = kinds
    m = KindMaker(dtype, device=device)
    inputs, outputs, kernel_h, kernel_w, geometry, size = CONVS[conv]

    def make() -> Arguments:
        weight, activation = m.weight(outputs, inputs, kernel_h, kernel_w), m.kind_of_a(a, inputs, size)
        gradient = m.kind_of_dy(dy, outputs, geometry.out_size(activation.x, weight))
        more = m.residual(residual, inputs, size)
        return [*gradient], [*activation], weight, *geometry, *more, [True, True]

    check("conv_backward", make, dtype)


@in_dtypes(
    "channels input_stride kind",
    [
        (19, (1, 1), "shifted"),
        (19, (2, 2), "normed shifted"),
        (40, (2, 2), "shifted"),
        (40, (1, 1), "normed shifted"),
    ],
)
def test_input_covariance(
    channels: int, input_stride: Pair, kind: str, dtype: torch.dtype, device: str
) -> None:
    """With a shift that is near the mean, as it is in a block."""
    m = KindMaker(dtype, device=device)

    def make() -> Arguments:
        a = m.kind_of_a(kind, channels, (7, 6))._replace(shift=None)
        mean = activation_value(a).double().mean((0, 2, 3)).float()
        return [*a._replace(shift=mean + 0.1 * m.vector(channels))], input_stride

    check("input_covariance", make, dtype)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_covariance_of_a_large_mean(dtype: torch.dtype, device: str) -> None:
    x = (torch.randn(2, 16, 9, 9) + 100 * torch.randn(16, 1, 1)).to(device, dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    shift = x[0, :, 4, 4].float()
    arguments = [*Activation(x, shift=shift)], [1, 1]
    exact = reference_of("input_covariance")(*in_float64(arguments))[1]
    with resnet_fused.backend("triton"):
        _, covariance = folded_conv_bn.input_covariance(*arguments)
    # In float16 differences are rounded where a mean is near zero, in float32 nowhere.
    assert relative_error(covariance, exact) < max(1e-5, 4 * torch.finfo(dtype).eps)


@in_dtypes(
    "main shortcut input_stride",
    [
        ("folded", "input", (1, 1)),
        ("folded", "normed", (1, 1)),
        ("folded", "folded", (2, 3)),
        ("folded", "folded running", (1, 1)),
        ("plain", "normed", (1, 1)),
        ("plain", "input", (1, 1)),
        ("plain", "folded running", (2, 3)),
        ("plain", "folded", (1, 1)),
    ],
)
def test_conv1x1_bn_add_relu(
    main: str, shortcut: str, input_stride: Pair, dtype: torch.dtype, device: str
) -> None:
    m = KindMaker(dtype, (5, 4), device)
    inputs, outputs, skip_channels = 19, 40, 13

    def make() -> Arguments:
        a, weight = m.kind_of_a("plain", outputs, m.size), None
        if main == "folded":
            a, weight = m.kind_of_a("normed shifted", inputs, m.size), m.weight(outputs, inputs)
        bn = [*m.bn(outputs)]
        if shortcut.startswith("folded"):
            skip = m.activation(skip_channels, m.before_subsampling(input_stride))
            shift = None if shortcut == "folded running" else m.vector(skip_channels)
            skip_bn = [*m.bn(outputs, shortcut == "folded")]
            rest = skip, shift, m.weight(outputs, skip_channels), skip_bn, input_stride
        else:
            skip_bn = [*m.bn(outputs)] if shortcut == "normed" else [None] * 4
            rest = m.activation(outputs), None, None, skip_bn, input_stride
        return [*a], weight, bn, *rest

    check("conv1x1_bn_add_relu", make, dtype)


FOLDED = ["normed", "normed shifted", "shifted", "plain", "both", "both strided", "both running"]


def folded_operands(m: KindMaker, kind: str) -> tuple[Tensor, Activation, Pair, list[Tensor | None], Pair]:
    """A gradient w.r.t. a block's output, and input and input stride of one or both folded convolutions."""
    channels, outputs, skip_channels = 19, 40, 13
    both = kind.startswith("both")
    input_stride = (2, 3) if kind in ("shifted", "plain") else (1, 1)
    a = m.kind_of_a("normed shifted" if both else kind, channels, m.before_subsampling(input_stride))
    skip_input_stride = (1, 2) if kind == "both strided" else (1, 1)
    skip: list[Tensor | None] = []
    if both:
        shift = None if kind == "both running" else m.vector(skip_channels)
        x = m.activation(skip_channels, m.before_subsampling(skip_input_stride))
        skip = [*Activation(x, shift=shift)]
    return m.activation(outputs), a, input_stride, skip, skip_input_stride


@in_dtypes("kind", FOLDED)
def test_folded_wgrad(kind: str, dtype: torch.dtype, device: str) -> None:
    m = KindMaker(dtype, (5, 4), device)

    def make() -> Arguments:
        grad, a, input_stride, skip, skip_input_stride = folded_operands(m, kind)
        return grad, m.mask(grad), [*a], input_stride, skip, skip_input_stride

    check("folded_wgrad", make, dtype)


@in_dtypes("kind", [*FOLDED[1:], FOLDED[0]])
def test_folded_dgrad(kind: str, dtype: torch.dtype, device: str) -> None:
    m = KindMaker(dtype, (5, 4), device)

    def factors(outputs: int, x: Tensor | None) -> list[Tensor | None]:
        if x is None:
            return []
        channels, running = x.shape[1], kind == "both running"
        rest = [None, None] if running else [m.weight(channels, channels), m.vector(channels)]
        return [m.weight(outputs, channels), *rest]

    def make() -> Arguments:
        grad, a, input_stride, skip, skip_input_stride = folded_operands(m, kind)
        outputs, skip_x = grad.shape[1], skip[0] if skip else None
        of_skip = factors(outputs, skip_x), skip, skip_input_stride
        return grad, m.mask(grad), factors(outputs, a.x), [*a], input_stride, *of_skip

    check("folded_dgrad", make, dtype)


@on_devices
def test_gradients_that_the_mask_drops_may_be_nan(device: str) -> None:
    m = KindMaker(torch.float32, device=device)
    g = m.activation(16, (4, 4))
    passed = torch.rand_like(g) < 0.6
    g, mask = torch.where(passed, g, torch.nan), pack_mask(passed, g)
    a, weight = [*Activation(m.activation(8, (4, 4)))], m.weight(16, 8)
    residual = None, None, (1, 1)
    with resnet_fused.backend("triton"):
        results = [
            *folded_conv_bn.folded_wgrad(g, mask, a, (1, 1), [], (1, 1)),
            *conv_bn.conv_backward([*Gradient(g, mask)], a, weight, *ConvGeometry(), *residual, [True, True]),
        ]
    assert not any(t.isnan().any() for t in results)


@on_devices
@pytest.mark.parametrize(("taps", "kernels"), [(31, ["conv_bn_stats", "dgrad"]), (32, [])])
def test_kernels_with_more_taps_than_bits(taps: int, kernels: list[str], device: str) -> None:
    """A convolution of more than 31 rows or columns is the vendor's."""
    m, geometry = KindMaker(torch.float32, device=device), ConvGeometry((1, 1), (15, 0))

    def operands() -> Arguments:
        return [*Activation(m.activation(8, (5, 2)))], m.weight(8, 8, taps, 1), *geometry

    def backward() -> Arguments:
        dy = Gradient(m.activation(8, (5 + 30 - taps + 1, 2)))
        return [*dy], *operands(), None, None, (1, 1), [True, False]

    launched: list[str] = []
    with observe_launches(lambda launch: launched.append(launch.name)):
        check("conv_bn_stats", lambda: (*operands(), 1e-5, False, None, None, True), m.dtype)
        check("conv_backward", backward, m.dtype)
    assert list(dict.fromkeys(launched)) == kernels

"""Every GEMM-shaped Triton kernel against float64, on a GPU or through Triton's interpreter."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import resnet_fused
from resnet_fused.kernels.launch import observe_launches
from resnet_fused.layout import pack_mask
from resnet_fused.ops import passes
from resnet_fused.reference import passes as reference
from resnet_fused.types import Activation, ConvGeometry, Gradient
from tests.accuracy import assert_as_accurate, in_some_draw, relative_error
from tests.kernels.devices import DEVICES, DTYPES

#: Name: (inputs, outputs, kernel, window, height, width).
CONVS = {
    "1x1": (19, 37, 1, ConvGeometry(), 5, 7),
    "1x1 stride": (24, 16, 1, ConvGeometry((2, 2)), 7, 6),
    "3x3": (16, 40, 3, ConvGeometry(padding=(1, 1)), 6, 5),
    "3x3 stride": (13, 21, 3, ConvGeometry((2, 2), (1, 1)), 7, 6),
    "3x3 dilation": (8, 16, 3, ConvGeometry(padding=(2, 2), dilation=(2, 2)), 7, 6),
    "3x1 uneven": (9, 17, 3, ConvGeometry((1, 2), (1, 0)), 5, 8),
}


class Maker:
    """Random operands of one dtype on one device, channels_last."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.dtype, self.device = dtype, device

    def activation(self, channels: int, height: int, width: int, images: int = 2) -> Tensor:
        x = torch.randn(images, channels, height, width) + torch.randn(channels, 1, 1)
        return x.to(self.device, self.dtype).contiguous(memory_format=torch.channels_last)

    def vector(self, count: int) -> Tensor:
        return torch.randn(count).to(self.device)

    def norm(self, channels: int, affine: bool = True) -> tuple[Tensor | None, ...]:
        invstd = 0.5 + torch.rand(channels).to(self.device)
        more = (self.vector(channels), self.vector(channels)) if affine else (None, None)
        return self.vector(channels), invstd, *more

    def conv(self, outputs: int, inputs: int, kernel: int = 1, kernel_w: int | None = None) -> Tensor:
        weight = torch.randn(outputs, inputs, kernel, kernel_w or kernel) / (inputs * kernel * kernel) ** 0.5
        return weight.to(self.device, self.dtype)

    def mask(self, like: Tensor) -> Tensor:
        return pack_mask(torch.rand(like.shape, device=self.device) < 0.6, like)


def exactly(value: Any) -> Any:
    """Arguments in float64; masks and numbers as they are."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return type(value)(exactly(v) for v in value) if isinstance(value, (list, tuple)) else value


def check(name: str, dtype: torch.dtype, *arguments: Any) -> None:
    """The rule, for all results of an op: by Triton, by the vendor's library, and exactly."""
    with resnet_fused.backend("triton"):
        found = getattr(passes, name)(*arguments)
    with resnet_fused.backend("vendor"):
        expected = getattr(passes, name)(*arguments)
    oracle = {"gram_of": "gram"}.get(name, name)
    exact = getattr(reference, oracle)(*exactly(list(arguments)))
    results = ([x] if isinstance(x, Tensor) else x for x in (found, expected, exact))
    for i, (ours, theirs, truth) in enumerate(zip(*results, strict=True)):
        assert ours.shape == theirs.shape == truth.shape and ours.stride() == theirs.stride(), (name, i)
        if ours.dtype == torch.uint8:
            # Of the kernel's own output: rounding decides on which side of zero it is.
            assert torch.equal(ours, pack_mask(found[0] > 0, found[0])), (
                f"{name}: the mask is not its output's"
            )
        elif ours.numel():
            # What was summed up has been rounded to the activations' dtype before.
            assert_as_accurate(f"{name} result {i}", ours, theirs, truth, dtype)


@pytest.fixture(params=DTYPES)
def make(request: pytest.FixtureRequest) -> Callable[[str], Maker]:
    return lambda device: Maker(request.param, device)


def sources(m: Maker, channels: int, height: int, width: int) -> dict[str, Activation]:
    x = m.activation(channels, height, width)
    return {
        "plain": Activation(x),
        "shifted": Activation(x, shift=m.vector(channels)),
        "normed": Activation(x, *m.norm(channels)),
        "no affine": Activation(x, *m.norm(channels, False)),
        "folded": Activation(x, *m.norm(channels), m.vector(channels)),
    }


def gradients(m: Maker, channels: int, height: int, width: int) -> dict[str, Gradient]:
    g, y = m.activation(channels, height, width), m.activation(channels, height, width)
    sums = m.vector(channels), m.vector(channels)
    return {
        "plain": Gradient(g),
        "masked": Gradient(g, m.mask(g)),
        "normed": Gradient(g, None, y, *m.norm(channels), *sums),
        "end": Gradient(g, m.mask(g), y, *m.norm(channels), *sums),
        "frozen": Gradient(g, None, y, *m.norm(channels)),
        "frozen end": Gradient(g, m.mask(g), y, *m.norm(channels, False)),
    }


def weight_of(m: Maker, name: str) -> Tensor:
    inputs, outputs, kernel, *_ = CONVS[name]
    return m.conv(outputs, inputs, kernel, 1 if name == "3x1 uneven" else kernel)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CONVS)
@in_some_draw
def test_conv_stats(name: str, make: Callable[[str], Maker], device: str) -> None:
    m = make(device)
    inputs, _, _, window, height, width = CONVS[name]
    for kind, source in sources(m, inputs, height, width).items():
        check("conv_stats", m.dtype, [*source], weight_of(m, name), *window, 1e-5, kind != "shifted")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CONVS)
@in_some_draw
def test_conv_backward(name: str, make: Callable[[str], Maker], device: str) -> None:
    m = make(device)
    inputs, _, _, window, height, width = CONVS[name]
    conv = weight_of(m, name)
    found = sources(m, inputs, height, width)
    size = window.out_size(found["plain"].x, conv)
    residual, sparse = (
        m.activation(inputs, height, width),
        m.activation(inputs, -(-height // 2), -(-width // 3)),
    )
    shortcuts = [(None, None, (1, 1)), (residual, m.mask(residual), (1, 1)), (sparse, None, (2, 3))]
    kinds = zip(
        gradients(m, len(conv), *size).values(), itertools.cycle(found.values()), itertools.cycle(shortcuts)
    )
    for dy, source, shortcut in kinds:
        check("conv_backward", m.dtype, [*dy], [*source], conv, *window, *shortcut, [True, True])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("every", [(1, 1), (2, 2)])
@pytest.mark.parametrize("channels", [19, 40])
@in_some_draw
def test_gram(
    channels: int, input_stride: tuple[int, int], make: Callable[[str], Maker], device: str
) -> None:
    m = make(device)
    x = m.activation(channels, 7, 6)
    near = x.double().mean((0, 2, 3)).float() + 0.1 * m.vector(channels)
    normed = Activation(x, *m.norm(channels))
    behind = normed.value().double().mean((0, 2, 3)).float() + 0.1 * m.vector(channels)
    for source in (Activation(x, shift=near), normed._replace(shift=behind)):
        check("gram_of", m.dtype, [*source], input_stride)


@pytest.mark.parametrize("device", DEVICES)
def test_gram_keeps_the_variance_of_a_large_mean(make: Callable[[str], Maker], device: str) -> None:
    m = make(device)
    x = (torch.randn(2, 16, 9, 9) + 100 * torch.randn(16, 1, 1)).to(device, m.dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    shift = x[0, :, 4, 4].float()
    exact = reference.gram([*Activation(x.double(), shift=shift.double())], [1, 1])[1]
    with resnet_fused.backend("triton"):
        _, covariance = passes.gram_of([*Activation(x, shift=shift)], [1, 1])
    # In float16 differences are rounded where a mean is near zero, in float32 nowhere.
    assert relative_error(covariance, exact) < max(1e-5, 4 * torch.finfo(m.dtype).eps)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("every", [(1, 1), (2, 3)])
@pytest.mark.parametrize("main", ["folded", "made"])
@pytest.mark.parametrize("shortcut", ["input", "made", "folded", "folded frozen"])
@in_some_draw
def test_expand(
    shortcut: str, main: str, input_stride: tuple[int, int], make: Callable[[str], Maker], device: str
) -> None:
    m = make(device)
    inputs, outputs, others, height, width = 19, 40, 13, 5, 4
    source = sources(m, inputs, height, width)["folded"]
    conv = m.conv(outputs, inputs)
    if main == "made":
        source, conv = Activation(m.activation(outputs, height, width)), None
    if shortcut.startswith("folded"):
        skip = m.activation(
            others,
            height * input_stride[0] - input_stride[0] // 2,
            width * input_stride[1] - input_stride[1] // 2,
        )
        shift = None if shortcut == "folded frozen" else m.vector(others)
        rest = [skip, shift, m.conv(outputs, others), [*m.norm(outputs, shortcut == "folded")], input_stride]
    else:
        norm = [*m.norm(outputs)] if shortcut == "made" else [None] * 4
        rest = [m.activation(outputs, height, width), None, None, norm, (1, 1)]
    check("expand", m.dtype, [*source], conv, [*m.norm(outputs)], *rest)


def folded_ends(
    m: Maker, kind: str
) -> tuple[Tensor, Activation, tuple[int, int], list[Tensor | None], tuple[int, int]]:
    """A gradient of a block's output, the input of its folded convolution, and of that of the shortcut, if any."""
    channels, outputs, others, height, width = 19, 40, 13, 5, 4
    input_stride = (2, 3) if kind in ("shifted", "plain") else (1, 1)
    size = height * input_stride[0] - input_stride[0] // 2, width * input_stride[1] - input_stride[1] // 2
    source = sources(m, channels, *size)["folded" if kind.startswith("both") else kind]
    skip: list[Tensor | None] = []
    skip_input_stride = (1, 2) if kind == "both strided" else (1, 1)
    if kind.startswith("both"):
        shift = None if kind == "both frozen" else m.vector(others)
        skip = [
            *Activation(
                m.activation(others, height, width * skip_input_stride[1] - skip_input_stride[1] // 2),
                shift=shift,
            )
        ]
    return m.activation(outputs, height, width), source, input_stride, skip, skip_input_stride


KINDS = ["normed", "folded", "shifted", "plain", "both", "both strided", "both frozen"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@in_some_draw
def test_folded_wgrad(kind: str, make: Callable[[str], Maker], device: str) -> None:
    m = make(device)
    grad, source, input_stride, skip, skip_input_stride = folded_ends(m, kind)
    check("folded_wgrad", m.dtype, grad, m.mask(grad), [*source], input_stride, skip, skip_input_stride)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@in_some_draw
def test_folded_dgrad(kind: str, make: Callable[[str], Maker], device: str) -> None:
    m = make(device)
    grad, source, input_stride, skip, skip_input_stride = folded_ends(m, kind)

    def factors(channels: int) -> list[Tensor | None]:
        rest = [None, None] if kind == "both frozen" else [m.conv(channels, channels), m.vector(channels)]
        return [m.conv(grad.shape[1], channels), *rest]

    skip_factors = factors(skip[0].shape[1]) if skip and skip[0] is not None else []
    arguments = [*source], input_stride, skip_factors, skip, skip_input_stride
    check("folded_dgrad", m.dtype, grad, m.mask(grad), factors(source.x.shape[1]), *arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_what_a_relu_held_back_may_be_nan(device: str) -> None:
    m = Maker(torch.float32, device)
    g = m.activation(16, 4, 4)
    mask = m.mask(g)
    kept = Gradient(torch.ones_like(g), mask).value()
    g = torch.where(kept > 0, g, torch.nan)
    x, conv = Activation(m.activation(8, 4, 4)), m.conv(16, 8)
    with resnet_fused.backend("triton"):
        found = [
            *passes.folded_wgrad(g, mask, [*x], (1, 1), [], (1, 1)),
            *passes.conv_backward(
                [*Gradient(g, mask)], [*x], conv, *ConvGeometry(), None, None, (1, 1), [True, True]
            ),
        ]
    assert not any(t.isnan().any() for t in found)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("taps", "family"), [(31, ["conv", "dgrad"]), (32, [])])
def test_kernels_with_more_taps_than_bits(taps: int, family: list[str], device: str) -> None:
    m, seen = Maker(torch.float32, device), []
    x, conv, window = Activation(m.activation(8, 33, 2)), m.conv(8, 8, taps, 1), ConvGeometry((1, 1), (15, 0))
    g = m.activation(8, 33 + 30 - taps + 1, 2)
    with observe_launches(lambda launch: seen.append(launch.name)):
        check("conv_stats", m.dtype, [*x], conv, *window, 1e-5, False)
        check(
            "conv_backward", m.dtype, [*Gradient(g)], [*x], conv, *window, None, None, (1, 1), [True, False]
        )
    assert seen == family

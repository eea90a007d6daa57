"""Random operands of all ops, and their results beside the reference's."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from resnet_fused.layout import pack_mask
from resnet_fused.ops.dispatch import IMPLEMENTATIONS
from resnet_fused.types import Activation, ConvGeometry

OPS = torch.ops.resnet_fused

# Operands of ops with a native kernel, in any layout


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def permuted(x: Tensor) -> Tensor:
    """Neither contiguous nor channels_last: memory order W, N, C, H."""
    return x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)


def sliced(x: Tensor) -> Tensor:
    """channels_last with every other column of a wider tensor."""
    wide = torch.zeros(*x.shape[:3], 2 * x.shape[3], dtype=x.dtype).to(memory_format=torch.channels_last)
    wide[..., ::2] = x
    return wide[..., ::2]


LAYOUTS = [contiguous, channels_last, permuted, sliced]
NATIVE = [name for name, found in IMPLEMENTATIONS.items() if found.composed is None and name != "fresh_like"]
N, C, H, W = 2, 11, 5, 3


def native_arguments(
    name: str, layout: Any, dtype: torch.dtype, affine: bool, shape: tuple[int, ...] = (N, C, H, W)
) -> tuple[Any, ...]:
    """The results of its forward pass among them."""
    batch, channels, *image = shape

    def activation(size: Sequence[int] = image) -> Tensor:
        x: Tensor = layout(torch.randn(batch, channels, *size).to(dtype))
        return x

    def vectors(count: int) -> list[Tensor]:
        return [
            torch.rand(channels, dtype=torch.float64 if dtype is torch.float64 else torch.float32)
            for _ in range(count)
        ]

    y, skip, grad = activation(), activation(), activation()
    mean, invstd = vectors(2)
    weight, bias = (v - 0.5 for v in vectors(2)) if affine else (None, None)
    if weight is not None:
        weight[channels // 2 :][:1] = 0.0
    pixels = batch * math.prod(image)
    sums = [pixels * v for v in vectors(2)] if affine else (None, None)
    if name == "batch_norm_stats":
        return y, 1e-5
    if name.startswith("bn_relu_maxpool"):
        if name == "bn_relu_maxpool":
            return y, mean, invstd, weight, bias
        _, indices = OPS.bn_relu_maxpool(y, mean, invstd, weight, bias)
        grad = activation((indices.shape[2], indices.shape[3]))
        forward = (grad, indices, y, mean, invstd)
        return forward if name.endswith("reduce") else (*forward, weight, *sums)
    if name.startswith("bn_relu"):
        forward = (y, mean, invstd, weight, bias)
        if name == "bn_relu":
            return (*forward, *(vectors(1) if affine else [None]))
        return (grad, *forward) if name.endswith("reduce") else (grad, *forward, *sums)
    if name == "masked_grad":
        out, mask = OPS.bn_add_relu(y, mean, invstd, weight, bias, skip)
        return grad, mask, out, affine, torch.rand(channels, dtype=torch.float64) if affine else None
    if name.startswith("bn_add_relu"):
        forward = (y, mean, invstd, weight, bias, skip)
        if name == "bn_add_relu":
            return forward
        out, mask = OPS.bn_add_relu(*forward)
        if name.endswith("out"):
            return *forward, torch.zeros_like(out), torch.zeros_like(mask)
        return (grad, mask, y, mean, invstd, *([] if name.endswith("reduce") else [weight, *sums]))
    both = (y, mean, invstd, weight, bias, skip, mean, invstd, weight, bias)
    if name == "bn_bn_add_relu":
        return both
    out, mask = OPS.bn_bn_add_relu(*both)
    if name.endswith("out"):
        return *both, torch.zeros_like(out), torch.zeros_like(mask)
    if name.endswith("reduce"):
        return grad, mask, y, mean, invstd, skip, mean, invstd
    return grad, mask, y, mean, invstd, weight, *sums, skip, mean, invstd, weight, *sums


# Operands of the other ops, channels_last


Arguments = tuple[Any, ...]
Size = tuple[int, int]
NORMAL, STRIDED, POINTWISE = ConvGeometry(padding=(1, 1)), ConvGeometry((2, 2), (1, 1)), ConvGeometry()
IMAGES, INPUTS, OUTPUTS, OTHERS = 3, 8, 12, 5
BOTH = [True, True]
#: Of the images; in the last two, strides of whole dimensions mean nothing and are promised all the same.
SIZES: dict[str, Size] = {"odd": (7, 6), "even": (4, 8), "one_row": (1, 5), "one_pixel": (1, 1)}


class Maker:
    """Makes operands of one dtype and image size."""

    def __init__(self, dtype: torch.dtype, size: Size = SIZES["odd"], device: str = "cpu") -> None:
        self.dtype, self.size, self.device = dtype, size, device
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32

    def activation(self, channels: int, size: Size | None = None) -> Tensor:
        x = torch.randn(IMAGES, channels, *(size or self.size)) + torch.randn(channels, 1, 1)
        x = x.to(self.device, self.dtype)
        # Where other strides would do as well, those that kernels give their results.
        return torch.empty_like(x, memory_format=torch.channels_last).copy_(x)

    def vector(self, count: int) -> Tensor:
        return torch.randn(count).to(self.device, self.wide)

    def bn(self, channels: int, affine: bool = True) -> list[Tensor | None]:
        """mean, invstd, weight and bias."""
        invstd = 0.5 + torch.rand(channels).to(self.device, self.wide)
        more = [self.vector(channels), self.vector(channels)] if affine else [None, None]
        return [self.vector(channels), invstd, *more]

    def weight(self, outputs: int, inputs: int, kernel: int = 1, kernel_w: int | None = None) -> Tensor:
        size = inputs, kernel, kernel if kernel_w is None else kernel_w
        weight = torch.randn(outputs, *size) / math.prod(size) ** 0.5
        return weight.to(self.device, self.dtype)

    def mask(self, like: Tensor) -> Tensor:
        return pack_mask(torch.rand(like.shape, device=self.device) < 0.6, like)

    def a(self, channels: int = INPUTS, size: Size | None = None) -> list[Tensor | None]:
        """relu(bn(x)) - shift."""
        return [self.activation(channels, size), *self.bn(channels), self.vector(channels)]

    def plain(self, channels: int = INPUTS, size: Size | None = None) -> list[Tensor | None]:
        return [*Activation(self.activation(channels, size))]

    def dy(
        self, geometry: ConvGeometry, kernel: int, masked: bool, running: bool = False
    ) -> list[Tensor | None]:
        size = geometry.out_size(self.activation(1), self.weight(1, 1, kernel))
        g = self.activation(OUTPUTS, size)
        sums = [None, None] if running else [self.vector(OUTPUTS), self.vector(OUTPUTS)]
        mask = self.mask(g) if masked else None
        return [g, mask, self.activation(OUTPUTS, size), *self.bn(OUTPUTS), *sums]

    def grad(self) -> tuple[Tensor, Tensor]:
        """A gradient w.r.t. a block's output, and its mask."""
        grad = self.activation(OUTPUTS)
        return grad, self.mask(grad)

    def factors(self, channels: int) -> list[Tensor | None]:
        return [self.weight(OUTPUTS, channels), self.weight(channels, channels), self.vector(channels)]

    def before_subsampling(self, input_stride: Size) -> Size:
        """The size of an image that has this one's pixels after subsampling."""
        return tuple(n * step - step // 2 for n, step in zip(self.size, input_stride, strict=True))  # type: ignore[return-value]


def statistics(m: Maker) -> tuple[Tensor, Tensor, Tensor]:
    """Of a convolution's input: weight, mean and covariance."""
    c = torch.randn(50, INPUTS, dtype=m.wide)
    return m.weight(OUTPUTS, INPUTS).flatten(1), c.mean(0), torch.cov(c.t(), correction=0)


def fold_gradients(m: Maker, affine: bool, running: bool) -> Arguments:
    weight, mean, covariance = statistics(m)
    mean_y, invstd, gamma, sum_dz = m.bn(OUTPUTS)
    c = (None, None) if running else (mean, covariance)
    q = m.weight(OUTPUTS, INPUTS).flatten(1).to(m.wide)
    return weight, gamma if affine else None, mean_y, invstd, *c, sum_dz, q, 50


def conv_bn_stats(
    a: list[Tensor | None], weight: Tensor, geometry: ConvGeometry, m: Maker, affine: bool = True
) -> Arguments:
    gamma, beta = (m.vector(len(weight)), m.vector(len(weight))) if affine else (None, None)
    return a, weight, *geometry, 1e-5, affine, gamma, beta, affine


def _conv1x1_bn_add_relu(main: str, shortcut: str, affine: bool = True) -> Callable[[Maker], Arguments]:
    def make(m: Maker) -> Arguments:
        weight = m.weight(OUTPUTS, INPUTS) if main == "folded" else None
        a = m.a() if main == "folded" else m.plain(OUTPUTS)
        stride = (2, 2) if shortcut == "strided" else (1, 1)
        convolved = shortcut in ("folded", "strided", "folded_plain")
        skip = m.activation(OTHERS if convolved else OUTPUTS, m.before_subsampling(stride))
        shift = m.vector(OTHERS) if shortcut == "strided" else None
        skip_weight = m.weight(OUTPUTS, OTHERS) if convolved else None
        skip_bn = [None] * 4 if shortcut in ("input", "folded_plain") else m.bn(OUTPUTS, affine)
        return a, weight, m.bn(OUTPUTS, affine), skip, shift, skip_weight, skip_bn, stride

    return make


def _with_residual(m: Maker, kernel: int, geometry: ConvGeometry, masked: bool, a: Any) -> Arguments:
    residual = m.activation(INPUTS)
    mask = m.mask(residual) if masked else None
    weight = m.weight(OUTPUTS, INPUTS, kernel)
    return m.dy(geometry, kernel, True), a, weight, *geometry, residual, mask, (1, 1), BOTH


def _conv_backward(
    m: Maker, kernel: int, geometry: ConvGeometry, masked: bool, needs: Any = BOTH
) -> Arguments:
    weight = m.weight(OUTPUTS, INPUTS, kernel)
    return m.dy(geometry, kernel, masked), m.a(), weight, *geometry, None, None, (1, 1), needs


#: By the name of the op and what is given of its optional operands.
CASES: dict[str, Callable[[Maker], Arguments]] = {
    "conv_bn_stats-normed": lambda m: conv_bn_stats(m.a(), m.weight(OUTPUTS, INPUTS, 3), NORMAL, m),
    "conv_bn_stats-plain": lambda m: conv_bn_stats(
        m.plain(), m.weight(OUTPUTS, INPUTS), ConvGeometry((2, 2)), m, False
    ),
    "conv_bn_stats-groups": lambda m: conv_bn_stats(
        m.a(), m.weight(OUTPUTS, 2, 3), ConvGeometry(padding=(1, 1), groups=4), m
    ),
    "input_covariance-normed": lambda m: (m.a(), (1, 1)),
    "input_covariance-strided": lambda m: (
        [*Activation(m.activation(INPUTS), shift=m.vector(INPUTS))],
        (2, 3),
    ),
    **{
        f"conv1x1_bn_add_relu-{main}-{shortcut}": _conv1x1_bn_add_relu(main, shortcut)
        for main in ("folded", "plain")
        for shortcut in ("input", "normed", "folded", "strided", "folded_plain")
    },
    "conv1x1_bn_add_relu-no_affine": _conv1x1_bn_add_relu("folded", "strided", affine=False),
    "folded_wgrad-one": lambda m: (*m.grad(), m.a(), (1, 1), [], (1, 1)),
    "folded_wgrad-both": lambda m: (
        *m.grad(), m.a(), (1, 1), m.plain(OTHERS, m.before_subsampling((2, 2))), (2, 2),
    ),
    "folded_dgrad-one": lambda m: (*m.grad(), m.factors(INPUTS), m.a(), (1, 1), [], [], (1, 1)),
    "folded_dgrad-both": lambda m: (
        *m.grad(), m.factors(INPUTS), m.a(), (1, 1), m.factors(OTHERS),
        m.plain(OTHERS, m.before_subsampling((2, 2))), (2, 2),
    ),
    "folded_dgrad-running": lambda m: (
        *m.grad(), [m.weight(OUTPUTS, INPUTS), None, None], m.plain(INPUTS, m.before_subsampling((1, 2))), (1, 2), [],
        [], (1, 1),
    ),
    "conv_backward-3x3": lambda m: _conv_backward(m, 3, STRIDED, False),
    "conv_backward-1x1": lambda m: _conv_backward(m, 1, POINTWISE, True),
    "conv_backward-residual": lambda m: _with_residual(m, 3, NORMAL, True, m.plain()),
    "conv_backward-1x1_residual": lambda m: _with_residual(m, 1, POINTWISE, False, m.plain()),
    "conv_backward-1x1_masked": lambda m: _with_residual(m, 1, POINTWISE, True, m.plain()),
    "conv_backward-strided_residual": lambda m: (
        m.dy(POINTWISE, 1, False, True), m.plain(), m.weight(OUTPUTS, INPUTS), *POINTWISE,
        m.activation(INPUTS, (-(-m.size[0] // 2), -(-m.size[1] // 2))), None, (2, 2), [True, False],
    ),
    "conv_backward-weight": lambda m: _conv_backward(m, 3, NORMAL, True, [False, True]),
    "conv_backward-neither": lambda m: _conv_backward(m, 3, NORMAL, True, [False, False]),
    "fold_statistics-shift": lambda m: (*statistics(m), m.vector(INPUTS), 1e-5),
    "fold_statistics-none": lambda m: (*statistics(m), None, 1e-5),
    "fold_gradients-affine": lambda m: fold_gradients(m, True, False),
    "fold_gradients-running": lambda m: fold_gradients(m, False, True),
    "rectified_mean": lambda m: (m.vector(INPUTS), m.vector(INPUTS)),
}  # fmt: skip


def op_of(case: str) -> str:
    return case.partition("-")[0]


# Results


def reference_of(op: str) -> Callable[..., Any]:
    """What an op has to compute."""
    return IMPLEMENTATIONS[op].reference


def copied(arguments: Sequence[Any]) -> list[Any]:
    """With their strides."""
    return [copy.deepcopy(x) for x in arguments]


def in_float64(arguments: Any) -> Any:
    """The same values; masks and numbers as they are."""
    return tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, arguments)


def tensors(results: Any) -> list[Tensor]:
    """All that are among results or arguments."""
    return [x for x in tree_leaves(results) if isinstance(x, Tensor)]


def metadata(x: Tensor) -> tuple[Any, ...]:
    """All that a fake result tells a compiler."""
    return x.shape, x.stride(), x.dtype, x.device


def assert_equals_reference(op: str, arguments: Sequence[Any]) -> None:
    """Bit for bit in masks and indices, to rounding in the rest, laid out alike; so are arguments that are written."""
    ours, theirs = copied(arguments), copied(arguments)
    results = tensors([getattr(OPS, op)(*ours), ours])
    expected = tensors([reference_of(op)(*theirs), theirs])
    for result, by_reference in zip(results, expected, strict=True):
        assert metadata(result) == metadata(by_reference)
        if result.is_floating_point():
            torch.testing.assert_close(result, by_reference, rtol=1e-11, atol=1e-11)
        else:
            assert torch.equal(result, by_reference)


def assert_fakes_are_exact(op: str, arguments: Sequence[Any]) -> None:
    """Fakes are laid out exactly as real results: opcheck lets strides of dimensions of size 1 pass."""
    call = getattr(OPS, op).default
    real = tensors(call(*copied(arguments)))
    with FakeTensorMode() as mode:
        fake = tensors(call(*tree_map_only(Tensor, mode.from_tensor, list(arguments))))
    assert [metadata(x) for x in fake] == [metadata(x) for x in real]

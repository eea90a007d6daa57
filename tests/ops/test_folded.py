"""The passes of a folded block: what they promise the dispatcher, what they compute, with all that may be left out."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused import models, reference
from resnet_fused.ops import PRIMITIVES
from resnet_fused.ops._primitive import TRITON
from resnet_fused.reference.layout import is_channels_last, mask_shape, pack_mask
from tests.accuracy import assert_as_accurate, relative_error
from tests.model_pairs import block_pair
from tests.ops.test_opcheck import as_tuple, copied

OPS = torch.ops.resnet_fused

#: Images, channels of the block's output, height, width; channels behind the first and the second shortcut's input.
SHAPES = {
    "odd": (3, 11, 7, 3, 7, 13),
    "even": (2, 16, 4, 8, 8, 16),
    "one_pixel": (9, 11, 1, 1, 7, 13),
    "one_row": (1, 33, 1, 5, 3, 2),
    "narrow": (2, 5, 3, 4, 2, 2),
}

Arguments = tuple[Any, ...]


class Maker:
    """Random arguments of one dtype."""

    def __init__(self, shape: str, dtype: torch.dtype) -> None:
        self.n, self.c, self.h, self.w, self.k, self.k2 = SHAPES[shape]
        self.dtype = dtype
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32

    def activation(self, channels: int, mean: float = 0.0) -> Tensor:
        x = torch.randn(self.n, channels, self.h, self.w) + mean * torch.randn(channels, 1, 1)
        x = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
        # Where other strides would do as well, those that kernels give their results.
        return torch.empty_like(x, memory_format=torch.channels_last).copy_(x)

    def conv(self, outputs: int, inputs: int) -> Tensor:
        return (torch.randn(outputs, inputs, 1, 1) / inputs**0.5).to(self.dtype)

    def vectors(self, count: int) -> list[Tensor]:
        return [torch.randn(self.c).to(self.wide) for _ in range(count)]

    def norm(self, affine: bool) -> list[Tensor | None]:
        """mean, invstd, weight, bias."""
        mean, weight, bias = self.vectors(3)
        invstd = 0.5 + torch.rand(self.c).to(self.wide)
        return [mean, invstd, weight, bias] if affine else [mean, invstd, None, None]

    def mask(self) -> Tensor:
        like = self.activation(self.c)
        mask: Tensor = pack_mask(torch.rand(like.shape) < 0.6, like)
        assert mask.shape == mask_shape(like)
        return mask


def gram(m: Maker) -> Arguments:
    return (m.activation(m.k),)


def folded_add_relu(main: str, shortcut: str, affine: bool = True) -> Callable[[Maker], Arguments]:
    def make(m: Maker) -> Arguments:
        y, conv = (m.activation(m.k), m.conv(m.c, m.k)) if main == "folded" else (m.activation(m.c), None)
        convolved = shortcut.startswith("convolved")
        skip = m.activation(m.k2 if convolved else m.c)
        skip_conv = m.conv(m.c, m.k2) if convolved else None
        skip_norm = [None] * 4 if shortcut in ("plain", "convolved_plain") else m.norm(affine)
        return y, conv, *m.norm(affine), skip, skip_conv, *skip_norm

    return make


def folded_backward(branches: int) -> Callable[[Maker], Arguments]:
    def make(m: Maker) -> Arguments:
        channels = (m.k, m.k2)[:branches]
        inputs, matrices = [m.activation(k) for k in channels], [m.conv(k, m.c) for k in channels]
        return m.activation(m.c), m.mask(), inputs, matrices

    return make


def add_product_(m: Maker) -> Arguments:
    vector = torch.randn(m.c).to(m.wide)
    return m.activation(m.c), m.activation(m.k), m.conv(m.c, m.k), vector


def conv1x1_backward(residual: bool, masked: bool) -> Callable[[Maker], Arguments]:
    def make(m: Maker) -> Arguments:
        arguments = m.activation(m.k), m.activation(m.c), m.conv(m.k, m.c)
        return *arguments, m.activation(m.c) if residual else None, m.mask() if masked else None

    return make


SHORTCUTS = ("plain", "normalised", "convolved", "convolved_plain")
#: By name of the primitive and of what is given of its optional arguments.
CASES: dict[str, tuple[str, Callable[[Maker], Arguments]]] = {
    "gram": ("gram", gram),
    **{
        f"folded_add_relu-{main}-{shortcut}{'' if affine else '-no_affine'}": (
            "folded_add_relu",
            folded_add_relu(main, shortcut, affine),
        )
        for main in ("folded", "made")
        for shortcut in SHORTCUTS
        for affine in (True, False)
    },
    "folded_backward-one": ("folded_backward", folded_backward(1)),
    "folded_backward-two": ("folded_backward", folded_backward(2)),
    "add_product_": ("add_product_", add_product_),
    "conv1x1_backward": ("conv1x1_backward", conv1x1_backward(False, False)),
    "conv1x1_backward-residual": ("conv1x1_backward", conv1x1_backward(True, False)),
    "conv1x1_backward-masked": ("conv1x1_backward", conv1x1_backward(True, True)),
}
FOLDED = ("gram", "folded_add_relu", "folded_backward", "add_product_", "conv1x1_backward")


def test_every_primitive_has_cases() -> None:
    kernels = ("bn_", "batch_norm", "masked_grad", "fresh_like", "count_batch")
    others = {name for name in PRIMITIVES if name.startswith(kernels)} | TRITON  # see test_passes.py
    assert set(PRIMITIVES) - others == set(FOLDED)
    assert {name for name, _ in CASES.values()} == set(FOLDED)


def flat(results: Any) -> list[Tensor]:
    """All tensors among results or arguments, lists of them opened."""
    found: list[Tensor] = []
    for x in as_tuple(results):
        found += x if isinstance(x, list) else [x] if isinstance(x, Tensor) else []
    return found


@pytest.fixture(params=["whole", "pieces"])
def piece_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """ "whole": the batch is one piece; "pieces": of a few rows each, the last one shorter."""
    if request.param == "pieces":
        monkeypatch.setattr("resnet_fused.ops._matmul.PIECE_BYTES", {"cpu": 256, "cuda": 256})
    chosen: str = request.param
    return chosen


@pytest.mark.parametrize("shape", ["odd", "one_pixel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_opcheck(case: str, dtype: torch.dtype, shape: str) -> None:
    name, make = CASES[case]
    torch.library.opcheck(getattr(OPS, name).default, make(Maker(shape, dtype)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_composition_equals_reference(case: str, shape: str, piece_size: str) -> None:
    """Bit for bit in the masks, to rounding in the rest, with the same strides; so do arguments that are written."""
    name, make = CASES[case]
    arguments = make(Maker(shape, torch.float64))
    by_native, by_reference = (
        [*flat(op(*copies)), *flat(tuple(copies))]
        for op, copies in (
            (getattr(OPS, name), copied(arguments)),
            (getattr(reference.folded, name), copied(arguments)),
        )
    )
    assert len(by_native) == len(by_reference)
    for ours, theirs in zip(by_native, by_reference, strict=True):
        assert ours.stride() == theirs.stride() and ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_pieces_are_what_they_are_called(piece_size: str) -> None:
    from resnet_fused.ops._matmul import pieces, rows_in_piece

    x = Maker("odd", torch.float32).activation(11)
    counts = [part.shape[3] for part in pieces(x, rows_in_piece(x, 11))]
    assert sum(counts) == 63
    assert len(counts) == 1 if piece_size == "whole" else len(counts) > 2 and counts[-1] < counts[0]


# The same in plain PyTorch, as a network would be written: every step rounds to the activations' dtype.


def rows(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def opened(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as zeros and ones, bit by bit."""
    n, c, h, w = like.shape
    bits = (mask[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten(1)[:, :c].reshape(n, h, w, c).permute(0, 3, 1, 2).to(like.dtype)


def wide_of(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def plain_gram(c: Tensor) -> list[Tensor]:
    mean = wide_of(rows(c)).mean(0)
    return [mean, wide_of(rows(c).t() @ rows(c)) / len(rows(c)) - torch.outer(mean, mean)]


def plain_folded_add_relu(*arguments: Any) -> list[Tensor]:
    y, conv, *norm, skip, skip_conv, skip_mean, skip_invstd, skip_weight, skip_bias = arguments

    def normed(x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.batch_norm(x, mean, invstd.pow(-2), weight, bias, False, eps=0.0)

    main = normed(y if conv is None else F.conv2d(y, conv), *norm)
    other = skip if skip_conv is None else F.conv2d(skip, skip_conv)
    if skip_mean is not None:
        other = normed(other, skip_mean, skip_invstd, skip_weight, skip_bias)
    return [F.relu(main + other)]


def plain_folded_backward(
    grad: Tensor, mask: Tensor, inputs: list[Tensor], matrices: list[Tensor]
) -> list[Tensor]:
    dz = grad * opened(mask, grad)
    products = [wide_of(rows(dz).t() @ rows(c)) for c in inputs]
    return [wide_of(dz).sum((0, 2, 3)), *products, *(F.conv2d(dz, matrix) for matrix in matrices)]


def plain_add_product_(out: Tensor, a: Tensor, matrix: Tensor, vector: Tensor) -> list[Tensor]:
    return [out + F.conv2d(a, matrix, vector.to(a.dtype))]


def plain_conv1x1_backward(
    dy: Tensor, x: Tensor, conv: Tensor, residual: Tensor | None, mask: Tensor | None
) -> list[Tensor]:
    geometry = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    dx, dconv, _ = torch.ops.aten.convolution_backward(dy, x, conv, None, *geometry, [True, True, False])
    if residual is not None:
        dx = dx + (residual if mask is None else residual * opened(mask, residual))
    return [dx, wide_of(dconv).flatten(1)]


PLAIN: dict[str, Callable[..., list[Tensor]]] = {
    "gram": plain_gram,
    "folded_add_relu": plain_folded_add_relu,
    "folded_backward": plain_folded_backward,
    "add_product_": plain_add_product_,
    "conv1x1_backward": plain_conv1x1_backward,
}


def in_float64(arguments: Arguments) -> list[Any]:
    """The same values; masks as they are."""

    def convert(x: Any) -> Any:
        if isinstance(x, list):
            return [convert(y) for y in x]
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    return [convert(x) for x in arguments]


def kept_bits(out: Tensor) -> Tensor:
    return pack_mask(out > 0, out.contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_accuracy(case: str, shape: str, dtype: torch.dtype, piece_size: str) -> None:
    """eps is the activations': products of two activations come from the vendor's library, rounded to their dtype."""
    name, make = CASES[case]
    arguments = make(Maker(shape, dtype))
    exact, by_eager = PLAIN[name](*in_float64(arguments)), PLAIN[name](*copied(arguments))
    copies = copied(arguments)
    by_fused = flat(getattr(OPS, name)(*copies))
    if name == "add_product_":
        by_fused = [copies[0]]
    if name == "folded_add_relu":
        out, mask = by_fused
        assert is_channels_last(out)
        # What decides is the sum before it is rounded: below the smallest number of the dtype the output is zero.
        tiny = torch.finfo(dtype).tiny
        assert torch.equal(mask, kept_bits(out)) or bool((exact[0][exact[0] > 0] < tiny).any())
        by_fused = [out]
    for i, (ours, eager, expected) in enumerate(zip(by_fused, by_eager, exact, strict=True)):
        assert_as_accurate(f"{case} {i}", ours, eager, expected, dtype)


@pytest.mark.parametrize("name", FOLDED)
def test_reference_equals_plain(name: str) -> None:
    """The reference itself, against the plain composition, in float64."""
    for case, (primitive, make) in CASES.items():
        if primitive != name:
            continue
        arguments = make(Maker("odd", torch.float64))
        expected = PLAIN[name](*copied(arguments))
        copies = copied(arguments)
        found = flat(getattr(reference.folded, name)(*copies))
        if name == "add_product_":
            found = [copies[0]]
        if name == "folded_add_relu":
            assert torch.equal(found.pop(), kept_bits(expected[0])), case
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["folded_add_relu", "folded_backward", "conv1x1_backward"])
def test_arguments_stay_as_they_are(name: str, piece_size: str) -> None:
    for case, (primitive, make) in CASES.items():
        if primitive == name:
            arguments = make(Maker("odd", torch.float32))
            before = copied(arguments)
            getattr(OPS, name)(*arguments)
            for x, y in zip(flat(tuple(arguments)), flat(tuple(before)), strict=True):
                assert torch.equal(x, y), case


@pytest.mark.parametrize("name", ["folded_backward", "conv1x1_backward"])
def test_gradients_of_another_layout(name: str, piece_size: str) -> None:
    """The gradient that autograd hands over may lie as it likes; masks keep the order of the output."""
    case = "folded_backward-two" if name == "folded_backward" else "conv1x1_backward-masked"
    arguments = list(CASES[case][1](Maker("odd", torch.float64)))
    place = 0 if name == "folded_backward" else 3
    expected = flat(getattr(OPS, name)(*arguments))
    arguments[place] = arguments[place].contiguous()
    assert not is_channels_last(arguments[place])
    for ours, theirs in zip(flat(getattr(OPS, name)(*arguments)), expected, strict=True):
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()


@pytest.mark.parametrize(
    ("kind", "inplanes", "planes", "outputs"),
    [("Bottleneck", 4, 1, None), ("Bottleneck", 3, 1, 4), ("BasicBlock", 4, 1, 1)],
    ids=["within", "within_downsample", "behind"],
)
def test_blocks_with_one_channel(kind: str, inplanes: int, planes: int, outputs: int | None) -> None:
    shortcut = None
    if outputs is not None:
        shortcut = nn.Sequential(nn.Conv2d(inplanes, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
    eager = getattr(reference, kind)(inplanes, planes, 1, shortcut).double()
    fused = getattr(models, kind)(inplanes, planes, 1, copy.deepcopy(shortcut)).double()
    fused.load_state_dict(eager.state_dict())
    x = torch.randn(4, inplanes, 8, 6, dtype=torch.float64).to(memory_format=torch.channels_last)
    by_fused, by_eager = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours, theirs = fused(by_fused), eager(by_eager)
    assert relative_error(ours, theirs) < 1e-10
    grad = torch.randn_like(theirs)
    ours.backward(grad)
    theirs.backward(grad)
    assert by_fused.grad is not None and by_eager.grad is not None
    assert relative_error(by_fused.grad, by_eager.grad) < 1e-10


@pytest.mark.parametrize("shape", [(5, 64, 3, 3), (4, 64, 8, 8), (2, 64, 28, 28)], ids=["45", "256", "1568"])
def test_statistics_of_one_batch(shape: tuple[int, ...]) -> None:
    """momentum=None takes the first batch's statistics whole, where 0.1 of it hides nine tenths of their error."""
    errors: dict[str, list[tuple[float, float]]] = {}
    for seed in range(5):
        torch.manual_seed(seed)
        fused, eager = (block.float() for block in block_pair("bottleneck", torch.channels_last))
        for module in [*fused.modules(), *eager.modules()]:
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        exact = copy.deepcopy(eager).double()
        x = torch.randn(shape).to(memory_format=torch.channels_last)
        for block in (fused, eager, exact):
            block(x.to(next(block.parameters()).dtype))
        for name in ("bn3", "downsample.1"):
            found = [block.get_submodule(name).running_var for block in (fused, eager, exact)]
            by_fused, by_eager = (relative_error(v, found[2]) for v in found[:2])
            errors.setdefault(name, []).append((by_fused, by_eager))
    for name, pairs in errors.items():
        by_fused, by_eager = (statistics.geometric_mean(side) for side in zip(*pairs, strict=True))
        assert by_fused <= 1.5 * by_eager + 4 * torch.finfo(torch.float32).eps, name

"""The ops of convolutions and lazy operands: schema, fakes, the reference, accuracy, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from resnet_fused.layout import is_channels_last, pack_mask
from resnet_fused.ops.dispatch import IMPLEMENTATIONS, runs_triton
from resnet_fused.ops.fold_algebra import fold_statistics
from resnet_fused.ops.vendor_gemm import chunks, rows_per_chunk
from resnet_fused.types import Activation
from tests.accuracy import Results, assert_accurate, relative_error
from tests.ops.operands import (
    BOTH,
    CASES,
    INPUTS,
    NORMAL,
    OTHERS,
    OUTPUTS,
    POINTWISE,
    SIZES,
    Arguments,
    Maker,
    conv_bn_stats,
    fold_gradients,
    op_of,
    reference_of,
    statistics,
)
from tests.ops.test_opcheck import as_tuple, copied

OPS = torch.ops.resnet_fused
#: oneDNN leaves taps of this gradient unwritten that see no pixel, for eager PyTorch too.
UNWRITTEN = ("conv_backward-3x3", "conv_backward-residual", "conv_backward-weight")


@pytest.fixture(params=["whole", "chunked"])
def chunk_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """ "whole": the batch is one chunk; "chunked": of a few rows each, the last one shorter."""
    if request.param == "chunked":
        monkeypatch.setattr("resnet_fused.ops.vendor_gemm.CHUNK_BYTES", {"cpu": 256, "cuda": 256})
    chosen: str = request.param
    return chosen


def flat(results: Any) -> list[Tensor]:
    """All tensors among results or arguments, lists of them opened."""
    found: list[Tensor] = []
    for x in as_tuple(results):
        found += flat(tuple(x)) if isinstance(x, (list, tuple)) else [x] if isinstance(x, Tensor) else []
    return found


def test_every_op_has_cases() -> None:
    composed = {name for name, found in IMPLEMENTATIONS.items() if found.composed is not None}
    assert {op_of(case) for case in CASES} == composed


def test_chunks_cover_the_batch(chunk_size: str) -> None:
    x = Maker(torch.float32).activation(11)
    sizes = [part.shape[3] for part in chunks(x, rows_per_chunk(x, 11))]
    assert sum(sizes) == x.numel() // 11
    assert len(sizes) == 1 if chunk_size == "whole" else len(sizes) > 2 and sizes[-1] < sizes[0]


@pytest.mark.parametrize("size", ["odd", "one_pixel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_opcheck(case: str, dtype: torch.dtype, size: str) -> None:
    """Schema, fake results with the strides of the real ones, and compilation."""
    if case in UNWRITTEN and (dtype, size) == (torch.bfloat16, "one_pixel"):
        pytest.skip("oneDNN leaves taps unwritten that see no pixel, for eager PyTorch too")
    arguments = CASES[case](Maker(dtype, SIZES[size]))
    torch.library.opcheck(getattr(OPS, op_of(case)).default, arguments)


def metadata(x: Tensor) -> tuple[Any, ...]:
    """All that a fake result tells a compiler."""
    return x.shape, x.stride(), x.dtype, x.device


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"]
)
@pytest.mark.parametrize("case", CASES)
def test_fakes_are_exact(case: str, dtype: torch.dtype, size: str) -> None:
    """Fakes are laid out exactly as real results: opcheck lets strides of dimensions of size 1 pass."""
    op, arguments = getattr(OPS, op_of(case)).default, CASES[case](Maker(dtype, SIZES[size]))
    real = flat(op(*copied(arguments)))
    with FakeTensorMode() as mode:
        fake = flat(op(*tree_map_only(Tensor, mode.from_tensor, arguments)))
    assert [metadata(x) for x in fake] == [metadata(x) for x in real]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_equals_reference(case: str, size: str, chunk_size: str) -> None:
    """Bit for bit in the masks, to rounding in the rest, laid out alike; so do arguments that are written."""
    op = op_of(case)
    arguments = CASES[case](Maker(torch.float64, SIZES[size]))
    ours, theirs = copied(arguments), copied(arguments)
    found = [*flat(getattr(OPS, op)(*ours)), *flat(tuple(ours))]
    expected = [*flat(reference_of(op)(*theirs)), *flat(tuple(theirs))]
    assert len(found) == len(expected)
    for result, by_reference in zip(found, expected, strict=True):
        assert metadata(result) == metadata(by_reference)
        if result.dtype == torch.uint8:
            assert torch.equal(result, by_reference)
        else:
            assert relative_error(result, by_reference) < 1e-10
    if not op.endswith("_"):
        torch.testing.assert_close(flat(tuple(ours)), flat(arguments), rtol=0, atol=0)


# The same as a network would be written in PyTorch: every step rounds to the activations' dtype.


def rows(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def unpacked(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as zeros and ones, bit by bit."""
    n, c, h, w = like.shape
    mask = (mask[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return mask.flatten(1)[:, :c].reshape(n, h, w, c).permute(0, 3, 1, 2).to(like.dtype)


def wide_of(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def normed(x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return F.batch_norm(x, mean, invstd.pow(-2), weight, bias, False, eps=0.0)


def value_of(fields: list[Any], input_stride: Any = (1, 1)) -> Tensor:
    a = Activation(*fields)
    value = a.x if a.mean is None else F.relu(normed(a.x, *fields[1:5]))
    value = value if a.shift is None else value - a.shift.to(a.x.dtype).view(1, -1, 1, 1)
    return value[:, :, :: input_stride[0], :: input_stride[1]]


def eager_input_covariance(a: list[Any], input_stride: Any) -> list[Tensor]:
    c = rows(value_of(a, input_stride))
    mean = wide_of(c).mean(0)
    return [mean, wide_of(c.t() @ c) / len(c) - torch.outer(mean, mean)]


def eager_conv1x1_bn_add_relu(
    a: Any, weight: Any, bn: Any, skip: Any, shift: Any, skip_weight: Any, skip_bn: Any, stride: Any
) -> list[Tensor]:
    main, other = value_of(a), value_of([*Activation(skip, shift=shift)], stride)
    main = normed(main if weight is None else F.conv2d(main, weight), *bn)
    other = other if skip_weight is None else F.conv2d(other, skip_weight)
    return [F.relu(main + (other if skip_bn[0] is None else normed(other, *skip_bn)))]


def eager_folded_wgrad(
    grad: Tensor, mask: Tensor, a: Any, stride: Any, skip: Any, skip_stride: Any
) -> list[Tensor]:
    dz = grad * unpacked(mask, grad)
    values = [value_of(a, stride), *([value_of(skip, skip_stride)] if skip else [])]
    return [*(wide_of(rows(dz).t() @ rows(c)) for c in values), wide_of(dz).sum((0, 2, 3))]


def eager_folded_dgrad(
    grad: Tensor,
    mask: Tensor,
    factors: Any,
    a: Any,
    stride: Any,
    skip_factors: Any,
    skip: Any,
    skip_stride: Any,
) -> list[Tensor]:
    dz = grad * unpacked(mask, grad)
    gradients = []
    for (scaled, matrix, vector), c, step in (
        (factors, a, stride),
        (skip_factors or [None] * 3, skip, skip_stride),
    ):
        if scaled is not None:
            da = F.conv2d(dz, scaled.transpose(0, 1))
            if matrix is not None:
                da = da + F.conv2d(value_of(c, step), matrix, vector.to(da.dtype))
            gradients.append(da)
    return gradients


def eager_1x1_backward(dy: list[Any], a: list[Any], weight: Tensor, *rest: Any) -> list[Tensor]:
    """Of operands that are in memory."""
    residual, mask = rest[4:6]
    geometry = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    da, dweight, _ = torch.ops.aten.convolution_backward(
        dy[0], a[0], weight, None, *geometry, [True, True, False]
    )
    if residual is not None:
        da = da + (residual if mask is None else residual * unpacked(mask, residual))
    return [da, wide_of(dweight)]


EAGER: dict[str, Callable[..., list[Tensor]]] = {
    "input_covariance": eager_input_covariance,
    "conv1x1_bn_add_relu": eager_conv1x1_bn_add_relu,
    "folded_wgrad": eager_folded_wgrad,
    "folded_dgrad": eager_folded_dgrad,
    "conv_backward": eager_1x1_backward,
}
#: Of ``conv_backward`` what residual blocks call where operands are in memory.
ACCURATE = [case for case in CASES if op_of(case) in EAGER and not case.startswith("conv_backward")] + [
    "conv_backward-1x1_residual",
    "conv_backward-1x1_masked",
]


def accuracy_arguments(case: str, dtype: torch.dtype, size: str) -> list[Any]:
    arguments = list(CASES[case](Maker(dtype, SIZES[size])))
    if case.startswith("conv_backward"):
        arguments[0] = arguments[0][:1]
    return arguments


def in_float64(arguments: list[Any]) -> list[Any]:
    """The same values; masks as they are."""
    return tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, arguments)  # type: ignore[no-any-return]


def compared(op: str, results: list[Tensor], count: int) -> list[Tensor]:
    """The results that eager computes too, without those that are not needed."""
    if op == "conv_backward":
        return [results[0], results[-1]]
    if op == "conv1x1_bn_add_relu":
        return results
    return [x for x in results if x.numel() > 0][:count]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", ACCURATE)
def test_accuracy(case: str, size: str, dtype: torch.dtype, chunk_size: str) -> None:
    """eps is the activations': GEMMs of two activations come from the vendor's library, rounded to their dtype."""
    op = op_of(case)

    def draw() -> tuple[Results, Results, Results]:
        arguments = accuracy_arguments(case, dtype, size)
        exact, by_eager = EAGER[op](*in_float64(arguments)), EAGER[op](*copied(tuple(arguments)))
        results = flat(getattr(OPS, op)(*arguments))
        if op == "conv1x1_bn_add_relu":
            out, mask = results
            assert is_channels_last(out) or out.shape[2:] == (1, 1)
            # What decides is the sum before it is rounded: below the dtype's smallest number the output is zero.
            tiny = torch.finfo(dtype).tiny
            assert torch.equal(mask, pack_mask(out > 0, out)) or bool((exact[0][exact[0] > 0] < tiny).any())
            results = [out]
        results = compared(op, results, len(exact))
        fused, eager, wide = ({str(i): x for i, x in enumerate(f)} for f in (results, by_eager, exact))
        return fused, eager, wide

    assert_accurate(draw, dtype)


@pytest.mark.parametrize("op", EAGER)
def test_reference_equals_eager(op: str) -> None:
    """The reference itself, in float64."""
    for case in (case for case in ACCURATE if op_of(case) == op):
        arguments = accuracy_arguments(case, torch.float64, "odd")
        expected, copies = EAGER[op](*copied(tuple(arguments))), copied(tuple(arguments))
        found = flat(reference_of(op)(*copies))
        found = compared(op, found, len(expected))
        if op == "conv1x1_bn_add_relu":
            assert torch.equal(found.pop(), pack_mask(expected[0] > 0, found[0])), case
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_small_terms_survive_rounding(dtype: torch.dtype) -> None:
    """dc = dz scaled + c matrix^T + vector, of which all but the first shrink with the number of pixels.

    Added to dz scaled in 16 bits they would be lost, in every pixel alike, and sums over pixels would be wrong.
    """
    m = Maker(dtype, (64, 64))
    grad, mask = m.grad()
    vector = 2e-2 * torch.finfo(dtype).eps * torch.ones(INPUTS)
    factors = [m.weight(OUTPUTS, INPUTS), torch.zeros(INPUTS, INPUTS, 1, 1, dtype=dtype), vector]
    arguments = [grad, mask, factors, m.plain(), (1, 1), [], [], (1, 1)]
    exact = reference_of("folded_dgrad")(*in_float64(arguments))[0].double()
    da = OPS.folded_dgrad(*arguments)[0].double()
    assert float((da - exact).mean().abs()) < 0.2 * float(vector[0])


def test_one_pixel() -> None:
    """Images of one pixel count as channels_last, whatever their strides say."""
    m = Maker(torch.float32)
    a, weight = [*Activation(m.activation(INPUTS, (1, 1)))], m.weight(OUTPUTS, INPUTS)
    y, mean, *_ = OPS.conv_bn_stats(*conv_bn_stats(a, weight, POINTWISE, m))
    torch.testing.assert_close(mean, y.mean((0, 2, 3)))


def test_float64_and_groups_are_left_to_the_vendor() -> None:
    assert not runs_triton(torch.empty(2, 2, 2, 2, dtype=torch.float64))
    assert not runs_triton(torch.empty(2, 2, 2, 2), groups=2)
    mean_y, *_ = fold_statistics(*statistics(Maker(torch.float64)), None, 1e-5)
    assert mean_y.dtype == torch.float64


def _conv(m: Maker, a: list[Any], inputs: int = INPUTS) -> Arguments:
    return conv_bn_stats(a, m.weight(OUTPUTS, inputs), POINTWISE, m)


#: What is wrong: op, its arguments, what the error says. Not what torch says of its own, which versions reword.
BAD: dict[str, tuple[str, Callable[[Maker], Arguments], str]] = {
    "no fields": ("conv_bn_stats", lambda m: _conv(m, []), "fields of"),
    "a field too many": ("conv_bn_stats", lambda m: _conv(m, [*m.plain(), None]), "fields of"),
    "too few arguments": ("conv_bn_stats", lambda m: (m.a(), m.weight(OUTPUTS, INPUTS)), "stride"),
    "no stride": ("input_covariance", lambda m: (m.a(), None), "input_stride"),
    "a weight of other inputs": ("conv_bn_stats", lambda m: _conv(m, m.plain(), INPUTS + 1), "weight must be"),
    "a batch norm of fewer channels": (
        "conv_bn_stats", lambda m: _conv(m, [m.activation(INPUTS), *m.bn(INPUTS - 1)]),
        "a.mean must be a contiguous torch.float32 vector of 8 channels",
    ),
    "a mask of fewer rows": (
        "folded_wgrad", lambda m: (*(x[i:] for i, x in enumerate(m.grad())), m.a(), (1, 1), [], (1, 1)),
        "mask must be a contiguous torch.uint8 mask of shape",
    ),
    "a mask of another dtype": (
        "folded_dgrad",
        lambda m: (*(x.int() if i else x for i, x in enumerate(m.grad())), m.factors(INPUTS), m.a(), (1, 1), [], [],
                   (1, 1)),
        "mask must be a contiguous torch.uint8 mask of shape",
    ),
    "a residual of other channels": (
        "conv_backward",
        lambda m: (m.dy(NORMAL, 3, True), m.a(), m.weight(OUTPUTS, INPUTS, 3), *NORMAL, m.activation(INPUTS + 1), None,
                   (1, 1), BOTH),
        "residual must be channels_last torch.float32 of shape",
    ),
    "a shortcut of other channels": (
        "conv1x1_bn_add_relu",
        lambda m: (m.a(), m.weight(OUTPUTS, INPUTS), m.bn(OUTPUTS), m.activation(OTHERS), None, None, [None] * 4,
                   (1, 1)),
        "skip must be of shape",
    ),
    "an input of other pixels": (
        "conv_backward",
        lambda m: (m.dy(POINTWISE, 1, True), m.a(INPUTS, (3, 3)), m.weight(OUTPUTS, INPUTS), *POINTWISE, None, None,
                   (1, 1), [False, True]),
        "dy.g must be torch.float32 of shape",
    ),
    "a covariance of fewer rows": (
        "fold_statistics", lambda m: (*(x[i // 2 :] for i, x in enumerate(statistics(m))), None, 1e-5), "contiguous"
    ),
    "a Q of fewer columns": (
        "fold_gradients",
        lambda m: (*(x[:, 1:] if i == 7 else x for i, x in enumerate(fold_gradients(m, True, False))),),
        "q must be contiguous",
    ),
    "a shift of fewer channels": ("rectified_mean", lambda m: (m.vector(INPUTS), m.vector(INPUTS - 1)), "bias must be"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused(what: str) -> None:
    op, make, message = BAD[what]
    arguments = make(Maker(torch.float32))
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
        getattr(OPS, op)(*arguments)

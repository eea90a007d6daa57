"""Every op, native, of the vendor's library or by Triton: schema, fakes, the reference, and what it refuses."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import resnet_fused
from resnet_fused.layout import dense, is_channels_last, subsample, widened
from resnet_fused.ops.dispatch import IMPLEMENTATIONS, runs_triton
from resnet_fused.ops.fold_algebra import fold_statistics
from resnet_fused.ops.vendor_gemm import chunks, rows_per_chunk
from resnet_fused.reference.conv_bn import activation_value
from resnet_fused.types import Activation, ConvGeometry, Gradient
from tests.accuracy import assert_accurate
from tests.ops.operands import (
    BOTH,
    CASES,
    INPUTS,
    LAYOUTS,
    NATIVE,
    NORMAL,
    OPS,
    OTHERS,
    OUTPUTS,
    POINTWISE,
    SIZES,
    Arguments,
    Maker,
    assert_equals_reference,
    assert_fakes_are_exact,
    channels_last,
    contiguous,
    conv_bn_stats,
    copied,
    fold_gradients,
    in_float64,
    native_arguments,
    op_of,
    reference_of,
    sliced,
    statistics,
    tensors,
)

by_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)


def test_every_op_has_cases() -> None:
    assert {*NATIVE, "fresh_like", *map(op_of, CASES)} == IMPLEMENTATIONS.keys()


# Ops with a native kernel


@by_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NATIVE)
def test_opcheck_of_native_ops(name: str, dtype: torch.dtype, layout: Any) -> None:
    """Schema, fake results with the strides of the real ones, and compilation."""
    affine = (dtype == torch.float32) == (layout in (contiguous, sliced))  # each with every dtype and layout
    torch.library.opcheck(getattr(OPS, name).default, native_arguments(name, layout, dtype, affine))


@by_layout
@pytest.mark.parametrize("name", NATIVE)
def test_native_equals_reference(name: str, layout: Any) -> None:
    assert_equals_reference(name, native_arguments(name, layout, torch.float64, True))


@by_layout
def test_layouts_are_what_they_are_called(layout: Any) -> None:
    x = layout(torch.randn(2, 11, 5, 3))
    assert x.is_contiguous() == (layout is contiguous)
    assert (dense(x) is x) == (layout in (contiguous, channels_last))
    assert is_channels_last(dense(x)) == (layout in (channels_last, sliced))


def test_masks_of_another_layout_are_refused() -> None:
    y, mean, invstd, weight, bias, skip = native_arguments("bn_add_relu", contiguous, torch.float32, True)
    _, mask = OPS.bn_add_relu(y, mean, invstd, weight, bias, skip)
    with pytest.raises(RuntimeError, match="mask must be the contiguous uint8 tensor"):
        OPS.bn_add_relu_backward_reduce(y, mask, channels_last(y), mean, invstd)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: (a[0][0], *a[1:]), "expected a 4-D activation"),
        (lambda a: (a[0].to(torch.int32), *a[1:]), "must be float32, float64, bfloat16 or float16"),
        (lambda a: (a[0], a[1][:-1], *a[2:]), "mean must be a vector of 11 channels"),
        (lambda a: (a[0], a[1], a[2].double(), *a[3:]), "invstd must be float64 for a float64"),
        (lambda a: (*a[:5], a[5][:, :, :-1]), "residual must have the shape"),
        (lambda a: (*a[:5], a[5].double()), "residual must have the activation's dtype"),
    ],
)
def test_native_checks_its_arguments(change: Any, message: str) -> None:
    args = change(native_arguments("bn_add_relu", contiguous, torch.float32, True))
    with pytest.raises(RuntimeError, match=message):
        OPS.bn_add_relu(*args)


# Ops composed of others, and Triton kernels


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few rows each, the last one shorter."""
    monkeypatch.setattr("resnet_fused.ops.vendor_gemm.CHUNK_BYTES", {"cpu": 256, "cuda": 256})


@pytest.mark.usefixtures("small_chunks")
def test_chunks_cover_the_batch() -> None:
    x = Maker(torch.float32).activation(11)
    sizes = [part.shape[3] for part in chunks(x, rows_per_chunk(x, 11))]
    assert sum(sizes) == x.numel() // 11
    assert len(sizes) > 2 and sizes[-1] < sizes[0]


@pytest.mark.parametrize(
    ("backend", "dtype", "size"),
    [
        ("auto", torch.float32, "one_pixel"),
        ("auto", torch.bfloat16, "odd"),
        # Fakes don't depend on the backend, so the layout of results must not either.
        pytest.param("triton", torch.float32, "odd", marks=pytest.mark.interpreter),
        pytest.param("triton", torch.float16, "one_pixel", marks=pytest.mark.interpreter),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", CASES)
def test_opcheck(case: str, backend: str, dtype: torch.dtype, size: str) -> None:
    op, arguments = op_of(case), CASES[case](Maker(dtype, SIZES[size]))
    checks = (
        ("test_schema", "test_faketensor") if backend == "triton" else torch.library._OPCHECK_DEFAULT_UTILS
    )
    with resnet_fused.backend(backend):
        torch.library.opcheck(getattr(OPS, op).default, arguments, test_utils=checks)
        assert_fakes_are_exact(op, arguments)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_equals_reference(case: str, size: str) -> None:
    arguments = CASES[case](Maker(torch.float64, SIZES[size]))
    assert_equals_reference(op_of(case), arguments)
    assert_fakes_are_exact(op_of(case), arguments)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("case", CASES)
def test_equals_reference_in_chunks(case: str) -> None:
    assert_equals_reference(op_of(case), CASES[case](Maker(torch.float64)))


def eager_covariance(fields: list[Tensor], input_stride: Any) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the pixels, without a second pass to center them."""
    c = subsample(activation_value(Activation(*fields)), input_stride).permute(0, 2, 3, 1).flatten(0, 2)
    mean = widened(c).mean(0)
    return mean, widened(c.t() @ c) / len(c) - mean.outer(mean)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", [case for case in CASES if case != "conv_backward-neither"])
@pytest.mark.usefixtures("small_chunks")
def test_composed_ops_obey_the_accuracy_rule(case: str, size: str, dtype: torch.dtype) -> None:
    """Eager is the reference in the same dtype, which rounds activations where eager mode does."""
    op = op_of(case)
    if op == "conv_backward" and size == "one_pixel" and dtype == torch.bfloat16:
        pytest.skip("oneDNN leaves taps unwritten that see no pixel, for eager PyTorch too")
    reference = reference_of(op)
    eager = eager_covariance if op == "input_covariance" else reference

    def draw() -> tuple[dict[str, Tensor], ...]:
        arguments = CASES[case](Maker(dtype, SIZES[size]))
        results = [
            tensors(call(*copied(given)))
            for call, given in (
                (getattr(OPS, op), arguments),
                (eager, arguments),
                (reference, in_float64(arguments)),
            )
        ]
        return tuple(
            {str(i): x for i, x in enumerate(each) if x.is_floating_point() and len(x)} for each in results
        )

    assert_accurate(draw, dtype)  # type: ignore[arg-type]


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
    exact = reference_of("folded_dgrad")(*in_float64(arguments))[0]
    da = OPS.folded_dgrad(*arguments)[0].double()
    assert float((da - exact).mean().abs()) < 0.2 * float(vector[0])


def test_one_pixel() -> None:
    """Images of one pixel count as channels_last, whatever their strides say."""
    m = Maker(torch.float32)
    a, weight = [*Activation(m.activation(INPUTS, (1, 1)))], m.weight(OUTPUTS, INPUTS)
    y, mean, *_ = OPS.conv_bn_stats(*conv_bn_stats(a, weight, POINTWISE, m))
    torch.testing.assert_close(mean, y.mean((0, 2, 3)))


def test_taps_that_see_only_padding_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the geometry, results are those of all taps."""
    module, cropped = sys.modules["resnet_fused.ops.conv_bn"], []
    crop = module.taps_inside  # type: ignore[attr-defined]

    def noting(x: Tensor, weight: Tensor, geometry: ConvGeometry) -> Any:
        result = crop(x, weight, geometry)
        if result is not None:
            cropped.append((tuple(x.shape[2:]), tuple(weight.shape[2:]), geometry))
        return result

    monkeypatch.setattr(module, "taps_inside", noting)
    sizes, kernels = [(1, 1), (2, 1), (2, 2), (3, 2), (5, 1)], [(3, 3), (1, 3), (7, 4)]
    steps = [(1, 1), (2, 1), (2, 2), (3, 3)]
    for size, kernel, stride, padding, dilation in itertools.product(
        sizes, kernels, steps, [(0, 0), (1, 1), (2, 1), (3, 3)], [(1, 1), (2, 2)]
    ):
        m, geometry = Maker(torch.float64, size), ConvGeometry(stride, padding, dilation)
        weight = m.weight(OUTPUTS, INPUTS, *kernel)
        out_size = geometry.out_size(m.activation(1), weight)
        if min(out_size) < 1:
            continue
        assert_equals_reference("conv_bn_stats", conv_bn_stats(m.a(), weight, geometry, m))
        arguments = [m.activation(OUTPUTS, out_size)], m.a(), weight, *geometry, None, None, (1, 1), BOTH
        arguments = [*Gradient(*arguments[0])], *arguments[1:]
        assert_equals_reference("conv_backward", arguments)
    assert ((1, 1), (3, 3), NORMAL) in cropped
    assert ((2, 2), (3, 3), ConvGeometry((2, 2), (1, 1))) in cropped
    assert ((5, 1), (3, 3), ConvGeometry((2, 2), (1, 1))) in cropped
    assert ((2, 2), (3, 3), NORMAL) not in cropped  # all taps see a pixel


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

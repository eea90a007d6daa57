"""The CUDA kernels, compiled by g++ and run by an emulation of blocks, threads and barriers on the CPU.

This finds wrong indices, arithmetic, alignment, accesses out of bounds and missing or diverging barriers in a
checkout without a GPU. It is no substitute for running the kernels on one: it knows nothing of the compiler's device
code, of races within a warp, of memory ordering between kernels, of launch limits beyond the block's size, or of speed.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fused.layout import pack_mask
from tests.accuracy import LAYOUTS, Results, assert_accurate, hostile_input
from tests.emulated_cuda.device import Device, build
from tests.ops.operands import NATIVE, copied, in_float64, native_arguments, reference_of, tensors

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation needs g++")

#: Those that go into given tensors run the same kernels.
OPS = [name for name in NATIVE if not name.endswith("_out")]
every_op = pytest.mark.parametrize("op", OPS)
SHAPES = (
    (2, 16, 4, 6),  # vectors in both layouts
    (3, 64, 5, 7),  # vectors with channels_last only
    (2, 3, 7, 9),
    (5, 7, 3, 5),
    (2, 24, 1, 1),
    (1, 1, 1, 1),
    (1, 2, 48, 46),  # several tiles of columns when contiguous, with vectors
    (1, 3, 45, 47),  # and without
    (3, 520, 2, 1),  # several tiles of channels, with vectors
    (3, 523, 1, 2),  # and without
)
# Enough pixels that blocks and threads go round their loops more than once, the last time cut short.
LARGE = {
    "channels_last": [(1, 1024, 19, 17), (2, 512, 21, 31), (3, 3, 67, 231)],
    "contiguous": [(42, 3, 45, 47), (30, 3, 70, 72), (700, 5, 3, 3)],
}
EMPTY = [(0, 4, 3, 3), (2, 0, 3, 3), (2, 4, 0, 3), (2, 4, 3, 0)]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("emulated_cuda"))


@pytest.fixture
def device(library: Path) -> Device:
    return Device(library)


def random_arguments(
    op: str, layout: str, dtype: torch.dtype, size: tuple[int, ...], affine: bool = True
) -> list[Any]:
    dense = lambda x: x.contiguous(memory_format=LAYOUTS[layout])  # noqa: E731
    arguments = list(native_arguments(op, dense, dtype, affine, size))
    if op == "bn_relu" and random.random() < 0.5:
        arguments[-1] = None  # without a shift
    return arguments


def by_reference(op: str, arguments: Sequence[Any]) -> list[Tensor]:
    """Results, and the tensors among the arguments after the call."""
    arguments = copied(arguments)
    return tensors([reference_of(op)(*arguments), arguments])


def assert_equals_reference(device: Device, op: str, arguments: Sequence[Any]) -> None:
    """In float64: bit for bit in masks and indices, to rounding in the rest; NaN and infinity in the same places."""
    expected = by_reference(op, arguments)
    results = device(op, arguments, expected[: len(expected) - len(tensors(arguments))])
    for ours, theirs in zip(results, expected, strict=True):
        if ours.is_floating_point():
            assert torch.equal(ours.isfinite(), theirs.isfinite())
            ours, theirs = (torch.where(x.isfinite(), x, 0.0) for x in (ours, theirs))
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
        else:
            assert torch.equal(ours, theirs)


def check_accuracy(device: Device, op: str, make: Callable[[], Sequence[Any]]) -> None:
    """The accuracy rule, with the reference in place of eager: it rounds its results once."""

    def draw() -> tuple[Results, Results, Results]:
        arguments = make()
        rounded, exact = by_reference(op, arguments), by_reference(op, in_float64(arguments))
        count = len(rounded) - len(tensors(arguments))
        results = device(op, arguments, rounded[:count])
        named: tuple[dict[str, Tensor], ...] = ({}, {}, {})
        for i in range(len(rounded) if op == "masked_grad" else count):  # which alone writes to arguments
            if results[i].dtype == torch.float64:  # to which sums in float32 are added
                results[i], rounded[i] = results[i].float(), rounded[i].float()
            if results[i].is_floating_point():
                for each, values in zip(named, (results, rounded, exact), strict=True):
                    each[str(i)] = values[i]
            elif op.endswith("add_relu"):
                # The bits of the kernel's own output: rounding decides on which side of zero it is.
                assert torch.equal(results[i], pack_mask(results[0] > 0, results[0]))
            else:
                assert torch.equal(results[i], rounded[i])
        return named  # type: ignore[return-value]

    assert_accurate(draw)


@every_op
@pytest.mark.parametrize("size", SHAPES, ids=str)
def test_equals_reference(device: Device, layout: str, size: tuple[int, ...], op: str) -> None:
    assert_equals_reference(device, op, random_arguments(op, layout, torch.float64, size))


@every_op
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_accuracy(device: Device, layout: str, dtype: torch.dtype, op: str) -> None:
    """In few shapes in float16, whose vectors are those of bfloat16."""
    for size in SHAPES if dtype != torch.float16 else SHAPES[:4]:
        check_accuracy(device, op, lambda size=size: random_arguments(op, layout, dtype, size))


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_misaligned(library: Path, layout: str, dtype: torch.dtype, op: str) -> None:
    """Shapes for vectors, at addresses that forbid them."""
    device = Device(library, aligned=False)
    for i in (0, 6, 8):
        make = lambda i=i: random_arguments(op, layout, dtype, SHAPES[i])  # noqa: E731
        check_accuracy(device, op, make)


@every_op
def test_large(device: Device, layout: str, op: str) -> None:
    for size in LARGE[layout]:
        assert_equals_reference(device, op, random_arguments(op, layout, torch.float64, size))


@every_op
def test_without_affine_and_frozen(device: Device, layout: str, op: str) -> None:
    size = (2, 16, 3, 5)
    assert_equals_reference(device, op, random_arguments(op, layout, torch.float64, size, affine=False))
    make = lambda: random_arguments(op, layout, torch.float32, size, affine=False)  # noqa: E731
    check_accuracy(device, op, make)


@pytest.mark.parametrize("name", ["mean", "constant_channel"])
def test_stats_of_hostile_input(device: Device, name: str, layout: str, dtype: torch.dtype) -> None:
    """|mean| / std of 1e3: a mean's rounding is that much larger than that of a deviation from it."""
    x, eps = hostile_input(name, dtype, layout).y, 1e-5
    mean, var, invstd, _ = device("batch_norm_stats", (x, eps), [torch.empty(x.shape[1])] * 3)
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    std, rounding = exact_var.sqrt(), torch.finfo(torch.float32).eps
    assert ((mean - exact_mean).abs() <= rounding * (4 * std + exact_mean.abs())).all()
    # Of a constant channel there is no error at all.
    assert ((var - exact_var).abs() <= rounding * std * (8 * std + exact_mean.abs())).all()
    torch.testing.assert_close(invstd.double(), (var.double() + eps).rsqrt(), rtol=4 * rounding, atol=0)


#: By op: which of its arguments is y.
WITH_NAN = dict.fromkeys(
    ("batch_norm_stats", "bn_relu", "bn_add_relu", "bn_bn_add_relu", "bn_relu_maxpool"), 0
)
WITH_NAN |= dict.fromkeys(("bn_add_relu_backward", "bn_add_relu_backward_reduce"), 2)


@pytest.mark.parametrize("op", WITH_NAN)
def test_nan_and_infinity(device: Device, layout: str, op: str) -> None:
    """They stay in their channel, pass the ReLU as in PyTorch, and do not reach a frozen batch norm's gradient."""
    for affine in (True, False):
        arguments = random_arguments(op, layout, torch.float64, (2, 16, 4, 6), affine)
        y = arguments[WITH_NAN[op]]
        y[0, 3, 1, 2], y[1, 5, 0, 0] = torch.nan, torch.inf
        assert_equals_reference(device, op, arguments)


@pytest.mark.parametrize("size", [(2, 16, 1, 1), (3, 16, 2, 13), (2, 5, 4, 3), (1, 3, 45, 47)], ids=str)
@pytest.mark.parametrize("op", ["bn_relu_maxpool_backward", "bn_relu_maxpool_backward_reduce"])
def test_pooling_indices_of_any_byte(device: Device, op: str, size: tuple[int, ...], layout: str) -> None:
    """An index that names no pixel, because its window is cut off there or has no such element, has no gradient."""
    arguments = random_arguments(op, layout, torch.float64, size)
    arguments[1].copy_(torch.randint(0, 14, arguments[1].shape))
    arguments[1][arguments[1] > 11] += 240
    assert_equals_reference(device, op, arguments)


@pytest.mark.parametrize("op", ["bn_add_relu", "bn_relu_maxpool"])
def test_zeros_are_not_kept(device: Device, op: str, layout: str) -> None:
    """All pixels of a constant channel without bias are at the ReLU's corner, where no gradient passes."""
    y = torch.full((2, 8, 3, 3), 2.0).double().contiguous(memory_format=LAYOUTS[layout])
    vectors = [torch.full((8,), v).double() for v in (2.0, 300.0)]
    residual = [torch.zeros_like(y)] if op == "bn_add_relu" else []
    assert_equals_reference(device, op, [y, *vectors, None, None, *residual])


@every_op
def test_empty(device: Device, layout: str, op: str) -> None:
    for size in EMPTY:
        assert_equals_reference(device, op, random_arguments(op, layout, torch.float64, size))

"""The CUDA kernels, compiled by g++ and run by an emulation of blocks, threads and barriers on the CPU.

This finds wrong indices, arithmetic, alignment, accesses out of bounds and missing or diverging barriers in a
checkout without a GPU. It is no substitute for running the kernels on one: it knows nothing of the compiler's device
code, of races within a warp, of memory ordering between kernels, of launch limits beyond the block's size, or of speed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from .checks import (
    check_bn_add_relu,
    check_bn_bn_add_relu,
    check_bn_relu,
    check_bn_relu_maxpool,
    check_masked_grad,
    check_pooling_backward,
    check_stats,
    mask_shape,
    random,
    random_norm,
    random_sums,
)
from .device import Device, build
from .formulas import (
    BatchNorm,
    pool,
    spread,
    unpack,
)

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation needs g++")

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
CASES = [(dtype, size) for dtype in (torch.float32, torch.bfloat16) for size in SHAPES]
CASES += [(dtype, size) for dtype in (torch.float16, torch.float64) for size in SHAPES[:4]]
# Shapes for vectors, at addresses that forbid them.
MISALIGNED = [(dtype, SHAPES[i]) for dtype in (torch.float32, torch.bfloat16) for i in (0, 6, 8)]
# Enough pixels that blocks and threads go round their loops more than once, the last time cut short.
LARGE = {
    True: [(1, 1024, 19, 17), (2, 512, 21, 31), (3, 3, 67, 231)],
    False: [(42, 3, 45, 47), (30, 3, 70, 72), (700, 5, 3, 3)],
}


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("emulated_cuda"))


@pytest.fixture(params=[True, False], ids=["channels_last", "contiguous"])
def channels_last(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def device(library: Path, channels_last: bool, request: pytest.FixtureRequest) -> Device:
    return Device(library, request.param, channels_last)


CHECKS = (check_stats, check_bn_relu, check_bn_add_relu, check_bn_bn_add_relu, check_bn_relu_maxpool)
ALL_CHECKS = (*CHECKS, check_masked_grad)
Check = Callable[[Device, tuple[int, ...]], None]


@pytest.mark.parametrize("check", ALL_CHECKS)
@pytest.mark.parametrize(("dtype", "size"), CASES, ids=str)
def test_op(
    library: Path, channels_last: bool, dtype: torch.dtype, size: tuple[int, ...], check: Check
) -> None:
    check(Device(library, dtype, channels_last), size)


@pytest.mark.parametrize("check", ALL_CHECKS)
@pytest.mark.parametrize(("dtype", "size"), MISALIGNED, ids=str)
def test_misaligned(
    library: Path, channels_last: bool, dtype: torch.dtype, size: tuple[int, ...], check: Check
) -> None:
    check(Device(library, dtype, channels_last, aligned=False), size)


@pytest.mark.parametrize("check", ALL_CHECKS)
@pytest.mark.parametrize("case", [0, 1, 2])
def test_large(library: Path, channels_last: bool, case: int, check: Check) -> None:
    check(Device(library, torch.bfloat16, channels_last), LARGE[channels_last][case])


@pytest.mark.parametrize("check", CHECKS[1:])
def test_without_affine_and_frozen(device: Device, check: Callable[..., None]) -> None:
    check(device, (2, 16, 3, 5), with_affine=False)
    check(device, (2, 16, 3, 5), frozen=True)


@pytest.mark.parametrize("size", [(4, 16, 9, 8), (3, 7, 5, 5), (40, 8, 16, 16)], ids=str)
def test_stats_of_hostile_input(device: Device, size: tuple[int, ...]) -> None:
    """|mean| / std of 1e3 (as far as the dtype can tell such numbers apart) and a constant channel."""
    check_stats(device, size, 0.1, 100.0)
    values = random(size, 0.1, 100.0)
    values[:, 1] = 100.1
    x = device.activation(values)
    mean, var, invstd = device("batch_norm_stats", [x], x.shape, vectors=3, eps=1e-5)
    assert mean[1] == x[0, 1, 0, 0]
    assert var[1] == 0
    assert invstd[1] == torch.tensor(1e-5, dtype=torch.float64).rsqrt().to(invstd.dtype)


def test_nan_and_infinity(device: Device) -> None:
    """They stay in their channel, pass the ReLU as in PyTorch, and do not reach a frozen batch norm's gradient."""
    size = (2, 16, 4, 6)
    y, grad = device.activation(random(size)), device.activation(random(size))
    y[0, 3, 1, 2], y[1, 5, 0, 0] = torch.nan, torch.inf
    norm = BatchNorm(*(torch.full((16,), v, dtype=device.statistics) for v in (0.0, 1.0, 1.0, 0.0)))
    statistics = [norm.mean, norm.invstd]
    healthy = torch.ones(16, dtype=torch.bool)
    healthy[[3, 5]] = False

    mean, var, _ = device("batch_norm_stats", [y], y.shape, vectors=3, eps=1e-5)
    assert (mean.isfinite() & var.isfinite()).equal(healthy)
    (out,) = device("bn_relu", [y, *norm.arguments(), None], y.shape, like=1)
    torch.testing.assert_close(out, torch.relu(y), rtol=0, atol=0, equal_nan=True)

    residual = torch.zeros_like(y)
    bits = mask_shape(device, y.shape)
    out, mask = device("bn_add_relu", [y, *norm.arguments(), residual], y.shape, like=1, extra_bytes=bits)
    kept = unpack(mask, y.shape, device.channels_last)
    assert kept.equal(~(y <= 0))
    inputs = [grad, mask, y, *statistics, None, None, None]
    dy, dresidual = device("bn_add_relu_backward", inputs, y.shape, like=2)
    assert dy.equal(dresidual) and dy.equal(torch.where(kept, grad, 0))
    sums = device("bn_add_relu_backward_reduce", [grad, mask, y, *statistics], y.shape, vectors=2)
    assert sums[0].isfinite().all() and sums[1].isfinite().equal(healthy)

    expected, taps = pool(torch.relu(y.double()))
    out, indices = device(
        "bn_relu_maxpool", [y, *norm.arguments()], y.shape, like=1, pooled=True, extra_bytes=taps.shape
    )
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=0, equal_nan=True)
    assert indices.equal(taps)


@pytest.mark.parametrize("size", [(2, 16, 1, 1), (3, 16, 2, 13), (2, 5, 4, 3), (1, 3, 45, 47)], ids=str)
def test_pooling_indices_of_any_byte(device: Device, size: tuple[int, ...]) -> None:
    """An index that names no pixel, because its window is cut off there or has no such element, has no gradient."""
    y, norm = device.activation(random(size)), random_norm(device, size[1])
    grad = device.activation(random((*size[:2], (size[2] + 1) // 2, (size[3] + 1) // 2)))
    memory_format = torch.channels_last if device.channels_last else torch.contiguous_format
    indices = torch.randint(0, 14, grad.shape, dtype=torch.uint8).contiguous(memory_format=memory_format)
    indices[indices > 11] += 240
    dz = spread(grad.double(), indices, y.shape, any_index=True)
    check_pooling_backward(device, y, grad, indices, norm, dz, random_sums(device, y))


def test_zeros_are_not_kept(device: Device) -> None:
    """All pixels of a constant channel without bias are at the ReLU's corner, where no gradient passes."""
    y = device.activation(torch.full((2, 8, 3, 3), 2.0))
    vectors = [torch.full((8,), v, dtype=device.statistics) for v in (2.0, 300.0)]
    bits = mask_shape(device, y.shape)
    out, mask = device(
        "bn_add_relu", [y, *vectors, None, None, torch.zeros_like(y)], y.shape, like=1, extra_bytes=bits
    )
    assert not out.any() and not mask.any()
    taps = (2, 8, 2, 2)
    out, indices = device(
        "bn_relu_maxpool", [y, *vectors, None, None], y.shape, like=1, pooled=True, extra_bytes=taps
    )
    assert not out.any() and (indices == 9).all()


@pytest.mark.parametrize("size", [(0, 4, 3, 3), (2, 0, 3, 3), (2, 4, 0, 3), (2, 4, 3, 0)], ids=str)
def test_empty(device: Device, size: tuple[int, ...]) -> None:
    y = device.activation(torch.empty(size))
    norm = BatchNorm(*torch.ones(4, size[1], dtype=device.statistics))
    statistics, mask = [norm.mean, norm.invstd], torch.empty(0, dtype=torch.uint8)
    sums = device("bn_relu_backward_reduce", [y, y, *norm.arguments()], y.shape, vectors=2)
    sums += device("bn_add_relu_backward_reduce", [y, mask, y, *statistics], y.shape, vectors=2)
    inputs = [y, mask, y, *statistics, y, *statistics]
    sums += device("bn_bn_add_relu_backward_reduce", inputs, y.shape, vectors=3)
    sums += device("bn_relu_maxpool_backward_reduce", [y, mask, y, *statistics], y.shape, vectors=2)
    assert all((s == 0).all() for s in sums)
    assert (device("batch_norm_stats", [y], y.shape, vectors=3, eps=1.0)[2] == 1).all()

    device("bn_relu", [y, *norm.arguments(), None], y.shape, like=1)
    device("bn_add_relu", [y, *norm.arguments(), y], y.shape, like=1, extra_bytes=(0,))
    device("bn_relu_maxpool", [y, *norm.arguments()], y.shape, like=1, pooled=True, extra_bytes=(0,))
    device("bn_relu_maxpool_backward", [y, mask, y, *statistics, None, None, None], y.shape, like=1)
    before = torch.full((size[1],), 3.0, dtype=torch.float64)
    outputs = device(
        "masked_grad", [y, mask, None, torch.ones(1)], y.shape, like=1, vectors=1, initial=(y, before)
    )
    assert torch.equal(outputs[1], before)

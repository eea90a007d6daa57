"""The CUDA kernels, compiled by g++ and run by an emulation of blocks, threads and barriers on the CPU.

This finds wrong indices, arithmetic, alignment, accesses out of bounds and missing or diverging barriers in a
checkout without a GPU. It is no substitute for running the kernels on one: it knows nothing of the compiler's device
code, of races within a warp, of memory ordering between kernels, of launch limits beyond the block's size, or of speed.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from .device import Device, build
from .formulas import (
    BatchNorm,
    Value,
    add,
    affine,
    assert_rounds_to,
    channel_sum,
    exactly,
    input_gradient,
    normalized,
    per_channel,
    pool,
    relu,
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


def random(size: tuple[int, ...], scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return torch.randn(size, dtype=torch.float64) * scale + shift


def random_norm(device: Device, channels: int, with_affine: bool = True) -> BatchNorm:
    """mean near 0, invstd near 1, weights of either sign and one of zero."""

    def vector(scale: float, shift: float) -> Tensor:
        return random((channels,), scale, shift).to(device.statistics)

    mean, invstd = vector(0.5, 0.1), vector(0.1, 1.0)
    if not with_affine:
        return BatchNorm(mean, invstd, None, None)
    weight = vector(1.0, 0.0)
    weight[channels // 2] = 0
    return BatchNorm(mean, invstd, weight, vector(0.5, 0.0))


def random_sums(device: Device, y: Tensor) -> tuple[Tensor, Tensor]:
    pixels = y.numel() // y.shape[1]
    first, second = (random((y.shape[1],), pixels).to(device.statistics) for _ in range(2))
    return first, second


def mask_shape(device: Device, size: torch.Size) -> tuple[int, int]:
    n, c, h, w = size
    return (n * h * w, (c + 7) // 8) if device.channels_last else (n * c, (h * w + 7) // 8)


def rounding_decides(device: Device, z: Value) -> Tensor:
    """Where the sign of z is within the error of computing it."""
    return (z.value.abs() <= 8 * torch.finfo(device.statistics).eps * z.magnitude) & (z.value != 0)


def check_mask(device: Device, mask: Tensor, z: Value) -> Tensor:
    """Compares a mask with z where rounding cannot decide; returns it unpacked."""
    kept = unpack(mask, z.value.shape, device.channels_last)
    assert ((kept == ~(z.value <= 0)) | rounding_decides(device, z)).all()
    return kept


def check_sums(device: Device, actual: list[Tensor], dz: Tensor, *xhats: Tensor) -> None:
    expected = [channel_sum(dz), *(channel_sum(dz * xhat) for xhat in xhats)]
    for a, e in zip(actual, expected, strict=True):
        assert_rounds_to(a, e, device.statistics, terms=16)


def both_sums(sums: tuple[Tensor, Tensor] | None) -> list[Tensor | None]:
    return [None, None] if sums is None else list(sums)


def check_stats(
    device: Device, size: tuple[int, ...], scale: float = 2.0, shift: float = 0.5, eps: float = 1e-5
) -> None:
    x = device.activation(random(size, scale, shift))
    mean, var, invstd = device("batch_norm_stats", [x], x.shape, vectors=3, eps=eps)
    exact = x.double()
    expected_mean = exact.mean((0, 2, 3))
    expected_var = (exact - per_channel(expected_mean)).square().mean((0, 2, 3))
    expected_invstd = (expected_var + eps).rsqrt()
    terms = 8 + abs(shift) / scale  # a mean's rounding is that much larger than that of a deviation from it
    mean_magnitude = expected_mean.abs() + expected_var.sqrt()
    assert_rounds_to(mean, Value(expected_mean, mean_magnitude), device.statistics, 4)
    assert_rounds_to(var, Value(expected_var, expected_var), device.statistics, terms)
    assert_rounds_to(invstd, Value(expected_invstd, expected_invstd), device.statistics, terms)


def check_bn_relu(
    device: Device, size: tuple[int, ...], with_affine: bool = True, frozen: bool = False
) -> None:
    y, grad = device.activation(random(size)), device.activation(random(size))
    norm = random_norm(device, size[1], with_affine)
    z = affine(y.double(), norm)
    (out,) = device("bn_relu", [y, *norm.arguments(), None], y.shape, like=1)
    assert_rounds_to(out, relu(z), device.statistics)

    shift = random((size[1],)).to(device.statistics)
    (shifted,) = device("bn_relu", [y, *norm.arguments(), shift], y.shape, like=1)
    lowered = exactly(-per_channel(shift).expand(size))
    assert_rounds_to(shifted, add(relu(z), lowered), device.statistics)

    kept = torch.where(rounding_decides(device, z), out > 0, ~(z.value <= 0))
    dz = torch.where(kept, grad.double(), 0.0)
    reduced = device("bn_relu_backward_reduce", [grad, y, *norm.arguments()], y.shape, vectors=2)
    check_sums(device, reduced, dz, normalized(y.double(), norm))
    sums = None if frozen else random_sums(device, y)
    (dy,) = device("bn_relu_backward", [grad, y, *norm.arguments(), *both_sums(sums)], y.shape, like=1)
    assert_rounds_to(dy, input_gradient(exactly(dz), y.double(), norm, sums), device.statistics)


def check_bn_add_relu(
    device: Device, size: tuple[int, ...], with_affine: bool = True, frozen: bool = False
) -> None:
    y, residual, grad = (device.activation(random(size)) for _ in range(3))
    norm = random_norm(device, size[1], with_affine)
    bits = mask_shape(device, y.shape)
    z = add(affine(y.double(), norm), exactly(residual))
    out, mask = device("bn_add_relu", [y, *norm.arguments(), residual], y.shape, like=1, extra_bytes=bits)
    assert_rounds_to(out, relu(z), device.statistics)

    dz = torch.where(check_mask(device, mask, z), grad.double(), 0.0)
    statistics = [norm.mean, norm.invstd]
    reduced = device("bn_add_relu_backward_reduce", [grad, mask, y, *statistics], y.shape, vectors=2)
    check_sums(device, reduced, dz, normalized(y.double(), norm))
    sums = None if frozen else random_sums(device, y)
    inputs = [grad, mask, y, *statistics, norm.weight, *both_sums(sums)]
    dy, dresidual = device("bn_add_relu_backward", inputs, y.shape, like=2)
    assert_rounds_to(dy, input_gradient(exactly(dz), y.double(), norm, sums), device.statistics)
    assert torch.equal(dresidual.double(), dz)
    (alone,) = device("bn_add_relu_backward_dy", inputs, y.shape, like=1)
    assert torch.equal(alone, dy)


def random_mask(device: Device, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mask bits by a forward pass, and the same unpacked."""
    vectors = [torch.full((y.shape[1],), v, dtype=device.statistics) for v in (0.0, 1.0)]
    inputs = [y, *vectors, None, None, torch.zeros_like(y)]
    bits = mask_shape(device, y.shape)
    _, mask = device("bn_add_relu", inputs, y.shape, like=1, extra_bytes=bits)
    return mask, unpack(mask, y.shape, device.channels_last)


def check_masked_grad(device: Device, size: tuple[int, ...]) -> None:
    y, grad, before = (device.activation(random(size)) for _ in range(3))
    mask, kept = random_mask(device, y)
    grad.masked_fill_(~kept, torch.nan)  # which a product with the mask would let through
    dz = torch.where(kept, grad.double(), 0.0)
    sum_before = random((size[1],), scale=1e4)
    yes = torch.ones(1)
    for accumulate, with_sum in itertools.product((None, yes), (None, yes)):
        out, total = device(
            "masked_grad",
            [grad, mask, accumulate, with_sum],
            y.shape,
            like=1,
            vectors=1,
            initial=(before, sum_before),
        )
        if accumulate is None:
            assert torch.equal(out.double(), dz)
        else:
            assert_rounds_to(out, add(exactly(before), exactly(dz)), device.statistics)
        if with_sum is None:
            assert torch.equal(total, sum_before)
        else:
            # The sum of this call is as good as any, and is added in float64.
            terms = channel_sum(dz)
            error = (total - sum_before - terms.value).abs()
            allowed = 16 * torch.finfo(device.statistics).eps * terms.magnitude
            assert (error <= allowed + 4 * torch.finfo(torch.float64).eps * sum_before.abs()).all()


def check_bn_bn_add_relu(
    device: Device, size: tuple[int, ...], with_affine: bool = True, frozen: bool = False
) -> None:
    y, skip, grad = (device.activation(random(size)) for _ in range(3))
    norm, skip_norm = (random_norm(device, size[1], with_affine) for _ in range(2))
    bits = mask_shape(device, y.shape)
    z = add(affine(y.double(), norm), affine(skip.double(), skip_norm))
    inputs = [y, *norm.arguments(), skip, *skip_norm.arguments()]
    out, mask = device("bn_bn_add_relu", inputs, y.shape, like=1, extra_bytes=bits)
    assert_rounds_to(out, relu(z), device.statistics)

    dz = torch.where(check_mask(device, mask, z), grad.double(), 0.0)
    inputs = [grad, mask, y, norm.mean, norm.invstd, skip, skip_norm.mean, skip_norm.invstd]
    reduced = device("bn_bn_add_relu_backward_reduce", inputs, y.shape, vectors=3)
    check_sums(device, reduced, dz, normalized(y.double(), norm), normalized(skip.double(), skip_norm))
    # One batch norm of the two may be frozen.
    sums = None if frozen else random_sums(device, y)
    skip_sums = random_sums(device, skip)
    inputs = [grad, mask, y, norm.mean, norm.invstd, norm.weight, *both_sums(sums)]
    inputs += [skip, skip_norm.mean, skip_norm.invstd, skip_norm.weight, *skip_sums]
    dy, dskip = device("bn_bn_add_relu_backward", inputs, y.shape, like=2)
    assert_rounds_to(dy, input_gradient(exactly(dz), y.double(), norm, sums), device.statistics)
    assert_rounds_to(
        dskip, input_gradient(exactly(dz), skip.double(), skip_norm, skip_sums), device.statistics
    )


def check_bn_relu_maxpool(
    device: Device, size: tuple[int, ...], with_affine: bool = True, frozen: bool = False
) -> None:
    y = device.activation(random(size))
    norm = random_norm(device, size[1], with_affine)
    z = affine(y.double(), norm)
    expected, taps = pool(relu(z).value)
    magnitude = pool(z.magnitude)[0]
    arguments = [y, *norm.arguments()]
    out, indices = device(
        "bn_relu_maxpool", arguments, y.shape, like=1, pooled=True, extra_bytes=tuple(taps.shape)
    )
    assert_rounds_to(out, Value(expected, magnitude), device.statistics)
    # float32 can take a nearby value for the maximum; what it took must be as large, but for rounding.
    taken = spread(torch.ones_like(expected), indices, y.shape).value > 0
    near = (
        pool(torch.where(taken, relu(z).value, 0.0))[0]
        >= expected - 16 * torch.finfo(device.statistics).eps * magnitude
    )
    assert ((indices == taps) | (near & (expected > 0) & (indices < 9))).all()
    assert (indices == taps).double().mean() > 0.99

    grad = device.activation(random(tuple(expected.shape)))
    dz = spread(grad.double(), indices, y.shape)
    check_pooling_backward(device, y, grad, indices, norm, dz, None if frozen else random_sums(device, y))


def check_pooling_backward(
    device: Device,
    y: Tensor,
    grad: Tensor,
    indices: Tensor,
    norm: BatchNorm,
    dz: Value,
    sums: tuple[Tensor, Tensor] | None,
) -> None:
    statistics = [norm.mean, norm.invstd]
    reduced = device("bn_relu_maxpool_backward_reduce", [grad, indices, y, *statistics], y.shape, vectors=2)
    xhat = normalized(y.double(), norm)
    for actual, total, size_of in zip(
        reduced, (dz.value, dz.value * xhat), (dz.magnitude, dz.magnitude * xhat.abs()), strict=True
    ):
        expected_sum = Value(total.sum((0, 2, 3)), size_of.sum((0, 2, 3)))
        assert_rounds_to(actual, expected_sum, device.statistics, 16)
    inputs = [grad, indices, y, *statistics, norm.weight, *both_sums(sums)]
    (dy,) = device("bn_relu_maxpool_backward", inputs, y.shape, like=1)
    assert_rounds_to(dy, input_gradient(dz, y.double(), norm, sums), device.statistics)


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

"""What each emulated kernel has to compute, on random operands of a size."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .device import Device
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

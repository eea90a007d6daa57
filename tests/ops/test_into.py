"""Ops for a caller that goes through a batch in slices: into given tensors, with or without a result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fused.layout import dense, unpack_mask
from resnet_fused.reference.bn_relu import bn_relu
from tests.accuracy import (
    DTYPES,
    HOSTILE_CASES,
    LAYOUTS,
    Case,
    Results,
    assert_accurate,
    hostile_input,
)
from tests.ops.operands import OPS, reference_of

Op = Callable[[str], Callable[..., Any]]
STEMS = ("bn_add_relu", "bn_bn_add_relu")
#: What a slice may look like.
NAMES = ("plain", "odd_channels", "odd_size", "sliced", "permuted")
on_both = pytest.mark.parametrize(
    "get_op", [lambda name: getattr(OPS, name), reference_of], ids=["native", "reference"]
)


@pytest.fixture(params=[*DTYPES.values(), torch.float64], ids=[*DTYPES, "fp64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    return chosen


def forward_arguments(stem: str, case: Case) -> tuple[Tensor, ...]:
    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        mean, _, invstd = OPS.batch_norm_stats(x, 1e-5)
        return mean, invstd, weight, bias

    main = (case.y, *norm(case.y, case.weight, case.bias))
    if stem == "bn_add_relu":
        return *main, case.residual
    return *main, case.skip, *norm(case.skip, case.skip_weight, case.skip_bias)


def masks(case: Case) -> tuple[Tensor, Tensor]:
    """The mask of a forward pass, and the same as bool."""
    _, mask = OPS.bn_add_relu(*forward_arguments("bn_add_relu", case))
    return mask, unpack_mask(mask, dense(case.y))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stem", STEMS)
@on_both
def test_slices_are_the_whole(get_op: Op, stem: str, name: str, dtype: torch.dtype, layout: str) -> None:
    """Of three images and of one."""
    args = forward_arguments(stem, hostile_input(name, dtype, layout))
    expected, expected_mask = get_op(stem)(*args)
    out, mask = torch.empty_like(expected), torch.empty_like(expected_mask)
    rows = len(mask) // len(out)  # of an image
    for first in range(0, len(out), 3):
        at, mask_at = slice(first, first + 3), slice(first * rows, (first + 3) * rows)
        sliced = [x[at] if x.dim() == 4 else x for x in args]
        get_op(f"{stem}_out")(*sliced, out[at], mask[mask_at])
    assert torch.equal(out, expected)
    assert torch.equal(mask, expected_mask)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (lambda x: x.contiguous(), "out must be dense, in the activation's layout"),
        (lambda x: x.transpose(2, 3).contiguous().transpose(2, 3), "out must be dense"),
        (lambda x: x.double(), "out must "),
        (lambda x: x[:, :, 1:], "out must "),
    ],
    ids=["layout", "permuted", "dtype", "shape"],
)
@on_both
def test_other_outputs_are_refused(get_op: Op, out: Any, message: str) -> None:
    case = hostile_input("plain", torch.float32, "channels_last")
    mask, _ = masks(case)
    given = out(torch.zeros_like(case.y))
    for stem in STEMS:
        with pytest.raises((RuntimeError, ValueError), match=message):
            get_op(f"{stem}_out")(*forward_arguments(stem, case), given, mask)
    # Here the output's layout is what the mask has to have, and the gradient is copied to.
    with pytest.raises(RuntimeError, match="masked_grad: "):
        OPS.masked_grad(case.grad, mask, given, False, None)


@pytest.mark.parametrize("accumulate", [False, True], ids=["copy", "add"])
@pytest.mark.parametrize("name", NAMES)
@on_both
def test_masked_grad(get_op: Op, name: str, accumulate: bool, dtype: torch.dtype, layout: str) -> None:
    """Bit for bit: there is one operation and one rounding. NaN stays behind the ReLU."""
    case = hostile_input(name, dtype, layout)
    mask, passed = masks(case)
    case.grad.masked_fill_(~passed, torch.nan)
    before = dense(case.residual)
    dz = torch.where(passed, case.grad.double(), 0.0)
    exact = before.double() + dz if accumulate else dz
    expected = exact if dtype == torch.float64 else exact.float().to(dtype)
    for sum_before in (None, torch.randn(before.shape[1], dtype=torch.float64)):
        out, total = before.clone(), None if sum_before is None else sum_before.clone()
        get_op("masked_grad")(case.grad, mask, out, accumulate, total)
        assert torch.equal(out, expected)
        if sum_before is not None and total is not None:
            eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
            error = (total - sum_before - dz.sum((0, 2, 3))).abs()
            assert (error <= 4 * eps * dz.abs().sum((0, 2, 3)) + 1e-15 * sum_before.abs()).all()


@pytest.mark.parametrize("name", NAMES)
@on_both
def test_dy_alone(get_op: Op, name: str, dtype: torch.dtype, layout: str) -> None:
    case = hostile_input(name, dtype, layout)
    y, mean, invstd, weight, _, _ = forward_arguments("bn_add_relu", case)
    mask, _ = masks(case)
    for sums in ((torch.randn_like(mean), torch.randn_like(mean)), (None, None)):
        args = (case.grad, mask, y, mean, invstd, weight, *sums)
        dy, both = get_op("bn_add_relu_backward_dy")(*args), get_op("bn_add_relu_backward")(*args)
        assert torch.equal(dy, both[0]) and dy.stride() == both[0].stride()


@pytest.mark.parametrize("name", HOSTILE_CASES)
def test_shift(name: str, dtype: torch.dtype, layout: str) -> None:
    """Subtracted before the one rounding: as accurate as the reference, which does so."""

    def draw() -> tuple[Results, Results, Results]:
        case = hostile_input(name, dtype, layout)
        affine = forward_arguments("bn_add_relu", case)[:5]
        shift = torch.rand_like(case.weight)
        shifted, by_reference = OPS.bn_relu(*affine, shift), bn_relu(*affine, shift)
        assert shifted.stride() == by_reference.stride()
        assert torch.equal(OPS.bn_relu(*affine, torch.zeros_like(shift)), OPS.bn_relu(*affine, None))
        exact = bn_relu(*(x.double() for x in affine)) - shift.double().view(-1, 1, 1)
        return {"out": shifted}, {"out": by_reference}, {"out": exact}

    assert_accurate(draw)


@pytest.mark.parametrize("size", [(2, 11, 5, 3), (3, 64, 96, 100)], ids=["small", "huge_pages"])
def test_fresh_memory(size: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    x = torch.randn(size).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    fresh = OPS.fresh_like(x)
    assert fresh.shape == x.shape and fresh.dtype == dtype and fresh.stride() == x.stride()
    assert fresh.data_ptr() != x.data_ptr()
    assert torch.equal(fresh.copy_(x), x)
    narrow = OPS.fresh_like(x, c=8)
    assert narrow.shape == (size[0], 8, *size[2:]) and narrow.dtype == dtype
    assert narrow.is_contiguous(memory_format=LAYOUTS[layout])
    assert OPS.fresh_like(x.transpose(2, 3)).stride() == dense(x.transpose(2, 3)).stride()
    # Its contents are anybody's, so opcheck must not compare them.
    torch.library.opcheck(OPS.fresh_like.default, (x,), test_utils=("test_schema", "test_faketensor"))


def test_large_outputs(layout: str) -> None:
    """From 4 MiB on they lie on huge pages where the system has them."""
    y = torch.randn(3, 64, 96, 100).contiguous(memory_format=LAYOUTS[layout])
    zeros, ones = torch.zeros(64), torch.ones(64)
    assert torch.equal(OPS.bn_relu(y, zeros, ones, None, None), y.relu())
    out, mask = OPS.bn_add_relu(y, zeros, ones, None, None, y)
    assert torch.equal(out, (y + y).relu())
    assert torch.equal(unpack_mask(mask, y), y > 0)

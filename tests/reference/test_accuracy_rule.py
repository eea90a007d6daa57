"""The accuracy rule passes what is as accurate as eager, and fails everything else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.accuracy import (
    DRAWS,
    Inaccurate,
    Results,
    assert_accurate,
    element_error,
    relative_error,
    shift_from_zero,
)


def check(fused: Tensor, eager: Tensor, exact: Tensor) -> None:
    """The same results in all draws."""
    assert_accurate(lambda: ({"x": fused}, {"x": eager}, {"x": exact}))


def draws(of_fused: Callable[[int], float], of_eager: Callable[[int], float], dtype: torch.dtype) -> None:
    """assert_accurate on results whose errors in draw i are so many times a random vector as large as the result."""
    count: Iterator[int] = iter(range(DRAWS))

    def draw() -> tuple[Results, Results, Results]:
        i = next(count)
        exact = torch.randn(1000, dtype=torch.float64)
        error = torch.randn(1000, dtype=torch.float64)
        fused, eager = ((exact + of(i) * error).to(dtype) for of in (of_fused, of_eager))
        return {"x": fused}, {"x": eager}, {"x": exact}

    assert_accurate(draw)
    assert next(count, None) is None, "not all draws count"


@pytest.mark.parametrize("size", [1e-3, 0.1])
def test_errors_up_to_half_again_as_large_as_eagers_pass(size: float) -> None:
    draws(lambda i: 1.4 * size, lambda i: size, torch.float32)
    with pytest.raises(Inaccurate, match=r"x: relative_error .* \(eager\)"):
        draws(lambda i: 1.6 * size, lambda i: size, torch.float32)


def test_errors_of_a_few_eps_pass(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    exact = torch.randn(1000, dtype=torch.float64)
    check((exact * (1 + eps)).to(dtype), exact.to(dtype), exact)
    draws(lambda i: 3 * eps, lambda i: 0.0, dtype)
    with pytest.raises(Inaccurate):
        draws(lambda i: 6 * eps, lambda i: 0.0, dtype)


@pytest.mark.parametrize("which", range(DRAWS))
def test_one_draw_with_a_large_error_fails(which: int, dtype: torch.dtype) -> None:
    """Whether or not eager has errors beyond rounding."""
    with pytest.raises(Inaccurate):
        draws(lambda i: 1.0 if i == which else 0.0, lambda i: 0.0, dtype)
    with pytest.raises(Inaccurate):
        draws(lambda i: 1.0 if i == which else 0.02, lambda i: 0.02, dtype)


def test_an_exact_draw_does_not_make_up_for_the_others() -> None:
    with pytest.raises(Inaccurate):
        draws(lambda i: 0.0 if i == 0 else 1e-3, lambda i: 1e-7, torch.float32)


def test_a_draw_without_any_error_does_not_make_up_for_a_few_eps() -> None:
    """Which are too small for the rule of one draw."""
    eps = torch.finfo(torch.float32).eps
    factors = iter([0.0, 20.0, 20.0, 20.0, 20.0])

    def draw() -> tuple[Results, Results, Results]:
        eager = torch.randn(1000)
        fused = (eager + next(factors) * eps * torch.randn(1000, dtype=torch.float64)).float()
        return {"x": fused}, {"x": eager}, {"x": eager.double()}

    with pytest.raises(Inaccurate, match=r"x: relative_error [^o]* >"):
        assert_accurate(draw)


def test_one_large_error_of_eager_does_not_excuse_the_others() -> None:
    with pytest.raises(Inaccurate):
        draws(lambda i: 1e-2, lambda i: 1.0 if i == 0 else 1e-3, torch.float32)


def test_eager_without_a_relative_error_fails() -> None:
    zero, one = torch.zeros(3), torch.ones(3)
    with pytest.raises(AssertionError, match="of eager is inf"):
        check(zero, one, zero.double())


def test_one_wrong_element_fails(dtype: torch.dtype) -> None:
    exact = torch.randn(1_000_000, dtype=torch.float64)
    eager = exact.to(dtype)
    fused = eager.clone()
    fused[-1] += fused[-1].sign() * (fused[-1].abs() + 1)
    with pytest.raises(Inaccurate, match="_error"):
        check(fused, eager, exact)


@pytest.mark.parametrize("which", range(3))
def test_nan_fails_wherever_it_is(which: int) -> None:
    results = [torch.ones(3), torch.ones(3), torch.ones(3, dtype=torch.float64)]
    results[which][1] = math.nan
    with pytest.raises(AssertionError, match="NaN"):
        check(*results)


def test_infinity_fails() -> None:
    one = torch.ones(2)
    with pytest.raises(Inaccurate):
        check(torch.tensor([1.0, math.inf]), one, one.double())


def test_an_exact_zero_must_be_met() -> None:
    zero, small = torch.zeros(3, dtype=torch.float64), torch.full((3,), 1e-9)
    assert relative_error(torch.zeros(3), zero) == element_error(torch.zeros(3), zero) == 0
    assert relative_error(small, zero) == element_error(small, zero) == math.inf
    with pytest.raises(Inaccurate):
        check(small, torch.zeros(3), zero)


def test_values_are_shifted_away_from_zero() -> None:
    values = torch.randn(4, 3, 10, 8, dtype=torch.float64)
    values[:, 1] = 0.3
    shift = shift_from_zero(values)
    assert shift[1] == 0
    shifted = (values + shift.view(1, -1, 1, 1))[:, ::2]
    assert shifted.abs().amin((0, 2, 3)).min() > 0.01
    assert ((shifted > 0).double().mean((0, 2, 3)) > 0.05).all()
    assert ((shifted < 0).double().mean((0, 2, 3)) > 0.05).all()


def test_memory_is_poisoned() -> None:
    assert torch.empty(5).isnan().all()
    assert torch.empty_like(torch.ones(2, dtype=torch.bfloat16)).isnan().all()
    assert (torch.empty(3, dtype=torch.uint8) == 255).all()

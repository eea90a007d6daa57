"""The accuracy rule catches what it is there for."""

from __future__ import annotations

import math

import pytest
import torch

from tests.accuracy import Inaccurate, assert_as_accurate, element_error, in_some_draw, relative_error


def test_rounding_passes(dtype: torch.dtype) -> None:
    exact = torch.randn(1000, dtype=torch.float64)
    assert_as_accurate("rounded", exact.to(dtype), exact.to(dtype), exact)
    assert_as_accurate("within", (exact * (1 + torch.finfo(dtype).eps)).to(dtype), exact.to(dtype), exact)


def test_as_wrong_as_eager_passes_and_twice_as_wrong_fails() -> None:
    exact = torch.randn(1000, dtype=torch.float64)
    error = 1e-3 * torch.randn(1000)
    eager = exact.float() + error
    assert_as_accurate("as wrong", exact.float() - error, eager, exact)
    with pytest.raises(AssertionError, match=r"relative_error .* \(eager\)"):
        assert_as_accurate("twice", exact.float() + 2 * error, eager, exact)


def test_one_wrong_element_fails(dtype: torch.dtype) -> None:
    exact = torch.randn(1_000_000, dtype=torch.float64)
    eager = exact.to(dtype)
    fused = eager.clone()
    fused[-1] += fused[-1].sign() * (fused[-1].abs() + 1)
    with pytest.raises(AssertionError, match="_error"):
        assert_as_accurate("one", fused, eager, exact)


@pytest.mark.parametrize("which", range(3))
def test_nan_fails_wherever_it_is(which: int) -> None:
    results = [torch.ones(3), torch.ones(3), torch.ones(3, dtype=torch.float64)]
    results[which][1] = math.nan
    with pytest.raises(AssertionError, match="NaN"):
        assert_as_accurate("nan", results[0], results[1], results[2])


def test_infinity_fails() -> None:
    fused = torch.tensor([1.0, math.inf])
    with pytest.raises(AssertionError):
        assert_as_accurate("inf", fused, torch.ones(2), torch.ones(2, dtype=torch.float64))


def test_shape_and_dtype_must_agree() -> None:
    exact = torch.ones(3, dtype=torch.float64)
    with pytest.raises(AssertionError, match="shapes"):
        assert_as_accurate("shape", torch.ones(1), torch.ones(3), exact)
    with pytest.raises(AssertionError, match="dtypes"):
        assert_as_accurate("dtype", torch.ones(3).bfloat16(), torch.ones(3), exact)
    with pytest.raises(AssertionError, match=r"exact result is torch\.float32"):
        assert_as_accurate("exact", torch.ones(3), torch.ones(3), torch.ones(3))


def test_an_exact_zero_must_be_met() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    assert relative_error(torch.zeros(3), zero) == element_error(torch.zeros(3), zero) == 0
    assert (
        relative_error(torch.full((3,), 1e-9), zero)
        == element_error(torch.full((3,), 1e-9), zero)
        == math.inf
    )
    with pytest.raises(AssertionError):
        assert_as_accurate("zero", torch.full((3,), 1e-9), torch.zeros(3), zero)


def test_memory_is_poisoned() -> None:
    assert torch.empty(5).isnan().all()
    assert torch.empty_like(torch.ones(2, dtype=torch.bfloat16)).isnan().all()
    assert (torch.empty(3, dtype=torch.uint8) == 255).all()


@pytest.mark.parametrize(("bad_draws", "passes"), [(0, True), (1, True), (3, True), (4, False)])
def test_one_of_four_draws_has_to_be_accurate(bad_draws: int, passes: bool) -> None:
    draws = 0

    @in_some_draw
    def drawn() -> None:
        nonlocal draws
        draws += 1
        exact = torch.ones(3, dtype=torch.float64)
        assert_as_accurate("drawn", exact.float() + (draws <= bad_draws), exact.float(), exact)

    if passes:
        drawn()
    else:
        with pytest.raises(Inaccurate, match="drawn: relative_error"):
            drawn()
    assert draws == min(bad_draws + 1, 4)


def test_other_failures_are_not_drawn_again() -> None:
    @in_some_draw
    def wrong() -> None:
        assert not calls, "called again"
        calls.append(1)
        raise AssertionError("wrong shape")

    calls: list[int] = []
    with pytest.raises(AssertionError, match="wrong shape"):
        wrong()

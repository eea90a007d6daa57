"""Every fused op, native and by its reference, forward and all gradients: accuracy on plain and hostile inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import resnet_fused
from resnet_fused.accuracy import element_error, relative_error
from resnet_fused.layout import dense, is_channels_last, memory_format
from resnet_fused.ops.bn_stats import batch_norm_stats
from tests.accuracy import HOSTILE_CASES, LAYOUTS, Case, Results, assert_accurate, hostile_input
from tests.ops.steps import (
    OTHERS,
    STEMS,
    Step,
    autograd_step,
    eager_step,
    exact_step,
    functional,
    make_step,
)

EPS = torch.finfo(torch.float32).eps
both_modes = pytest.mark.parametrize("frozen", [False, True], ids=["train", "eval"])
every_op = pytest.mark.parametrize("stem", STEMS)
on_backends = pytest.mark.parametrize("backend", ["auto", "reference"])
# In these, float64 itself loses digits: to |mean|/std, or to a gradient that cancels but for eps.
WELL_CONDITIONED = [name for name in HOSTILE_CASES if name not in ("mean", "two_values", "constant_channel")]


def step_by(backend: str, step: Step) -> Results:
    with resnet_fused.backend(backend):
        results = autograd_step(functional, step)
    assert results["out"].is_contiguous(memory_format=memory_format(dense(step.y)))
    return results


def check(make: Callable[[], Step], backend: str = "auto") -> None:
    def draw() -> tuple[Results, Results, Results]:
        step = make()
        return step_by(backend, step), eager_step(step), exact_step(step)

    assert_accurate(draw)


@both_modes
@pytest.mark.parametrize("name", HOSTILE_CASES)
@every_op
@on_backends
def test_accuracy(
    backend: str, stem: str, name: str, frozen: bool, dtype: torch.dtype, layout: str, device: str
) -> None:
    check(lambda: make_step(stem, hostile_input(name, dtype, layout, device), frozen), backend)


def assert_equals_autograd(backend: str, step: Step) -> None:
    """In float64, where all is right but for rounding."""
    results, expected = step_by(backend, step), eager_step(step)
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        assert results[name].shape == value.shape and results[name].dtype == torch.float64, name
        assert relative_error(results[name], value) < 1e-12, name
        assert element_error(results[name], value) < 1e-12, name


@both_modes
@pytest.mark.parametrize("name", WELL_CONDITIONED)
@every_op
@on_backends
def test_equals_autograd_in_float64(backend: str, stem: str, name: str, frozen: bool, layout: str) -> None:
    assert_equals_autograd(backend, make_step(stem, hostile_input(name, torch.float64, layout), frozen))


@both_modes
@every_op
@on_backends
def test_weight_and_bias_may_be_none(backend: str, stem: str, frozen: bool, layout: str) -> None:
    case = hostile_input("plain", torch.float64, layout)
    assert_equals_autograd(backend, make_step(stem, case, frozen, affine=False))


@pytest.mark.parametrize(("frozen", "skip_frozen"), [(True, False), (False, True)])
@on_backends
def test_one_of_two_batch_norms_may_be_frozen(backend: str, frozen: bool, skip_frozen: bool) -> None:
    case = hostile_input("plain", torch.float64, "channels_last")
    assert_equals_autograd(backend, make_step("bn_bn_add_relu", case, frozen, skip_frozen))


@pytest.mark.parametrize("name", ["plain", "odd_size", "sliced", "sliced_channels", "permuted"])
@every_op
@on_backends
def test_results_have_the_layout_of_y(
    backend: str, stem: str, name: str, dtype: torch.dtype, layout: str
) -> None:
    """Whatever the layouts of the other activations are."""
    opposite = {"contiguous": "channels_last", "channels_last": "contiguous"}[layout]
    case = hostile_input(name, dtype, layout)
    others = hostile_input("odd_size" if name == "odd_size" else "plain", dtype, opposite)
    case.residual, case.skip, case.grad = others.residual, others.skip, others.grad
    step = make_step(stem, case)
    y, results, exact = dense(step.y), step_by(backend, step), exact_step(step)
    assert is_channels_last(y) == (layout == "channels_last")
    for result in {"out", "dy", "dresidual", "dskip"} & results.keys():
        x = results[result]
        assert x.dtype == dtype
        assert x.stride() == y.stride() or x.shape != y.shape, result
        assert is_channels_last(x) == is_channels_last(y), result
        assert relative_error(x, exact[result]) < 4 * torch.finfo(dtype).eps, result


@on_backends
def test_statistics_keep_their_digits_far_from_zero(backend: str, layout: str) -> None:
    x = hostile_input("mean", torch.float32, layout).y * 10 + 5e4
    with resnet_fused.backend(backend):
        mean, var, invstd = batch_norm_stats(x, 1e-5)
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert relative_error(mean, exact_mean) < 2 * EPS
    assert relative_error(var, exact_var) < 4 * EPS
    assert relative_error(invstd, torch.rsqrt(exact_var + 1e-5)) < 4 * EPS


@on_backends
def test_statistics_of_many_tasks(backend: str, layout: str) -> None:
    """Of several parts of different sizes, whose means differ: a merge by wrong counts would show."""
    x = torch.randn(7, 5, 61, 57, dtype=torch.float64).cumsum(2).contiguous(memory_format=LAYOUTS[layout])
    with resnet_fused.backend(backend):
        mean, var, _ = batch_norm_stats(x, 1e-5)
    exact_var, exact_mean = torch.var_mean(x, (0, 2, 3), correction=0)
    assert relative_error(mean, exact_mean) < 1e-12
    assert relative_error(var, exact_var) < 1e-12


@pytest.mark.parametrize("value", [0.1, 1e3, -7.7e4, 0.0])
@on_backends
def test_a_constant_channel_has_no_variance(backend: str, value: float, layout: str) -> None:
    x = hostile_input("odd_size", torch.float32, layout).y
    x[:, 3] = value
    with resnet_fused.backend(backend):
        mean, var, invstd = batch_norm_stats(x, 1e-5)
    assert mean[3] == x[0, 3, 0, 0]
    assert var[3] == 0
    assert invstd[3].item() == pytest.approx(1e-5**-0.5, rel=1e-6)


@every_op
def test_many_pixels(stem: str) -> None:
    """100,000 pixels per channel with a mean far from zero: sums in float32 without compensation would fail here."""

    def make() -> Step:
        y, skip, residual, grad = (
            torch.randn(2, 8, 224, 224).to(memory_format=torch.channels_last) for _ in range(4)
        )
        vectors = [torch.rand(8) + 0.5, torch.randn(8), torch.rand(8) + 0.5, torch.randn(8)]
        return make_step(stem, Case("many", y + 100, *vectors[:2], residual, skip + 100, *vectors[2:], grad))

    check(make)


@both_modes
@every_op
def test_gradcheck(stem: str, frozen: bool, layout: str) -> None:
    step = make_step(stem, hostile_input("odd_size", torch.float64, layout), frozen)
    inputs = [step.y, step.norm.weight, step.norm.bias]
    if stem in OTHERS:
        inputs.append(step.other)
    if stem == "bn_bn_add_relu":
        inputs += [step.skip_norm.weight, step.skip_norm.bias]

    def call(y: Tensor, weight: Tensor, bias: Tensor, other: Tensor = step.other, *skip: Tensor) -> Tensor:
        norms = [
            replace(
                norm,
                weight=w,
                bias=b,
                running_mean=norm.running_mean.clone(),
                running_var=norm.running_var.clone(),
            )
            for norm, (w, b) in ((step.norm, (weight, bias)), (step.skip_norm, skip or (None, None)))
        ]
        return functional(stem, y, norms[0], other, norms[1])

    leaves = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs if x is not None]
    assert len(leaves) == len(inputs)
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@every_op
@on_backends
def test_nan_goes_through_as_in_eager(backend: str, stem: str, layout: str) -> None:
    """As are the gradients that pass a NaN, which a max-pool takes for the maximum."""
    step = make_step(stem, hostile_input("plain", torch.float64, layout), frozen=True)
    step.y[1, 3, 2, 5] = step.y[1, 2, 3, 4] = step.y[1, 2, 4, 4] = step.y[0, 0, 0, 0] = torch.nan
    by_fused, by_eager = step_by(backend, step), eager_step(step)
    assert by_eager["out"].isnan().any()
    for name in ("out", "dy"):
        torch.testing.assert_close(by_fused[name], by_eager[name], rtol=1e-12, atol=1e-12, equal_nan=True)

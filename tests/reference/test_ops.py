"""Every primitive of the reference against autograd through plain PyTorch."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_fused.layout import dense, is_channels_last, unpack_mask
from tests.accuracy import (
    HOSTILE_CASES,
    LAYOUTS,
    element_error,
    hostile_input,
    relative_error,
)
from tests.reference.steps import REFERENCE, STEMS, eager_step, exact_step, fused_step, make_step

# In these, float64 itself loses digits: to |mean|/std, or to a gradient that cancels but for eps.
_ILL_CONDITIONED = ("mean", "two_values", "constant_channel")
_WELL_CONDITIONED = [name for name in HOSTILE_CASES if name not in _ILL_CONDITIONED]


def assert_exact(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].shape == expected[name].shape, name
        assert found[name].dtype == torch.float64, name
        assert relative_error(found[name], expected[name]) < 1e-12, name
        assert element_error(found[name], expected[name]) < 1e-12, name


@pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen"])
@pytest.mark.parametrize("name", _WELL_CONDITIONED)
@pytest.mark.parametrize("stem", STEMS)
def test_equals_autograd_in_float64(stem: str, name: str, frozen: bool, layout: str) -> None:
    step = make_step(stem, hostile_input(name, torch.float64, layout), frozen)
    assert_exact(fused_step(REFERENCE, step), eager_step(step))


@pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen"])
@pytest.mark.parametrize("stem", STEMS)
def test_weight_and_bias_may_be_none(stem: str, frozen: bool, layout: str) -> None:
    step = make_step(stem, hostile_input("plain", torch.float64, layout), frozen, affine=False)
    found = fused_step(REFERENCE, step)
    assert "dweight" not in found
    assert_exact(found, eager_step(step))


@pytest.mark.parametrize(("frozen", "skip_frozen"), [(True, False), (False, True)])
def test_one_of_two_batch_norms_may_be_frozen(frozen: bool, skip_frozen: bool) -> None:
    case = hostile_input("plain", torch.float64, "channels_last")
    step = make_step("bn_bn_add_relu", case, frozen, skip_frozen)
    assert_exact(fused_step(REFERENCE, step), eager_step(step))


@pytest.mark.parametrize("name", ["plain", "odd_size", "sliced", "sliced_channels", "permuted"])
@pytest.mark.parametrize("stem", STEMS)
def test_results_have_the_layout_of_y(stem: str, name: str, dtype: torch.dtype, layout: str) -> None:
    """Whatever the layouts of the other activations are."""
    opposite = {"contiguous": "channels_last", "channels_last": "contiguous"}[layout]
    case = hostile_input(name, dtype, layout)
    others = hostile_input("odd_size" if name == "odd_size" else "plain", dtype, opposite)
    case.residual, case.skip, case.grad = others.residual, others.skip, others.grad
    step = make_step(stem, case)
    y = dense(step.y)
    assert is_channels_last(y) == (layout == "channels_last")
    found = fused_step(REFERENCE, step)
    same = exact_step(step)
    for result in ("out", "dy", "dresidual", "dskip"):
        if result not in found:
            continue
        x = found[result]
        assert x.dtype == dtype
        if x.shape == y.shape:
            assert x.stride() == y.stride(), result
        assert is_channels_last(x) == is_channels_last(y), result
        assert relative_error(x, same[result]) < 4 * torch.finfo(dtype).eps, result


def test_statistics_keep_their_digits_far_from_zero(layout: str) -> None:
    x = hostile_input("mean", torch.float32, layout).y * 10 + 5e4
    mean, var, invstd = REFERENCE.batch_norm_stats(x, 1e-5)
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    eps = torch.finfo(torch.float32).eps
    assert relative_error(mean, exact_mean) < 2 * eps
    assert relative_error(var, exact_var) < 4 * eps
    assert relative_error(invstd, torch.rsqrt(exact_var + 1e-5)) < 4 * eps


@pytest.mark.parametrize("value", [0.1, 1e3, -7.7e4, 0.0])
def test_a_constant_channel_has_no_variance(value: float, layout: str) -> None:
    x = hostile_input("odd_size", torch.float32, layout).y
    x[:, 3] = value
    mean, var, invstd = REFERENCE.batch_norm_stats(x, 1e-5)
    assert mean[3] == x[0, 3, 0, 0]
    assert var[3] == 0
    assert invstd[3].item() == pytest.approx(1e-5**-0.5, rel=1e-6)


@pytest.mark.parametrize("shape", [(0, 5, 4, 3), (2, 5, 0, 3), (2, 5, 3, 0), (2, 0, 3, 3)])
@pytest.mark.parametrize("stem", STEMS)
def test_empty_activations(stem: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    y = torch.zeros(shape, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
    c = shape[1]
    mean, var, invstd = REFERENCE.batch_norm_stats(y, 0.25)
    assert mean.tolist() == var.tolist() == [0.0] * c
    assert invstd.tolist() == [2.0] * c
    affine = (mean, invstd, torch.ones(c), torch.ones(c))
    extra: tuple[Tensor, ...] = {"bn_add_relu": (y,), "bn_bn_add_relu": (y, *affine)}.get(stem, ())
    forward, reduce, backward = (
        getattr(REFERENCE, stem + part) for part in ("", "_backward_reduce", "_backward")
    )
    out, *saved = as_tuple(forward(y, *affine, *extra))
    skip = (y, mean, invstd) if stem == "bn_bn_add_relu" else ()
    sums = as_tuple(reduce(out, *saved, y, *affine[: 4 if stem == "bn_relu" else 2], *skip))
    assert out.numel() == 0 and out.dtype == dtype
    for total in sums:
        assert total.tolist() == [0.0] * c
        assert total.dtype == torch.float32
    parameters = affine[: 4 if stem == "bn_relu" else 3]
    for given in (sums[:2], (None, None)):
        skip_backward = (*skip, None, *given) if skip else ()
        for gradient in as_tuple(backward(out, *saved, y, *parameters, *given, *skip_backward)):
            assert gradient.shape == y.shape and gradient.dtype == dtype


def as_tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else results


def test_only_one_of_two_sums_is_refused() -> None:
    step = make_step("bn_relu", hostile_input("plain", torch.float32, "contiguous"))
    channels = step.y.shape[1]
    vectors = [torch.ones(channels) for _ in range(4)]
    with pytest.raises(ValueError, match="sum_dz and sum_dz_xhat must be given together"):
        REFERENCE.bn_relu_backward(step.grad, step.y, *vectors, torch.ones(channels), None)


@pytest.mark.parametrize(
    ("y", "vector", "error", "message"),
    [
        (torch.ones(2, 3, 4), torch.ones(3), ValueError, r"expected 4D input \(got 3D input\)"),
        (torch.ones(2, 3, 4, 4), torch.ones(1), ValueError, "one element per channel"),
        (torch.ones(2, 3, 4, 4, dtype=torch.int32), torch.ones(3), TypeError, "got torch.int32"),
        (torch.ones(2, 3, 4, 4, dtype=torch.float8_e4m3fn), torch.ones(3), TypeError, "got torch.float8"),
    ],
    ids=["rank", "channels", "integers", "float8"],
)
def test_bad_input(y: Tensor, vector: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        REFERENCE.bn_relu(y, vector, vector, None, None)


def test_nan_passes_as_in_eager() -> None:
    y = hostile_input("plain", torch.float64, "channels_last").y
    y[1, 2, 3, 4] = y[1, 2, 4, 4] = y[0, 0, 0, 0] = math.nan
    ones, zeros = torch.ones(y.shape[1]).double(), torch.zeros(y.shape[1]).double()
    out = REFERENCE.bn_relu(y, zeros, ones, None, None)
    assert torch.equal(out.isnan(), y.isnan())
    _, mask = REFERENCE.bn_add_relu(y, zeros, ones, None, None, torch.zeros_like(y))
    assert unpack_mask(mask, y)[y.isnan()].all()

    leaf = y.clone().requires_grad_()
    pooled = F.max_pool2d(F.relu(leaf), 3, stride=2, padding=1)
    grad = torch.randn_like(pooled)
    (expected,) = torch.autograd.grad(pooled, leaf, grad)
    out, indices = REFERENCE.bn_relu_maxpool(y, zeros, ones, None, None)
    assert torch.equal(out.isnan(), pooled.isnan())
    dy = REFERENCE.bn_relu_maxpool_backward(grad, indices, y, zeros, ones, None, None, None)
    torch.testing.assert_close(dy, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("stem", STEMS)
def test_backward_is_differentiable(stem: str) -> None:
    """What double backward stands on: autograd goes through the explicit backward, the sums among it."""
    step = make_step(stem, hostile_input("odd_size", torch.float64, "channels_last"))

    def backward(y: Tensor, grad: Tensor) -> Tensor:
        return fused_step(REFERENCE, replace(step, y=y, grad=grad))["dy"]

    y, grad = step.y.clone().requires_grad_(), step.grad.clone().requires_grad_()
    assert torch.autograd.gradcheck(backward, (y, grad), fast_mode=True)


def test_every_primitive_is_there() -> None:
    parts = ("", "_backward_reduce", "_backward")
    steps = {stem + part for stem in STEMS for part in parts}
    others = {"bn_add_relu_out", "bn_bn_add_relu_out", "bn_add_relu_backward_dy", "masked_grad"}
    assert set(vars(REFERENCE)) == {"batch_norm_stats"} | steps | others


@pytest.mark.parametrize("name", _WELL_CONDITIONED)
def test_shift_is_subtracted_behind_the_relu(name: str, layout: str) -> None:
    case = hostile_input(name, torch.float64, layout)
    mean, _, invstd = REFERENCE.batch_norm_stats(case.y, 1e-5)
    shift = torch.randn_like(mean)
    affine = (case.y, mean, invstd, case.weight, case.bias)
    shifted = REFERENCE.bn_relu(*affine, shift)
    torch.testing.assert_close(shifted, REFERENCE.bn_relu(*affine) - shift.view(1, -1, 1, 1))
    assert shifted.stride() == dense(case.y).stride()


@pytest.mark.parametrize("name", HOSTILE_CASES)
def test_masked_grad(name: str, dtype: torch.dtype, layout: str) -> None:
    """dresidual of the backward it is a part of, and sum_dz; added, it is rounded once."""
    case = hostile_input(name, dtype, layout)
    mean, _, invstd = REFERENCE.batch_norm_stats(case.y, 1e-5)
    _, mask = REFERENCE.bn_add_relu(case.y, mean, invstd, case.weight, case.bias, case.residual)
    case.grad.masked_fill_(~unpack_mask(mask, dense(case.y)), math.nan)
    backward = (case.grad, mask, case.y, mean, invstd, case.weight, None, None)
    dy, dresidual = REFERENCE.bn_add_relu_backward(*backward)
    assert torch.equal(REFERENCE.bn_add_relu_backward_dy(*backward), dy)

    out, total = torch.empty_like(dense(case.y)), torch.ones(len(mean), dtype=torch.float64)
    REFERENCE.masked_grad(case.grad, mask, out, False, total)
    assert torch.equal(out, dresidual)
    torch.testing.assert_close(total - 1, dresidual.double().sum((0, 2, 3)))
    before = dense(case.residual)
    out.copy_(before)
    REFERENCE.masked_grad(case.grad, mask, out, True, None)
    assert torch.equal(out, (before.double() + dresidual.double()).float().to(dtype))


@pytest.mark.parametrize("stem", ["bn_add_relu", "bn_bn_add_relu"])
def test_results_go_into_given_tensors(stem: str, dtype: torch.dtype, layout: str) -> None:
    case = hostile_input("odd_size", dtype, layout)
    affine = (*REFERENCE.batch_norm_stats(case.y, 1e-5)[::2], case.weight, case.bias)
    args = (case.y, *affine, case.residual, *(affine if stem == "bn_bn_add_relu" else ()))
    expected, expected_mask = getattr(REFERENCE, stem)(*args)
    out, mask = torch.empty_like(expected), torch.empty_like(expected_mask)
    into = getattr(REFERENCE, f"{stem}_out")
    into(*args, out, mask)
    assert torch.equal(out, expected) and torch.equal(mask, expected_mask)
    with pytest.raises(ValueError, match="out must be dense, in the activation's layout"):
        into(*args, out.transpose(1, 3).contiguous().transpose(1, 3), mask)
    with pytest.raises(ValueError, match="out must be torch"):
        into(*args, out[1:], mask)

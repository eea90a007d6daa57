"""Every fused op and its reference, forward and all gradients, by the accuracy rule, on plain and hostile inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from resnet_fused.layout import dense, memory_format
from tests.accuracy import HOSTILE_CASES, Case, Results, assert_accurate, hostile_input
from tests.reference.steps import (
    OTHERS,
    REFERENCE,
    STEMS,
    Step,
    autograd_step,
    eager_step,
    exact_step,
    functional,
    fused_step,
    make_step,
    plain,
)

IMPLEMENTATIONS = {
    "fused": partial(autograd_step, functional),
    "reference": partial(fused_step, REFERENCE),
}
both_modes = pytest.mark.parametrize("frozen", [False, True], ids=["train", "eval"])
every_op = pytest.mark.parametrize("stem", STEMS)


def check(make: Callable[[], Step], implementation: str = "fused") -> None:
    def draw() -> tuple[Results, Results, Results]:
        step = make()
        found = IMPLEMENTATIONS[implementation](step)
        assert found["out"].is_contiguous(memory_format=memory_format(dense(step.y)))
        return found, eager_step(step), exact_step(step)

    assert_accurate(draw)


@both_modes
@pytest.mark.parametrize("name", HOSTILE_CASES)
@every_op
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_accuracy(
    implementation: str, stem: str, name: str, frozen: bool, dtype: torch.dtype, layout: str, device: str
) -> None:
    check(lambda: make_step(stem, hostile_input(name, dtype, layout, device), frozen), implementation)


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
def test_nan_goes_through_as_in_eager(stem: str, layout: str) -> None:
    step = make_step(stem, hostile_input("plain", torch.float32, layout), frozen=True)
    step.y[1, 3, 2, 5] = torch.nan
    by_fused, by_eager = (
        op(stem, step.y, step.norm, step.other, step.skip_norm) for op in (functional, plain)
    )
    assert by_eager.isnan().any()
    assert torch.equal(by_fused.isnan(), by_eager.isnan())

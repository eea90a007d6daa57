"""The functions of resnet_fused.functional beside eager PyTorch, for whatever hypothesis draws."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.properties.agreement import (
    assert_accurate,
    assert_close_where_finite,
    assert_equal,
    assert_same_kind,
    fails_alike,
    is_decided,
    not_finite_alike,
    outcome,
)
from tests.properties.functional_cases import (
    Call,
    Operands,
    Rounding,
    Run,
    activated,
    calls,
    eager,
    fused,
    in_layout,
    operands_of,
    preactivation,
    widened,
)
from tests.properties.strategies import CHANNELS_LAST, CONTIGUOUS, faults

_FAULTY = ("y", "partner", "grad", "running_mean", "running_var", "weight", "bias")
_faults = faults(st.sampled_from((*_FAULTY, "y", "grad", *(f"skip_{name}" for name in _FAULTY[3:]))))


@given(calls(6_000, st.just(())))
def test_functions_are_as_accurate_as_eager(call: Call) -> None:
    """Fused functions of drawn shapes, strides, dtypes, norms and modes: as accurate as eager PyTorch"""
    operands = operands_of(call)
    theirs = outcome(lambda: Run(call, in_layout(operands, CHANNELS_LAST), eager))
    ours = outcome(lambda: Run(call, operands, fused))
    if fails_alike(ours, theirs):
        return
    if theirs.out.numel() == 0:
        assert_equal(ours.results(theirs.out), theirs.results(theirs.out))
        return
    wide = widened(in_layout(operands, CONTIGUOUS))
    grad = call.grad.place(decided_gradient(call, wide, theirs.out))
    found, by_eager = ours.results(grad), theirs.results(CONTIGUOUS.place(grad))
    assert_same_kind(found, by_eager)
    by_exact = Run(call, wide, eager).results(CONTIGUOUS.place(grad))
    moved = (Run(call, wide, Rounding(call)).results(CONTIGUOUS.place(grad)) for _ in itertools.count())
    assert_accurate(found, by_eager, by_exact, moved, call.dtype)


def decided_gradient(call: Call, wide: Operands, out: Tensor) -> Tensor:
    """A random gradient w.r.t. the output; zero where rounding may decide what a ReLU or a maximum lets through."""

    def copies() -> Operands:  # running statistics are updated
        return {name: value.clone() for name, value in wide.items()}

    with torch.no_grad():
        z = preactivation(call, copies(), F.batch_norm)
        decided = _decided(call, z, preactivation(call, copies(), Rounding(call).batch_norm))
    for axis in call.grad.expanded:
        decided = decided.amin(axis, keepdim=True)
    grad = torch.randn(out.shape).to(out.dtype)
    for fault in call.faults:
        if fault.operand == "grad":
            fault.put_into(grad)
    return torch.where(decided, grad, 0)


def _decided(call: Call, z: Tensor, moved: Tensor) -> Tensor:
    if call.op != "bn_relu_maxpool":
        return is_decided(z, moved)
    n, c, height, width = activated(call, z).shape
    largest = []
    for x in (z, moved):
        windows = F.unfold(F.pad(x, (1, 1, 1, 1), value=-1e9), 3, stride=2).view(n, c, 9, -1)
        largest.append(windows[..., : height * width].topk(2, dim=2)[0].unbind(2))
    (first, second), (moved_first, moved_second) = largest
    decided = is_decided(first, moved_first) & is_decided(first - second, moved_first - moved_second)
    return decided.view(n, c, height, width)


@given(calls(1_500, _faults, empty=False))
def test_functions_propagate_what_is_not_finite(call: Call) -> None:
    """Infinite and NaN operands and gradients of fused functions: results are finite exactly where eager's are"""
    operands = operands_of(call)
    theirs = outcome(lambda: Run(call, in_layout(operands, CONTIGUOUS), eager))
    if isinstance(theirs, Exception):
        return  # the test above compares exceptions
    other, ours = Run(call, in_layout(operands, CHANNELS_LAST), eager), Run(call, operands, fused)
    grad = call.grad.place(decided_gradient(call, widened(in_layout(operands, CONTIGUOUS)), theirs.out))
    found = ours.results(grad)
    by_eager = theirs.results(CONTIGUOUS.place(grad)), other.results(CHANNELS_LAST.place(grad))
    assert_same_kind(found, by_eager[0])
    uses_batch = any(norm.training for norm in call.norms.values())
    for name, result in found.items():
        wrong = not_finite_alike(
            result, [each[name] for each in by_eager], sums=uses_batch or "gradient" in name
        )
        wrong &= ~(excepted := _excepted(call, operands, name, result))
        assert not wrong.any(), f"{name}: {result[wrong]} instead of {by_eager[0][name][wrong]}"
        assert_close_where_finite(name, result[~excepted], by_eager[0][name][~excepted])


def _excepted(call: Call, operands: Operands, name: str, result: Tensor) -> Tensor:
    """Where docs/api.md says that results are finite or not for reasons of their own."""
    channels = torch.zeros(call.shape[1], dtype=torch.bool)
    if "running" not in name:
        for weight in ("weight", "skip_weight"):
            if weight in operands:
                channels |= operands[weight].isinf()
    if call.op == "bn_relu_maxpool" and not call.norm.training and name == "weight gradient":
        channels |= ~operands["y"].isfinite().all(3).all(2).all(0) | ~operands["running_mean"].isfinite()
    return (channels.view(-1, 1, 1) if result.dim() == 4 else channels).expand(result.shape)

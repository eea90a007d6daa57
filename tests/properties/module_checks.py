"""What a fused block or model has to have in common with the plain one."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.properties import not_finite
from tests.properties.agreement import (
    Results,
    assert_accurate,
    assert_close_where_finite,
    assert_equal,
    assert_same_kind,
    fails_alike,
    is_decided,
    outcome,
)
from tests.properties.block_cases import Exact, Mode, Run
from tests.properties.strategies import CONTIGUOUS, Fault, Placement

Kernels = Callable[[], contextlib.AbstractContextManager[None]]


def assert_as_accurate(
    fused: nn.Module,
    plain: nn.Module,
    x: Tensor,
    grad_place: Placement,
    mode: Mode,
    frozen: bool,
    kernels: Kernels = contextlib.nullcontext,
) -> None:
    """The same exception, or results as accurate as eager's.

    Args:
        kernels: the context in which the fused one runs.
        frozen: whether norms are FrozenBatchNorm2d.
    """
    untouched = copy.deepcopy(plain)
    theirs = outcome(lambda: Run(plain, CONTIGUOUS.place(x), mode))
    with kernels():
        ours = outcome(lambda: Run(fused, x, mode))
        if fails_alike(ours, theirs):
            return
        grad = _gradient(theirs.out, grad_place)
        found = ours.results(grad)
    grad = grad.contiguous()
    by_eager = theirs.results(grad)
    if frozen and found["output"].dtype == mode.rounds_to:
        # Under autocast one fused op returns autocast's dtype, where torchvision's FrozenBatchNorm2d returns float32.
        by_eager["output"] = by_eager["output"].to(mode.rounds_to)
    assert_same_kind(found, by_eager)
    if theirs.out.numel() == 0:
        assert_equal(found, by_eager)
        return

    def computed(each: Exact) -> Results:
        return each.run(CONTIGUOUS.place(x)).results(grad)

    exact, moved = Exact(untouched, mode, False), Exact(untouched, mode, True)
    by_exact, by_moved = computed(exact), computed(moved)
    if not all(is_decided(*each).all() for each in zip(exact.decisions, moved.decisions, strict=True)):
        for name in [name for name in by_exact if "gradient" in name]:
            # Eager's may not be: without a variance gradients grow by 1 / sqrt(eps), beyond float16.
            assert found[name].isfinite().all() or not by_eager[name].isfinite().all(), name
            del by_exact[name]
    again = (computed(Exact(untouched, mode, True)) for _ in itertools.count())
    assert_accurate(found, by_eager, by_exact, itertools.chain([by_moved], again), mode.rounds_to)


def _gradient(out: Tensor, place: Placement, faults: tuple[Fault, ...] = ()) -> Tensor:
    grad = torch.randn(out.shape).to(out.dtype)
    for fault in faults:
        if fault.operand == "gradient":
            fault.put_into(grad)
    return place.place(grad) if grad.dim() == 4 else grad


def assert_propagates(
    fused: nn.Module,
    plain: nn.Module,
    x: Tensor,
    grad_place: Placement,
    mode: Mode,
    faults: tuple[Fault, ...],
    kernels: Kernels = contextlib.nullcontext,
    pooled: str = "",
) -> None:
    """Results that are finite where plain PyTorch's are, within the bounds of ``not_finite``, and equal there.

    Args:
        pooled: the prefix of the norm before a max-pool. In evaluation the gradient of its weight is a sum over maxima,
            where plain PyTorch's is one over all pixels, of zero times infinity for some (docs/api.md).
    """
    bounds = [copy.deepcopy(plain) for _ in range(2)]
    theirs = outcome(lambda: Run(plain, CONTIGUOUS.place(x), mode))
    if isinstance(theirs, Exception):
        return  # assert_as_accurate compares exceptions
    grad = _gradient(theirs.out, grad_place, faults)
    with kernels():
        found = Run(fused, x, mode).results(grad)
    grad = grad.contiguous()
    by_eager = theirs.results(grad)
    assert_same_kind(found, by_eager)
    least, most = (
        _bounded(module, CONTIGUOUS.place(x), mode, conv2d).results(grad)
        for module, conv2d in zip(bounds, (not_finite.least, not_finite.most), strict=True)
    )
    for name, result in found.items():
        for who, each in (("eager's", by_eager[name]), ("ours", result)):
            assert (~most[name].isfinite() | each.isfinite()).all(), f"{name}: not finite, {who}"
            if name != f"{pooled}.weight gradient":
                assert (least[name].isfinite() | ~each.isfinite()).all(), f"{name}: finite, {who}"
        same = (least[name] - most[name]).abs() <= 1e-12  # a thousandth of what is compared with
        assert_close_where_finite(name, result[same], most[name][same])


def _bounded(plain: nn.Module, x: Tensor, mode: Mode, conv2d: Callable[..., Tensor]) -> Run:
    with mock.patch.object(F, "conv2d", conv2d):
        return Run(plain, x, mode)

"""Every fused op, forward and all gradients, against float64 by the accuracy rule, on plain and hostile inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused import functional as fused
from resnet_fused.layout import dense, memory_format
from resnet_fused.types import BatchNorm
from tests.accuracy import HOSTILE_CASES, Case, assert_as_accurate, hostile_input, in_some_draw

#: Both: fused or plain op of (case's tensors by name, training) to the output, with running statistics updated.
Op = Callable[[dict[str, Tensor], bool], Tensor]

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def plain_norm(t: dict[str, Tensor], training: bool, branch: str = "") -> Tensor:
    y = t["skip" if branch else "y"]
    statistics = t[f"{branch}running_mean"], t[f"{branch}running_var"]
    return F.batch_norm(y, *statistics, t[f"{branch}weight"], t[f"{branch}bias"], training)


def plain_bn_relu(t: dict[str, Tensor], training: bool) -> Tensor:
    return F.relu(plain_norm(t, training))


def plain_bn_add_relu(t: dict[str, Tensor], training: bool) -> Tensor:
    return F.relu(plain_norm(t, training) + t["residual"])


def plain_bn_bn_add_relu(t: dict[str, Tensor], training: bool) -> Tensor:
    return F.relu(plain_norm(t, training) + plain_norm(t, training, "skip_"))


def plain_bn_relu_maxpool(t: dict[str, Tensor], training: bool) -> Tensor:
    return F.max_pool2d(plain_bn_relu(t, training), 3, 2, 1)


def vectors(t: dict[str, Tensor], branch: str = "") -> tuple[Tensor, ...]:
    return tuple(t[f"{branch}{name}"] for name in ("running_mean", "running_var", "weight", "bias"))


def fused_bn_relu(t: dict[str, Tensor], training: bool) -> Tensor:
    return fused.bn_relu(t["y"], *vectors(t), training)


def fused_bn_add_relu(t: dict[str, Tensor], training: bool) -> Tensor:
    return fused.bn_add_relu(t["y"], t["residual"], *vectors(t), training)


def fused_bn_bn_add_relu(t: dict[str, Tensor], training: bool) -> Tensor:
    norms = (BatchNorm(*vectors(t, branch), training, 0.1, 1e-5) for branch in ("", "skip_"))
    return fused.bn_bn_add_relu(t["y"], t["skip"], *norms)


def fused_bn_relu_maxpool(t: dict[str, Tensor], training: bool) -> Tensor:
    return fused.bn_relu_maxpool(t["y"], *vectors(t), training)


#: name: (fused, plain, the differentiable inputs)
OPS: dict[str, tuple[Op, Op, list[str]]] = {
    "bn_relu": (fused_bn_relu, plain_bn_relu, ["y", "weight", "bias"]),
    "bn_add_relu": (fused_bn_add_relu, plain_bn_add_relu, ["y", "weight", "bias", "residual"]),
    "bn_bn_add_relu": (
        fused_bn_bn_add_relu,
        plain_bn_bn_add_relu,
        ["y", "weight", "bias", "skip", "skip_weight", "skip_bias"],
    ),
    "bn_relu_maxpool": (fused_bn_relu_maxpool, plain_bn_relu_maxpool, ["y", "weight", "bias"]),
}


def tensors_of(case: Case, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Fresh tensors of a case with its strides (none of a copy's in float64) and running statistics near its own."""
    found = {}
    for name in ("y", "weight", "bias", "residual", "skip", "skip_weight", "skip_bias"):
        x = getattr(case, name)
        found[name] = (x.detach() if dtype is None else x.to(dtype)).requires_grad_()
    for branch, y in (("", case.y), ("skip_", case.skip)):
        wide = y.double()
        for name, value in (("mean", wide.mean((0, 2, 3)) + 0.1), ("var", wide.var((0, 2, 3)) + 0.1)):
            found[f"{branch}running_{name}"] = value.to(case.weight.dtype).to(dtype or case.weight.dtype)
    return found


def results(
    op: Op, case: Case, names: list[str], grad: Tensor, training: bool, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    tensors = tensors_of(case, dtype)
    out = op(tensors, training)
    grads = torch.autograd.grad(out, [tensors[name] for name in names], grad.to(out.dtype))
    found = {"output": out.detach()} | {f"d{name}": g for name, g in zip(names, grads, strict=True)}
    if training:
        found |= {name: x for name, x in tensors.items() if "running" in name}
    return found


def gradient_for(case: Case, out: Tensor) -> Tensor:
    """A gradient of the output that is zero where rounding alone decides whether the ReLU lets it through."""
    grad = case.grad if out.shape == case.grad.shape else torch.randn_like(out).to(case.y.dtype)
    undecided = (out > -1e-3) & (out < 1e-3) & (out != 0)
    return grad.masked_fill(undecided, 0.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("hostile", HOSTILE_CASES)
@pytest.mark.parametrize("name", OPS)
@in_some_draw
def test_accuracy(
    name: str, hostile: str, training: bool, dtype: torch.dtype, layout: str, device: str
) -> None:
    fused_op, plain_op, names = OPS[name]
    case = hostile_input(hostile, dtype, layout, device)
    exact_output = plain_op(tensors_of(case, torch.float64), training).detach()
    grad = gradient_for(case, exact_output)
    exact = results(plain_op, case, names, grad, training, torch.float64)
    by_eager = results(plain_op, case, names, grad, training, None)
    by_fused = results(fused_op, case, names, grad, training, None)
    for result in exact:
        # Running statistics and parameter gradients are float32 whatever the activations are.
        assert_as_accurate(result, by_fused[result], by_eager[result], exact[result])
    assert by_fused["output"].is_contiguous(memory_format=memory_format(dense(case.y)))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", OPS)
def test_gradcheck(name: str, training: bool, layout: str) -> None:
    fused_op, _, names = OPS[name]
    case = hostile_input("odd_size", torch.float64, layout)
    keep = {
        n: getattr(case, n)[:2, :3, :5, :4] if getattr(case, n).dim() == 4 else getattr(case, n)[:3]
        for n in names
    }
    inputs = [keep[n].clone(memory_format=torch.preserve_format).requires_grad_() for n in names]

    def call(*values: Tensor) -> Tensor:
        tensors = dict(zip(names, values, strict=True))
        for branch in ("", "skip_"):
            tensors[f"{branch}running_mean"] = torch.zeros(3, dtype=torch.float64)
            tensors[f"{branch}running_var"] = torch.ones(3, dtype=torch.float64)
        return fused_op(tensors, training)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("name", OPS)
def test_nan_goes_through_as_in_eager(name: str, layout: str) -> None:
    fused_op, plain_op, _ = OPS[name]
    case = hostile_input("plain", torch.float32, layout)
    case.y.data[1, 3, 2, 5] = torch.nan
    by_fused, by_plain = (op(tensors_of(case), False) for op in (fused_op, plain_op))
    assert by_plain.isnan().any()
    assert torch.equal(by_fused.isnan(), by_plain.isnan())


@pytest.mark.parametrize("name", OPS)
def test_many_pixels(name: str) -> None:
    """200,000 pixels per channel with a mean far from zero: what plain sums of float32 would lose.

    Among so many some ReLUs are decided by rounding, in eager or in fused: the rule is to hold in one of a few draws.
    """
    for last in (False, False, False, False, True):
        try:
            check_many_pixels(name)
        except AssertionError:
            if last:
                raise
        else:
            return


def check_many_pixels(name: str) -> None:
    fused_op, plain_op, names = OPS[name]
    shape = (4, 8, 224, 224)
    make = lambda: (torch.randn(shape) + 100).to(memory_format=torch.channels_last)  # noqa: E731
    small = [torch.rand(8) + 0.5, torch.randn(8), torch.rand(8) + 0.5, torch.randn(8)]
    case = Case(
        "many", make(), small[0], small[1], torch.randn(shape), make(), small[2], small[3], torch.randn(shape)
    )
    exact_output = plain_op(tensors_of(case, torch.float64), True).detach()
    grad = gradient_for(case, exact_output)
    exact = results(plain_op, case, names, grad, True, torch.float64)
    by_eager = results(plain_op, case, names, grad, True, None)
    by_fused = results(fused_op, case, names, grad, True, None)
    for result in exact:
        assert_as_accurate(result, by_fused[result], by_eager[result], exact[result])

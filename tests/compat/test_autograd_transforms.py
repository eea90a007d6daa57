"""Gradients in every way that PyTorch has: of all modes and orders, batched, checkpointed, through torch.func."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    functionalize,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)
from torch.utils.checkpoint import checkpoint

from tests.compat.small_models import (
    NHWC,
    assert_close,
    assert_same,
    every_block,
    every_case,
    gradients_and_buffers,
    images,
    leaf,
    small_pair,
    tiny_block_pair,
    train_only,
)
from tests.model_pairs import assert_equal, nodes


def scalar(block: nn.Module) -> Callable[[Tensor], Tensor]:
    """A loss with derivatives of all orders."""
    return lambda x: block(x).sin().sum()


#: Of norms in training under transforms, which take no change of buffers in place, in eager either.
UNTRACKED = {"track_running_stats": False}


# torch.func and forward-mode AD


@every_block
def test_jvp(kind: str, layout: torch.memory_format, training: bool, downsample: bool) -> None:
    """torch.func.jvp"""
    block = kind, layout, training, downsample
    assert_same(lambda model, x: jvp(model, (x,), (x.cos(),)), block, **UNTRACKED)


@every_block
def test_vjp(kind: str, layout: torch.memory_format, training: bool, downsample: bool) -> None:
    """torch.func.vjp"""

    def of(model: nn.Module, x: Tensor) -> Any:
        out, backward = vjp(model, x)
        return out, backward(out.cos())

    assert_same(of, (kind, layout, training, downsample), **UNTRACKED)


@every_block
@pytest.mark.parametrize("jacobian", [jacrev, jacfwd], ids=["jacrev", "jacfwd"])
def test_jacobians(
    kind: str, layout: torch.memory_format, training: bool, downsample: bool, jacobian: Any
) -> None:
    """torch.func.jacrev, jacfwd"""
    block = kind, layout, training, downsample
    assert_same(lambda model, x: jacobian(lambda y: model(y).sum((2, 3)))(x), block, **UNTRACKED)


@every_block
def test_hessian(kind: str, layout: torch.memory_format, training: bool, downsample: bool) -> None:
    """torch.func.hessian, and Hessian-vector products forward over reverse"""

    def of(model: nn.Module, x: Tensor) -> Any:
        x = x[:2]
        return hessian(scalar(model))(x), jvp(grad(scalar(model)), (x,), (x.cos(),))

    assert_same(of, (kind, layout, training, downsample), **UNTRACKED)


@every_block
def test_nested_grad(kind: str, layout: torch.memory_format, training: bool, downsample: bool) -> None:
    """torch.func.grad, and grad of grad"""

    def of(model: nn.Module, x: Tensor) -> Any:
        slope = grad(scalar(model))
        return grad_and_value(scalar(model))(x), grad(lambda y: slope(y).square().sum())(x)

    assert_same(of, (kind, layout, training, downsample), **UNTRACKED)


@every_block
def test_linearize(kind: str, layout: torch.memory_format, training: bool, downsample: bool) -> None:
    """torch.func.linearize, functionalize"""

    def of(model: nn.Module, x: Tensor) -> Any:
        out, tangent = linearize(model.requires_grad_(False), x)  # in eager too it refuses trained parameters
        return out, tangent(x.cos()), functionalize(model)(x)

    assert_same(of, (kind, layout, training, downsample), **UNTRACKED)


@every_block
def test_forward_mode(kind: str, layout: torch.memory_format, training: bool, downsample: bool) -> None:
    """Forward-mode AD: dual tensors, also through a backward"""

    def of(model: nn.Module, x: Tensor) -> Any:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(leaf(x), x.cos())
            out = model(dual)
            (gradient,) = torch.autograd.grad(out.sin().sum(), dual)
            through = forward_ad.unpack_dual(out).tangent, forward_ad.unpack_dual(gradient).tangent
        inputs = leaf(x)
        out = model(inputs)
        with forward_ad.dual_level():
            # The forward knew of no tangent.
            dual = forward_ad.make_dual(out.detach().cos(), out.detach().sin())
            (gradient,) = torch.autograd.grad(out, inputs, dual)
            return *through, forward_ad.unpack_dual(gradient).tangent

    assert_same(of, (kind, layout, training, downsample))


@every_block
def test_vmap(kind: str, layout: torch.memory_format, training: bool, downsample: bool) -> None:
    """torch.vmap over images, and over batches"""

    def of(model: nn.Module, x: Tensor) -> Any:
        batches = torch.stack([x, x.cos()])
        return vmap(lambda image: model(image[None])[0])(x), vmap(model, randomness="error")(batches)

    assert_same(of, (kind, layout, training, downsample), **UNTRACKED if training else {})


@every_block
def test_ensembles(kind: str, layout: torch.memory_format, training: bool, downsample: bool) -> None:
    """Ensembles: vmap over stack_module_state"""
    norms = UNTRACKED if training else {}
    members = [tiny_block_pair(kind, layout, training, downsample, **norms) for _ in range(3)]
    x = members[0][-1]
    for models in zip(*(member[:2] for member in members), strict=True):
        state = stack_module_state(list(models))
        skeleton = copy.deepcopy(models[0]).to("meta")
        run = functools.partial(functional_call, skeleton)
        by_vmap = vmap(lambda values, buffers, y, run=run: run((values, buffers), (y,)), (0, 0, None))
        assert_close(by_vmap(*state, x), torch.stack([eager(x) for _, eager, _ in members]))


@every_block
def test_per_sample_gradients(
    kind: str, layout: torch.memory_format, training: bool, downsample: bool
) -> None:
    """Per-sample gradients: vmap over grad of functional_call"""
    norms = UNTRACKED if training else {}

    def of(model: nn.Module, x: Tensor) -> Any:
        def loss(values: dict[str, Tensor], image: Tensor) -> Tensor:
            return functional_call(model, values, (image[None],)).sin().sum()

        values = {name: p.detach() for name, p in model.named_parameters()}
        return vmap(grad(loss), (None, 0))(values, x), vmap(grad(lambda i: loss(values, i)))(x)

    assert_same(of, (kind, layout, training, downsample), **norms)


@every_case
def test_functional_call(kind: str, layout: torch.memory_format) -> None:
    """torch.func.functional_call with other parameters and buffers, and grad of it"""
    x, found = images(layout), []
    pair = small_pair(kind, layout)
    values = {name: p.detach() + 0.1 for name, p in pair[1].named_parameters()}
    for model in pair:
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        before = {name: b.clone() for name, b in buffers.items()}
        leaves = {name: v.clone().requires_grad_() for name, v in values.items()}
        out = functional_call(model, (leaves, buffers), (x,))
        assert ("_ResidualBlockBackward" in nodes(out)) == (model is pair[0] and layout is NHWC)
        gradients = torch.autograd.grad(F.cross_entropy(out, torch.arange(3)), list(leaves.values()))

        def loss(values: dict[str, Tensor], model: nn.Module = model, before: Any = before) -> Tensor:
            copies = {name: b.clone() for name, b in before.items()}
            return F.cross_entropy(functional_call(model, (values, copies), (x,)), torch.arange(3))

        by_grad = grad(loss)(values)
        names = [f"{name} gradient" for name in values]
        found.append({"output": out.detach()} | dict(zip(names, gradients, strict=True)))
        found.append({"output": out.detach()} | dict(zip(names, by_grad.values(), strict=True)))
        for each in found[-2:]:
            each |= {name: b.double() for name, b in buffers.items()}
    for other in found[1:]:
        assert_equal(other, found[0])


# Batched gradients


@every_block
@pytest.mark.parametrize("create_graph", [False, True])
def test_batched_gradients(
    kind: str, layout: torch.memory_format, training: bool, downsample: bool, create_graph: bool
) -> None:
    """Batched gradients of a fused forward: is_grads_batched, vmap over autograd.grad"""

    def of(model: nn.Module, x: Tensor) -> Any:
        x = leaf(x)
        out = model(x)
        directions = torch.stack([out.detach().cos(), out.detach().sin()])
        options: dict[str, Any] = {"retain_graph": True, "create_graph": create_graph}
        (batched,) = torch.autograd.grad(out, x, directions, is_grads_batched=True, **options)
        by_vmap = vmap(lambda v: torch.autograd.grad(out, x, v, retain_graph=True)[0])(directions)
        assert_close(batched.detach(), by_vmap)
        return torch.autograd.grad(batched.sin().sum(), x)[0] if create_graph else batched

    assert_same(of, (kind, layout, training, downsample))


@every_block
def test_autograd_functional(
    kind: str, layout: torch.memory_format, training: bool, downsample: bool
) -> None:
    """torch.autograd.functional: jacobian (also vectorized), hessian, jvp, vhp"""

    def of(model: nn.Module, x: Tensor) -> Any:
        api, x = torch.autograd.functional, x[:2]
        return (
            api.jacobian(lambda y: model(y).sum((2, 3)), x),
            api.jacobian(lambda y: model(y).sum((2, 3)), x, vectorize=True),
            api.jacobian(lambda y: model(y).sum((2, 3)), x, vectorize=True, strategy="forward-mode"),
            api.hessian(scalar(model), x),
            api.jvp(model, x, x.cos()),
            api.vhp(scalar(model), x, x.cos()),
        )

    assert_same(of, (kind, layout, training, downsample), **UNTRACKED)


# Gradients of gradients


@every_block
def test_gradcheck(kind: str, layout: torch.memory_format, training: bool, downsample: bool) -> None:
    """gradcheck (with forward mode and batches) and gradgradcheck"""
    block, _, x = tiny_block_pair(kind, layout, training, downsample)
    names, values = zip(*block.named_parameters(), strict=True)

    def call(x: Tensor, *values: Tensor) -> Tensor:
        state = dict(zip(names, values, strict=True)) | {n: b.clone() for n, b in block.named_buffers()}
        out: Tensor = functional_call(block, state, (x,))
        return out

    operands = leaf(x), *map(leaf, values)
    modes = {"check_batched_grad": True, "fast_mode": True}
    assert torch.autograd.gradcheck(call, operands, check_forward_ad=True, **modes)
    assert torch.autograd.gradgradcheck(call, operands, **modes)


class _PlainNorm(nn.Module):
    """Batch norm as arithmetic: the third derivative of F.batch_norm in training is wrong in PyTorch itself."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.eps, self.weight, self.bias, self.counted = norm.eps, norm.weight, norm.bias, norm.training
        self.mean, self.var = norm.running_mean, norm.running_var

    def forward(self, y: Tensor) -> Tensor:
        mean, var = self.mean.view(-1, 1, 1), self.var.view(-1, 1, 1)
        if self.counted:
            mean = y.mean((0, 2, 3), keepdim=True)
            var = (y - mean).square().mean((0, 2, 3), keepdim=True)
        xhat = (y - mean) * (var + self.eps).rsqrt()
        return xhat * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


@every_block
def test_third_derivatives(kind: str, layout: torch.memory_format, training: bool, downsample: bool) -> None:
    """Double backward, and third derivatives, of inputs and parameters"""
    fused, eager, x = tiny_block_pair(kind, layout, training, downsample)
    for owner, name in [(eager, "bn1"), (eager, "bn2"), (eager, "bn3"), (eager.downsample, "1")]:
        if hasattr(owner, name):
            setattr(owner, name, _PlainNorm(getattr(owner, name)))
    by_model = []
    for model in (fused, eager):
        leaves = [leaf(x), *model.parameters()]
        loss, found = model(leaves[0]).sin().sum(), []
        for order in range(3):
            found.append(torch.autograd.grad(loss, leaves, create_graph=order < 2))
            loss = sum(g.sin().sum() for g in found[-1])
        by_model.append(found)
    for ours, theirs in zip(*by_model, strict=True):
        largest = max(float(g.norm()) for g in theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert float((a - b).norm()) <= 1e-9 * largest


@every_case
def test_gradient_penalty(kind: str, layout: torch.memory_format) -> None:
    """A gradient penalty: double backward of a whole model"""
    x, found = images(layout), []
    for model in small_pair(kind, layout):
        inputs = leaf(x)
        (slope,) = torch.autograd.grad(model(inputs).square().sum(), inputs, create_graph=True)
        slope.square().sum().backward()
        found.append({"input gradient": inputs.grad, **gradients_and_buffers(model)})
    assert_equal(*found)


@every_block
@pytest.mark.parametrize("trained", ["conv1", "bn1.bias", "bn2.weight", "conv2", "downsample", "input"])
def test_double_backward_of_some(
    kind: str, layout: torch.memory_format, training: bool, downsample: bool, trained: str
) -> None:
    """Double backward where most parameters are frozen"""
    if trained == "downsample" and not downsample:
        trained = "bn"  # all norms

    def of(model: nn.Module, x: Tensor) -> Any:
        train_only(model, trained)
        leaves = [p for p in model.parameters() if p.requires_grad] or [leaf(x)]
        out = model(leaves[0] if trained == "input" else x)
        slopes = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in slopes), leaves)

    assert_same(of, (kind, layout, training, downsample))


@every_block
def test_double_backward_of_checkpoints(
    kind: str, layout: torch.memory_format, training: bool, downsample: bool
) -> None:
    """Double backward through activation checkpointing and save_on_cpu"""

    def of(model: nn.Module, x: Tensor) -> Any:
        leaves = [leaf(x), *model.parameters()]
        found = []
        for context in (contextlib.nullcontext(), torch.autograd.graph.save_on_cpu()):
            with context:
                checkpoints = isinstance(context, contextlib.nullcontext)
                run = (
                    functools.partial(checkpoint, use_reentrant=False) if checkpoints else nn.Module.__call__
                )
                out = run(model, leaves[0])
            (slope,) = torch.autograd.grad(out.sin().sum(), leaves[:1], create_graph=True)
            found += torch.autograd.grad(slope.sin().sum(), leaves, materialize_grads=True)
        return found

    assert_same(of, (kind, layout, training, downsample))

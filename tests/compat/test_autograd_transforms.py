"""Gradients in every way that PyTorch has: of all modes and orders, batched, checkpointed, through torch.func."""

from __future__ import annotations

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
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

from tests.compat.small_models import NHWC, every_case, images, small_pair, tiny_block_pair
from tests.model_pairs import assert_equal, nodes

both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
with_and_without = pytest.mark.parametrize("downsample", [False, True], ids=["identity", "downsample"])


def every_block(test: Callable[..., None]) -> Callable[..., None]:
    """Tiny blocks of all kinds, layouts, modes, and shortcuts."""
    return every_case(both_modes(with_and_without(test)))


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone(memory_format=torch.preserve_format).requires_grad_()


def assert_close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def assert_same(of: Callable[[nn.Module, Tensor], Any], block: tuple[Any, ...], **norms: Any) -> None:
    """Compares what ``of`` computes with a block and its reference."""
    fused, eager, x = tiny_block_pair(*block, **norms)
    assert_close(of(fused, x), of(eager, x))


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


# Checkpointing and saved tensors


def gradients_and_buffers(model: nn.Module) -> dict[str, Tensor]:
    found = {f"{name} gradient": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: b.double() for name, b in model.named_buffers()}


def save_convolutions(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if "conv" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE


WAYS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "reentrant": lambda block, x: checkpoint(block, x, use_reentrant=True),
    "not reentrant": lambda block, x: checkpoint(block, x, use_reentrant=False),
    "sequential": lambda block, x: checkpoint_sequential([block, nn.Identity()], 2, x, use_reentrant=False),
    "selective": lambda block, x: checkpoint(
        block,
        x,
        use_reentrant=False,
        context_fn=functools.partial(create_selective_checkpoint_contexts, save_convolutions),
    ),
}


@every_block
@pytest.mark.parametrize("way", WAYS)
def test_checkpointing(
    kind: str, layout: torch.memory_format, training: bool, downsample: bool, way: str
) -> None:
    """Activation checkpointing, reentrant or not, sequential, selective; statistics are updated as eager's

    Twice: a recomputation ends as soon as all is saved again, by then eager has updated them.
    """
    found = []
    fused, eager, x = tiny_block_pair(kind, layout, training, downsample)
    for block in (fused, eager):
        inputs = leaf(x)
        WAYS[way](block, inputs).sin().sum().backward()
        assert block.bn1.num_batches_tracked == 2 * training
        found.append(gradients_and_buffers(block) | {"input gradient": inputs.grad})
    assert_equal(*found)


@every_case
def test_checkpointing_under_autocast_recomputes_the_same(kind: str, layout: torch.memory_format) -> None:
    """Activation checkpointing under autocast: bit for bit as without

    In the dtype of the first pass.
    """
    fused, _, x = tiny_block_pair(kind, layout)
    fused.float()
    found: list[list[Tensor]] = []
    for wrapped in (False, True):
        fused.zero_grad()
        inputs = leaf(x.float())
        with torch.autocast("cpu", torch.bfloat16):
            out = checkpoint(fused, inputs, use_reentrant=False) if wrapped else fused(inputs)
        assert out.dtype == torch.bfloat16
        out.backward(out.detach().cos())
        found.append([out, inputs.grad, *(p.grad.clone() for p in fused.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@every_block
def test_save_on_cpu(kind: str, layout: torch.memory_format, training: bool, downsample: bool) -> None:
    """torch.autograd.graph.save_on_cpu, saved_tensors_hooks"""

    def of(model: nn.Module, x: Tensor) -> Any:
        found, packed = [], []  # type: ignore[var-annotated]
        for hooks in (torch.autograd.graph.save_on_cpu(), numpy_hooks(packed)):
            inputs = leaf(x)
            with hooks:
                out = model(inputs)
            found += torch.autograd.grad(out.sin().sum(), [inputs, *model.parameters()])
        assert packed
        return found

    assert_same(of, (kind, layout, training, downsample))


def numpy_hooks(packed: list[Tensor]) -> torch.autograd.graph.saved_tensors_hooks:
    """Saves everything as arrays."""

    def pack(t: Tensor) -> Any:
        packed.append(t)
        return t.detach().numpy().copy()

    return torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy)


# How backward is called


@every_case
def test_two_forwards_before_one_backward(kind: str, layout: torch.memory_format) -> None:
    """Two forwards before one backward"""
    first, second, found = images(layout), images(layout), []
    for model in small_pair(kind, layout):
        (model(first).square().sum() + model(second).sum()).backward()
        found.append(gradients_and_buffers(model))
    assert_equal(*found)


@every_block
def test_retain_graph(kind: str, layout: torch.memory_format, training: bool, downsample: bool) -> None:
    """retain_graph: three times backward through one forward, with anomaly detection too"""

    def of(model: nn.Module, x: Tensor) -> Any:
        x = leaf(x)
        with torch.autograd.detect_anomaly():
            out = model(x)
            out.sin().sum().backward(retain_graph=True)
        out.cos().sum().backward(retain_graph=True)
        out.square().sum().backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            out.sum().backward()
        return [x.grad, *(p.grad for p in model.parameters())]

    with pytest.warns(UserWarning, match="Anomaly Detection"):
        assert_same(of, (kind, layout, training, downsample))


@every_block
def test_backward_with_inputs(
    kind: str, layout: torch.memory_format, training: bool, downsample: bool
) -> None:
    """backward(inputs=...), autograd.grad with allow_unused and materialize_grads"""

    def of(model: nn.Module, x: Tensor) -> Any:
        x, spare = leaf(x), torch.ones(2, dtype=x.dtype, requires_grad=True)
        out = model(x)
        out.sin().sum().backward(inputs=[model.conv2.weight, model.bn1.bias], retain_graph=True)
        assert x.grad is None and model.conv1.weight.grad is None
        found = [model.conv2.weight.grad, model.bn1.bias.grad]
        loss = out.cos().sum()
        used, unused = torch.autograd.grad(loss, [x, spare], retain_graph=True, allow_unused=True)
        assert unused is None
        with pytest.raises(RuntimeError, match="appears to not have been used"):
            torch.autograd.grad(loss, [x, spare], retain_graph=True)
        return [*found, used, *torch.autograd.grad(loss, [model.bn2.weight, spare], materialize_grads=True)]

    assert_same(of, (kind, layout, training, downsample))


@every_block
@pytest.mark.parametrize("trained", ["conv1", "bn1.bias", "bn2.weight", "conv2", "downsample", "input"])
def test_frozen_parameters(
    kind: str, layout: torch.memory_format, training: bool, downsample: bool, trained: str
) -> None:
    """Gradients of some parameters alone, or of the input alone"""
    if trained == "downsample" and not downsample:
        pytest.skip("the block has no such parameter")

    def of(model: nn.Module, x: Tensor) -> Any:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(trained))
        x = leaf(x).requires_grad_(trained == "input")
        model(x).sin().sum().backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        return [t.grad for t in (x, *model.parameters()) if t.requires_grad]

    assert_same(of, (kind, layout, training, downsample))


@every_case
def test_hooks_of_tensors(kind: str, layout: torch.memory_format) -> None:
    """Tensor hooks: register_hook, retain_grad, optimizers in backward (register_post_accumulate_grad_hook)"""

    def step(parameter: Tensor) -> None:
        parameter.data.sub_(parameter.grad, alpha=0.01)

    x, found = images(layout), []
    for model in small_pair(kind, layout):
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        model.layer2[0].conv2.weight.register_hook(lambda g: 2 * g)
        inputs = leaf(x)
        inner = model.layer1(model._stem(inputs))
        inner.retain_grad()
        model.layer2(inner).sin().sum().backward()
        found.append(gradients_and_buffers(model) | {"inner": inner.grad, "input gradient": inputs.grad})
        found[-1] |= {name: p.detach() for name, p in model.named_parameters()}
    assert_equal(*found)


@every_case
def test_modes_without_gradients(kind: str, layout: torch.memory_format) -> None:
    """no_grad and inference_mode between steps of training, in both modes of the model"""
    batches, found = [images(layout) for _ in range(2)], []
    for model in small_pair(kind, layout):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        outputs = {}
        for i, x in enumerate(batches):
            for mode in (torch.no_grad, torch.inference_mode):
                for training in (True, False):
                    with mode():
                        outputs[f"{i} {mode.__name__} {training}"] = model.train(training)(x).clone()
            optimizer.zero_grad()
            F.cross_entropy(model.train()(x), torch.arange(3)).backward()
            optimizer.step()
        with torch.inference_mode():
            made_there = batches[0] * 1
        with torch.no_grad():
            outputs["inference tensor"] = model.eval()(made_there)
        found.append({name: t.clone() for name, t in outputs.items()} | gradients_and_buffers(model))
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            model.train()(made_there)
    assert_equal(*found)


@every_case
def test_a_forward_within_backward_trains_as_eager(kind: str, layout: torch.memory_format) -> None:
    """A forward within backward, as of a hook or a custom Function

    Not a recomputation: it updates statistics.
    """
    x, found = images(layout), []
    for teacher in small_pair(kind, layout):
        y = torch.ones(1, requires_grad=True) * 2
        y.register_hook(lambda g, teacher=teacher: (teacher(x), None)[1])
        y.sum().backward()
        assert teacher.bn1.num_batches_tracked == 1
        found.append(gradients_and_buffers(teacher))
    assert_equal(*found)

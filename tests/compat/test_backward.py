"""Backward in every way that it is called: checkpointed, repeated, for some parameters, with hooks and modes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

from tests.compat.small_models import (
    NHWC,
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


@every_block
def test_tiny_blocks_run_fused(
    kind: str, layout: torch.memory_format, training: bool, downsample: bool
) -> None:
    """What the tests of gradients compare with eager PyTorch is fused"""
    fused, eager, x = tiny_block_pair(kind, layout, training, downsample)
    ops = {"_ResidualBlockBackward"} if layout is NHWC else {"_BnReluBackward"}
    assert ops <= {*nodes(fused(x))} and not ops & {*nodes(eager(x))}


# Checkpointing and saved tensors


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
        trained = "bn"  # all norms

    def of(model: nn.Module, x: Tensor) -> Any:
        train_only(model, trained)
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

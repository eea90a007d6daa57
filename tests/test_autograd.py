"""What autograd promises beside values: memory of gradients, hooks for saved tensors, transforms, changes in place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

import resnet_fused
from resnet_fused import functional
from resnet_fused.types import BatchNorm
from tests.model_pairs import KINDS, assert_equal, block_pair, pair, scrambled

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
F64 = torch.float64


@pytest.fixture(params=LAYOUTS)
def memory_format(request: pytest.FixtureRequest) -> torch.memory_format:
    return LAYOUTS[request.param]


def norm(channels: int, training: bool) -> BatchNorm:
    vectors = [torch.randn(channels, dtype=F64), torch.rand(channels, dtype=F64) + 0.5]
    parameters = [v.clone().requires_grad_() for v in vectors]
    return BatchNorm(*vectors, parameters[1], parameters[0], training, 0.1, 1e-5)


Made = tuple[Callable[..., Tensor], list[Tensor], int]


def function(name: str) -> Callable[[bool], Made]:
    """Of resnet_fused.functional: what to call in a mode, its parameters, and how many activations it takes."""

    def make(training: bool) -> Made:
        n, m = norm(64, training), norm(64, training)
        if name == "bn_bn_add_relu":
            parameters = [n.weight, n.bias, m.weight, m.bias]
            return lambda y, skip: functional.bn_bn_add_relu(y, skip, n, m), parameters, 2
        op = getattr(functional, name)
        return lambda *xs: op(*xs, *n[:7]), [n.weight, n.bias], 2 if name == "bn_add_relu" else 1

    make.__name__ = name
    return make


def block(kind: str, downsample: bool) -> Callable[[bool], Made]:
    def make(training: bool) -> Made:
        fused, _ = block_pair(kind, torch.channels_last, training, downsample)
        return fused, list(fused.parameters()), 1

    make.__name__ = f"{kind}{'_downsample' if downsample else ''}"
    return make


FUNCTIONS = [function(name) for name in ("bn_relu", "bn_relu_maxpool", "bn_add_relu", "bn_bn_add_relu")]
OPS = FUNCTIONS + [
    block(kind, downsample) for kind in ("basic", "bottleneck") for downsample in (False, True)
]
every_op = pytest.mark.parametrize("make", OPS, ids=lambda make: make.__name__)
both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def activations(count: int, memory_format: torch.memory_format) -> list[Tensor]:
    """With as many pixels as channels: strides of another layout fit the shape."""
    made = (torch.randn(3, 64, 8, 8, dtype=F64).to(memory_format=memory_format) for _ in range(count))
    return [x.requires_grad_() for x in made]


def memory_of(tensors: list[Tensor]) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors}


@every_op
@both_modes
def test_no_two_results_of_backward_share_memory(
    make: Any, training: bool, memory_format: torch.memory_format
) -> None:
    """With each other, with what was saved, or with the gradient of the output: a hook may scale one in place."""
    op, parameters, count = make(training)
    inputs = activations(count, memory_format)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = op(*inputs)
    grad_out = torch.randn_like(out)
    grads = torch.autograd.grad(out, [*inputs, *parameters], grad_out)
    assert len(memory_of(list(grads))) == len(grads)
    assert not memory_of(list(grads)) & memory_of([*saved, grad_out, out, *inputs, *parameters])


@every_op
@both_modes
def test_hooks_may_change_the_strides_of_saved_tensors(
    make: Any, training: bool, memory_format: torch.memory_format
) -> None:
    op, parameters, count = make(training)
    inputs = activations(count, memory_format)
    out = op(*inputs)
    grad_out = torch.randn_like(out)
    expected = torch.autograd.grad(out, [*inputs, *parameters], grad_out)
    for pack in (scrambled, lambda t: torch.from_numpy(t.detach().numpy().copy()), scrambled):
        with torch.autograd.graph.saved_tensors_hooks(lambda t, pack=pack: pack(t.detach()), lambda t: t):
            out = op(*inputs)
        for ours, theirs in zip(
            torch.autograd.grad(out, [*inputs, *parameters], grad_out), expected, strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@every_op
def test_tools_that_walk_the_graph_meet_no_none(make: Any, memory_format: torch.memory_format) -> None:
    """torchviz asks every saved tensor for its size."""
    op, _, count = make(True)
    out = op(*activations(count, memory_format))
    todo = [out.grad_fn]
    ours = 0
    while todo:
        node = todo.pop()
        if type(node).__module__.startswith("resnet_fused") or hasattr(node, "layout"):
            ours += 1
            assert all(t.size() is not None for t in node.saved_tensors)
        todo += [parent for parent, _ in node.next_functions if parent is not None]
    assert ours > 0


@every_op
@both_modes
def test_a_bias_may_change_before_backward(
    make: Any, training: bool, memory_format: torch.memory_format
) -> None:
    """Eager does not save it. Weights it does."""
    op, parameters, count = make(training)
    inputs = activations(count, memory_format)
    grads = []
    for change in (False, True):
        out = op(*inputs)
        if change:
            with torch.no_grad():
                for bias in [p for p in parameters if p.dim() == 1][1::2]:
                    bias.sub_(5.0)
        grads.append(torch.autograd.grad(out, [*inputs, *parameters], torch.ones_like(out)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
@both_modes
def test_vectors_need_not_be_contiguous(
    kind: str, training: bool, memory_format: torch.memory_format
) -> None:
    """torch.func.stack_module_state and stacked ensembles hand out such.

    Eager gets contiguous ones: F.batch_norm itself computes wrong gradients from others on channels_last, on a CPU.
    """
    found = []
    x, weights = torch.randn(3, 64, 8, 8, dtype=F64).to(memory_format=memory_format), None
    fused, eager = block_pair(kind, memory_format, training)
    for model in (fused, eager):
        values = {name: v.detach().clone() for name, v in model.state_dict().items() if v.dim() == 1}
        if model is fused:
            values = {name: torch.stack([v, v], -1)[..., 0] for name, v in values.items()}
        leaves = {k: v.requires_grad_() for k, v in values.items() if "running" not in k}
        out = functional_call(model, values | leaves, (x,))
        weights = torch.randn_like(out) if weights is None else weights
        grads = torch.autograd.grad(out, list(leaves.values()), weights)
        found.append({"output": out.detach()} | dict(zip(leaves, grads, strict=True)))
        found[-1] |= {k: v for k, v in values.items() if "running" in k}
    assert_equal(*found)


def gradient_strides(model: nn.Module, x: Tensor, autocast: bool) -> dict[str, tuple[int, ...]]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(x).float().sum()
    names, parameters = zip(*model.named_parameters(), strict=True)
    return {n: g.stride() for n, g in zip(names, torch.autograd.grad(loss, parameters), strict=True)}


@pytest.mark.parametrize("of_input", LAYOUTS)
@pytest.mark.parametrize("arch", KINDS)
def test_gradients_have_the_strides_of_eagers(
    arch: str, of_input: str, memory_format: torch.memory_format, request: pytest.FixtureRequest
) -> None:
    """To the last stride: DistributedDataParallel warns of other strides than its buckets', and is slower.

    Of those that eager's have with several threads: with one, PyTorch runs some 1x1 convolutions without oneDNN.
    """
    request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(2)
    # So that all triples of the four choices occur.
    autocast = (arch == "basic") ^ (of_input == "nhwc") ^ (memory_format is torch.channels_last)
    x = torch.randn(2, 3, 64, 64).to(memory_format=LAYOUTS[of_input])
    fused, eager = (m.to(memory_format=memory_format) for m in pair(arch))
    assert gradient_strides(fused, x, autocast) == gradient_strides(eager, x, autocast)


@pytest.mark.parametrize("make", FUNCTIONS, ids=lambda make: make.__name__)
def test_transforms_of_functions(make: Any) -> None:
    op, _, count = make(False)
    xs = [x.detach() for x in activations(count, torch.channels_last)]
    before = [x.sin() for x in xs]
    _, tangent = jvp(op, tuple(xs), tuple(before))
    by_vmap = vmap(lambda *images: op(*(image[None] for image in images))[0])(*xs)
    torch.testing.assert_close(by_vmap, op(*xs), rtol=1e-11, atol=1e-11)
    steps = [op(*(x + h * t for x, t in zip(xs, before, strict=True))) for h in (1e-7, -1e-7)]
    inside = (steps[0] > 0) == (steps[1] > 0)  # no ReLU turned over in between
    difference = (steps[0] - steps[1]) / 2e-7
    torch.testing.assert_close(tangent[inside], difference[inside], rtol=1e-5, atol=1e-5)
    assert inside.float().mean() > 0.99


def test_compiled_transforms(memory_format: torch.memory_format) -> None:
    """torch.compile traces what runs under torch.func: unfused PyTorch there too."""
    short = pair("basic", layers=[1, 1, 1, 1])
    fused, eager = (m.double().eval().to(memory_format=memory_format) for m in short)
    x = torch.randn(2, 3, 32, 32, dtype=F64).to(memory_format=memory_format)
    parameters = {name: p.detach() for name, p in eager.named_parameters()}

    def gradients(model: nn.Module) -> Callable[..., dict[str, Tensor]]:
        def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(model, values, (x,)).square().mean()

        return grad(loss)

    torch._dynamo.reset()
    found = torch.compile(gradients(fused), backend="eager")(parameters, x)
    assert_equal(
        {f"{n} gradient": g for n, g in found.items()},
        {f"{n} gradient": g for n, g in gradients(eager)(parameters, x).items()},
    )
    batched = torch.compile(vmap(lambda image: fused(image[None])[0]), backend="eager")(x)
    torch.testing.assert_close(batched, eager(x), rtol=1e-9, atol=1e-9)


def test_fused_again_after_a_transform() -> None:
    block, _ = block_pair("basic", torch.channels_last)
    x = activations(1, torch.channels_last)[0]
    vmap(lambda image: block.eval()(image[None])[0])(x)
    assert "_ResidualBlock" in block(x).grad_fn.name()
    assert resnet_fused.explain(block, x) == {}

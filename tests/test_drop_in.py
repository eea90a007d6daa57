"""What users do to a ResNet: copies, checkpointing, hooks, swapped modules, gradients of gradients."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint

import resnet_fused
from tests.accuracy import relative_error
from tests.model_pairs import KINDS, assert_equal, block_pair, pair, results

FORMAT = {"now": torch.contiguous_format}


@pytest.fixture(autouse=True, params=[torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def _both_layouts(request: pytest.FixtureRequest) -> None:
    """Blocks run as one op in channels_last and as several otherwise."""
    FORMAT["now"] = request.param


def gradients_and_buffers(model: nn.Module) -> dict[str, Tensor]:
    found = {f"{name} gradient": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: b.double() for name, b in model.named_buffers()}


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype).to(memory_format=FORMAT["now"])


@pytest.mark.parametrize("arch", KINDS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_empty_batch(arch: str, training: bool) -> None:
    """As a rank of DistributedDataParallel may get one: no gradient, and statistics as they were."""
    found = []
    for model in pair(arch):
        model.train(training)
        before = {name: b.clone() for name, b in model.named_buffers() if b.is_floating_point()}
        out = model(images(0, 3, 32, 32))
        assert out.shape == (0, 7)
        out.sum().backward()
        assert all(p.grad is not None and p.grad.count_nonzero() == 0 for p in model.parameters())
        assert all(torch.equal(b, before[name]) for name, b in model.named_buffers() if name in before)
        found.append([int(b) for name, b in model.named_buffers() if name not in before])
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_checkpointing_under_autocast_recomputes_the_same(kind: str) -> None:
    """Bit for bit: in the dtype of the first pass."""
    fused, _ = block_pair(kind, FORMAT["now"])
    fused.float()
    x, grad = images(4, 64, 8, 8), None
    found = []
    for wrapped in (False, True):
        fused.zero_grad()
        inputs = x.clone(memory_format=torch.preserve_format).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = checkpoint(fused, inputs, use_reentrant=False) if wrapped else fused(inputs)
        grad = torch.randn_like(out) if grad is None else grad
        out.backward(grad)
        found.append([out, inputs.grad, *(p.grad.clone() for p in fused.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_checkpointing(kind: str, use_reentrant: bool) -> None:
    """Statistics are updated twice: a recomputation ends as soon as all is saved again, by then eager has done so."""
    found = []
    x = images(3, 64, 8, 8, dtype=torch.float64)
    for block in block_pair(kind, FORMAT["now"]):
        inputs = x.clone(memory_format=torch.preserve_format).requires_grad_()
        checkpoint(block, inputs, use_reentrant=use_reentrant).sin().sum().backward()
        assert block.bn1.num_batches_tracked == 2
        found.append(gradients_and_buffers(block) | {"input gradient": inputs.grad})
    assert_equal(*found)


def test_a_forward_within_backward_trains_as_eager() -> None:
    """A hook or a custom Function may call a model there: not a recomputation."""
    found = []
    for teacher in (m.double() for m in pair("basic")):
        y = torch.ones(1, requires_grad=True) * 2
        x = torch.ones(2, 3, 32, 32, dtype=torch.float64).cumsum(3)
        y.register_hook(lambda g, teacher=teacher, x=x: (teacher(x), None)[1])
        y.sum().backward()
        assert teacher.bn1.num_batches_tracked == 1
        found.append(gradients_and_buffers(teacher))
    assert_equal(*found)


def test_called_twice_before_backward() -> None:
    fused, eager = (m.double() for m in pair("basic"))
    first, second = (images(4, 3, 32, 32, dtype=torch.float64) for _ in range(2))
    found = []
    for model in (fused, eager):
        (model(first).square().sum() + model(second).sum()).backward()
        found.append(gradients_and_buffers(model))
    assert_equal(*found)


def test_double_backward() -> None:
    fused, eager = (m.double() for m in pair("basic"))
    x = images(3, 3, 40, 40, dtype=torch.float64)
    found = []
    for model in (fused, eager):
        inputs = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(inputs).square().sum(), inputs, create_graph=True)
        slope.square().sum().backward()
        found.append(gradients_and_buffers(model) | {"input gradient": inputs.grad})
    assert_equal(*found)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_give_the_same_answers(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, _ = pair("basic")
    x = images(2, 3, 32, 32)
    assert torch.equal(copied(model)(x), model(x))


def test_functional_call_and_func_grad() -> None:
    fused, eager = (m.double() for m in pair("basic"))
    x = images(3, 3, 32, 32, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in eager.named_parameters()}

    def slopes(model: nn.Module) -> dict[str, Tensor]:
        def loss(values: dict[str, Tensor]) -> Tensor:
            buffers = {name: b.clone() for name, b in model.named_buffers()}
            return F.cross_entropy(
                torch.func.functional_call(model, (values, buffers), (x,)), torch.arange(3)
            )

        return torch.func.grad(loss)(parameters)

    assert_equal(slopes(fused), slopes(eager))


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    fused, eager = pair("basic")
    torch.save(fused.state_dict(), tmp_path / "model.pt")
    eager.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), strict=True)
    with pytest.raises(RuntimeError, match=r"size mismatch for fc\.weight"):
        pair("basic", num_classes=3)[0].load_state_dict(eager.state_dict())


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


#: Changes of a block, by what ``explain`` says of them.
CHANGES: dict[str, Callable[[Any], object]] = {
    "bn1 has hooks": lambda block: block.bn1.register_forward_hook(lambda *_: None),
    "bn2 has hooks": lambda block: block.bn2.register_forward_pre_hook(lambda *_: None),
    "bn1 is a GroupNorm": lambda block: setattr(block, "bn1", nn.GroupNorm(8, 64).double()),
    "relu is a GELU": lambda block: setattr(block, "relu", nn.GELU()),
    "bn1 is a ParametrizedBatchNorm2d": lambda block: register_parametrization(block.bn1, "weight", Twice()),
    "bn1 has a forward of its own": lambda block: setattr(block.bn1, "forward", lambda x: x),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_a_changed_block_runs_plain_and_says_so(reason: str) -> None:
    fused, eager = (m.double() for m in pair("basic"))
    assert resnet_fused.explain(fused) == {}
    for model in (fused, eager):
        CHANGES[reason](model.layer1[0])
    assert resnet_fused.explain(fused) == {"layer1.0": reason}
    x = images(3, 3, 32, 32, dtype=torch.float64)
    assert_equal(results(fused, x), results(eager, x))


def test_hooks_on_blocks_and_convs() -> None:
    """A block with a hook is still one op; a convolution with one is called as a module, amid fused ops."""
    fused, eager = (m.double() for m in pair("basic"))
    calls: list[str] = []
    for model in (fused, eager):
        model.layer1[0].register_forward_hook(lambda *_: calls.append("block"))
        model.layer1[1].conv1.register_forward_hook(lambda *_: calls.append("conv"))
    explained = resnet_fused.explain(fused)
    assert list(explained) == ["layer1.1"] and "conv1 has hooks: fused ops around" in explained["layer1.1"]
    x = images(3, 3, 32, 32, dtype=torch.float64)
    by_fused, by_eager = results(fused, x), results(eager, x)
    assert calls == ["block", "conv"] * 2
    assert_equal(by_fused, by_eager)


def test_a_model_without_max_pool_keeps_its_fused_norm() -> None:
    fused, eager = (m.double() for m in pair("basic"))
    for model in (fused, eager):
        model.maxpool = nn.Identity()
    x = images(3, 3, 32, 32, dtype=torch.float64)
    assert_equal(results(fused, x), results(eager, x))


def test_symbolic_tracing_sees_the_plain_composition() -> None:
    model, _ = pair("basic")
    model.eval()
    traced = torch.fx.symbolic_trace(model)
    x = images(2, 3, 32, 32)
    assert relative_error(traced(x), model(x)) < 1e-5

"""What users do to a ResNet: bad input, copies, checkpointing, hooks, swapped modules, gradients of gradients."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import resnet_fused
from tests.accuracy import relative_error
from tests.model_pairs import assert_equal, block_pair, pair, results

FORMAT = {"now": torch.contiguous_format}


@pytest.fixture(autouse=True, params=[torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def _both_layouts(request: pytest.FixtureRequest) -> None:
    """Blocks run as one op in channels_last and as several otherwise."""
    FORMAT["now"] = request.param


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype).to(memory_format=FORMAT["now"])


def test_one_value_per_channel_in_training_is_refused_as_by_batch_norm() -> None:
    fused, eager = (m.train() for m in pair("resnet18"))
    messages = []
    for model in (fused, eager):
        with pytest.raises(
            ValueError, match="Expected more than 1 value per channel when training"
        ) as caught:
            model(images(1, 3, 32, 32))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_empty_batch(arch: str, training: bool) -> None:
    """As a rank of DistributedDataParallel may get one: no gradient, and statistics as they were."""
    found = []
    for model in pair(arch):
        model.train(training)
        before = {name: b.clone() for name, b in model.named_buffers() if b.is_floating_point()}
        out = model(images(0, 3, 64, 64))
        assert out.shape == (0, 1000)
        out.sum().backward()
        assert all(p.grad is not None and p.grad.count_nonzero() == 0 for p in model.parameters())
        assert all(torch.equal(b, before[name]) for name, b in model.named_buffers() if name in before)
        found.append([int(b) for name, b in model.named_buffers() if name not in before])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("x", "error"),
    [
        (torch.randn(2, 4, 64, 64), RuntimeError),
        (torch.randn(2, 3, 64), RuntimeError),
        (torch.zeros(2, 3, 64, 64, dtype=torch.int64), RuntimeError),
        (torch.randn(2, 3, 64, 64, dtype=torch.float64), RuntimeError),
        (torch.randn(2, 3, 64, 64, device="meta"), RuntimeError),
    ],
    ids=["channels", "rank", "integers", "another dtype", "another device"],
)
def test_bad_input_fails_as_in_the_reference(x: Tensor, error: type[Exception]) -> None:
    for model in pair("resnet18"):
        with pytest.raises(error):
            model(x)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant: bool) -> None:
    """Statistics are updated again by the recomputation, as eager's are."""
    x = images(4, 3, 64, 64, dtype=torch.float64)
    found = []
    for model in (m.double() for m in pair("resnet18", num_classes=7)):
        inputs = x.clone(memory_format=torch.preserve_format).requires_grad_()
        out = checkpoint(model, inputs, use_reentrant=use_reentrant)
        F.cross_entropy(out, torch.arange(4)).backward()
        assert model.bn1.num_batches_tracked == 2
        results = {"output": out.detach(), "input gradient": inputs.grad}
        results |= {f"{name} gradient": p.grad for name, p in model.named_parameters()}
        found.append(results | {name: b for name, b in model.named_buffers() if b.is_floating_point()})
    assert_equal(*found)


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


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_a_checkpointed_block_updates_its_statistics_twice(kind: str) -> None:
    """A recomputation ends as soon as all is saved again: by then eager has updated them."""
    found = []
    x = images(3, 64, 8, 8, dtype=torch.float64).requires_grad_()
    for block in block_pair(kind, FORMAT["now"]):
        checkpoint(block, x, use_reentrant=False).sin().sum().backward()
        found.append({name: b.double() for name, b in block.named_buffers()})
    assert_equal(*found)


def test_a_forward_within_backward_trains_as_eager() -> None:
    """A hook or a custom Function may call a model there: not a recomputation."""
    found = []
    for teacher in (m.double() for m in pair("resnet18", num_classes=7)):
        y = torch.ones(1, requires_grad=True) * 2
        x = torch.ones(2, 3, 64, 64, dtype=torch.float64).cumsum(3)
        y.register_hook(lambda g, teacher=teacher, x=x: (teacher(x), None)[1])
        y.sum().backward()
        assert teacher.bn1.num_batches_tracked == 1
        found.append({name: b for name, b in teacher.named_buffers() if b.is_floating_point()})
    assert_equal(*found)


def test_called_twice_before_backward() -> None:
    fused, eager = (m.double() for m in pair("resnet18", num_classes=7))
    first, second = (images(4, 3, 64, 64, dtype=torch.float64) for _ in range(2))
    found = []
    for model in (fused, eager):
        (model(first).square().sum() + model(second).sum()).backward()
        found.append(
            {n: p.grad for n, p in model.named_parameters()}
            | {n: b.double() for n, b in model.named_buffers()}
        )
    assert_equal(*found)


def test_double_backward() -> None:
    fused, eager = (m.double() for m in pair("resnet18", num_classes=7))
    x = images(3, 3, 40, 40, dtype=torch.float64)
    found = []
    for model in (fused, eager):
        inputs = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(inputs).square().sum(), inputs, create_graph=True)
        slope.square().sum().backward()
        found.append(
            {"input": inputs.grad} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        )
    assert_equal(*found)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_give_the_same_answers(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, _ = pair("resnet18")
    x = images(2, 3, 64, 64)
    assert torch.equal(copied(model)(x), model(x))


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_gradients_lie_as_their_parameters(arch: str, autocast: bool) -> None:
    """To the last stride: DistributedDataParallel warns of another, and is slower."""
    fused, eager = (m.to(memory_format=FORMAT["now"]) for m in pair(arch))
    for model in (fused, eager):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(images(2, 3, 64, 64)).float().sum()
        grads = torch.autograd.grad(loss, list(model.parameters()))
        for (name, parameter), grad in zip(model.named_parameters(), grads, strict=True):
            assert grad.stride() == parameter.stride(), name


def test_functional_call_and_func_grad() -> None:
    fused, eager = (m.double() for m in pair("resnet18", num_classes=7))
    x = images(3, 3, 64, 64, dtype=torch.float64)
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
    fused, eager = pair("resnet18")
    torch.save(fused.state_dict(), tmp_path / "model.pt")
    eager.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), strict=True)
    with pytest.raises(RuntimeError, match=r"size mismatch for fc\.weight"):
        resnet_fused.resnet18(num_classes=3).load_state_dict(eager.state_dict())


def test_does_not_depend_on_the_number_of_threads() -> None:
    y = torch.randn(3, 37, 33, 31)
    norm = (torch.zeros(37), torch.ones(37), torch.rand(37), torch.randn(37), True)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            x = y.clone().requires_grad_()
            out = resnet_fused.functional.bn_relu(x, *norm)
            out.square().sum().backward()
            found.append((out.detach(), x.grad))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def hook_a_norm(model: nn.Module) -> str:
    model.layer1[0].bn1.register_forward_hook(lambda *_: None)
    return "bn1 has hooks"


def hook_before_a_norm(model: nn.Module) -> str:
    model.layer1[0].bn2.register_forward_pre_hook(lambda *_: None)
    return "bn2 has hooks"


def swap_a_norm(model: nn.Module) -> str:
    model.layer1[0].bn1 = nn.GroupNorm(8, 64).double()
    return "bn1 is a GroupNorm"


def swap_the_relu(model: nn.Module) -> str:
    model.layer1[0].relu = nn.GELU()
    return "relu is a GELU"


def parametrize_a_norm(model: nn.Module) -> str:
    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    nn.utils.parametrize.register_parametrization(model.layer1[0].bn1, "weight", Twice())
    return "bn1 is a ParametrizedBatchNorm2d"


def replace_a_forward(model: nn.Module) -> str:
    model.layer1[0].bn1.forward = lambda x: x
    return "bn1 has a forward of its own"


CHANGES = [hook_a_norm, hook_before_a_norm, swap_a_norm, swap_the_relu, parametrize_a_norm, replace_a_forward]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_changed_block_runs_plain_and_says_so(change: Callable[[nn.Module], str]) -> None:
    fused, eager = (m.double() for m in pair("resnet18", num_classes=7))
    assert resnet_fused.explain(fused) == {}
    reason = change(fused)
    change(eager)
    assert resnet_fused.explain(fused) == {"layer1.0": reason}
    x = images(3, 3, 64, 64, dtype=torch.float64)
    by_fused, by_eager = results(fused, x), results(eager, x)
    assert_equal(by_fused, by_eager)


def test_hooks_on_blocks_and_convs() -> None:
    """A block with a hook is still one op; a convolution with one is called as a module, amid fused ops."""
    fused, eager = (m.double() for m in pair("resnet18", num_classes=7))
    calls: list[str] = []
    for model in (fused, eager):
        model.layer1[0].register_forward_hook(lambda *_: calls.append("block"))
        model.layer1[1].conv1.register_forward_hook(lambda *_: calls.append("conv"))
    explained = resnet_fused.explain(fused)
    assert list(explained) == ["layer1.1"] and "conv1 has hooks: fused ops around" in explained["layer1.1"]
    x = images(3, 3, 64, 64, dtype=torch.float64)
    by_fused, by_eager = results(fused, x), results(eager, x)
    assert calls == ["block", "conv"] * 2
    assert_equal(by_fused, by_eager)


def test_a_model_without_max_pool_keeps_its_fused_norm() -> None:
    fused, eager = (m.double() for m in pair("resnet18", num_classes=7))
    for model in (fused, eager):
        model.maxpool = nn.Identity()
    x = images(3, 3, 32, 32, dtype=torch.float64)
    by_fused, by_eager = results(fused, x), results(eager, x)
    assert_equal(by_fused, by_eager)


def test_symbolic_tracing_sees_the_plain_composition() -> None:
    model, _ = pair("resnet18")
    model.eval()
    traced = torch.fx.symbolic_trace(model)
    x = images(2, 3, 64, 64)
    assert relative_error(traced(x), model(x)) < 1e-5

"""Modules that run Triton kernels behave like PyTorch's: compiled, shared, frozen, checkpointed. In the interpreter."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

import resnet_fused
from resnet_fused import models, reference
from resnet_fused.kernels.launch import Launch, observe_launches
from resnet_fused.plan import PASSES
from tests.model_pairs import scrambled
from tests.ops.operands import CASES, SIZES, Maker, op_of

pytestmark = pytest.mark.interpreter
#: Cases that Triton kernels support: convolutions without groups, whose coefficients are needed.
KERNEL_CASES = {case: make for case, make in CASES.items() if not case.endswith(("groups", "neither"))} | {
    "conv_bn_stats-plain": lambda m: (*CASES["conv_bn_stats-plain"](m)[:-1], True)
}
#: Images of each process.
PER_RANK = (3, 2)
SIZE = 8


@pytest.fixture(autouse=True)
def _by_triton() -> Iterator[None]:
    with resnet_fused.backend("triton"):
        yield


def blocks(library: Any = models, norm: Callable[..., nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    """A bottleneck with a folded shortcut, one without, and a basic block with a stride."""
    torch.manual_seed(0)

    def shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    blocks = [
        library.Bottleneck(8, 4, stride=2, downsample=shortcut(8, 16, 2), norm_layer=norm),
        library.Bottleneck(16, 4, norm_layer=norm),
        library.BasicBlock(16, 24, downsample=shortcut(16, 24, 1), norm_layer=norm),
    ]
    return nn.Sequential(*blocks).to(memory_format=torch.channels_last)


def images(count: int = sum(PER_RANK)) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(count, 8, SIZE, SIZE).to(memory_format=torch.channels_last)


def train(model: nn.Module, x: Tensor, step: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """Output, gradients and buffers of a step."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = (step or model)(x)
    out.square().sum().backward()
    results = {"output": out.detach(), "input gradient": x.grad}
    results |= {f"{name} gradient": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return results | {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Up to sums of float32 in another order, relative to each tensor's largest element."""
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            results[name],
            value,
            rtol=1e-3,
            atol=1e-4 * float(value.abs().max()),
            msg=lambda m, name=name: f"{name}: {m}",
        )


@functools.cache
def step_by_triton() -> dict[str, Tensor]:
    """A step that several tests compare with."""
    with resnet_fused.backend("triton"):
        return train(blocks(), images())


def launched(run: Callable[[], Any]) -> list[Launch]:
    launches: list[Launch] = []
    with observe_launches(launches.append):
        run()
    return launches


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", KERNEL_CASES)
def test_opcheck(case: str, dtype: torch.dtype) -> None:
    """Fakes do not depend on the backend, so the layout of results must not either."""
    op = getattr(torch.ops.resnet_fused, op_of(case)).default
    utils = ("test_schema", "test_faketensor")
    assert launched(lambda: torch.library.opcheck(op, KERNEL_CASES[case](Maker(dtype)), test_utils=utils))
    # opcheck ignores the strides of dimensions of size 1.
    arguments = KERNEL_CASES[case](Maker(dtype, SIZES["one_pixel"]))
    with FakeTensorMode() as mode:
        fake = tree_leaves(op(*tree_map_only(Tensor, mode.from_tensor, arguments)))
    results = tree_leaves(op(*arguments))
    assert [(x.shape, x.stride(), x.dtype) for x in fake] == [(x.shape, x.stride(), x.dtype) for x in results]


def test_a_step_is_that_of_plain_modules() -> None:
    results: dict[str, Tensor] = {}
    launches = launched(lambda: results.update(train(blocks(), images())))
    assert set(PASSES) <= {launch.name for launch in launches}
    assert_same(results, train(blocks(reference), images()))


def test_compiled_without_a_break() -> None:
    torch._dynamo.reset()
    model, results = blocks(), {}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    launches = launched(lambda: results.update(train(model, images(), compiled)))
    assert any(launch.name == "folded_dgrad" for launch in launches)
    assert_same(results, step_by_triton())


def test_no_two_results_of_backward_share_memory() -> None:
    model, x, saved = blocks(), images().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = model(x)
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, [x, *model.parameters()], grad)
    memory = {g.untyped_storage().data_ptr() for g in grads}
    assert len(memory) == len(grads)
    assert not memory & {t.untyped_storage().data_ptr() for t in (*saved, grad, out, x)}


def test_saved_tensor_hooks() -> None:
    """Saved tensors may come back with other strides, and biases change before backward: the gradients are equal."""
    model, x = blocks(), images()

    def step(pack: Callable[[Tensor], Tensor], change: float) -> dict[str, Tensor]:
        def run(x: Tensor) -> Tensor:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: pack(t.detach()), lambda t: t):
                out = model(x)
            with torch.no_grad():
                for module in model.modules():
                    if isinstance(module, nn.BatchNorm2d):
                        module.bias.sub_(change)
            return out

        model.zero_grad()
        return {name: value for name, value in train(model, x, run).items() if "gradient" in name}

    expected = step(lambda t: t, 0.0)
    for results in (step(scrambled, 0.0), step(lambda t: torch.from_numpy(t.numpy().copy()), 5.0)):
        assert all(torch.equal(results[name], value) for name, value in expected.items())


def test_frozen_statistics() -> None:
    ours, theirs = blocks(), blocks(reference)
    for model in (ours, theirs):
        model(images())  # so that the running statistics are not the initial ones
        model.eval()
    assert_same(train(ours, images()), train(theirs, images()))


@pytest.mark.parametrize(
    "options",
    [{"affine": False}, {"momentum": None}, {"track_running_stats": False}, {"eps": 0.1, "momentum": 0.5}],
    ids=str,
)
def test_batch_norms_of_all_kinds(options: dict[str, Any]) -> None:
    def norm(channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels, **options)

    assert_same(train(blocks(norm=norm), images(3)), train(blocks(reference, norm), images(3)))


def test_parameters_that_need_no_gradient() -> None:
    model, other = blocks(), blocks(reference)
    for m in (model, other):
        m[0].conv2.weight.requires_grad_(False)
        m[1].bn3.weight.requires_grad_(False)
    assert_same(train(model, images()), train(other, images()))


def test_an_input_that_needs_no_gradient() -> None:
    """As that of a first block: no kernel computes one for the input."""
    model = blocks()
    launches = launched(lambda: model(images()).square().sum().backward())
    expected = step_by_triton()
    gradients = {f"{name} gradient": p.grad for name, p in model.named_parameters()}
    assert_same(gradients, {name: expected[name] for name in gradients})
    # Two convolutions of each block are not folded; the first one needs no input gradient: 2 + 2 + 2 - 1.
    assert [launch.name for launch in launches].count("dgrad") == 5


def test_autocast() -> None:
    """Equals a step whose convolutions are float16 already (test_blocks.py checks the accuracy of that).

    Against eager modules only ReLUs that flip would show: after three blocks one of them is percents of a gradient.
    """
    mixed, narrow = blocks(), blocks()
    for module in narrow.modules():
        if isinstance(module, nn.Conv2d):
            module.half()

    def step(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            return mixed(x).float()

    results: dict[str, Tensor] = {}
    launches = launched(lambda: results.update(train(mixed, images(3), step)))
    convolved = [launch.arguments["x"].dtype for launch in launches if launch.name == "conv_bn_stats"]
    assert convolved and set(convolved) == {torch.float16}
    assert {p.grad.dtype for p in mixed.parameters()} == {torch.float32}
    expected = train(narrow, images(3), lambda x: narrow(x.half()).float())
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(results[name].to(value.dtype), value), name


def test_called_twice_before_backward() -> None:
    def twice(model: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: model(x) + model(x.flip(0)).flip(0)

    ours, theirs = blocks(), blocks(reference)
    assert_same(train(ours, images(), twice(ours)), train(theirs, images(), twice(theirs)))


def test_recomputed_under_checkpointing() -> None:
    model = blocks()
    results = train(model, images(), lambda x: checkpoint(model, x, use_reentrant=False))
    plain = blocks(reference)
    expected = train(plain, images(), lambda x: checkpoint(plain, x, use_reentrant=False))
    assert_same(results, expected)  # running statistics too, which either forward pass updates


def test_double_backward() -> None:
    def penalty(model: nn.Module) -> list[Tensor]:
        x = images().requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(grad.square().sum(), list(model.parameters())))

    ours, theirs = penalty(blocks()), penalty(blocks(reference))
    for results, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(results, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("options", [{}, {"track_running_stats": False}, {"affine": False}], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["0.bn1", "0.bn2", "0.bn3", "0.downsample.1"])
def test_a_batch_norm_of_another_width(name: str, training: bool, options: dict[str, Any]) -> None:
    """Raises PyTorch's error: kernels would read past its end."""
    messages = []
    for library in (models, reference):
        model = blocks(library)
        width = model.get_submodule(name).num_features - 1
        model.set_submodule(name, nn.BatchNorm2d(width, **options))
        with pytest.raises(RuntimeError, match="should contain") as caught:
            model.train(training)(images())
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_other_inputs() -> None:
    contiguous = train(blocks(), images().contiguous())
    assert_same(contiguous, train(blocks(reference), images().contiguous()))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        blocks()(torch.randn(1, 8, 1, 1).to(memory_format=torch.channels_last))
    copied = copy.deepcopy(blocks())
    assert_same(train(copied, images()), step_by_triton())


def train_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(PER_RANK))
    try:
        synced = nn.SyncBatchNorm.convert_sync_batchnorm(blocks())
        mine = slice(sum(PER_RANK[:rank]), sum(PER_RANK[: rank + 1]))
        with resnet_fused.backend("triton"):
            results: dict[str, Tensor] = {}
            launches = launched(lambda: results.update(train(synced, images()[mine])))
        assert any(launch.name == "folded_wgrad" for launch in launches)
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_statistics_shared_by_two_processes(tmp_path: Path) -> None:
    mp.spawn(train_rank, (str(tmp_path),), nprocs=len(PER_RANK))
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    whole = step_by_triton()
    joined = {}
    for name, value in whole.items():
        results = [part[name] for part in parts]
        if name in ("output", "input gradient"):
            joined[name] = torch.cat(results)
        elif name.endswith("gradient"):
            joined[name] = results[0] + results[1]
        else:
            assert torch.equal(*results), name
            joined[name] = results[0].to(value.dtype)
    assert_same(joined, whole)

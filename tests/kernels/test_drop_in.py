"""Modules that run Triton kernels behave like PyTorch's: compiled, shared, frozen. In the interpreter."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import resnet_fused
from resnet_fused import models, reference
from resnet_fused.kernels.launch import Launch, observe_launches
from resnet_fused.plan import PASSES
from tests.model_pairs import scrambled

pytestmark = pytest.mark.interpreter
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


def images(count: int = 3) -> Tensor:
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
    model = blocks()

    def step(x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: scrambled(t.detach()), lambda t: t):
            out = model(x)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.bias.sub_(5.0)
        return out

    results = train(model, images(), step)
    assert all(torch.equal(results[name], x) for name, x in step_by_triton().items() if "gradient" in name)


@pytest.mark.parametrize(
    "options",
    [{"affine": False, "momentum": None}, {"track_running_stats": False, "eps": 0.1}],
    ids=str,
)
def test_batch_norms_of_all_kinds(options: dict[str, Any]) -> None:
    def norm(channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels, **options)

    assert_same(train(blocks(norm=norm), images()), train(blocks(reference, norm), images()))


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
    launches = launched(lambda: results.update(train(mixed, images(), step)))
    convolved = [launch.arguments["x"].dtype for launch in launches if launch.name == "conv_bn_stats"]
    assert convolved and set(convolved) == {torch.float16}
    assert {p.grad.dtype for p in mixed.parameters()} == {torch.float32}
    expected = train(narrow, images(), lambda x: narrow(x.half()).float())
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(results[name].to(value.dtype), value), name


def train_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(PER_RANK))
    try:
        synced = nn.SyncBatchNorm.convert_sync_batchnorm(blocks())
        mine = slice(sum(PER_RANK[:rank]), sum(PER_RANK[: rank + 1]))
        with resnet_fused.backend("triton"):
            results: dict[str, Tensor] = {}
            launches = launched(lambda: results.update(train(synced, images(sum(PER_RANK))[mine])))
        assert any(launch.name == "folded_wgrad" for launch in launches)
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_statistics_shared_by_two_processes(tmp_path: Path) -> None:
    mp.spawn(train_rank, (str(tmp_path),), nprocs=len(PER_RANK))
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    whole = train(blocks(), images(sum(PER_RANK)))
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

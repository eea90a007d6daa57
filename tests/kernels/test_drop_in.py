"""Blocks of Triton kernels are still the modules that they stand for: compiled, shared, frozen, used in odd ways."""

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
from torch.utils.checkpoint import checkpoint

import resnet_fused
from resnet_fused import models, reference
from resnet_fused.kernels.launch import Launch, observe_launches
from tests.model_pairs import scrambled
from tests.ops.test_passes import CASES, OPS, SIZES, Maker, check_promises

pytestmark = pytest.mark.interpreter
SHARES = (3, 2)
SIZE = 8


@pytest.fixture(autouse=True)
def _by_triton() -> Iterator[None]:
    with resnet_fused.backend("triton"):
        yield


def made(library: Any = models, norm: Callable[..., nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
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


def images(count: int = sum(SHARES)) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(count, 8, SIZE, SIZE).to(memory_format=torch.channels_last)


def trained(model: nn.Module, x: Tensor, step: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """Output, gradients and buffers of a step."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = (step or model)(x)
    out.square().sum().backward()
    found = {"output": out.detach(), "input gradient": x.grad}
    found |= {f"{name} gradient": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To what a few sums of float32 in another order make of it, relative to each tensor's largest element."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name],
            value,
            rtol=1e-3,
            atol=1e-4 * float(value.abs().max()),
            msg=lambda m, name=name: f"{name}: {m}",
        )


@functools.cache
def step_by_triton() -> dict[str, Tensor]:
    """What several tests compare with."""
    with resnet_fused.backend("triton"):
        return trained(made(), images())


def launched(run: Callable[[], Any]) -> list[Launch]:
    seen: list[Launch] = []
    with observe_launches(seen.append):
        run()
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", [case for case in CASES if not case.endswith(("groups", "neither"))])
def test_opcheck(case: str, dtype: torch.dtype) -> None:
    """Of the launchers; fakes do not depend on the backend, so the layout of results may not either."""
    name = case.partition("-")[0]
    arguments = CASES[case](Maker(dtype))
    utils = ("test_schema", "test_faketensor")
    seen = launched(lambda: torch.library.opcheck(getattr(OPS, name).default, arguments, test_utils=utils))
    assert seen
    check_promises(name, CASES[case](Maker(dtype, SIZES["one_pixel"])))


def test_a_step_is_that_of_plain_modules() -> None:
    found: dict[str, Tensor] = {}
    seen = launched(lambda: found.update(trained(made(), images())))
    assert {"conv", "gram", "expand", "folded_wgrad", "folded_dgrad", "wgrad", "dgrad"} <= {
        x.name for x in seen
    }
    assert_same(found, trained(made(reference), images()))


def test_compiled_without_a_break() -> None:
    torch._dynamo.reset()
    model, found = made(), {}
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    seen = launched(lambda: found.update(trained(model, images(), compiled)))
    assert any(launch.name == "folded_dgrad" for launch in seen)
    assert_same(found, step_by_triton())


def test_no_two_results_of_backward_share_memory() -> None:
    model, x, saved = made(), images().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = model(x)
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, [x, *model.parameters()], grad)
    memory = {g.untyped_storage().data_ptr() for g in grads}
    assert len(memory) == len(grads)
    assert not memory & {t.untyped_storage().data_ptr() for t in (*saved, grad, out, x)}


def test_hooks_may_change_the_strides_of_saved_tensors_and_users_the_biases() -> None:
    """The first bit for bit. Kernels take biases of forward from the statistics' terms."""
    model, x = made(), images()

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
        return {name: value for name, value in trained(model, x, run).items() if "gradient" in name}

    expected = step(lambda t: t, 0.0)
    for found in (step(scrambled, 0.0), step(lambda t: torch.from_numpy(t.numpy().copy()), 5.0)):
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_frozen_statistics() -> None:
    ours, theirs = made(), made(reference)
    for model in (ours, theirs):
        model(images())  # statistics that are not the initial ones
        model.eval()
    assert_same(trained(ours, images()), trained(theirs, images()))


@pytest.mark.parametrize(
    "options",
    [{"affine": False}, {"momentum": None}, {"track_running_stats": False}, {"eps": 0.1, "momentum": 0.5}],
    ids=str,
)
def test_batch_norms_of_all_kinds(options: dict[str, Any]) -> None:
    def norm(channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels, **options)

    assert_same(trained(made(norm=norm), images(3)), trained(made(reference, norm), images(3)))


def test_what_needs_no_gradient_gets_none() -> None:
    model, other = made(), made(reference)
    for m in (model, other):
        m[0].conv2.weight.requires_grad_(False)
        m[1].bn3.weight.requires_grad_(False)
    assert_same(trained(model, images()), trained(other, images()))


def test_an_input_that_needs_no_gradient() -> None:
    """As that of a first block: parameters get theirs, and no pass makes one for the input."""
    model = made()
    seen = launched(lambda: model(images()).square().sum().backward())
    expected = step_by_triton()
    gradients = {f"{name} gradient": p.grad for name, p in model.named_parameters()}
    assert_same(gradients, {name: expected[name] for name in gradients})
    # A bottleneck's chain has two convolutions, a basic block's end is not folded: 2 + 2 + 2, the first left out.
    assert [launch.name for launch in seen].count("dgrad") == 5


def test_autocast() -> None:
    """Bit for bit a step whose convolutions are float16 already, which test_blocks.py holds to the accuracy rule.

    Beside eager modules only ReLUs that flip would be seen: three blocks on, one of them is percents of a gradient.
    """
    mixed, narrow = made(), made()
    for module in narrow.modules():
        if isinstance(module, nn.Conv2d):
            module.half()

    def step(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            return mixed(x).float()

    found: dict[str, Tensor] = {}
    seen = launched(lambda: found.update(trained(mixed, images(3), step)))
    convolved = [launch.arguments["x"].dtype for launch in seen if launch.name == "conv"]
    assert convolved and set(convolved) == {torch.float16}
    assert {p.grad.dtype for p in mixed.parameters()} == {torch.float32}
    expected = trained(narrow, images(3), lambda x: narrow(x.half()).float())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name].to(value.dtype), value), name


def test_called_twice_before_backward() -> None:
    def twice(model: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: model(x) + model(x.flip(0)).flip(0)

    ours, theirs = made(), made(reference)
    assert_same(trained(ours, images(), twice(ours)), trained(theirs, images(), twice(theirs)))


def test_recomputed_under_checkpointing() -> None:
    model = made()
    found = trained(model, images(), lambda x: checkpoint(model, x, use_reentrant=False))
    plain = made(reference)
    expected = trained(plain, images(), lambda x: checkpoint(plain, x, use_reentrant=False))
    assert_same(found, expected)  # running statistics too, which either forward pass updates


def test_double_backward() -> None:
    def penalty(model: nn.Module) -> list[Tensor]:
        x = images().requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(grad.square().sum(), list(model.parameters())))

    ours, theirs = penalty(made()), penalty(made(reference))
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("options", [{}, {"track_running_stats": False}, {"affine": False}], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("place", ["0.bn1", "0.bn2", "0.bn3", "0.downsample.1"])
def test_a_norm_of_another_width(place: str, training: bool, options: dict[str, Any]) -> None:
    """Refused with the words of plain modules: kernels would read past its end."""
    messages = []
    for library in (models, reference):
        model = made(library)
        width = model.get_submodule(place).num_features - 1
        model.set_submodule(place, nn.BatchNorm2d(width, **options))
        with pytest.raises(RuntimeError, match="should contain") as caught:
            model.train(training)(images())
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_other_inputs() -> None:
    contiguous = trained(made(), images().contiguous())
    assert_same(contiguous, trained(made(reference), images().contiguous()))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        made()(torch.randn(1, 8, 1, 1).to(memory_format=torch.channels_last))
    copied = copy.deepcopy(made())
    assert_same(trained(copied, images()), step_by_triton())


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(SHARES))
    try:
        synced = nn.SyncBatchNorm.convert_sync_batchnorm(made())
        mine = slice(sum(SHARES[:rank]), sum(SHARES[: rank + 1]))
        with resnet_fused.backend("triton"):
            found: dict[str, Tensor] = {}
            seen = launched(lambda: found.update(trained(synced, images()[mine])))
        assert any(launch.name == "folded_wgrad" for launch in seen)
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_statistics_shared_by_two_processes(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path),), nprocs=len(SHARES))
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    whole = step_by_triton()
    joined = {}
    for name, value in whole.items():
        found = [part[name] for part in parts]
        if name in ("output", "input gradient"):
            joined[name] = torch.cat(found)
        elif name.endswith("gradient"):
            joined[name] = found[0] + found[1]
        else:
            assert torch.equal(*found), name
            joined[name] = found[0].to(value.dtype)
    assert_same(joined, whole)

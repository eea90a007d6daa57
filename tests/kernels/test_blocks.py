"""Whole blocks through Triton kernels: the accuracy rule, launches, determinism, CUDA graphs."""

from __future__ import annotations

import copy

import pytest
import torch
from resnet_fused.ops.passes import runs_triton
from torch import Tensor

import resnet_fused
from resnet_fused.kernels.launch import Launch, observe_launches
from resnet_fused.plan import PASSES
from tests.accuracy import HOSTILE_CASES
from tests.kernels.devices import DEVICES, DTYPES
from tests.ops.test_residual_block import (
    BLOCKS,
    check_accuracy,
    fused,
    gradient_for,
    make_case,
    plain,
    results,
)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", BLOCKS)
def test_accuracy(name: str, training: bool, dtype: torch.dtype, device: str) -> None:
    with resnet_fused.backend("triton"):
        check_accuracy(name, "plain", training, dtype, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hostile", [case for case in HOSTILE_CASES if case != "plain"])
def test_hostile_input(hostile: str, dtype: torch.dtype, device: str) -> None:
    with resnet_fused.backend("triton"):
        check_accuracy("bottleneck_stride", hostile, True, dtype, device)


@pytest.mark.gpu
def test_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As accurate as eager convolutions in TF32: eps of the rule is that of float32 still, but eager's error is not."""
    monkeypatch.setattr("torch.backends.cudnn.allow_tf32", True)
    for name in ("bottleneck", "basic_block_stride"):
        with resnet_fused.backend("triton"):
            check_accuracy(name, "plain", True, torch.float32, "cuda")


def step(device: str, choice: str) -> tuple[dict[str, Tensor], list[Launch]]:
    torch.manual_seed(0)
    case = make_case("bottleneck", "plain", torch.float32, device)
    grad = gradient_for(plain(case.to(torch.float64), True).detach(), torch.float32)
    seen: list[Launch] = []
    with resnet_fused.backend(choice), observe_launches(seen.append):
        return results(fused, case, grad, True, None), seen


@pytest.mark.parametrize("device", DEVICES)
def test_launches_of_a_bottleneck(device: str) -> None:
    """conv, conv, gram, end; then Q, da, and a gradient of weight and input for each of the two convolutions."""
    _, seen = step(device, "triton")
    passes = [launch.name for launch in seen if launch.name in PASSES]
    ends = ["gram", "expand", "folded_wgrad", "folded_dgrad"]
    assert passes == ["conv", "conv", *ends, "wgrad", "dgrad", "wgrad", "dgrad"]


@pytest.mark.parametrize("device", DEVICES)
def test_steps_repeat_bit_for_bit(device: str) -> None:
    (first, _), (second, _) = step(device, "triton"), step(device, "triton")
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("device", DEVICES)
def test_a_launch_may_run_again(device: str) -> None:
    """What benchmarks rely on: no kernel reads what it writes."""
    _, seen = step(device, "triton")
    for launch in seen:
        before = [x.clone() for x in launch.arguments.values() if isinstance(x, Tensor)]
        launch.run()
        after = [x for x in launch.arguments.values() if isinstance(x, Tensor)]
        same = [
            torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) for a, b in zip(before, after, strict=True)
        ]
        assert all(same), launch.name


@pytest.mark.parametrize("device", DEVICES)
def test_the_vendor_can_be_asked_for(device: str) -> None:
    _, seen = step(device, "vendor")
    assert not seen


@pytest.mark.parametrize("device", DEVICES)
def test_who_is_served(device: str) -> None:
    def serves(dtype: torch.dtype, groups: int = 1) -> bool:
        return runs_triton(torch.empty(2, 2, 2, 2, dtype=dtype, device=device), groups)

    with resnet_fused.backend("triton"):
        assert serves(torch.float16) and serves(torch.float32)
        assert not serves(torch.float64) and not serves(torch.float32, groups=2)
    with resnet_fused.backend("vendor"):
        assert not serves(torch.float32)
    with resnet_fused.backend("reference"):
        assert not serves(torch.float32)


@pytest.mark.parametrize("device", DEVICES)
def test_large_tensors_are_left_to_the_vendor(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resnet_fused.ops.passes.COUNTABLE", 1000)
    results, seen = step(device, "triton")
    assert not [launch.name for launch in seen if launch.name in PASSES]
    for name, value in step(device, "vendor")[0].items():
        torch.testing.assert_close(results[name], value, rtol=1e-3, atol=1e-4 * float(value.abs().max()))


@pytest.mark.gpu
def test_replay_of_a_captured_step() -> None:
    model = resnet_fused.resnet18(num_classes=10).cuda().to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 64, 64, device="cuda").to(memory_format=torch.channels_last)

    def train() -> Tensor:
        for p in model.parameters():
            p.grad = None
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(x).float().square().mean()
        loss.backward()
        return loss

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            train()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = train()
    gradients = [p.grad for p in model.parameters()]
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        expected = train()
        torch.testing.assert_close(captured, expected, rtol=1e-3, atol=0)
        for ours, p in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(ours, p.grad, rtol=1e-3, atol=1e-3 * float(p.grad.abs().max()))


@pytest.mark.gpu
def test_graphed_callables() -> None:
    """PyTorch's recipe for small batches."""
    model = resnet_fused.resnet18(num_classes=10).cuda().to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 64, 64, device="cuda").to(memory_format=torch.channels_last)
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        graphed = torch.cuda.make_graphed_callables(copy.deepcopy(model), (x,))
        for _ in range(2):
            x = torch.randn_like(x)
            outputs = [one(x) for one in (graphed, model)]
            for one, output in zip((graphed, model), outputs, strict=True):
                one.zero_grad()
                output.float().square().mean().backward()
            torch.testing.assert_close(*outputs, rtol=1e-2, atol=1e-2)
            for ours, p in zip(graphed.parameters(), model.parameters(), strict=True):
                assert ours.grad is not None and p.grad is not None
                torch.testing.assert_close(
                    ours.grad, p.grad, rtol=1e-3, atol=1e-3 * float(p.grad.abs().max())
                )

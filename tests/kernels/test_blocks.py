"""Whole blocks through Triton kernels, on a GPU or in the interpreter: accuracy, launches, verification, graphs."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, nn

import resnet_fused
from resnet_fused.backend import interprets
from resnet_fused.kernels.autotune import search, verification
from resnet_fused.kernels.autotune.tunable import Tunable
from resnet_fused.kernels.autotune.verification import EPS, Rejected, Verifier
from resnet_fused.kernels.launch import Config, Launch, observe_launches
from resnet_fused.ops.dispatch import runs_triton
from resnet_fused.plan import PASSES
from tests.accuracy import HOSTILE_CASES
from tests.kernels.devices import DEVICES, DTYPES
from tests.kernels.test_accuracy import in_dtypes
from tests.ops.test_residual_block import (
    BLOCKS,
    check_accuracy,
    fused,
    gradient_for,
    make_case,
    plain,
    results,
)

on_devices = pytest.mark.parametrize("device", DEVICES)
#: The interpreter takes seconds for each image; two of them still fill several tiles.
IMAGES = 2 if interprets() else None
#: Block, input, and whether it trains.
RUNS = [
    *((name, "plain", True) for name in BLOCKS),
    *(("bottleneck_stride", case, True) for case in HOSTILE_CASES if case != "plain"),
    ("bottleneck_stride", "plain", False),
    ("basic_block_stride", "plain", False),
]


@in_dtypes("name hostile training", RUNS)
def test_accuracy(name: str, hostile: str, training: bool, dtype: torch.dtype, device: str) -> None:
    with resnet_fused.backend("triton"):
        check_accuracy(name, hostile, training, dtype, device, IMAGES)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bottleneck", "basic_block_stride"])
def test_tf32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """eps of the rule is that of float32 still; eager's error is that of TF32 convolutions."""
    monkeypatch.setattr("torch.backends.cudnn.allow_tf32", True)
    with resnet_fused.backend("triton"):
        check_accuracy(name, "plain", True, torch.float32, "cuda")


def step(device: str, choice: str) -> tuple[dict[str, Tensor], list[Launch]]:
    """Results and launches of a bottleneck in float32, forward and backward."""
    torch.manual_seed(0)
    case = make_case("bottleneck", "plain", torch.float32, device)
    grad = gradient_for(plain(case.to(torch.float64), True).detach(), torch.float32)
    launches: list[Launch] = []
    with resnet_fused.backend(choice), observe_launches(launches.append):
        return results(fused, case, grad, True, None), launches


@on_devices
def test_a_step(device: str) -> None:
    """Its launches; it repeats bit for bit, and so does each launch: no kernel reads what it writes."""
    results, launches = step(device, "triton")
    # The first two convolutions, then the folded one, forward and backward; then backward of the other two.
    passes = [launch.name for launch in launches if launch.name in PASSES]
    folded = ["input_covariance", "conv1x1_bn_add_relu", "folded_wgrad", "folded_dgrad"]
    assert passes == ["conv_bn_stats", "conv_bn_stats", *folded, "wgrad", "dgrad", "wgrad", "dgrad"]
    again, _ = step(device, "triton")
    for name, value in results.items():
        assert torch.equal(value, again[name]), name
    for launch in launches:
        tensors = [x for x in launch.arguments.values() if isinstance(x, Tensor)]
        before = [x.clone() for x in tensors]
        launch.run()
        for x, y in zip(tensors, before, strict=True):
            assert torch.equal(torch.nan_to_num(x), torch.nan_to_num(y)), launch.name


@on_devices
def test_runs_triton(device: str) -> None:
    def runs(dtype: torch.dtype, groups: int = 1) -> bool:
        return runs_triton(torch.empty(2, 2, 2, 2, dtype=dtype, device=device), groups)

    with resnet_fused.backend("triton"):
        assert runs(torch.float16) and runs(torch.float32)
        assert not runs(torch.float64) and not runs(torch.float32, groups=2)
    for choice in ("vendor", "reference"):
        with resnet_fused.backend(choice):
            assert not runs(torch.float32)


@on_devices
def test_large_tensors_are_left_to_the_vendor(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("dispatch", "conv_bn", "folded_conv_bn"):
        monkeypatch.setattr(f"resnet_fused.ops.{module}.MAX_NUMEL", 1000)
    found, launches = step(device, "triton")
    assert not [launch.name for launch in launches if launch.name in PASSES]
    by_vendor, launches = step(device, "vendor")
    assert not launches
    for name, value in by_vendor.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4 * float(value.abs().max()))


@on_devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel_passes_verification(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As autotuning verifies it; with the last row of its largest result unwritten it is rejected."""
    torch.use_deterministic_algorithms(False)  # memory is poisoned by the verification
    verified = set()

    def last_row_unwritten(tunable: Tunable) -> list[Tensor]:
        tensors = verification._results(tunable.run(tunable.configs[0]))
        largest = max(tensors, key=Tensor.numel)
        largest[-1] = torch.empty_like(largest[-1])
        return tensors

    def choose(tunable: Tunable, device: torch.device) -> Config:
        with torch.no_grad():
            verifier = Verifier(tunable.exact, tunable.vendor, EPS[tunable.key.dtype], device)
            verifier.check(functools.partial(tunable.run, tunable.configs[0]))
            with pytest.raises(Rejected):
                verifier.check(functools.partial(last_row_unwritten, tunable))
        verified.add(tunable.key.kernel)
        return tunable.configs[0]

    def choose_sharing(tunables: list[Tunable], shared: Tunable, device: torch.device) -> list[Config]:
        return [choose(tunable, device) for tunable in tunables]

    if device == "cpu":
        monkeypatch.setattr(verification, "wait", lambda device: None)
        monkeypatch.setattr(verification, "RUNS", 2)
    monkeypatch.setattr(search, "choose", choose)
    monkeypatch.setattr(search, "choose_sharing", choose_sharing)
    with resnet_fused.backend("triton"):
        case = make_case("bottleneck_stride", "plain", dtype, device)
        grad = gradient_for(plain(case.to(torch.float64), True).detach(), dtype)
        results(fused, case, grad, True, None)
    assert verified == set(PASSES)


def small_model() -> tuple[nn.Module, Tensor]:
    model = resnet_fused.resnet18(num_classes=10).cuda().to(memory_format=torch.channels_last)
    return model, torch.randn(4, 3, 64, 64, device="cuda").to(memory_format=torch.channels_last)


@pytest.mark.gpu
def test_replay_of_a_captured_step() -> None:
    model, x = small_model()

    def train() -> Tensor:
        for p in model.parameters():
            p.grad = None
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(x).float().square().mean()
        loss.backward()
        return loss

    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        for _ in range(3):
            train()
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = train()
    gradients = [p.grad for p in model.parameters()]
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        expected = train()
        torch.testing.assert_close(captured, expected, rtol=1e-3, atol=0)
        for grad, p in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(grad, p.grad, rtol=1e-3, atol=1e-3 * float(p.grad.abs().max()))


@pytest.mark.gpu
def test_graphed_callables() -> None:
    """PyTorch's recipe for small batches."""
    model, x = small_model()
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        graphed = torch.cuda.make_graphed_callables(copy.deepcopy(model), (x,))
        for _ in range(2):
            x = torch.randn_like(x)
            outputs = [module(x) for module in (graphed, model)]
            for module, output in zip((graphed, model), outputs, strict=True):
                module.zero_grad()
                output.float().square().mean().backward()
            torch.testing.assert_close(*outputs, rtol=1e-2, atol=1e-2)
            for ours, p in zip(graphed.parameters(), model.parameters(), strict=True):
                assert ours.grad is not None and p.grad is not None
                atol = 1e-3 * float(p.grad.abs().max())
                torch.testing.assert_close(ours.grad, p.grad, rtol=1e-3, atol=atol)

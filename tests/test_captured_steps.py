"""GraphedStep on a GPU."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resnet_fused
from resnet_fused import GraphedStep
from tests.graphed_steps import (
    WARMUP,
    assert_same,
    batch,
    eager_step,
    sgd,
    state_of,
)


def on_gpu(arch: str = "resnet18") -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = getattr(resnet_fused, arch)(num_classes=10).cuda()
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def capturable_adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True, **options)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("arch", "choice", "dtype", "make_optimizer"),
    [
        ("resnet18", "auto", torch.bfloat16, sgd),
        ("resnet18", "triton", None, sgd),
        ("resnet18", "triton", torch.bfloat16, capturable_adamw),
        ("resnet18", "triton", torch.float16, sgd),
        ("resnet18", "vendor", torch.bfloat16, sgd),
        ("resnet18", "vendor", torch.float16, capturable_adamw),
        ("resnet50", "triton", torch.bfloat16, sgd),
    ],
)
def test_captured(arch: str, choice: str, dtype: torch.dtype | None, make_optimizer: Any) -> None:
    """Bit for bit: the same kernels on the same numbers. With a schedule, and a last batch that is smaller."""
    model = on_gpu(arch)
    other = copy.deepcopy(model)
    options = {"fused": True} if dtype == torch.float16 else {}
    optimizers = make_optimizer(model, **options), make_optimizer(other, **options)
    enabled = dtype == torch.float16
    scalers = [torch.amp.GradScaler("cuda", init_scale=2.0**10, enabled=enabled) for _ in range(2)]
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7) for optimizer in optimizers]
    sizes = [4] * (WARMUP + 3) + [2, 4, 4]
    with resnet_fused.backend(choice):
        step = GraphedStep(
            model, optimizers[0], F.cross_entropy, autocast=dtype, scaler=scalers[0], warmup=WARMUP
        )
        for index, count in enumerate(sizes):
            images, labels = batch(count, 64, "cuda", 10)
            assert step.is_captured == (index > WARMUP)
            results = step(images, labels)
            expected = eager_step(other, optimizers[1], images, labels, dtype, scalers[1])
            for ours, theirs in zip(results, expected, strict=True):
                assert torch.equal(ours, theirs), index
            assert_same(state_of(model, optimizers[0]), state_of(other, optimizers[1]))
            for schedule in schedules:
                schedule.step()
    assert scalers[0].state_dict() == scalers[1].state_dict()


@pytest.mark.gpu
def test_captured_twice() -> None:
    """At another image size, and beside another graph; with gradients that are clipped."""
    model, second = on_gpu(), on_gpu()
    other = copy.deepcopy(model)
    optimizers = sgd(model), sgd(other), sgd(second)
    for one_model, optimizer in zip((model, other, second), optimizers, strict=True):
        clip = functools.partial(nn.utils.clip_grad_norm_, list(one_model.parameters()), 0.5)
        optimizer.register_step_pre_hook(lambda *_, clip=clip: (clip(), None)[1])
    with resnet_fused.backend("triton"):
        step = GraphedStep(model, optimizers[0], F.cross_entropy, warmup=1)
        beside = GraphedStep(second, optimizers[2], F.cross_entropy, warmup=1)
        for index, size in enumerate([64] * 4 + [96] * 4 + [64] * 4):
            one = batch(4, size, "cuda", 10)
            loss, _ = step(*one)
            assert torch.equal(loss, eager_step(other, optimizers[1], *one)[0]), index
            assert torch.equal(loss, beside(*one)[0]), index
    assert_same(state_of(model, optimizers[0]), state_of(other, optimizers[1]))


@pytest.mark.gpu
def test_captured_while_batches_are_pinned() -> None:
    """A data loader's thread allocates pinned memory at any time."""
    count = 24
    data = torch.utils.data.TensorDataset(torch.randn(4 * count, 3, 64, 64), torch.randint(10, (4 * count,)))
    loader = torch.utils.data.DataLoader(data, 4, num_workers=1, pin_memory=True)
    model = on_gpu()
    with resnet_fused.backend("triton"):
        step = GraphedStep(model, sgd(model), F.cross_entropy)
        losses = [step(*(x.cuda(non_blocking=True) for x in one))[0] for one in loader]
    assert len(losses) == count and step.is_captured
    assert torch.stack(losses).isfinite().all()


@pytest.mark.gpu
def test_launches_of_a_captured_step() -> None:
    """One graph and a few copies, instead of hundreds of kernels."""
    model = on_gpu()
    with resnet_fused.backend("triton"):
        step = GraphedStep(model, sgd(model), F.cross_entropy, warmup=1)
        one = batch(4, 64, "cuda", 10)
        for _ in range(3):
            step(*one)
        torch.cuda.synchronize()
        with torch.profiler.profile() as profile:  # of the CPU and of CUDA's calls
            step(*one)
            torch.cuda.synchronize()
    launched = [event.name for event in profile.events() if event.name.startswith("cu")]
    assert sum("GraphLaunch" in name for name in launched) == 1
    assert sum("LaunchKernel" in name for name in launched) < 16

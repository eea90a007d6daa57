"""A whole training step: forward, loss, backward and SGD of a ResNet at 224x224, batch 16, channels_last."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused
from benchmarks.harness import Comparison
from resnet_fused import reference

BATCH, SIZE = 16, 224


def step_of(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        mixed = dtype is not torch.float32
        with torch.autocast(images.device.type, dtype=dtype) if mixed else nullcontext():
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_train_step(
    arch: str,
    dtype: torch.dtype,
    device: torch.device,
    compare: Callable[[Comparison, Callable[[], object], Callable[[], object], int], None],
) -> None:
    images = torch.randn(BATCH, 3, SIZE, SIZE, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (BATCH,), device=device)
    steps = []
    for library in (reference, resnet_fused):
        torch.manual_seed(0)
        model = getattr(library, arch)().to(device, memory_format=torch.channels_last).train()
        steps.append(step_of(model, images, labels, dtype))
    eager, fused = steps
    first_losses = [float(step()) for step in steps]
    # Losses of an untrained network are near ln 1000; a wrong forward pass shows in the second digit.
    assert first_losses[0] == pytest.approx(first_losses[1], rel=1e-4 if dtype is torch.float32 else 2e-2)
    second_losses = [float(step()) for step in steps]
    assert second_losses[0] == pytest.approx(second_losses[1], rel=1e-3 if dtype is torch.float32 else 5e-2)
    label = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    compare(Comparison("model", arch, "train", label, BATCH, f"{BATCH}x3x{SIZE}x{SIZE}"), eager, fused, 8)

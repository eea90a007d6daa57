"""A whole training step: forward, loss, backward and SGD of a ResNet at 224x224, batch 16, channels_last."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused
from benchmarks.harness import Comparison
from resnet_fused import reference
from tests.accuracy import relative_error

BATCH, SIZE = 16, 224


def make_model(library: ModuleType, arch: str, device: torch.device) -> nn.Module:
    """The model with the same weights from either library."""
    torch.manual_seed(0)
    model: nn.Module = getattr(library, arch)()
    return model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]


def loss_of(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    mixed = dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(images.device.type, dtype=dtype) if mixed else nullcontext():
        return F.cross_entropy(model(images), labels)


def step_of(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_of(model, images, labels, dtype).backward()
        optimizer.step()

    return step


def gradient_of(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of all parameters as one float64 vector."""
    grads = torch.autograd.grad(loss_of(model, images, labels, dtype), list(model.parameters()))
    return torch.cat([grad.flatten().double() for grad in grads])


@cache
def batch(device: torch.device) -> tuple[Tensor, Tensor]:
    images = torch.randn(BATCH, 3, SIZE, SIZE, device=device).to(memory_format=torch.channels_last)
    return images, torch.randint(1000, (BATCH,), device=device)


@cache
def exact_gradient(arch: str, device: torch.device) -> Tensor:
    images, labels = batch(device)
    return gradient_of(make_model(reference, arch, device).double(), images.double(), labels, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_train_step(
    arch: str,
    dtype: torch.dtype,
    device: torch.device,
    compare: Callable[[Comparison, Callable[[], object], Callable[[], object], int], None],
) -> None:
    images, labels = batch(device)
    models = [make_model(library, arch, device) for library in (reference, resnet_fused)]
    # The accuracy rule, for the gradient as a whole, on the batch that is timed. An untrained network amplifies
    # rounding: a few per cent in float32 are normal, for eager PyTorch too.
    exact = exact_gradient(arch, device)
    eager_error, fused_error = (
        relative_error(gradient_of(model, images, labels, dtype), exact) for model in models
    )
    assert fused_error <= 1.5 * eager_error + 4 * torch.finfo(dtype).eps
    label = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    eager, fused = (step_of(model, images, labels, dtype) for model in models)
    compare(Comparison("model", arch, "train", label, BATCH, f"{BATCH}x3x{SIZE}x{SIZE}"), eager, fused, 16)

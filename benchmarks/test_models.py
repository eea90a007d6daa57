"""A whole training step: forward, loss, backward and SGD of a ResNet at 224x224, channels_last."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused
from benchmarks.harness import BATCH, Comparison
from resnet_fused import reference
from tests.accuracy import relative_error

SIZE = 224


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


Compare = Callable[[Comparison, Callable[[], object], Callable[[], object], int], None]
LABELS = {torch.float32: "fp32", torch.bfloat16: "bf16"}
SHAPE = f"{BATCH}x3x{SIZE}x{SIZE}"


def checked_models(arch: str, dtype: torch.dtype, device: torch.device) -> list[nn.Module]:
    """Eager and fused, after a look at the accuracy rule for the gradient as a whole, on the batch that is timed.

    An untrained network amplifies rounding: a few per cent in float32 are normal, for eager PyTorch too.
    """
    images, labels = batch(device)
    models = [make_model(library, arch, device) for library in (reference, resnet_fused)]
    exact = exact_gradient(arch, device)
    eager_error, fused_error = (
        relative_error(gradient_of(model, images, labels, dtype), exact) for model in models
    )
    assert fused_error <= 1.5 * eager_error + 4 * torch.finfo(dtype).eps
    return models


@pytest.mark.parametrize("dtype", list(LABELS), ids=LABELS.values())
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_train_step(arch: str, dtype: torch.dtype, device: torch.device, compare: Compare) -> None:
    eager, fused = (step_of(model, *batch(device), dtype) for model in checked_models(arch, dtype, device))
    compare(Comparison("model", arch, "train", LABELS[dtype], BATCH, SHAPE), eager, fused, 16)


@pytest.mark.parametrize("dtype", list(LABELS), ids=LABELS.values())
def test_train_step_beside_compiled(dtype: torch.dtype, device: torch.device, compare: Compare) -> None:
    """Eager PyTorch compiled by inductor, which takes about a minute."""
    models = checked_models("resnet50", dtype, device)
    models[0].compile()
    compiled, fused = (step_of(model, *batch(device), dtype) for model in models)
    kind = Comparison("model", "resnet50", "train", LABELS[dtype], BATCH, SHAPE, "compile_default")
    compare(kind, compiled, fused, 10)


FIRST_STEP = """
import sys, time, torch
from benchmarks.test_models import batch, make_model, step_of
from resnet_fused import reference
import resnet_fused
torch.set_num_threads(int(sys.argv[2]))
device = torch.device(sys.argv[3])
model = make_model({"fused": resnet_fused, "eager": reference}[sys.argv[1]], "resnet50", device)
step = step_of(model, *batch(device), torch.float32)
begin = time.perf_counter()
step()
if device.type == "cuda":
    torch.cuda.synchronize()
print(time.perf_counter() - begin)
"""


def test_first_step(device: torch.device, compare: Compare) -> None:
    """Of fresh processes; what is timed by ``compare`` is read from what they print."""

    def seconds(which: str) -> float:
        torch.cuda.empty_cache()  # the process that is timed needs the GPU's memory
        arguments = [sys.executable, "-c", FIRST_STEP, which, str(torch.get_num_threads()), str(device)]
        done = subprocess.run(arguments, capture_output=True, text=True, check=True)
        return float(done.stdout)

    checked_models("resnet50", torch.float32, device)
    comparison = Comparison("model", "resnet50", "first_step", "fp32", BATCH, SHAPE)
    compare(comparison, lambda: seconds("eager"), lambda: seconds("fused"), 5)

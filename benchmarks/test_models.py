"""Whole ResNets at 224x224: a training step (forward, loss, backward, SGD), and evaluation."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused
from benchmarks.apart import ProcessFailed, two_steps_apart
from benchmarks.conftest import Compare
from benchmarks.harness import BATCH, OURS, Case
from benchmarks.implementations import BASELINE, EXACT, Attempt, begin, entrants, laid_out, modules, verdicts
from benchmarks.precision import Precision
from benchmarks.roofline import Ceilings, limit, step
from resnet_fused import reference
from resnet_fused.cli.steps import Case as Training
from resnet_fused.cli.steps import exactly

LAYER = "model"
SIZE = 224
SHAPE = f"{BATCH}x3x{SIZE}x{SIZE}"
ROUNDS = 6
#: Whose first step and memory are measured in processes of their own.
FRESHLY = (OURS, BASELINE, "compile_default")


def make_model(library: ModuleType, arch: str, device: torch.device) -> nn.Module:
    """The model with the same weights from either library."""
    torch.manual_seed(0)
    model: nn.Module = getattr(library, arch)()
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


@cache
def batch(device: torch.device) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    images = torch.randn(BATCH, 3, SIZE, SIZE, device=device).to(memory_format=torch.channels_last)
    return images, torch.randint(1000, (BATCH,), device=device)


def loss_of(model: nn.Module, images: Tensor, labels: Tensor, precision: Precision) -> Tensor:
    with precision.cast(images.device.type, images.dtype):
        return F.cross_entropy(model(images), labels)


def learnt(model: nn.Module, images: Tensor, labels: Tensor, precision: Precision) -> list[Tensor]:
    """The loss, and the gradient of all parameters as one float64 vector."""
    loss = loss_of(model, images, labels, precision)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return [loss.detach(), torch.cat([grad.flatten().double() for grad in grads])]


def seen(model: nn.Module, images: Tensor, precision: Precision) -> list[Tensor]:
    with torch.no_grad(), precision.cast(images.device.type, images.dtype):
        return [model(images)]


@cache
def exact_results(arch: str, mode: str, device: torch.device) -> list[Tensor]:
    images, labels = batch(device)
    model, precision = (
        make_model(reference, arch, device).train(mode == "train"),
        Precision("fp64", torch.float64),
    )
    if mode == "eval":
        return seen(model.double(), images.double(), precision)
    return learnt(exactly(model), images.double(), labels, precision)


def fresh_process(
    impl: str, arch: str, precision: Precision, device: torch.device
) -> tuple[float | None, float | None]:
    """Milliseconds of the first training step, and the peak of the second in 1e6 bytes; None of what fails."""
    tf32 = precision.name == "tf32"
    case = Training(arch, BATCH, SIZE, "fp32" if tf32 else precision.name, str(device))
    try:
        return two_steps_apart(case, impl, allow_tf32=tf32)
    except ProcessFailed:
        if impl == OURS:
            raise
        return None, None


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_model(
    arch: str,
    mode: str,
    precision: Precision,
    device: torch.device,
    impls: tuple[str, ...],
    ceilings: Ceilings,
    compare: Compare,
) -> None:
    images, labels = batch(device)
    # Before the compiler has kept anything of this model.
    fresh = {
        impl: fresh_process(impl, arch, precision, device)
        for impl in FRESHLY
        if impl in impls and mode == "train"
    }
    eager, fused = (
        make_model(library, arch, device).train(mode == "train") for library in (reference, resnet_fused)
    )
    found = modules(impls, eager, fused, precision, device)
    present = {impl: module for impl, module in found.items() if isinstance(module, nn.Module)}

    def draw() -> Attempt:
        def attempt(impl: str) -> list[Tensor]:
            if impl == EXACT:
                return exact_results(arch, mode, device)
            begin(impl)
            module, given = present.get(impl, eager), laid_out(impl, images)
            return (
                learnt(module, given, labels, precision)
                if mode == "train"
                else seen(module, given, precision)
            )

        return attempt

    def run_of(impl: str, module: nn.Module) -> Callable[[], object]:
        given = laid_out(impl, images)

        def evaluate() -> list[Tensor]:
            begin(impl)
            return seen(module, given, precision)

        optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)

        def train() -> None:
            begin(impl)
            optimizer.zero_grad(set_to_none=True)
            loss_of(module, given, labels, precision).backward()
            optimizer.step()

        return train if mode == "train" else evaluate

    notes = verdicts(draw, present, precision.eps, draws=1)
    roofline_ms = None
    if mode == "train":
        roofline_ms = limit(step(arch, BATCH, SIZE, precision.name, whole=True), ceilings) * 1e3
    case = Case(LAYER, arch, mode, precision.name, BATCH, SHAPE, roofline_ms)
    all_entrants = entrants(found, notes, run_of)
    for entrant in all_entrants:
        entrant.first_step_ms, entrant.peak_mb = fresh.get(entrant.impl, (None, None))
    compare(case, all_entrants, ROUNDS)

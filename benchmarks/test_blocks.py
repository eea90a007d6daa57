"""Every distinct block of ResNet-18 and ResNet-50, forward and backward in training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import resnet_fused
from benchmarks.conftest import Compare
from benchmarks.harness import BATCH, Case
from benchmarks.implementations import EXACT, Attempt, begin, entrants, laid_out, modules, verdicts
from benchmarks.precision import Precision
from benchmarks.roofline import Ceilings, limit, step
from resnet_fused import reference

LAYER = "block"
SIZE = 224
ROUNDS = 8


def distinct_blocks() -> Iterator[tuple[str, str, tuple[int, int]]]:
    """(architecture, name of the block, channels and size of its input), one for each kind."""
    for arch in ("resnet18", "resnet50"):
        with torch.device("meta"):
            model = getattr(reference, arch)()
        size = SIZE // 4
        for stage in ("layer1", "layer2", "layer3", "layer4"):
            for index in (0, 1):
                block = model.get_submodule(f"{stage}.{index}")
                yield arch, f"{stage}.{index}", (block.conv1.in_channels, size)
                size //= block.stride


def run(block: nn.Module, x: Tensor, grad: Tensor, precision: Precision) -> list[Tensor]:
    """The output, and the gradients of the input and the parameters."""
    with precision.cast(x.device.type, x.dtype):
        out = block(x)
    return [out.detach(), *torch.autograd.grad(out, [x, *block.parameters()], grad.to(out.dtype))]


@pytest.mark.parametrize(("arch", "name", "shape"), list(distinct_blocks()))
def test_block(
    arch: str,
    name: str,
    shape: tuple[int, int],
    precision: Precision,
    device: torch.device,
    impls: tuple[str, ...],
    ceilings: Ceilings,
    compare: Compare,
) -> None:
    pair: list[nn.Module] = []
    for library in (reference, resnet_fused):
        torch.manual_seed(0)
        block = getattr(library, arch)().get_submodule(name).train()
        pair.append(block.to(device, memory_format=torch.channels_last))
    eager, fused = pair
    found = modules(impls, eager, fused, precision, device)
    present = {impl: module for impl, module in found.items() if isinstance(module, nn.Module)}
    channels, size = shape
    x = torch.zeros(BATCH, channels, size, size, device=device, dtype=precision.dtype)
    x = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        grad = torch.zeros_like(eager(x.float()), dtype=precision.dtype)
    exact = copy.deepcopy(eager).double()

    def draw() -> Attempt:
        x.normal_().relu_()
        grad.normal_()

        def attempt(impl: str) -> list[Tensor]:
            if impl == EXACT:
                return run(exact, x.double().requires_grad_(), grad, precision)
            return run_of(impl, present.get(impl, eager))()

        return attempt

    def run_of(impl: str, module: nn.Module) -> Callable[[], list[Tensor]]:
        given, incoming = laid_out(impl, x).detach().requires_grad_(), laid_out(impl, grad)

        def once() -> list[Tensor]:
            begin(impl)
            return run(module, given, incoming, precision)

        return once

    notes = verdicts(draw, present, precision.eps)
    kernels = [k for k in step(arch, BATCH, SIZE, precision.name) if k.block == name]
    case = Case(
        LAYER,
        f"{arch} {name}",
        "fwd_bwd",
        precision.name,
        BATCH,
        f"{BATCH}x{channels}x{size}x{size}",
        limit(kernels, ceilings) * 1e3,
    )
    compare(case, entrants(found, notes, run_of), ROUNDS)

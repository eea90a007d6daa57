"""Every distinct block of ResNet-18 and ResNet-50, forward and backward in training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import resnet_fused
from benchmarks.conftest import Compare
from benchmarks.providers import BATCH, make_providers, modules, to_layout
from benchmarks.roofline import Ceilings, limit, step
from resnet_fused import reference
from resnet_fused.cli.precision import PRECISIONS, Precision
from resnet_fused.cli.steps import begin_step
from resnet_fused.measure import EXACT, Case, Results, check_accuracy

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


def forward_backward(block: nn.Module, x: Tensor, grad: Tensor, precision: Precision) -> list[Tensor]:
    """The output, and the gradients of the input and the parameters."""
    x = x.detach().requires_grad_()
    with precision.autocast(x.device.type):
        out = block(x)
    return [out.detach(), *torch.autograd.grad(out, [x, *block.parameters()], grad.to(out.dtype))]


@pytest.mark.parametrize(("arch", "name", "shape"), list(distinct_blocks()))
def test_block(
    arch: str,
    name: str,
    shape: tuple[int, int],
    precision: Precision,
    device: torch.device,
    names: tuple[str, ...],
    ceilings: Ceilings,
    compare: Compare,
) -> None:
    pair: list[nn.Module] = []
    for library in (reference, resnet_fused):
        torch.manual_seed(0)
        block = getattr(library, arch)().get_submodule(name).train()
        pair.append(block.to(device, memory_format=torch.channels_last))
    eager, fused = pair
    runnable, missing = modules(names, arch, name, eager, fused)
    exact = copy.deepcopy(eager).double()
    channels, size = shape
    x = torch.zeros(BATCH, channels, size, size, device=device, dtype=precision.dtype)
    x = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        grad = torch.zeros_like(eager(x.float()), dtype=precision.dtype)

    def draw(seed: int) -> Results:
        torch.manual_seed(seed)
        x.normal_().relu_()
        grad.normal_()

        def results(provider: str) -> list[Tensor]:
            if provider == EXACT:
                return forward_backward(exact, x.double(), grad, PRECISIONS["fp32"])
            return run_of(provider, runnable.get(provider, eager))()

        return results

    def run_of(provider: str, module: nn.Module) -> Callable[[], list[Tensor]]:
        given, incoming = to_layout(provider, x), to_layout(provider, grad)

        def run() -> list[Tensor]:
            begin_step(provider)
            return forward_backward(module, given, incoming, precision)

        return run

    notes = check_accuracy(draw, runnable, precision.eps)
    kernels = [k for k in step(arch, BATCH, SIZE, precision.name) if k.block == name]
    roofline_ms = limit(kernels, ceilings) * 1e3
    shape_of_input = f"{BATCH}x{channels}x{size}x{size}"
    case = Case(LAYER, f"{arch} {name}", "fwd_bwd", precision.name, BATCH, shape_of_input, roofline_ms)
    compare(case, make_providers(names, runnable, notes | missing, run_of), ROUNDS)

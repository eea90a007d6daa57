"""Every distinct block of ResNet-18 and ResNet-50, forward and backward in training, channels_last."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import resnet_fused
from benchmarks.harness import BATCH, Comparison
from resnet_fused import reference
from tests.accuracy import relative_error

SIZE = 224
LABELS = {torch.float32: "fp32", torch.bfloat16: "bf16"}
Compare = Callable[[Comparison, Callable[[], object], Callable[[], object], int], None]


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


def run(block: nn.Module, x: Tensor, grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The output, and the gradients of the input and the parameters."""
    mixed = dtype != torch.float32 and x.dtype != torch.float64
    with torch.autocast(x.device.type, dtype=dtype) if mixed else nullcontext():
        out = block(x)
    return [out.detach(), *torch.autograd.grad(out, [x, *block.parameters()], grad.to(out.dtype))]


@pytest.mark.parametrize("dtype", list(LABELS), ids=LABELS.values())
@pytest.mark.parametrize(("arch", "name", "shape"), list(distinct_blocks()))
def test_block(
    arch: str, name: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, compare: Compare
) -> None:
    models = []
    for library in (reference, resnet_fused):
        torch.manual_seed(0)
        models.append(getattr(library, arch)().get_submodule(name).train())
    eager, fused = (model.to(device, memory_format=torch.channels_last) for model in models)
    channels, size = shape
    x, grad = check(eager, fused, (BATCH, channels, size, size), dtype, device)
    kind = Comparison(
        "block", f"{arch} {name}", "fwd_bwd", LABELS[dtype], BATCH, f"{BATCH}x{channels}x{size}x{size}"
    )
    compare(kind, lambda: run(eager, x, grad, dtype), lambda: run(fused, x, grad, dtype), 12)


def check(
    eager: nn.Module, fused: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Holds the fused block to the accuracy rule, by the smallest errors in a few draws as the tests do.

    Returns:
        input and gradient of the output of the last draw, to be timed with.
    """
    exact_block = copy.deepcopy(eager).double()
    smallest: dict[int, tuple[float, float]] = {}
    for _ in range(6):
        x = torch.randn(shape, device=device).relu().to(dtype).to(memory_format=torch.channels_last)
        x64, x = x.double().requires_grad_(), x.requires_grad_()
        with torch.no_grad():
            out = exact_block(x64)
        grad = torch.randn_like(out).to(dtype)
        exact, by_eager, by_fused = (
            run(exact_block, x64, grad, dtype),
            run(eager, x, grad, dtype),
            run(fused, x, grad, dtype),
        )
        for i, expected in enumerate(exact):
            errors = relative_error(by_fused[i], expected), relative_error(by_eager[i], expected)
            before = smallest.get(i, errors)
            smallest[i] = min(before[0], errors[0]), min(before[1], errors[1])
        misses = {i: e for i, e in smallest.items() if e[0] > 1.5 * e[1] + 4 * torch.finfo(dtype).eps}
        if not misses:
            return x, grad
    raise AssertionError(f"fused and eager errors: {misses}")

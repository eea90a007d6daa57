"""The providers of the benchmark suite: ours, eager PyTorch, torch.compile and other libraries."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from benchmarks.peers import PEERS, Missing, peer_module
from resnet_fused.cli.precision import Precision
from resnet_fused.cli.steps import COMPILED
from resnet_fused.measure import EAGER, OURS, Provider

#: Eager PyTorch in its default layout; EAGER is channels_last, as everything else.
CONTIGUOUS = "eager"
NAMES = (OURS, CONTIGUOUS, EAGER, *COMPILED, *PEERS)

#: A module, or a function of tensors.
Module = TypeVar("Module")


def default_names(device: torch.device, layer: str) -> tuple[str, ...]:
    """All on a GPU; on a CPU what a quarter of an hour is enough for."""
    on_cpu = {
        "op": (OURS, CONTIGUOUS, EAGER),
        "block": (OURS, EAGER, "compile_default"),
        "model": (OURS, CONTIGUOUS, EAGER, "compile_default"),
    }
    return NAMES if device.type == "cuda" else on_cpu[layer]


def modules(
    names: Iterable[str], arch: str, block: str, eager: nn.Module, fused: nn.Module, precision: Precision
) -> dict[str, nn.Module | Missing]:
    """A module of each provider with the same weights.

    Args:
        arch, block: of which ``eager`` is: a model, and a submodule such as "layer1.0" or "".
        eager: the reference's, channels_last, on the device; copied for each but ours.
        fused: ours.
    """
    by_name: dict[str, nn.Module | Missing] = {}
    # Else torch.compile counts this module as another shape of the previous one, and gives up on static shapes.
    torch.compiler.reset()
    device = next(eager.parameters()).device
    for name in names:
        if name == OURS:
            by_name[name] = fused
            continue
        own = copy.deepcopy(eager)
        if name == CONTIGUOUS:
            own = own.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        elif name in COMPILED:
            own.compile(mode=COMPILED[name], dynamic=False)
        by_name[name] = peer_module(name, arch, block, own, precision.dtype, device) if name in PEERS else own
    return by_name


def to_layout(name: str, x: Tensor) -> Tensor:
    """An input in the memory format of the provider."""
    return x.contiguous() if name == CONTIGUOUS else x.contiguous(memory_format=torch.channels_last)


def make_providers(
    by_name: dict[str, Module | Missing],
    notes: dict[str, str],
    run_of: Callable[[str, Module], Callable[[], object]],
) -> list[Provider]:
    """A provider of each module; a missing one does not run."""
    return [
        Provider(name, note=module.reason)
        if isinstance(module, Missing)
        else Provider(name, run_of(name, module), notes[name])
        for name, module in by_name.items()
    ]

"""The providers of the benchmark suite: ours, eager PyTorch, torch.compile and other libraries."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from resnet_fused.cli.steps import COMPILED
from resnet_fused.measure import EAGER, OURS, Provider

#: Eager PyTorch in its default layout; EAGER is channels_last, as everything else.
CONTIGUOUS = "eager"
#: Libraries with whole models, where they are installed: a function of the architecture's name.
PEERS: dict[str, Callable[[str], Any]] = {
    "torchvision": lambda arch: getattr(import_module("torchvision.models"), arch)(),
    "timm": lambda arch: import_module("timm").create_model(arch),
}
NAMES = (OURS, CONTIGUOUS, EAGER, *COMPILED, *PEERS)
#: Images per batch; a GPU wants more than a CPU has time for.
BATCH = int(os.environ.get("RESNET_FUSED_BENCH_BATCH", "16"))


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
    names: Iterable[str], arch: str, block: str, eager: nn.Module, fused: nn.Module
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """A module of each provider with the same weights, and which libraries are missing and why.

    Args:
        arch, block: of which ``eager`` is: a model, and a submodule such as "layer1.0" or "".
        eager: the reference's, channels_last, on the device; copied for each but ours.
        fused: ours.
    """
    by_name: dict[str, nn.Module] = {}
    missing: dict[str, str] = {}
    # Else torch.compile counts this module as another shape of the previous one, and gives up on static shapes.
    torch.compiler.reset()
    for name in names:
        module: Any = copy.deepcopy(eager)
        if name == OURS:
            module = fused
        elif name == CONTIGUOUS:
            module.to(memory_format=torch.contiguous_format)
        elif name in COMPILED:
            module.compile(mode=COMPILED[name], dynamic=False)
        elif name in PEERS:
            try:
                module = PEERS[name](arch).get_submodule(block)
            except (ImportError, OSError) as error:
                missing[name] = f"{name} could not be imported ({error}): pip install {name}"
                continue
            module.load_state_dict(eager.state_dict())
            device = next(eager.parameters()).device
            module.to(device, memory_format=torch.channels_last).train(eager.training)
        by_name[name] = module
    return by_name, missing


def to_layout(name: str, x: Tensor) -> Tensor:
    """An input in the memory format of the provider."""
    return x.contiguous() if name == CONTIGUOUS else x.contiguous(memory_format=torch.channels_last)


def make_providers(
    names: Iterable[str],
    runnable: dict[str, Module],
    notes: dict[str, str],
    run_of: Callable[[str, Module], Callable[[], object]],
) -> list[Provider]:
    """A provider of each name. One that is not ``runnable`` does not run; ``notes`` say why, or what is wrong."""
    return [
        Provider(name, run_of(name, runnable[name]) if name in runnable else None, notes[name])
        for name in names
    ]

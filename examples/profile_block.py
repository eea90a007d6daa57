"""Profiles forward and backward of one bottleneck, fused beside plain PyTorch.

    python examples/profile_block.py --planes 64 --size 56 --batch 8

Prints the bytes that each saves for backward, their times, taken in turns so that both meet the same conditions of the
machine, and the operators of the fused block that take longest.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import resnet_fused

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """The bytes of all tensors that autograd saves for backward, each storage once, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module(x)  # the graph holds the saved tensors, so no address is used twice
    total = sum(storages.values())
    del out
    return total


def seconds(step: Callable[[], None], device: torch.device) -> float:
    """The time of one call, including what it launches on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def training_step(module: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    """Forward and backward of the module."""

    def step() -> None:
        module.zero_grad()
        module(x).backward(grad)

    return step


def profile_block(arguments: argparse.Namespace) -> dict[str, int]:
    """Prints bytes, times and a profile; returns the bytes saved for backward."""
    torch.manual_seed(0)
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    channels = 4 * arguments.planes
    blocks = {
        "plain": resnet_fused.reference.Bottleneck(channels, arguments.planes),
        "fused": resnet_fused.Bottleneck(channels, arguments.planes),
    }
    blocks["fused"].load_state_dict(blocks["plain"].state_dict())
    for block in blocks.values():
        block.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    shape = (arguments.batch, channels, arguments.size, arguments.size)
    x = torch.randn(shape).to(device, dtype, memory_format=torch.channels_last).requires_grad_()
    grad = torch.randn(shape).to(device, dtype, memory_format=torch.channels_last)
    print(f"Bottleneck({channels}, {arguments.planes}) on {shape}, {arguments.dtype}, {device}")
    print(f"explain: {resnet_fused.explain(blocks['fused'], x)}")

    saved = {name: saved_bytes(block, x) for name, block in blocks.items()}
    steps = {name: training_step(block, x, grad) for name, block in blocks.items()}
    for step in steps.values():  # compiles kernels and allocates memory
        step()
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, device))
    print(f"\n{'':8} {'saved for backward':>20} {'forward and backward':>22}")
    for name in steps:
        median = f"{1e3 * statistics.median(times[name]):.2f} ms"
        print(f"{name:8} {saved[name] / 1e6:17.2f} MB {median:>22}")
    ratios = [a / b for a, b in zip(times["plain"], times["fused"], strict=True)]
    print(f"plain / fused: {statistics.median(ratios):.2f}x, median of {arguments.rounds} rounds\n")

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiled:
        steps["fused"]()
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profiled.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=40))
    return saved


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Profiles one bottleneck, fused beside plain PyTorch.")
    parser.add_argument("--planes", type=int, default=64, help="channels inside; a quarter of those outside")
    parser.add_argument("--size", type=int, default=56, help="height and width of the activations")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    if min(arguments.planes, arguments.size, arguments.batch, arguments.rounds) < 1:
        parser.error("--planes, --size, --batch and --rounds must be at least 1")
    if arguments.batch * arguments.size**2 < 2:
        parser.error("batch norm needs more than one pixel: use a larger --size or --batch")
    profile_block(arguments)


if __name__ == "__main__":
    main()

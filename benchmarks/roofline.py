"""The least time that a training step can take: ``python -m benchmarks.roofline [--help]``.

The limit of a kernel is the larger of bytes / bandwidth and operations / rate, and that of a step the sum over its
kernels, which ``benchmarks.roofline_model`` lists.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.roofline_model import ELEMENT, SCHEDULES, Kernel, check_choice, step
from resnet_fused.cli.text import table
from resnet_fused.measure import milliseconds


@dataclass(frozen=True)
class Ceilings:
    """What a device can do: bandwidth in bytes per second, flops in floating point operations per second.

    Raises:
        ValueError: one of them is not a positive finite number.
    """

    bandwidth: float
    flops: float

    def __post_init__(self) -> None:
        for name, value in (("bandwidth", self.bandwidth), ("flops", self.flops)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number per second, got {value!r}")

    def memory_seconds(self, kernel: Kernel) -> float:
        return kernel.bytes / self.bandwidth

    def compute_seconds(self, kernel: Kernel) -> float:
        return kernel.flops / self.flops

    def __str__(self) -> str:
        return f"{self.bandwidth / 1e9:,.1f} GB/s, {self.flops / 1e9:,.0f} GFLOP/s"


#: Measured on an H100 SXM, bf16; see section 1 of the design.
H100 = Ceilings(bandwidth=3.0e12, flops=790e12)


def limit(kernels: Iterable[Kernel], ceilings: Ceilings) -> float:
    """Seconds that the kernels take at least, one after the other."""
    return sum(max(ceilings.memory_seconds(k), ceilings.compute_seconds(k)) for k in kernels)


def op_bytes(name: str, shape: tuple[int, int, int, int], dtype: str) -> int:
    """Bytes that a fused op alone must move in training, forward and backward.

    Batch norm cannot start before it has read all of its input, forward and backward: two passes over it each.

    Args:
        name: bn_relu, bn_add_relu, bn_bn_add_relu or bn_relu_maxpool.
        shape: of the convolution's output, (N, C, H, W).

    Raises:
        ValueError: an op or dtype that is not modelled.
    """
    check_choice("dtype", dtype, ELEMENT)
    n, c, h, w = shape
    elements, windows = n * c * h * w, n * c * ((h - 1) // 2 + 1) * ((w - 1) // 2 + 1)
    y, bits, pooled = ELEMENT[dtype] * elements, -(-elements // 8), (ELEMENT[dtype] + 1) * windows
    moved = {
        # statistics y, pass y -> out | reduce g y, pass g y -> dy
        "bn_relu": 3 * y + 5 * y,
        # statistics y, pass y residual -> out bits | reduce g bits y, pass g bits y -> dy dresidual
        "bn_add_relu": 4 * y + bits + 6 * y + 2 * bits,
        # statistics y skip, pass y skip -> out bits | reduce g bits y skip, pass g bits y skip -> dy dskip
        "bn_bn_add_relu": 5 * y + bits + 8 * y + 2 * bits,
        # statistics y, pass y -> out indices | reduce g indices y, pass g indices y -> dy
        "bn_relu_maxpool": 2 * y + pooled + 3 * y + 2 * pooled,
    }
    check_choice("op", name, moved)
    return moved[name]


def measure(dtype: str, device: torch.device) -> Ceilings:
    """This machine's ceilings, in about two seconds: a warm copy of 256 MB, and the faster of two convolutions.

    Raises:
        ValueError: an unknown dtype, or tf32 on a CPU.
    """
    check_choice("dtype", dtype, ELEMENT)
    if dtype == "tf32" and device.type == "cpu":
        raise ValueError("a CPU has no tf32 to measure: pass --dtype fp32")
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
    batch = 256 if device.type == "cuda" else 16
    rates = []
    cudnn = torch.backends.cudnn
    with cudnn.flags(enabled=True, benchmark=cudnn.benchmark, allow_tf32=dtype == "tf32"):
        for channels, kernel in ((256, 3), (1024, 1)):
            x = torch.randn(batch, channels, 14, 14, device=device, dtype=kind)
            w = torch.randn(256, channels, kernel, kernel, device=device, dtype=kind)
            x, w = (t.to(memory_format=torch.channels_last) for t in (x, w))
            conv = functools.partial(F.conv2d, x, w, padding=kernel // 2)
            seconds = fastest_seconds(conv, device)
            rates.append(2 * batch * 14 * 14 * w.numel() / seconds)
    source = torch.ones(64 * 2**20, device=device)
    target = torch.empty_like(source)
    return Ceilings(2 * source.nbytes / fastest_seconds(lambda: target.copy_(source), device), max(rates))


def ceilings_of(dtype: str, device: torch.device) -> Ceilings:
    """Known of an H100 in 16 bits, else measured."""
    is_h100 = device.type == "cuda" and "H100" in torch.cuda.get_device_name(device)
    return H100 if is_h100 and dtype in ("bf16", "fp16") else measure(dtype, device)


def fastest_seconds(run: Callable[[], object], device: torch.device) -> float:
    """The fastest of up to ten runs in about half a second, after one that warms up."""
    with torch.no_grad():
        run()
        times: list[float] = []
        while len(times) < 10 and sum(times) < 500:
            times.append(milliseconds(run, device))
    return min(times) / 1e3


def steps_table(arch: str, batch: int, image_size: int, dtype: str, ceilings: Ceilings, whole: bool) -> str:
    """One line per schedule."""
    rows = [["schedule", "kernels", "MB/image", "GFLOP/image", "limit ms", "limit img/s"]]
    for schedule in SCHEDULES:
        kernels = step(arch, batch, image_size, dtype, schedule, whole=whole)
        seconds = limit(kernels, ceilings)
        moved, flops = (sum(getattr(k, name) for k in kernels) / batch for name in ("bytes", "flops"))
        figures = [
            f"{moved / 1e6:.1f}",
            f"{flops / 1e9:.2f}",
            f"{seconds * 1e3:.3f}",
            f"{batch / seconds:,.0f}",
        ]
        rows.append([schedule, str(len(kernels)), *figures])
    return table(rows)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument("--arch", default="resnet50", help="one of the ten ResNets (default: resnet50)")
    parser.add_argument("--batch", type=int, default=256, help="images per step (default: 256)")
    parser.add_argument("--image-size", type=int, default=224, help="height and width (default: 224)")
    parser.add_argument("--dtype", default="bf16", help="fp32, tf32, bf16 or fp16 (default: bf16)")
    parser.add_argument("--bandwidth", type=float, default=H100.bandwidth, help="bytes/s (default: an H100)")
    parser.add_argument("--flops", type=float, default=H100.flops, help="operations/s (default: an H100)")
    parser.add_argument("--measure", action="store_true", help="measure this machine's ceilings instead")
    parser.add_argument("--whole", action="store_true", help="with pooling, classifier, loss and optimizer")
    options = parser.parse_args(arguments)
    arch, batch, size, dtype = options.arch, options.batch, options.image_size, options.dtype
    try:
        if options.measure:
            ceilings = measure(dtype, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        else:
            ceilings = Ceilings(options.bandwidth, options.flops)
        steps = steps_table(arch, batch, size, dtype, ceilings, options.whole)
    except ValueError as error:
        parser.error(str(error))
    part = "whole step" if options.whole else "stem and blocks"
    print(f"{arch}, batch {batch}, {size}x{size}, {dtype}, {part}; {ceilings}")
    print(steps)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

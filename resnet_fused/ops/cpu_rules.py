"""What was measured to be faster on a CPU: our kernels or the vendor's, fused blocks or PyTorch's operators.

``cpu_rules.json``, which ``python -m benchmarks.cpu_rules`` measures and writes, holds for each processor that was
measured the batch sizes from which ours are faster. What holds on all of them is the rule; nothing is timed in use.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path

from resnet_fused import native

RULES = Path(__file__).with_name("cpu_rules.json")
#: [channels][height and width]: the smallest batch size from which ours are faster.
Table = dict[int, dict[int, int]]


@functools.cache
def tables(isa: str, kind: str, name: str) -> list[Table]:
    """What was measured with an instruction set, one for each processor.

    Args:
        kind, name: "convolutions" and a pass (ops.conv3x3), or "blocks" and a kind of block (modules.kind_of_block).
    """
    machines = json.loads(RULES.read_text())["machines"]
    measured = [m[kind][name] for m in machines if m["isa"] == isa and name in m.get(kind, {})]
    return [
        {
            int(channels): {int(size): batch for size, batch in sizes.items()}
            for channels, sizes in table.items()
        }
        for table in measured
    ]


@functools.cache
def _least_pixels(isa: str, kind: str, name: str, channels: int, size: int) -> float:
    """Pixels of a batch from which ours are faster, by the nearest channels and size that were measured."""
    least = []
    for by_channels in tables(isa, kind, name):
        by_size = by_channels[min(by_channels, key=lambda c: abs(math.log(c / channels)))]
        nearest = min(by_size, key=lambda s: abs(math.log(s / size)))
        least.append(by_size[nearest] * nearest**2)
    return max(least, default=math.inf)


def supported(what: str) -> str:
    """What an op computes in native kernels on a CPU, for `info`."""
    return f"native: {what} in float32, by {native.cpu_isa()} kernels where measured to be faster"


def is_measured(kind: str, name: str) -> bool:
    """Whether anything was measured with this machine's instruction set."""
    return bool(tables(native.cpu_isa(), kind, name))


def is_faster(kind: str, name: str, shape: Sequence[int], channels: int) -> bool:
    """Whether ours were measured to be faster for an input of ``shape`` (N, C, H, W); False if nothing was measured.

    Args:
        kind, name: see ``tables``.
        channels: by which the tables are looked up.
    """
    n, _, height, width = shape
    size = max(1, round(math.sqrt(height * width)))
    return n * height * width >= _least_pixels(native.cpu_isa(), kind, name, channels, size)

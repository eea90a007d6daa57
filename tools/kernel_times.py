"""Every Triton launch of a training step beside its limit: ``python -m tools.kernel_times [--help]``.

A model trains two steps, in which configurations are chosen; in a third every launch is timed in place, by running it
again with a cold cache. The whole step is measured apart, and what else runs in it is profiled.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import DeviceType

from benchmarks.roofline import H100, Ceilings, limit, measure, read_ceilings
from benchmarks.roofline_model import ELEMENT, Kernel
from resnet_fused import backend, models
from resnet_fused.kernels.launch import Launch, observe_launches
from resnet_fused.measure import COLD_BYTES, header, milliseconds
from resnet_fused.reference.resnet import ARCHITECTURES

REPETITIONS = 15
#: Cycles, about a millisecond, in which the CPU gets ahead of the GPU, so that launching takes no measured time.
HEAD_START = 2_000_000
#: Steps between two events, so that the CPU runs ahead as it does in training.
STEPS = 5
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None, "tf32": None}


@dataclass(frozen=True)
class Row:
    """All launches of one kernel with the same configuration and operands. Times and bytes are those of one launch."""

    kernel: str
    config: str
    grid: str
    bytes: int
    flops: int
    ms: float
    limit_ms: float
    count: int = 1

    @property
    def lost_ms(self) -> float:
        """Time of all of them beyond their limit."""
        return self.count * (self.ms - self.limit_ms)


def timed(launch: Launch, ceilings: Ceilings, time_of: Callable[[Callable[[], None]], float]) -> Row:
    """A launch beside its limit; ``time_of`` runs it and returns milliseconds."""
    seconds = limit([Kernel(launch.name, "", "", launch.bytes, launch.flops)], ceilings)
    grid = "x".join(map(str, launch.grid))
    ms = time_of(launch.run)
    return Row(launch.name, str(launch.config), grid, launch.bytes, launch.flops, ms, seconds * 1e3)


def grouped(rows: Iterable[Row]) -> list[Row]:
    """Rows that differ in time alone as one, with their median time; those that lose most first."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.kernel, row.config, row.grid, row.bytes, row.flops), []).append(row)
    merged = (
        replace(same[0], ms=statistics.median(row.ms for row in same), count=len(same))
        for same in groups.values()
    )
    return sorted(merged, key=lambda row: -row.lost_ms)


def table(rows: list[Row]) -> str:
    """A line per row, then per kernel, then their sum; ``*`` is below half of the limit."""
    heads = ("launches", "MB", "GFLOP", "us", "limit us", "of limit", "lost us")
    lines = [f"{'kernel':18}{'config':26}{'grid':18}" + "".join(f"{head:>10}" for head in heads)]

    def add(name: str, config: str, grid: str, group: list[Row]) -> None:
        us, limit_us = (
            sum(r.count * t(r) * 1e3 for r in group) for t in (lambda r: r.ms, lambda r: r.limit_ms)
        )
        megabytes, gflop = (
            sum(r.count * r.bytes for r in group) / 1e6,
            sum(r.count * r.flops for r in group) / 1e9,
        )
        share = limit_us / us if us else 0.0
        lines.append(
            f"{name:18}{config:26}{grid:18}{sum(r.count for r in group):10}{megabytes:10.1f}{gflop:10.2f}{us:10.1f}"
            f"{limit_us:10.1f}{share:9.0%}{'*' if share < 0.5 else ' '}{us - limit_us:10.1f}"
        )

    for row in rows:
        add(row.kernel, row.config, row.grid, [row])
    for kernel in sorted({row.kernel for row in rows}):
        add(f"all {kernel}", "", "", [row for row in rows if row.kernel == kernel])
    add("all", "", "", rows)
    return "\n".join(lines)


def make_step(arch: str, batch: int, image_size: int, dtype: str, device: torch.device) -> Callable[[], None]:
    """A training step of ours: forward, loss, backward, SGD with momentum."""
    torch.manual_seed(0)
    model: nn.Module = getattr(models, arch)().to(device, memory_format=torch.channels_last)
    images = torch.randn(batch, 3, image_size, image_size, device=device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (batch,), device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    lower = DTYPES[dtype]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with nullcontext() if lower is None else torch.autocast(device.type, dtype=lower):
            loss: Tensor = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return step


def observed(step: Callable[[], None], ceilings: Ceilings, device: torch.device) -> list[Row]:
    """The rows of one step, each launch timed while its tensors live."""
    cold = torch.empty(COLD_BYTES, dtype=torch.uint8, device=device)

    def time_of(run: Callable[[], None]) -> float:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPETITIONS)]
        torch.cuda._sleep(HEAD_START)
        for start, end in pairs:
            cold.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize(device)
        return statistics.median(start.elapsed_time(end) for start, end in pairs)

    rows: list[Row] = []
    with observe_launches(lambda launch: rows.append(timed(launch, ceilings, time_of))):
        step()
    return rows


def profiled(step: Callable[[], None]) -> list[Any]:
    """``FunctionEventAvg`` of one step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return list(profiler.key_averages())


def split(events: Iterable[Any], ours: set[str]) -> tuple[float, list[tuple[str, int, float]]]:
    """Milliseconds in the kernels named ``ours``; (name, launches, milliseconds) of all others, the longest first."""
    # Calls on the CPU carry their kernels' times too, and user annotations cover kernels: left out.
    times = [
        (event.key, event.count, event.self_device_time_total / 1e3)
        for event in events
        if event.device_type == DeviceType.CUDA
        and event.self_device_time_total > 0
        and not event.is_user_annotation
    ]
    others = sorted((row for row in times if row[0] not in ours), key=lambda row: -row[2])
    return sum(ms for name, _, ms in times if name in ours), others


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m tools.kernel_times", description=__doc__)
    found.add_argument("--arch", default="resnet50", choices=ARCHITECTURES, metavar="ARCH")
    found.add_argument("--batch", type=int, default=256, help="images per step (default: 256)")
    found.add_argument("--image-size", type=int, default=224, help="height and width (default: 224)")
    found.add_argument("--dtype", default="bf16", choices=list(ELEMENT), help="default: bf16")
    found.add_argument("--backend", default="auto", choices=("auto", "triton", "vendor"))
    found.add_argument(
        "--ceilings",
        type=Path,
        help="JSON with this GPU's ceilings; without, those of an H100 in 16 bits, else measured ones",
    )
    found.add_argument("--json", type=Path, help="write header and rows to this file")
    return found


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    if not torch.cuda.is_available():
        print("kernel_times needs a CUDA device and this machine has none", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    torch.backends.cudnn.allow_tf32 = options.dtype == "tf32"
    ceilings = read_ceilings(options.ceilings, options.dtype)
    if ceilings is None:
        ceilings = H100 if options.dtype in ("bf16", "fp16") else measure(options.dtype, device)
    with backend(options.backend):
        _show(options, device, ceilings)
    return 0


def _show(options: argparse.Namespace, device: torch.device, ceilings: Ceilings) -> None:
    begun = time.monotonic()
    step = make_step(options.arch, options.batch, options.image_size, options.dtype, device)
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    whole = statistics.median(
        milliseconds(lambda: [step() for _ in range(STEPS)], device) / STEPS for _ in range(3)
    )
    rows = grouped(observed(step, ceilings, device))
    triton_ms, others = split(profiled(step), {f"{row.kernel}_kernel" for row in rows})
    gpu = torch.cuda.get_device_name()
    print(f"{options.arch}, batch {options.batch}, {options.dtype}, {gpu}; {ceilings}")
    print(table(rows))
    print(f"{'other kernels':70}{'launches':>10}{'us':>10}")
    for name, count, ms in others[:40]:
        print(f"{name[:68]:70}{count:10}{ms * 1e3:10.1f}")
    alone, other_ms = sum(r.count * r.ms for r in rows), sum(ms for _, _, ms in others)
    print(
        f"step {whole:.3f} ms, {options.batch / whole * 1e3:,.0f} img/s; in it Triton kernels {triton_ms:.3f} ms"
        f" ({triton_ms / whole:.0%}), others {other_ms:.3f} ms; Triton kernels one by one, cold {alone:.3f} ms"
    )
    if options.json:
        known = header(device, time.monotonic() - begun, {options.dtype: asdict(ceilings)})
        chosen = {name: getattr(options, name) for name in ("arch", "batch", "dtype", "backend")}
        found = {
            "header": known | chosen,
            "step_ms": whole,
            "triton_ms": triton_ms,
            "rows": [{**asdict(row), "share": row.limit_ms / row.ms} for row in rows],
            "others": [{"kernel": name, "count": count, "ms": ms} for name, count, ms in others],
        }
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

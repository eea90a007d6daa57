"""Every Triton launch of a training step beside its limit: ``python -m benchmarks.kernel_times [--help]``.

A model trains two steps, in which configurations are chosen; in a third each launch is timed where it stands, by
running it again with a cold cache. What the whole step takes is measured apart, and what else runs in it is profiled.
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

from benchmarks.roofline import H100, Ceilings, measure
from benchmarks.roofline_model import ELEMENT, Kernel
from resnet_fused import backend, models
from resnet_fused.measure import COLD_BYTES, header, milliseconds
from resnet_fused.reference.resnet import ARCHITECTURES

REPETITIONS = 15
#: Cycles, about a millisecond, in which the processor gets ahead of the GPU: launching then costs no time measured.
HEAD_START = 2_000_000
#: Steps between two events, so that the processor runs ahead as it does in training.
STEPS = 5
#: (name, launches, milliseconds of all of them)
Other = tuple[str, int, float]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None, "tf32": None}


@dataclass(frozen=True)
class Row:
    """All launches of one kernel that are alike. Times and bytes are those of one of them."""

    kernel: str
    config: str
    grid: str
    bytes: int
    flops: int
    ms: float
    limit_ms: float
    count: int = 1

    @property
    def share(self) -> float:
        """The limit as a part of the measured time: 1 is as fast as can be."""
        return self.limit_ms / self.ms

    @property
    def lost_ms(self) -> float:
        """What all of them take above their limit."""
        return self.count * (self.ms - self.limit_ms)


def grouped(rows: Iterable[Row]) -> list[Row]:
    """Rows that differ in time alone as one, with their median time; those that lose most first."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.kernel, row.config, row.grid, row.bytes, row.flops), []).append(row)
    merged = [
        replace(same[0], ms=statistics.median(r.ms for r in same), count=sum(r.count for r in same))
        for same in groups.values()
    ]
    return sorted(merged, key=lambda row: -row.lost_ms)


def table(rows: list[Row]) -> str:
    """One line per row; ``*`` is below half of the limit. At the end each kernel over the whole step."""
    heads = ("launches", "MB", "GFLOP", "us", "limit us", "share", "lost us")
    lines = [f"{'kernel':18}{'config':26}{'grid':18}" + "".join(f"{head:>10}" for head in heads)]

    def add(name: str, config: str, grid: str, group: list[Row]) -> None:
        count = sum(r.count for r in group)
        sums = [sum(r.count * value(r) for r in group) for value in (_mb, _gflop, _us, _limit_us)]
        share = sums[3] / sums[2] if sums[2] else 0.0
        lines.append(
            f"{name:18}{config:26}{grid:18}{count:10}{sums[0]:10.1f}{sums[1]:10.2f}{sums[2]:10.1f}{sums[3]:10.1f}"
            f"{share:9.0%}{'*' if share < 0.5 else ' '}{sums[2] - sums[3]:10.1f}"
        )

    for row in rows:
        add(row.kernel, row.config, row.grid, [row])
    for kernel in sorted({row.kernel for row in rows}):
        add(f"all {kernel}", "", "", [row for row in rows if row.kernel == kernel])
    add("all", "", "", rows)
    return "\n".join(lines)


def _mb(row: Row) -> float:
    return row.bytes / 1e6


def _gflop(row: Row) -> float:
    return row.flops / 1e9


def _us(row: Row) -> float:
    return row.ms * 1e3


def _limit_us(row: Row) -> float:
    return row.limit_ms * 1e3


def timed(launch: Any, ceilings: Ceilings, time_of: Callable[[Callable[[], None]], float]) -> Row:
    """A launch (resnet_fused.kernels.launch.Launch) beside its limit; ``time_of`` runs it and returns milliseconds."""
    kernel = Kernel(launch.name, "", "", launch.bytes, launch.flops)
    seconds = max(ceilings.memory_seconds(kernel), ceilings.compute_seconds(kernel))
    grid = "x".join(map(str, launch.grid))
    ms = time_of(launch.run)
    return Row(launch.name, str(launch.config), grid, launch.bytes, launch.flops, ms, seconds * 1e3)


def make_step(arch: str, batch: int, image_size: int, dtype: str, device: torch.device) -> Callable[[], None]:
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
    from resnet_fused.kernels.launch import observing

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
    with observing(lambda launch: rows.append(timed(launch, ceilings, time_of))):
        step()
    return rows


def profiled(step: Callable[[], None], ours: set[str]) -> tuple[float, list[Other]]:
    """What the profiler sees of one step: milliseconds in our Triton kernels, and everything else."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return split(profiler.key_averages(), ours)


def split(events: Iterable[Any], ours: set[str]) -> tuple[float, list[Other]]:
    """Averages of the profiler (``FunctionEventAvg``) as ``profiled`` returns them, the longest first."""
    # Calls on the CPU carry their kernels' times too, and ranges that a user marked cover kernels: left out.
    kernels = [
        event
        for event in events
        if event.device_type == DeviceType.CUDA
        and event.self_device_time_total > 0
        and not event.is_user_annotation
    ]
    times = [(event.key, event.count, event.self_device_time_total / 1e3) for event in kernels]
    others = sorted((row for row in times if row[0] not in ours), key=lambda row: -row[2])
    return sum(ms for name, _, ms in times if name in ours), others


def read_ceilings(file: Path | None, dtype: str) -> Ceilings | None:
    """A device's own, as the stage environment of benchmarks.gpu has written them; None where it has not."""
    if file is None:
        return None
    try:
        return Ceilings(**json.loads(file.read_text())["ceilings"][dtype])
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{file} has no ceilings for {dtype}: {error!r}", file=sys.stderr)
        return None


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m benchmarks.kernel_times", description=__doc__)
    found.add_argument("--arch", default="resnet50", choices=ARCHITECTURES, metavar="ARCH")
    found.add_argument("--batch", type=int, default=256, help="images a step (default: 256)")
    found.add_argument("--image-size", type=int, default=224, help="pixels of a side (default: 224)")
    found.add_argument("--dtype", default="bf16", choices=list(ELEMENT), help="default: bf16")
    found.add_argument(
        "--backend",
        default="auto",
        choices=("auto", "triton", "vendor"),
        help="what runs a step (default: auto)",
    )
    found.add_argument(
        "--measure", action="store_true", help="this GPU's ceilings, not an H100's for bf16; others always"
    )
    found.add_argument(
        "--ceilings",
        type=Path,
        help="a file of this GPU's ceilings, as the stage environment of benchmarks.gpu"
        " writes it; where it has none they are as without",
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
    known = options.dtype in ("bf16", "fp16") and not options.measure
    ceilings = read_ceilings(options.ceilings, options.dtype)
    ceilings = ceilings or (H100 if known else measure(options.dtype, device))
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
    triton_ms, others = profiled(step, {f"{row.kernel}_kernel" for row in rows})
    print(
        f"{options.arch}, batch {options.batch}, {options.dtype}, {torch.cuda.get_device_name()}; {ceilings}"
    )
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
        found = {
            "header": {
                **header(device, time.monotonic() - begun, {options.dtype: asdict(ceilings)}),
                "arch": options.arch,
                "batch": options.batch,
                "dtype": options.dtype,
                "backend": options.backend,
            },
            "step_ms": whole,
            "triton_ms": triton_ms,
            "rows": [{**asdict(row), "share": row.share} for row in rows],
            "others": [{"kernel": name, "count": count, "ms": ms} for name, count, ms in others],
        }
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Every Triton launch of a training step beside its limit: ``python -m tools.kernel_times [--help]``.

A model trains two steps, in which configurations are chosen; in a third every launch is timed in place, by running it
again with a cold cache. The whole step is measured apart, and what else runs in it is profiled. ``--tune`` only chooses
configurations, ``--profile`` runs the launches that Nsight Compute is to look at.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

from benchmarks.roofline import H100, Ceilings, ceilings_of, limit
from benchmarks.roofline_model import Kernel
from resnet_fused import backend
from resnet_fused.cli.precision import PRECISIONS
from resnet_fused.cli.steps import TrainingStep
from resnet_fused.cli.text import columns
from resnet_fused.kernels.launch import Launch, observe_launches
from resnet_fused.measure import COLD_BYTES, OURS, milliseconds
from resnet_fused.plan import PASSES
from resnet_fused.reference.resnet import ARCHITECTURES

REPETITIONS = 15
#: Cycles, about a millisecond, in which the CPU gets ahead of the GPU, so that launching takes no measured time.
HEAD_START = 2_000_000
#: Steps between two events, so that the CPU runs ahead as it does in training.
STEPS = 5
#: Launches that Nsight Compute looks at: it runs each a dozen times.
PROFILED = 10


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
    groups = [((row.kernel, row.config, row.grid), [row]) for row in rows]
    for kernel in sorted({row.kernel for row in rows}):
        groups.append(((f"all {kernel}", "", ""), [row for row in rows if row.kernel == kernel]))
    heads = ("launches", "MB", "GFLOP", "us", "limit us", "of limit", "lost us")
    lines = [["kernel", "config", "grid", *heads]]
    for names, group in [*groups, (("all", "", ""), rows)]:
        moved, flops, ms, limit_ms = (
            sum(row.count * getattr(row, name) for row in group)
            for name in ("bytes", "flops", "ms", "limit_ms")
        )
        of_limit = limit_ms / ms if ms else 0.0
        cells = [f"{moved / 1e6:.1f}", f"{flops / 1e9:.2f}", f"{1e3 * ms:.1f}", f"{1e3 * limit_ms:.1f}"]
        cells += [f"{of_limit:.0%}{'*' if of_limit < 0.5 else ' '}", f"{1e3 * (ms - limit_ms):.1f}"]
        lines.append([*names, str(sum(row.count for row in group)), *cells])
    return "\n".join(columns(lines, numbers=True))


def observed(step: Callable[[], object], ceilings: Ceilings, device: torch.device) -> list[Row]:
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


def profiled(step: Callable[[], object]) -> list[Any]:
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


def tune(step: Callable[[], object], table_file: Path) -> None:
    """Checks and times all configurations of a step; writes the table of the fastest, also if interrupted."""
    from resnet_fused.kernels.autotune import search

    begun = time.monotonic()
    try:
        step()
        torch.cuda.synchronize()
    finally:
        search.write_table(table_file)
        for key, config, ms in search.entries():
            print(key, config or "vendor", ms)
        counts = ", ".join(f"{name} {count}" for name, count in search.summary().items())
        print(f"{counts}; {time.monotonic() - begun:.0f} s", flush=True)


def profile_largest(step: Callable[[], object]) -> None:
    """Runs ``PROFILED`` launches of a step with the profiler on: one of each group with the largest limit in sum."""
    step()
    step()  # gradients are there
    groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    limits: dict[tuple[Any, ...], float] = defaultdict(float)
    indices = itertools.count()

    def note(launch: Launch) -> None:
        index = next(indices)
        if launch.name in PASSES:
            group = launch.name, launch.config, launch.grid, launch.bytes
            groups[group].append(index)
            limits[group] += limit([Kernel(launch.name, "", "", launch.bytes, launch.flops)], H100)

    with observe_launches(note):
        step()
    largest = sorted(groups, key=lambda group: -limits[group])[:PROFILED]
    counts = {groups[group][0]: len(groups[group]) for group in largest}
    indices = itertools.count()

    def run_if_largest(launch: Launch) -> None:
        if (index := next(indices)) in counts:
            torch.cuda.synchronize()
            operands = (
                f"{launch.bytes / 1e6:.1f} MB {launch.flops / 1e9:.1f} GFLOP, {counts[index]} in a step"
            )
            print(f"{launch.name} {launch.config} grid {launch.grid} {operands}", flush=True)
            torch.cuda.profiler.start()
            launch.run()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()

    with observe_launches(run_if_largest):
        step()
    torch.cuda.synchronize()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.kernel_times", description=__doc__)
    parser.add_argument("--arch", default="resnet50", choices=ARCHITECTURES, metavar="ARCH")
    parser.add_argument("--batch", type=int, default=256, help="images per step (default: 256)")
    parser.add_argument("--image-size", type=int, default=224, help="height and width (default: 224)")
    parser.add_argument("--dtype", default="bf16", choices=list(PRECISIONS), help="default: bf16")
    parser.add_argument("--backend", default="auto", choices=("auto", "triton", "vendor"))
    parser.add_argument("--tune", type=Path, metavar="FILE", help="tune, write the table, and no more")
    parser.add_argument(
        "--profile", action="store_true", help="for ncu --profile-from-start off, with Triton"
    )
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("kernel_times needs a CUDA device and this machine has none", file=sys.stderr)
        return 2
    torch.backends.cudnn.allow_tf32 = options.dtype == "tf32"
    precision = "fp32" if options.dtype == "tf32" else options.dtype
    training = TrainingStep(options.arch, options.batch, options.image_size, precision, "cuda")
    step = training.one_step(training.model(OURS))
    with backend("triton" if options.profile else options.backend):
        if options.tune:
            tune(step, options.tune)
        elif options.profile:
            profile_largest(step)
        else:
            _show(options, step)
    return 0


def _show(options: argparse.Namespace, step: Callable[[], object]) -> None:
    device = torch.device("cuda")
    ceilings = ceilings_of(options.dtype, device)
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

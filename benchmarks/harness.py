"""Timing A beside B: interleaved in one process, medians of pairs, outputs checked before a ratio counts."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import resnet_fused

#: Images of a batch; a GPU wants more than a CPU has time for.
BATCH = int(os.environ.get("RESNET_FUSED_BENCH_BATCH", "16"))


@dataclass
class Comparison:
    """Paired timings of two implementations of one thing, in milliseconds; ``baseline`` is what the first one is."""

    layer: str
    name: str
    mode: str
    dtype: str
    batch: int
    shape: str
    baseline: str = "eager_channels_last"
    eager_ms: list[float] = field(default_factory=list)
    fused_ms: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """eager / fused of each pair, ascending: above 1 the fused one is faster."""
        return sorted(eager / fused for eager, fused in zip(self.eager_ms, self.fused_ms, strict=True))

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    def spread(self) -> tuple[float, float]:
        """20th and 80th percentile of the ratios."""
        return quantile(self.ratios, 0.2), quantile(self.ratios, 0.8)

    def rows(self) -> list[dict[str, Any]]:
        """One row per implementation, as results files hold them; only checked comparisons get here."""
        shared = {k: v for k, v in asdict(self).items() if k not in ("baseline", "eager_ms", "fused_ms")}
        low, high = self.spread()
        return [
            {
                **shared,
                "impl": impl,
                "median_ms": statistics.median(times),
                "p20_ms": quantile(sorted(times), 0.2),
                "p80_ms": quantile(sorted(times), 0.8),
                "checked": True,
                **(
                    {"ratio": self.ratio, "ratio_p20": low, "ratio_p80": high, "against": self.baseline}
                    if impl == "resnet_fused"
                    else {}
                ),
            }
            for impl, times in ((self.baseline, self.eager_ms), ("resnet_fused", self.fused_ms))
        ]


def quantile(ascending: list[float], q: float) -> float:
    """The q-quantile of sorted values, by linear interpolation."""
    position = q * (len(ascending) - 1)
    below = int(position)
    above = min(below + 1, len(ascending) - 1)
    return ascending[below] + (position - below) * (ascending[above] - ascending[below])


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """One run, by CUDA events on a GPU and by the wall clock on a CPU; or the seconds that ``run`` itself returns."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        found = run()
        end.record()
        end.synchronize()
        return found * 1e3 if isinstance(found, float) else start.elapsed_time(end)
    begin = time.perf_counter()
    found = run()
    taken = time.perf_counter() - begin
    return (found if isinstance(found, float) else taken) * 1e3


def header(device: torch.device) -> dict[str, Any]:
    """What a results file says about where its rows come from."""

    def git(*arguments: str) -> str:
        if shutil.which("git") is None:
            return ""
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD")
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "resnet_fused": resnet_fused.__version__,
        "commit": commit,
        # Outside a repository git says nothing of changes either.
        "clean": commit != "" and not git("status", "--porcelain", "--untracked-files=no"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    models = [
        line.partition(":")[2].strip()
        for line in (
            Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
        )
        if line.startswith("model name")
    ]
    return f"{models[0] if models else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"


def write_results(path: Path, device: torch.device, comparisons: list[Comparison]) -> None:
    """One JSON file: the header and a row per implementation measured."""
    rows = [row for comparison in comparisons for row in comparison.rows()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"header": header(device), "rows": rows}, indent=1) + "\n")


def table(comparisons: list[Comparison]) -> str:
    """The comparisons as aligned text, with the geometric mean of each group of the same name and mode."""
    lines = [f"{'':44}{'shape':>20}{'eager ms':>10}{'fused ms':>10}{'eager/fused':>13}{'p20 - p80':>15}"]
    groups: dict[str, list[float]] = {}
    for c in comparisons:
        low, high = c.spread()
        label = f"{c.name} {c.mode} {c.dtype}" + (" (compiled)" if c.baseline.startswith("compile") else "")
        groups.setdefault(label, []).append(c.ratio)
        eager, fused = statistics.median(c.eager_ms), statistics.median(c.fused_ms)
        lines.append(
            f"{label:44}{c.shape:>20}{eager:10.2f}{fused:10.2f}{c.ratio:12.2f}x{low:8.2f} - {high:.2f}"
        )
    for label, ratios in groups.items():
        if len(ratios) > 1:
            mean = statistics.geometric_mean(ratios)
            lines.append(
                f"{label:44}{'geometric mean':>20}{'':20}{mean:12.2f}x{'worst':>8} {min(ratios):.2f}x"
            )
    return "\n".join(lines)

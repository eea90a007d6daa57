"""benchmarks/gpu.sh and kernel_times where there is no GPU: what they refuse, and what they make of results."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import kernel_times
from benchmarks.kernel_times import Row, grouped, split, table, timed
from benchmarks.roofline import Ceilings
from resnet_fused.kernels.launch import Config, Launch
from tests import gpu_small

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
#: Stands for a Python that sees a GPU; whatever runs ``tests/ops`` fails.
PRETENDER = """#!/bin/sh
case "$*" in *tests/ops*) echo "no such luck"; exit 1 ;; esac
echo "ran $*"
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), *arguments], capture_output=True, text=True, env=os.environ | environment, timeout=60
    )


def rows_of(summary: Path) -> list[list[str]]:
    return [line.split()[:2] for line in summary.read_text().splitlines()]


def test_usage(tmp_path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPT)], check=False).returncode == 0
    assert run().returncode == 2
    unknown = run(str(tmp_path / "out"), "kernels", "nonsense")
    assert unknown.returncode == 2 and "unknown stage nonsense: choose some of build tests" in unknown.stderr


@without_gpu
def test_needs_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    refused = run(str(out), "kernels", "train", PYTHON=sys.executable)
    assert refused.returncode == 3 and "needs a GPU" in refused.stderr
    assert rows_of(out / "summary.txt") == [["stage", "status"], ["kernels", "no-gpu"], ["train", "no-gpu"]]
    assert kernel_times.main([]) == 2 and "needs a CUDA device" in capsys.readouterr().err
    assert gpu_small.main() == 2 and "needs a CUDA device" in capsys.readouterr().err


def test_a_stage_that_fails_does_not_keep_others_from_running(tmp_path: Path) -> None:
    pretender = tmp_path / "python"
    pretender.write_text(PRETENDER)
    pretender.chmod(0o755)
    out = tmp_path / "out"
    done = run(str(out), "ops", "kernels", "record400", "train", PYTHON=str(pretender))
    assert done.returncode == 1, done.stderr
    rows = rows_of(out / "summary.txt")
    assert rows == [
        ["stage", "status"],
        ["ops", "failed"],
        ["kernels", "passed"],
        ["record400", "passed"],
        ["train", "passed"],
    ]
    assert "ran -m benchmarks.kernel_times --arch resnet50" in done.stdout
    assert "--impls resnet_fused,eager_channels_last,compile_max_autotune" in done.stdout
    left = sorted(path.name for path in out.iterdir())
    assert left == ["logs.tar.gz", "summary.txt"]


def launch(size: int, flops: int) -> Launch:
    def some_kernel() -> None: ...

    return Launch(
        some_kernel, (3, 2), {"x": torch.empty(size, dtype=torch.uint8), "y": None}, {}, Config(), flops
    )


def test_rows_are_grouped_and_sorted_by_what_they_lose() -> None:
    ceilings = Ceilings(bandwidth=1e6, flops=1e9)
    memory_bound = timed(launch(1000, 10), ceilings, lambda run: 2.0)
    assert (memory_bound.kernel, memory_bound.grid, memory_bound.limit_ms) == ("some", "3x2", 1.0)
    assert memory_bound.share == 0.5
    compute_bound = timed(launch(10, 10**6), ceilings, lambda run: 5.0)
    assert compute_bound.limit_ms == pytest.approx(1.0)
    slower = timed(launch(1000, 10), ceilings, lambda run: 4.0)
    rows = grouped([memory_bound, compute_bound, slower, slower])
    assert [(row.count, row.ms) for row in rows] == [(3, 4.0), (1, 5.0)]
    lines = table(rows).splitlines()
    assert "25%*" in lines[1] and "20%*" in lines[2] and lines[-1].startswith("all")
    assert isinstance(rows[0], Row) and rows[0].lost_ms == 9.0
    assert table([]).splitlines()[-1].startswith("all")  # nothing launched: no division by zero


def test_what_the_profiler_saw_is_split() -> None:
    def event(
        key: str, us: float, kind: DeviceType = DeviceType.CUDA, marked: bool = False
    ) -> SimpleNamespace:
        return SimpleNamespace(
            key=key, count=2, self_device_time_total=us, device_type=kind, is_user_annotation=marked
        )

    events = [
        event("some_kernel", 3000.0),
        event("vendor_gemm", 1000.0),
        event("Memset", 2000.0),
        event("cudaLaunchKernel", 500.0, DeviceType.CPU),
        event("Optimizer.step", 9000.0, marked=True),
        event("never_ran", 0.0),
    ]
    assert split(events, {"some_kernel"}) == (3.0, [("Memset", 2, 2.0), ("vendor_gemm", 2, 1.0)])

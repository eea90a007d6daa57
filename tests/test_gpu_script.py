"""benchmarks/gpu.sh and kernel_times where there is no GPU: what they refuse, and what they make of results."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import kernel_times
from benchmarks.kernel_times import Row, grouped, table, timed
from benchmarks.roofline import Ceilings
from resnet_fused.kernels.launch import Config, Launch

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


def test_usage(tmp_path: Path) -> None:
    assert run().returncode == 2
    unknown = run(str(tmp_path / "out"), "kernels", "nonsense")
    assert unknown.returncode == 2 and "unknown stage nonsense: choose some of build tests" in unknown.stderr


@without_gpu
def test_needs_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused = run(str(tmp_path / "out"), PYTHON="python")
    assert refused.returncode == 3 and "needs a GPU" in refused.stderr
    assert kernel_times.main([]) == 2 and "needs a CUDA device" in capsys.readouterr().err


def test_a_stage_that_fails_does_not_keep_others_from_running(tmp_path: Path) -> None:
    pretender = tmp_path / "python"
    pretender.write_text(PRETENDER)
    pretender.chmod(0o755)
    out = tmp_path / "out"
    done = run(str(out), "ops", "kernels", "train", PYTHON=str(pretender))
    assert done.returncode == 1, done.stderr
    rows = [line.split()[:2] for line in (out / "summary.txt").read_text().splitlines()]
    assert rows == [["stage", "status"], ["ops", "failed"], ["kernels", "passed"], ["train", "passed"]]
    assert "ran -m benchmarks.kernel_times --arch resnet50" in done.stdout
    left = sorted(path.name for path in out.iterdir())
    assert left == ["environment.txt", "logs.tar.gz", "summary.txt"]


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

"""kernel_times where there is no GPU: what it refuses, and what it makes of results."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks.roofline import Ceilings
from resnet_fused.kernels.launch import Config, Launch
from tests import gpu_small
from tools import kernel_times
from tools.kernel_times import grouped, split, table, timed


def test_needs_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert kernel_times.main([]) == 2 and "needs a CUDA device" in capsys.readouterr().err
    assert gpu_small.main([]) == 2 and "needs a CUDA device" in capsys.readouterr().err


def launch(size: int, flops: int) -> Launch:
    def some_kernel() -> None: ...

    return Launch(
        some_kernel, (3, 2), {"x": torch.empty(size, dtype=torch.uint8), "y": None}, {}, Config(), flops
    )


def test_rows_are_grouped_and_sorted_by_what_they_lose() -> None:
    ceilings = Ceilings(bandwidth=1e6, flops=1e9)
    memory_bound = timed(launch(1000, 10), ceilings, lambda run: 2.0)
    assert (memory_bound.kernel, memory_bound.grid, memory_bound.limit_ms) == ("some", "3x2", 1.0)
    compute_bound = timed(launch(10, 10**6), ceilings, lambda run: 5.0)
    assert compute_bound.limit_ms == pytest.approx(1.0)
    slower = timed(launch(1000, 10), ceilings, lambda run: 4.0)
    rows = grouped([memory_bound, compute_bound, slower, slower])
    assert [(row.count, row.ms) for row in rows] == [(3, 4.0), (1, 5.0)]
    lines = table(rows).splitlines()
    assert "25%*" in lines[1] and "20%*" in lines[2] and lines[-1].startswith("all")
    assert rows[0].lost_ms == 9.0
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


def test_the_launches_that_are_profiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each group over activations one, those with the largest limit in sum."""
    ran: list[tuple[str, int, bool]] = []
    profiling = [False]
    launches = [
        ("conv_bn_stats", 1, 4), ("sum", 1, 99), ("dgrad", 1, 5), ("conv_bn_stats", 1, 4), ("wgrad", 1, 1),
        ("conv_bn_stats", 2, 7), ("wgrad", 1, 1),
    ]  # fmt: skip

    def step() -> None:
        for name, programs, flops in launches:
            kernel = SimpleNamespace(__name__=f"{name}_kernel")
            Launch(kernel, (programs,), {"x": x}, {}, Config(), flops=flops * 10**12).start()

    x = torch.empty(1, device="meta")
    monkeypatch.setattr(kernel_times, "PROFILED", 3)
    monkeypatch.setattr(Launch, "run", lambda self: ran.append((self.name, *self.grid, profiling[-1])))
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    monkeypatch.setattr("torch.cuda.profiler.start", lambda: profiling.append(True))
    monkeypatch.setattr("torch.cuda.profiler.stop", lambda: profiling.append(False))
    kernel_times.profile_largest(step)
    assert ran == [("conv_bn_stats", 1, True), ("dgrad", 1, True), ("conv_bn_stats", 2, True)]


def test_an_interrupted_search_leaves_its_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    search = "resnet_fused.kernels.autotune.search"
    monkeypatch.setattr(f"{search}.write_table", lambda path: path.write_text("{}"))
    monkeypatch.setattr(f"{search}.entries", list)
    monkeypatch.setattr(f"{search}.summary", lambda: {"tuning keys": 3})

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kernel_times.tune(interrupted, tmp_path / "tuned.json")
    assert os.listdir(tmp_path) == ["tuned.json"]
    assert "tuning keys 3; 0 s" in capsys.readouterr().out

"""How long something takes, what it holds, and on what machine: shared by `bench` and the benchmark suite."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from resnet_fused._version import __version__


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """One run: by events of the current stream on a GPU, by the wall clock on a CPU."""
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(stream)
        run()
        end.record(stream)
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e3


def quantile(ascending: list[float], q: float) -> float:
    """The q-quantile of sorted values, of which there is at least one, by linear interpolation."""
    position = q * (len(ascending) - 1)
    below = int(position)
    above = min(below + 1, len(ascending) - 1)
    return ascending[below] + (position - below) * (ascending[above] - ascending[below])


class Memory:
    """The most memory held at once, above what is held when this is made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before: int | None = None
        if device.type == "cuda":
            self.before = torch.cuda.memory_allocated(device)
        elif sys.platform == "linux":
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
            if trim:
                trim(0)
            resident = int(Path("/proc/self/statm").read_text().split()[1])
            self.before = resident * os.sysconf("SC_PAGE_SIZE")

    def start(self) -> None:
        """Forgets the peak so far."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.before is not None:
            try:
                Path("/proc/self/clear_refs").write_text("5")
            except OSError:  # some sandboxes have none
                self.before = None

    def peak_mb(self) -> float | None:
        """Since `start`, in 1e6 bytes; None where this system does not say."""
        if self.before is None:
            return None
        if self.device.type == "cuda":
            return (torch.cuda.max_memory_allocated(self.device) - self.before) / 1e6
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
        return (peak - self.before) / 1e6


def quantiles(ascending: list[float], *names: str) -> dict[str, float | None]:
    """Median, 20th and 80th percentile of sorted values under the three names; None of nothing."""
    return {
        name: quantile(ascending, q) if ascending else None
        for name, q in zip(names, (0.5, 0.2, 0.8), strict=True)
    }


def header(
    device: torch.device, seconds: float, ceilings: dict[str, dict[str, float]] | None = None
) -> dict[str, Any]:
    """What a results file says about where its rows come from.

    Args:
        device: what was measured on.
        seconds: how long the run took.
        ceilings: by dtype, what the device reaches: `bandwidth` in bytes/s and `flops` in operations/s.
    """
    driver, clocks = _driver_and_clocks(device) if device.type == "cuda" else (None, None)
    commit, clean = _commit()
    has_triton = importlib.util.find_spec("triton") is not None
    return {
        "device": device_name(device),
        "device_type": device.type,
        "driver": driver,
        "clocks": clocks,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__ if has_triton else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.version.cuda else None,
        "resnet_fused": __version__,
        "commit": commit,
        "clean": clean,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "ceilings": ceilings or {},
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the instructions that PyTorch uses on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"


def _driver_and_clocks(device: torch.device) -> tuple[str | None, dict[str, int] | None]:
    """The driver's version and the clocks right now, as nvidia-smi says; None for what it does not."""
    # By its identity: nvidia-smi counts all GPUs, torch those in CUDA_VISIBLE_DEVICES.
    identity = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = "--query-gpu=driver_version,clocks.sm,clocks.mem"
    found = _said(["nvidia-smi", "-i", identity, query, "--format=csv,noheader,nounits"])
    driver, *clocks = (part.strip() for part in found.split(","))
    known = len(clocks) == 2 and all(clock.isdecimal() for clock in clocks)
    return driver or None, {"sm_mhz": int(clocks[0]), "memory_mhz": int(clocks[1])} if known else None


def _commit() -> tuple[str, bool]:
    """The commit of the checkout that this package lies in, and whether no tracked file differs; else empty."""
    package = Path(__file__).parents[1]
    git = ["git", "-C", str(package)]
    # An environment inside another project's checkout is not tracked by it, or not at this place.
    if _said([*git, "ls-files", "--full-name", "__init__.py"]) != f"{package.name}/__init__.py":
        return "", False
    return _said([*git, "rev-parse", "HEAD"]), not _said(
        [*git, "status", "--porcelain", "--untracked-files=no"]
    )


def _said(command: list[str]) -> str:
    """What a program prints; empty where it is not installed or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""

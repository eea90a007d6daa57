"""Interleaved timing, memory, accuracy checks and result headers, for `python -m resnet_fused bench` and benchmarks/.

A `Comparison` times providers in turns in one process, so that a change of clock frequency or load meets all of them.
`check_accuracy` holds what they compute to the accuracy rule against float64 first: only what passed has a ratio.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_fused._version import __version__
from resnet_fused.accuracy import limit, relative_error

#: Providers that must run; whatever goes wrong with another one is a note in its row.
OURS, EAGER = "resnet_fused", "eager_channels_last"
#: The float64 computation among the names of providers.
EXACT = "exact"
#: The inputs of an accuracy check.
SEEDS = (0, 1, 2, 3, 4)
#: More than the L2 cache of any GPU: written before a run that must find nothing there.
COLD_BYTES = 256 << 20
#: GPU cycles, about 5 ms, that hide the time the processor needs to launch a run.
HEAD_START = 10_000_000

Progress = Callable[[float, str], None]


# Timing.


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """One run, by CUDA events on a GPU and by the wall clock on a CPU.

    torch.utils.benchmark.Timer runs its statement twice before it times it, which would double the cost of a round.
    """
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


def quantiles(
    values: Sequence[float], names: Sequence[str] = ("median", "p20", "p80")
) -> dict[str, float | None]:
    """Median, 20th and 80th percentile under three names; None for no values."""
    if not values:
        return dict.fromkeys(names)
    fifths = statistics.quantiles([*values] * (2 if len(values) == 1 else 1), n=5, method="inclusive")
    return dict(zip(names, (statistics.median(values), fifths[0], fifths[3]), strict=True))


@dataclass(frozen=True)
class Case:
    """What is compared: columns of a results file."""

    layer: str  # "model", "block" or "op"
    name: str
    mode: str
    dtype: str
    batch: int
    shape: str  # of the input, NxCxHxW
    roofline_ms: float | None = None  # the shortest time that the device allows


@dataclass
class Provider:
    """One implementation."""

    name: str
    run: Callable[[], object] | None = None  # None where it is missing or failed
    note: str = ""  # why it is missing, or why its results were rejected
    peak_mb: float | None = None  # peak memory, in 1e6 bytes
    first_step_ms: float | None = None  # in a fresh process
    times: list[float] = field(default_factory=list)  # milliseconds, one per round

    @property
    def checked(self) -> bool:
        """Whether it runs and its results passed the accuracy check."""
        return self.run is not None and not self.note


@dataclass
class Comparison:
    """Providers of one case, timed in turns.

    Args:
        repeats: runs that are timed together; a time is of one of them.
        cold_cache: on a GPU, empties the L2 cache before each run and hides the time of launching.
    """

    case: Case
    providers: list[Provider]
    device: torch.device
    repeats: int = 1
    cold_cache: bool = False

    def __getitem__(self, name: str) -> Provider:
        return next(provider for provider in self.providers if provider.name == name)

    @property
    def ours(self) -> Provider:
        return self[OURS]

    def warm_up(self, measure_peak: bool = False) -> None:
        """One run each. Fills in ``peak_mb`` of a GPU where asked, above what was allocated before the run."""
        for provider in self.providers:
            if provider.run is None:
                continue
            try:
                self._time(provider)
            except Exception as error:
                provider.run, provider.note = None, failure(provider.name, error)
                continue
            if measure_peak and self.device.type == "cuda":
                memory = Memory(self.device)
                memory.start()
                provider.run()
                provider.peak_mb = memory.peak_mb()

    def rounds(self, count: int) -> Iterator[int]:
        """Times each provider once per round and yields the round's number; the order rotates from round to round."""
        for done in range(count):
            running = [provider for provider in self.providers if provider.run]
            first = done % max(1, len(running))
            for provider in running[first:] + running[:first]:
                provider.times.append(self._time(provider))
            yield done + 1

    def _time(self, provider: Provider) -> float:
        assert provider.run
        run = provider.run
        if self.cold_cache and self.device.type == "cuda":
            torch.empty(COLD_BYTES, dtype=torch.uint8, device=self.device).zero_()
            torch.cuda._sleep(HEAD_START)
        return milliseconds(lambda: [run() for _ in range(self.repeats)], self.device) / self.repeats

    def ratios(self, provider: Provider, other: Provider) -> list[float]:
        """Time of ``other`` / time of ``provider``, round by round; empty unless both passed the accuracy check."""
        if provider is other or not (provider.checked and other.checked):
            return []
        return [theirs / own for own, theirs in zip(provider.times, other.times, strict=False)]

    def rows(self) -> list[dict[str, Any]]:
        """One row of a results file per provider; ``ratio``: its time / ours."""
        return [
            {
                **asdict(self.case),
                "impl": provider.name,
                **quantiles(provider.times, ("median_ms", "p20_ms", "p80_ms")),
                "rounds": len(provider.times),
                "peak_mb": provider.peak_mb,
                "first_step_ms": provider.first_step_ms,
                "checked": provider.checked and bool(provider.times),
                **quantiles(self.ratios(self.ours, provider), ("ratio", "ratio_p20", "ratio_p80")),
                "note": provider.note,
            }
            for provider in self.providers
        ]


def failure(name: str, error: Exception) -> str:
    """Why a provider can't run, in one line; errors of OURS and EAGER other than lack of memory are raised again."""
    if name in (OURS, EAGER) and not isinstance(error, torch.OutOfMemoryError):
        raise error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # The first line of a torch.compile error only names the backend that raised the next one.
    first = next((line for line in lines if not line.endswith("raised:")), "")
    return f"{type(error).__name__}: {first}"[:200]


# Memory.


class Memory:
    """Peak memory above what is in use when this is made: PyTorch's on a GPU, the process's resident set on Linux."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before: int | None = None
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            self.before = torch.cuda.memory_allocated(device)
        elif sys.platform == "linux":
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
            if trim:
                trim(0)
            resident = int(Path("/proc/self/statm").read_text().split()[1])
            self.before = resident * os.sysconf("SC_PAGE_SIZE")

    def start(self) -> None:
        """Resets the peak."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.before is not None:
            try:
                Path("/proc/self/clear_refs").write_text("5")
            except OSError:  # some sandboxes have none
                self.before = None

    def peak_mb(self) -> float | None:
        """Since `start`, in 1e6 bytes; None where the system does not say."""
        if self.before is None:
            return None
        if self.device.type == "cuda":
            return (torch.cuda.max_memory_allocated(self.device) - self.before) / 1e6
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
        return (peak - self.before) / 1e6


@contextlib.contextmanager
def saved_storages(*excluded: Tensor) -> Iterator[dict[int, int]]:
    """Bytes of each storage that autograd saves for backward, by address, without the storages of ``excluded``.

    Addresses are valid while the graph is alive.
    """
    own = {x.untyped_storage().data_ptr() for x in excluded}
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield saved


# Accuracy.

#: The results of a provider, by its name, on the inputs of one seed.
Results = Callable[[str], Sequence[Tensor]]


def inaccuracy(errors: Sequence[Sequence[float]], eager: Sequence[Sequence[float]], eps: float) -> str:
    """Which result breaks the accuracy rule, or "". Both are lists by seed of one relative error per result.

    Seeds disagree by orders of magnitude where a single ReLU whose input rounds to the other side of zero decides the
    error of a whole gradient, eager's as well. So twice the standard error of the ratio of the two means is allowed.
    """
    for i, (own, other) in enumerate(zip(zip(*errors, strict=True), zip(*eager, strict=True), strict=True)):
        # An error counts as at least eager's smallest: one exact result does not make up for wrong ones.
        least = max(min(other), eps / 16)
        logs = [[math.log(max(error, least)) for error in side] for side in (own, other)]
        error, eager_error = (math.exp(statistics.fmean(side)) for side in logs)
        allowed = limit(eager_error, eps)
        if math.isfinite(error) and math.isfinite(allowed):
            spread = statistics.stdev(x - y for x, y in zip(*logs, strict=True))
            allowed *= math.exp(2 * spread / math.sqrt(len(own)))
        if not (math.isfinite(allowed) and error <= allowed):
            return f"wrong result {i}: the relative error is {error:.2g}, and {allowed:.2g} is allowed"
    return ""


def check_accuracy(
    draw: Callable[[int], Results],
    names: Iterable[str],
    eps: float,
    seeds: Sequence[int] = SEEDS,
    progress: Progress = lambda done, what: None,
) -> dict[str, str]:
    """Holds providers to e <= 1.5 * e_eager + 4 * eps, with errors relative to float64.

    Both errors are geometric means over the seeds, see `inaccuracy`; eager's first result must be right to 10 %.

    Args:
        draw: makes the inputs of a seed; what it returns gives the results for EXACT, for EAGER and for each name.
        names: of the providers.

    Returns:
        What is wrong with each provider, or "".
    """
    names = [EAGER, *(name for name in names if name != EAGER)]
    notes: dict[str, str] = {}
    errors: dict[str, list[list[float]]] = {name: [] for name in names}
    for count, seed in enumerate(seeds):
        progress(count / len(seeds), "float64")
        results = draw(seed)
        try:
            # Float64 convolutions are too slow to try several algorithms of each.
            with torch.backends.cudnn.flags(enabled=True, benchmark=False):
                exact = results(EXACT)
        except torch.OutOfMemoryError:
            return dict.fromkeys(names, "not checked: not enough memory for float64, try a smaller batch")
        for i, name in enumerate(names, 1):
            progress((count + i / (1 + len(names))) / len(seeds), name)
            if name in notes:
                continue
            try:
                errors[name].append([relative_error(x, y) for x, y in zip(results(name), exact, strict=True)])
            except Exception as error:
                notes[name] = failure(name, error)
    if EAGER in notes:
        return {name: notes.get(name, "not checked: eager PyTorch failed") for name in names}
    output = statistics.geometric_mean(max(of_seed[0], eps / 16) for of_seed in errors[EAGER])
    if not output <= 0.1 + 4 * eps:
        notes[EAGER] = f"wrong result 0: the relative error is {output:.2g}"
    return {name: notes.get(name) or inaccuracy(errors[name], errors[EAGER], eps) for name in names}


# The header of a results file.


def header(
    device: torch.device, seconds: float, ceilings: dict[str, dict[str, float]] | None = None
) -> dict[str, Any]:
    """What a results file says about where its rows come from.

    Args:
        device: that was measured.
        seconds: that the run took.
        ceilings: by dtype, what the device reaches: ``bandwidth`` in bytes/s and ``flops`` in operations/s.
    """
    driver, clocks = _driver_and_clocks(device) if device.type == "cuda" else (None, None)
    commit, clean = _commit()
    return {
        "device": device_name(device),
        "device_type": device.type,
        "driver": driver,
        "clocks": clocks,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.version.cuda else None,
        "resnet_fused": __version__,
        "commit": commit,
        "clean": clean,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "ceilings": ceilings or {},
    }


def triton_version() -> str | None:
    """None where it is not installed."""
    return importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else None


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the instruction set that PyTorch uses on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"


def _driver_and_clocks(device: torch.device) -> tuple[str | None, dict[str, int] | None]:
    """The driver's version and the clocks right now, as nvidia-smi says; None for what it does not."""
    # By UUID: nvidia-smi counts all GPUs, torch those in CUDA_VISIBLE_DEVICES.
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = "--query-gpu=driver_version,clocks.sm,clocks.mem"
    output = _output(["nvidia-smi", "-i", uuid, query, "--format=csv,noheader,nounits"])
    driver, *clocks = (part.strip() for part in output.split(","))
    known = len(clocks) == 2 and all(clock.isdecimal() for clock in clocks)
    return driver or None, {"sm_mhz": int(clocks[0]), "memory_mhz": int(clocks[1])} if known else None


def _commit() -> tuple[str, bool]:
    """The commit of this package's checkout, and whether its tracked files are unchanged; "" outside a checkout."""
    package = Path(__file__).parent
    git = ["git", "-C", str(package)]
    # An environment inside another project's checkout is not tracked by it, or not at this path.
    if _output([*git, "ls-files", "--full-name", "__init__.py"]) != f"{package.name}/__init__.py":
        return "", False
    changes = _output([*git, "status", "--porcelain", "--untracked-files=no"])
    return _output([*git, "rev-parse", "HEAD"]), not changes


def _output(command: list[str]) -> str:
    """What a program prints; "" where it is not installed or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""

"""What runs a kernel for a shape: which of its Triton configurations, or the vendor's library. Measured at first use.

What was measured is looked for in this order: this process's memory, the table that is shipped for the device, the
cache on disk. The ranks of a distributed job agree through its store: whoever asks first answers for all, so that a
model's sums are made in the same order everywhere. Nothing in it is a collective: a rank that never asks hangs nobody.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import statistics
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
import triton
from triton.runtime.errors import OutOfResources, PTXASError

from resnet_fused.backend import choice
from resnet_fused.kernels import tuning_files
from resnet_fused.kernels.launch import Config, Launch, holding_back
from resnet_fused.kernels.tuning_files import Problem, Times

#: A device's name, a problem, and whether it might be measured when it was asked for.
_Key = tuple[str, Problem, bool]

ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "tf32": 4}
#: Candidates that are compiled for a problem; compiling is what takes long.
MOST = 8
ROUNDS = 3
#: For all rounds of one candidate.
MILLISECONDS = 5.0
MOST_REPETITIONS = 20
#: About a millisecond, in which the processor gets ahead of the GPU: then launches cost no time that is measured.
_HEAD_START = 2_000_000
#: Of a configuration: it does not compile, or not fit.
_REFUSALS = (OutOfResources, PTXASError, triton.CompilationError)

_log = logging.getLogger("resnet_fused")
_lock = threading.RLock()
_alone: dict[_Key, Times] = {}
#: By process group: what was remembered before there was one could differ between its ranks.
_together: WeakKeyDictionary[dist.ProcessGroup, dict[_Key, Times]] = WeakKeyDictionary()


def choose(
    problem: Problem,
    candidates: Sequence[Config],
    run: Callable[[Config], Any],
    vendor: Callable[[], Any] | None,
    device: torch.device,
) -> Config | None:
    """The configuration to run with; None: the vendor.

    Args:
        candidates: the most promising first, which is taken where nothing is known and nothing can be measured.
        run, vendor: start the work on ``device``; called many times where the problem is measured.

    Raises:
        ValueError: there is nothing to choose from.
    """
    if not candidates:
        if vendor is None:
            raise ValueError(f"{problem}: neither a configuration nor a vendor to choose from")
        return None
    backend = choice()
    if vendor is not None and backend in ("vendor", "reference"):
        return None
    if device.type != "cuda":
        return candidates[0]
    vendor_allowed = vendor is not None and backend == "auto"
    group = _group()
    memory = _alone if group is None else _together.setdefault(group, {})
    name = tuning_files.device_name(device.index)
    times = memory.get((name, problem, True))
    if times is None:
        asked = (name, problem, backend == "auto" and not _is_recording())

        def find() -> Times | None:
            found = tuning_files.look_up(device, problem, candidates, vendor_allowed)
            if found is None and asked[-1]:
                found = _times(problem, candidates, run, vendor, device)
                if found:
                    tuning_files.keep(device, problem, found)
            return found or None

        with _lock:
            if asked not in memory:
                known = find() if group is None else _agree(asked, find)
                memory[asked] = known or ((candidates[0], None),)
            times = memory[asked]
    found = tuning_files.fastest(times, vendor_allowed)
    return candidates[0] if found is None or tuning_files.is_foreign(found[0], candidates) else found[0]


def forget() -> None:
    """Forgets what this process knows, and rereads files; the cache on disk stays."""
    with _lock:
        _alone.clear()
        _together.clear()
        tuning_files.forget()


def entries() -> list[tuple[Problem, Config | None, float | None]]:
    """What is remembered: the fastest of each problem and its milliseconds; None: the vendor, and never timed."""
    return [(problem, *times[0]) for (_, problem), times in _remembered().items()]


def write_table(path: Path, device: torch.device | None = None) -> None:
    """Writes what is remembered of a device, the current one unless told, as a table that can be shipped."""
    device = device or torch.device("cuda", torch.cuda.current_device())
    rows = {
        problem: times
        for (name, problem), times in _remembered().items()
        if name == tuning_files.device_name(device.index) and times[0][1] is not None
    }
    tuning_files.write(path, tuning_files.header(device), rows)


def _remembered() -> dict[tuple[str, Problem], Times]:
    with _lock:
        known = [pair for memory in (_alone, *_together.values()) for pair in memory.items()]
    # What may have been measured wins over what may not.
    return {
        (name, problem): times for (name, problem, _), times in sorted(known, key=lambda pair: pair[0][2])
    }


def _is_recording() -> bool:
    """Whether what is launched now is not run now: waiting for it would break a graph's capture."""
    return torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing()


# Measuring


def _measure(run: Callable[[], Any], device: torch.device, repetitions: int = 1) -> float:
    """Milliseconds of one run. Waits for this stream alone: a collective on another one may wait for other ranks."""
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_HEAD_START)
        start.record()
        for _ in range(repetitions):
            run()
        end.record()
        end.synchronize()
    return float(start.elapsed_time(end)) / repetitions


def _pruned(problem: Problem, candidates: Sequence[Config], device: torch.device) -> list[Config]:
    """The first ``MOST`` that fit into the shared memory; the smallest alone where all seem too large."""

    def shared(config: Config) -> int:
        elements = config.stages * (config.block_m + config.block_n) * config.block_k
        return elements * ELEMENT_BYTES[problem.dtype]

    properties: Any = torch.cuda.get_device_properties(device)  # torch's stubs lack the field
    limit = properties.shared_memory_per_block_optin
    fitting = [config for config in candidates if shared(config) <= limit]
    return fitting[:MOST] or [min(candidates, key=shared)]


@functools.cache
def _announce(device: str) -> None:
    """Once in a process: why a first step takes minutes."""
    _log.warning(
        "choosing kernels for %s: the first step compiles and measures them, which takes minutes; what it finds is"
        " kept in %s for the next time (RESNET_FUSED_BACKEND=triton or vendor does without)",
        device,
        tuning_files.cache_folder(),
    )


def _compile(run: Callable[[Config], Any], configs: Sequence[Config]) -> None:
    """What the runs would compile one after the other, in as many threads as there are processors."""

    def compile_one(launch: Launch) -> None:
        with contextlib.suppress(*_REFUSALS):  # the run that needs it meets it again
            launch.compile()

    with holding_back() as held:
        for config in configs:
            with contextlib.suppress(*_REFUSALS):
                run(config)
    if held:
        with ThreadPoolExecutor(min(len(held), os.cpu_count() or 1)) as pool:
            list(pool.map(compile_one, held))


def _times(
    problem: Problem,
    candidates: Sequence[Config],
    run: Callable[[Config], Any],
    vendor: Callable[[], Any] | None,
    device: torch.device,
) -> Times:
    """Of every candidate that compiles and of the vendor, interleaved so that a changing clock is fair to all."""
    _announce(torch.cuda.get_device_name(device))
    _log.info("measuring %s", problem)
    runs: dict[Config | None, Callable[[], Any]] = {}
    refused: Exception | None = None
    pruned = _pruned(problem, candidates, device)
    _compile(run, pruned)
    for config in pruned:
        try:
            run(config)
        except _REFUSALS as error:
            refused = error
        else:
            runs[config] = functools.partial(run, config)
    if refused is not None and not runs:
        warnings.warn(f"no configuration of {problem} compiles: {refused}", stacklevel=3)
    if vendor is not None:
        vendor()
        runs[None] = vendor
    repetitions = {
        config: max(1, min(MOST_REPETITIONS, int(MILLISECONDS / ROUNDS / max(_measure(one, device), 1e-6))))
        for config, one in runs.items()
    }
    rounds = [
        {config: _measure(one, device, repetitions[config]) for config, one in runs.items()}
        for _ in range(ROUNDS)
    ]
    medians = {config: statistics.median(times[config] for times in rounds) for config in runs}
    return tuning_files.sorted_times(medians.items())


# The ranks of a job


def _group() -> dist.ProcessGroup | None:
    """The ranks that have to agree; None where this process is alone."""
    together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if together else None


def _agree(key: _Key, find: Callable[[], Times | None]) -> Times | None:
    """What the first rank to ask finds; None if it fails, on every other rank and for whoever asks again."""
    from torch.distributed import PrefixStore, distributed_c10d

    name, problem, measures = key
    store = PrefixStore("resnet_fused/tuning", distributed_c10d._get_default_store())
    place = "/".join((name, "measured" if measures else "known", json.dumps(problem)))
    if store.add(f"{place}/claim", 1) != 1:
        answer = json.loads(store.get(f"{place}/answer"))
        if answer["failure"] is not None:
            failed = f"the rank that was to measure it failed with {answer['failure']}"
            tuning_files.warn(place, f"{problem} runs untuned: {failed}")
        return None if answer["times"] is None else tuning_files.times_of(answer["times"])
    failure: str | None = "an interrupt"
    found = None
    try:
        found = find()
        failure = None
    except Exception as error:
        failure = repr(error)
        raise
    finally:  # whatever happened: the others wait for it
        times = None if found is None else tuning_files.rows_of(found)
        store.set(f"{place}/answer", json.dumps({"times": times, "failure": failure}))
    return found

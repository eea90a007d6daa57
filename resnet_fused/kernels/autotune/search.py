"""Chooses what runs a kernel for a shape: one of its Triton configurations, or the vendor's library.

Measured at first use (measurement). Measurements are looked up in this order: this process's memory, the table that is
shipped for the device, the cache on disk (cache). A configuration is timed only after its results have passed the
accuracy rule (verification); a rejection is stored like a time. The ranks of a distributed job agree (ranks), so that
sums are computed in the same order on all of them.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from resnet_fused.backend import choice
from resnet_fused.kernels.autotune import cache, verification
from resnet_fused.kernels.autotune.measurement import MAX_CONFIGS, measure_all
from resnet_fused.kernels.autotune.ranks import agree, process_group
from resnet_fused.kernels.autotune.tunable import Timing, Timings, Tunable, TuningKey
from resnet_fused.kernels.autotune.tunable import dtype_name as dtype_name
from resnet_fused.kernels.autotune.verification import Unverifiable
from resnet_fused.kernels.launch import Config, Launch, capture_launches

#: A device's name, a tuning key, and whether it could be measured when it was asked for.
_MemoryKey = tuple[str, TuningKey, bool]

#: Times that a tuning key is asked for before the vendor runs it for good, because nothing can be verified.
MAX_ATTEMPTS = 10

_log = logging.getLogger("resnet_fused")
_lock = threading.RLock()
_collected: list[Launch] | None = None
_attempts: Counter[_MemoryKey] = Counter()
_single_process: dict[_MemoryKey, Timings] = {}
#: By process group: what was measured before the group existed may differ between its ranks.
_by_group: WeakKeyDictionary[dist.ProcessGroup, dict[_MemoryKey, Timings]] = WeakKeyDictionary()
#: What ``choose_sharing`` chose for a device and tuning keys, with what was known of each key.
_joint_choices: dict[tuple[Any, ...], tuple[list[tuple[Timings, bool]] | None, list[Config | None]]] = {}


def choose(tunable: Tunable, device: torch.device) -> Config | None:
    """The configuration to run with; None for the vendor's implementation."""
    return _options(tunable, *_known(tunable, device))[0].config


def choose_sharing(tunables: Sequence[Tunable], shared: Tunable, device: torch.device) -> list[Config | None]:
    """As ``choose``, for several at once: what takes the least time in sum.

    Args:
        shared: a computation without configurations, whose result the vendor's implementations of ``tunables`` need.
            If any of those is chosen it runs once. Their own times are without it.
    """
    known = [_known(tunable, device) for tunable in tunables]
    cache_key = device, *(tunable.key for tunable in tunables)
    known_before, chosen = _joint_choices.get(cache_key, (None, []))
    if known_before == known:
        return chosen
    options = [_options(tunable, *of_it) for tunable, of_it in zip(tunables, known, strict=True)]
    best = [timings[0] for timings in options]
    shared_timings: Timings = ()
    needs_shared = any(timing.config is None for timing in best) and max(map(len, options)) > 1
    if needs_shared:
        shared_timings = _look_up(shared, device)
        shared_ms = (shared_timings[0].ms or 0.0) if shared_timings else 0.0

        def cost(timings: tuple[Timing, ...]) -> float:
            uses_vendor = any(timing.config is None for timing in timings)
            return sum(timing.ms or 0.0 for timing in timings) + (shared_ms if uses_vendor else 0.0)

        best = [*min(itertools.product(*options), key=cost)]
    chosen = [timing.config for timing in best]
    if all(timings for timings, _ in known) and bool(shared_timings) == needs_shared:
        _joint_choices[cache_key] = known, chosen
    return chosen


def _options(tunable: Tunable, timings: Timings, vendor_allowed: bool) -> list[Timing]:
    """The vendor and the fastest configuration, as far as they are timed and allowed, the faster first.

    Where there is neither the vendor, if it is allowed, else the first configuration that is not rejected.
    """
    options: dict[bool, Timing] = {}
    rejected = set()
    for timing in timings:
        is_vendor = timing.config is None
        if timing.rejection is not None:
            rejected.add(timing.config)
        elif vendor_allowed or not is_vendor:
            options.setdefault(is_vendor, timing)
    if options or vendor_allowed:
        return [*options.values()] or [Timing(None)]
    return [Timing(next((config for config in tunable.configs if config not in rejected), None))]


def _known(tunable: Tunable, device: torch.device) -> tuple[Timings, bool]:
    """What is known of a tuning key, and whether the vendor may be chosen."""
    if not tunable.configs or choice() in ("vendor", "reference"):
        return (), True
    if device.type == "cuda":
        return _look_up(tunable, device), choice() == "auto"
    if _collected is not None:
        with capture_launches() as captured:
            for config in tunable.configs[:MAX_CONFIGS]:
                tunable.run(config)
        _collected.extend(captured)
    return (), False


def _look_up(tunable: Tunable, device: torch.device) -> Timings:
    """From memory, files, or a measurement; empty where nothing is known and it can't be measured now."""
    group = process_group()
    memory = _single_process if group is None else _by_group.setdefault(group, {})
    name = cache.device_name(device.index)
    timings = memory.get((name, tunable.key, True))
    if timings is not None:
        return timings
    may_measure = choice() == "auto" and not _is_recording()
    memory_key = (name, tunable.key, may_measure)

    def load_or_measure() -> Timings | None:
        timings = cache.load(device, tunable.key, tunable.configs)
        if timings is None and may_measure:
            timings = measure_all(tunable, device)
            cache.store(device, tunable.key, timings)
        return timings

    with _lock:
        if memory_key not in memory:
            try:
                timings = load_or_measure() if group is None else agree(*memory_key, load_or_measure)
            except Unverifiable as error:
                _attempts[memory_key] += 1
                level = logging.WARNING if _attempts[memory_key] == 1 else logging.INFO
                _log.log(level, "%s is not measured, the vendor runs it: %s", tunable.key, error)
                if group is None and _attempts[memory_key] < MAX_ATTEMPTS:
                    return ()
                timings = None
            memory[memory_key] = timings or ()
        return memory[memory_key]


def _is_recording() -> bool:
    """Whether launches are recorded, not run: synchronizing would break the capture of a CUDA graph."""
    return torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing()


def forget_measurements() -> None:
    """Clears this process's memory, files that it has read included. The cache on disk stays and is read again."""
    with _lock:
        _single_process.clear()
        _by_group.clear()
        _joint_choices.clear()
        _attempts.clear()
        cache.forget_loaded_files()


@contextmanager
def collect_candidates() -> Iterator[list[Launch]]:
    """In this context the launches that a GPU would measure, for tensors on none, are appended to the list."""
    global _collected
    before, _collected = _collected, []
    try:
        yield _collected
    finally:
        _collected = before


# What this process knows


def entries() -> list[tuple[TuningKey, Config | None, float | None]]:
    """(key, fastest configuration or None for the vendor, its milliseconds or None where nothing was timed)."""
    best = {key: [t for t in timings if t.rejection is None] for (_, key), timings in _memory().items()}
    return [(key, *(timings[0] if timings else Timing(None))[:2]) for key, timings in best.items()]


def summary() -> dict[str, int]:
    """Counts of what this process knows, files included.

    tuning keys that have configurations; configurations that were tried; of these the rejected ones by reason; keys
    for which the vendor is the fastest; keys that were not measured.
    """
    tables = [
        timings for timings in _memory().values() if not timings or any(t.config is not None for t in timings)
    ]
    tried = [t for timings in tables for t in timings if t.config is not None]
    reasons = Counter(t.rejection.partition(":")[0] for t in tried if t.rejection is not None)
    return {
        "tuning keys": len(tables),
        "configurations": len(tried),
        **{reason: reasons[reason] for reason in verification.REASONS},
        "vendor fastest": sum(bool(timings) and timings[0].config is None for timings in tables),
        "not measured": sum(not timings for timings in tables),
    }


def write_table(path: Path, device: torch.device | None = None) -> None:
    """Writes what this process knows of a device, by default the current one, as a table that can be shipped."""
    device = device or torch.device("cuda", torch.cuda.current_device())
    table = {
        key: timings
        for (name, key), timings in _memory().items()
        if name == cache.device_name(device.index) and timings
    }
    cache.write_table(path, cache.header(device), table)


def _memory() -> dict[tuple[str, TuningKey], Timings]:
    with _lock:
        items = [item for memory in (_single_process, *_by_group.values()) for item in memory.items()]
    # Of two entries that of a time when it could be measured counts.
    return {(name, key): timings for (name, key, _), timings in sorted(items, key=lambda item: item[0][2])}

"""What runs a kernel for a shape: which of its Triton configurations, or the vendor's library. Measured at first use.

What was measured is looked for in this order: this process's memory, the table that is shipped for the device, the
cache on disk. A configuration is timed only after its results were held to the accuracy rule (verification); what was
refused is remembered like what was timed. The ranks of a distributed job agree through its store: whoever asks first
answers for all, so that a model's sums are made in the same order everywhere. Nothing in it is a collective: a rank
that never asks hangs nobody.
"""

from __future__ import annotations

import functools
import gc
import itertools
import json
import logging
import os
import statistics
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from resnet_fused.backend import choice
from resnet_fused.kernels.arguments import dtype_name as dtype_name
from resnet_fused.kernels.autotune import cache, verification
from resnet_fused.kernels.autotune.cache import Times, Timing, TuningKey
from resnet_fused.kernels.autotune.heuristics import SHARED
from resnet_fused.kernels.autotune.timing import measure
from resnet_fused.kernels.autotune.verification import Unverifiable, Verifier, refusing
from resnet_fused.kernels.launch import Config, Launch, capture_launches

#: A device's name, a problem, and whether it might be measured when it was asked for.
_Key = tuple[str, TuningKey, bool]

ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "tf32": 4}
#: Candidates that are compiled for a problem; compiling is what takes long.
MOST = 8
ROUNDS = 3
#: For all rounds of one candidate.
MILLISECONDS = 5.0
MOST_REPETITIONS = 20
#: Times that a problem is asked for before it is left to the vendor because its operands verify nothing.
TRIES = 10

_log = logging.getLogger("resnet_fused")
_lock = threading.RLock()
_collected: list[Launch] | None = None
_tries: Counter[_Key] = Counter()
_alone: dict[_Key, Times] = {}
#: What was chosen for several problems of a device, by all that was known of them and whether the vendor was allowed.
_decided: dict[tuple[Any, ...], tuple[list[tuple[Times, bool]] | None, list[Config | None]]] = {}
#: By process group: what was remembered before there was one could differ between its ranks.
_together: WeakKeyDictionary[dist.ProcessGroup, dict[_Key, Times]] = WeakKeyDictionary()


class Tunable(NamedTuple):
    """What a Triton kernel and the vendor's library can do alike.

    Args:
        problem: what it is remembered by.
        candidates: configurations; the first is taken where nothing is known, nothing can be measured, and the vendor
            is not allowed.
        run, vendor: start it on a device; called many times where it is measured. vendor None: there is none.
        exact: the same results in more bits.
    """

    problem: TuningKey
    candidates: Sequence[Config]
    run: Callable[[Config], Any]
    vendor: Callable[[], Any] | None
    exact: Callable[[], Any]


def choose(work: Tunable, device: torch.device) -> Config | None:
    """The configuration to run with; None: the vendor.

    Raises:
        ValueError: there is nothing to choose from.
    """
    times, vendor_allowed = _known(work, device)
    return _chosen(work, times, vendor_allowed)


def choose_sharing(works: Sequence[Tunable], shared: Tunable, device: torch.device) -> list[Config | None]:
    """As ``choose``, for all at once: what takes the least time in sum.

    Args:
        shared: has no candidates. What its vendor makes the vendors of ``works`` need; if any of those is chosen it is
            made, once. Their own times are without it.
    """
    known = [_known(work, device) for work in works]
    key = device, *(work.problem for work in works)
    before, chosen = _decided.get(key, (None, []))
    if before == known:
        return chosen
    ways = [_ways(work, *known_of_it) for work, known_of_it in zip(works, known, strict=True)]
    fastest = [min(timings, key=lambda t: t.ms or 0.0) for timings in ways]
    times: Times = ()
    needs_shared = any(timing.config is None for timing in fastest) and max(map(len, ways)) > 1
    if needs_shared:
        times = _remembered_or_found(shared, device, True)
        extra = (times[0].ms or 0.0) if times else 0.0

        def cost(timings: tuple[Timing, ...]) -> float:
            vendor = any(timing.config is None for timing in timings)
            return sum(timing.ms or 0.0 for timing in timings) + (extra if vendor else 0.0)

        fastest = [*min(itertools.product(*ways), key=cost)]
    chosen = [timing.config for timing in fastest]
    if all(found for found, _ in known) and bool(times) == needs_shared:
        _decided[key] = known, chosen
    return chosen


def _ways(work: Tunable, times: Times, vendor_allowed: bool) -> list[Timing]:
    """The vendor and the fastest configuration, the faster first, as far as they are timed; else what is chosen."""
    ways: dict[bool, Timing] = {}
    for timing in times:
        vendor = timing.config is None
        if timing.ms is None or vendor in ways or (vendor and not vendor_allowed):
            continue
        if not cache.is_foreign(timing.config, work.candidates):
            ways[vendor] = timing
    return [*ways.values()] or [Timing(_chosen(work, times, vendor_allowed))]


def _known(work: Tunable, device: torch.device) -> tuple[Times, bool]:
    """What is known of a problem, and whether the vendor may be chosen."""
    backend = choice()
    if not work.candidates or (work.vendor is not None and backend in ("vendor", "reference")):
        return (), True
    if device.type != "cuda":
        if _collected is not None:
            with capture_launches() as held:
                for config in _pruned(work, device):
                    work.run(config)
            _collected.extend(held)
        return (), False
    vendor_allowed = work.vendor is not None and backend == "auto"
    return _remembered_or_found(work, device, vendor_allowed), vendor_allowed


def _chosen(work: Tunable, times: Times, vendor_allowed: bool) -> Config | None:
    """The fastest; what nothing is known of is the vendor's where that is allowed."""
    found = cache.fastest(times, vendor_allowed)
    if found is not None and not cache.is_foreign(found.config, work.candidates):
        return found.config
    if vendor_allowed and work.vendor is not None:
        return None
    refused = {time.config for time in times if time.refusal is not None}
    first = next((config for config in work.candidates if config not in refused), None)
    if first is None and work.vendor is None:
        raise ValueError(f"{work.problem}: neither a configuration nor a vendor to choose from")
    return first


def _remembered_or_found(work: Tunable, device: torch.device, vendor_allowed: bool) -> Times:
    """Nothing where it is neither known nor may be measured now."""
    group = _group()
    memory = _alone if group is None else _together.setdefault(group, {})
    name = cache.device_name(device.index)
    times = memory.get((name, work.problem, True))
    if times is not None:
        return times
    asked = (name, work.problem, choice() == "auto" and not _is_recording())

    def find() -> Times | None:
        found = cache.look_up(device, work.problem, work.candidates, vendor_allowed)
        if found is None and asked[-1]:
            found = _times(work, device)
            cache.keep(device, work.problem, found)
        return found

    with _lock:
        if asked not in memory:
            try:
                found = find() if group is None else _agree(asked, find)
            except Unverifiable as error:
                _tries[asked] += 1
                level = logging.WARNING if _tries[asked] == 1 else logging.INFO
                _log.log(level, "%s is not measured, the vendor runs it: %s", work.problem, error)
                if group is None and _tries[asked] < TRIES:
                    return ()
                found = None
            memory[asked] = found or ()
        return memory[asked]


def clear_cache() -> None:
    """Forgets what this process knows, and rereads files; the cache on disk stays."""
    with _lock:
        _alone.clear()
        _together.clear()
        _decided.clear()
        _tries.clear()
        cache.clear_cache()


def entries() -> list[tuple[TuningKey, Config | None, float | None]]:
    """What is remembered: the fastest of each problem and its milliseconds; None: the vendor, and never timed."""
    fastest = {
        problem: cache.fastest(times, True) or Timing(None) for (_, problem), times in _remembered().items()
    }
    return [(problem, found.config, found.ms) for problem, found in fastest.items()]


def summary() -> dict[str, int]:
    """Counts of what is remembered, files included.

    problems that have configurations, candidates of them that were tried, those that were refused by why, problems for
    which the vendor is the fastest, and those of which nothing is known.
    """
    tables = [
        times for times in _remembered().values() if not times or any(t.config is not None for t in times)
    ]
    tried = [t for times in tables for t in times if t.config is not None]
    reasons = Counter(t.refusal.partition(":")[0] for t in tried if t.refusal is not None)
    return {
        "problems": len(tables),
        "candidates": len(tried),
        **{reason: reasons[reason] for reason in verification.REASONS},
        "vendor": sum(bool(times) and times[0].config is None for times in tables),
        "unknown": sum(not times for times in tables),
    }


def write_table(path: Path, device: torch.device | None = None) -> None:
    """Writes what is remembered of a device, the current one unless told, as a table that can be shipped."""
    device = device or torch.device("cuda", torch.cuda.current_device())
    rows = {
        problem: times
        for (name, problem), times in _remembered().items()
        if name == cache.device_name(device.index) and times
    }
    cache.write(path, cache.header(device), rows)


def _remembered() -> dict[tuple[str, TuningKey], Times]:
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


def _pruned(work: Tunable, device: torch.device) -> list[Config]:
    """The first ``MOST`` that fit into the shared memory; the smallest alone where all seem too large."""
    if not work.candidates:
        return []

    def shared(config: Config) -> int:
        elements = config.stages * (config.block_m + config.block_n) * config.block_k
        return elements * ELEMENT_BYTES[work.problem.dtype]

    limit = SHARED
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)  # torch's stubs lack the field
        limit = properties.shared_memory_per_block_optin
    fitting = [config for config in work.candidates if shared(config) <= limit]
    return fitting[:MOST] or [min(work.candidates, key=shared)]


@contextmanager
def collect_candidates() -> Iterator[list[Launch]]:
    """Within, what a GPU would try for tensors that are on none is put into the list: launches that are not started."""
    global _collected
    before, _collected = _collected, []
    try:
        yield _collected
    finally:
        _collected = before


@functools.cache
def _announce(device: str) -> None:
    """Once in a process: why a first step takes minutes."""
    _log.warning(
        "choosing kernels for %s: the first step compiles and measures them, which takes minutes; what it finds is"
        " kept in %s for the next time (RESNET_FUSED_BACKEND=triton or vendor does without)",
        device,
        cache.cache_folder(),
    )


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """For threads that compile: in Python 3.11 ``ast.parse`` raises a SystemError where a finalizer that it runs lets
    another thread parse."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _compile(work: Tunable, configs: Sequence[Config], device: torch.device) -> dict[Config, str]:
    """Compiles what the runs would compile one after the other, in as many threads as there are processors.

    Returns:
        Why some do not compile.
    """
    refusals: dict[Config, str] = {}
    launches: list[tuple[Config, Launch]] = []
    for config in configs:
        with refusing(refusals, config, work.problem, device):
            with capture_launches() as held:
                work.run(config)
            launches += [(config, launch) for launch in held]

    def compile_one(pair: tuple[Config, Launch]) -> None:
        config, launch = pair
        with refusing(refusals, config, work.problem, device):
            launch.compile()

    if launches:
        threads = min(len(launches), os.cpu_count() or 1)
        with _without_garbage_collection(), ThreadPoolExecutor(threads) as pool:
            list(pool.map(compile_one, launches))
    return refusals


def _verify(work: Tunable, configs: Sequence[Config], device: torch.device) -> dict[Config, str]:
    """Why some of the configurations are wrong."""
    refusals: dict[Config, str] = {}
    if configs:
        verifier = Verifier(work.exact, work.vendor, verification.EPS[work.problem.dtype], device)
    for config in configs:
        with refusing(refusals, config, work.problem, device):
            verifier.check(functools.partial(work.run, config))
    return refusals


@torch.no_grad()
def _times(work: Tunable, device: torch.device) -> Times:
    """Of every candidate that is right and of the vendor, interleaved so that a changing clock is fair to all.

    Raises:
        Unverifiable: see there.
    """
    problem = work.problem
    _announce(torch.cuda.get_device_name(device))
    _log.info("measuring %s", problem)
    pruned = _pruned(work, device)
    try:
        refusals = _compile(work, pruned, device)
        refusals |= _verify(work, [config for config in pruned if config not in refusals], device)
        medians = _medians(work, [config for config in pruned if config not in refusals], device, refusals)
    except torch.OutOfMemoryError as error:
        raise Unverifiable(str(error)) from None
    if pruned and len(refusals) == len(pruned):
        reason = next(iter(refusals.values()))
        warnings.warn(f"no configuration of {problem} is of use: {reason}", stacklevel=3)
    times = [Timing(config, ms) for config, ms in medians.items()]
    return cache.sorted_times([*times, *(Timing(c, None, why) for c, why in refusals.items())])


def _medians(
    work: Tunable, configs: Sequence[Config], device: torch.device, refusals: dict[Config, str]
) -> dict[Config | None, float]:
    """Milliseconds of configurations and the vendor; what fails now is added to the refusals."""
    runs: dict[Config | None, Callable[[], Any]] = {c: functools.partial(work.run, c) for c in configs}
    if work.vendor is not None:
        runs[None] = work.vendor
    rounds: dict[Config | None, list[float]] = {config: [] for config in runs}
    repetitions: dict[Config | None, int] = {}

    def measure_one(config: Config | None) -> None:
        ms = measure(runs[config], device, repetitions.get(config, 1))
        if config in repetitions:
            rounds[config].append(ms)
        else:
            most = int(MILLISECONDS / ROUNDS / max(ms, 1e-6))
            repetitions[config] = max(1, min(MOST_REPETITIONS, most))

    for _ in range(1 + ROUNDS):
        for config in [config for config in runs if config not in refusals]:
            if config is None:
                measure_one(config)
            else:
                with refusing(refusals, config, work.problem, device):
                    measure_one(config)
    return {config: statistics.median(times) for config, times in rounds.items() if config not in refusals}


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
            cache.warn(place, f"{problem} runs untuned: {failed}")
        return None if answer["times"] is None else cache.times_of(answer["times"])
    failure: str | None = "an interrupt"
    found = None
    try:
        found = find()
        failure = None
    except Exception as error:
        failure = repr(error)
        raise
    finally:  # whatever happened: the others wait for it
        times = None if found is None else cache.rows_of(found)
        store.set(f"{place}/answer", json.dumps({"times": times, "failure": failure}))
    return found

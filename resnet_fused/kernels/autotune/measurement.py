"""Measuring one tuning key: compiles its configurations, verifies their results, times them beside the vendor's."""

from __future__ import annotations

import functools
import gc
import logging
import os
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from resnet_fused.kernels.autotune import cache, verification
from resnet_fused.kernels.autotune.heuristics import SHARED_MEMORY
from resnet_fused.kernels.autotune.timing import measure
from resnet_fused.kernels.autotune.tunable import ELEMENT_BYTES, Timing, Timings, Tunable, sorted_timings
from resnet_fused.kernels.autotune.verification import Unverifiable, Verifier, record_rejection
from resnet_fused.kernels.launch import Config, Launch, capture_launches

#: Configurations that are compiled for a tuning key: compiling takes most of the time.
MAX_CONFIGS = 8
ROUNDS = 3
#: Milliseconds for all rounds of one configuration.
TIME_PER_CONFIG = 5.0
MAX_REPETITIONS = 20

_log = logging.getLogger("resnet_fused")


@torch.no_grad()
def measure_all(tunable: Tunable, device: torch.device) -> Timings:
    """Timings of every configuration whose results are right and of the vendor's implementation.

    Raises:
        Unverifiable: results can't be verified now.
    """
    _announce(torch.cuda.get_device_name(device))
    _log.info("measuring %s", tunable.key)
    configs = configs_to_try(tunable, device)
    try:
        rejections = _compile(tunable, configs, device)
        rejections |= _verify(tunable, [config for config in configs if config not in rejections], device)
        medians = _medians(tunable, [c for c in configs if c not in rejections], device, rejections)
    except torch.OutOfMemoryError as error:
        raise Unverifiable(str(error)) from None
    if configs and len(rejections) == len(configs):
        reason = next(iter(rejections.values()))
        warnings.warn(f"every configuration of {tunable.key} is rejected: {reason}", stacklevel=3)
    timings = [Timing(config, ms) for config, ms in medians.items()]
    return sorted_timings([*timings, *(Timing(config, None, why) for config, why in rejections.items())])


def configs_to_try(tunable: Tunable, device: torch.device) -> list[Config]:
    """The first ``MAX_CONFIGS`` that fit into shared memory; the smallest one where none seems to."""
    if not tunable.configs:
        return []

    def shared_bytes(config: Config) -> int:
        elements = config.stages * (config.block_m + config.block_n) * config.block_k
        return elements * ELEMENT_BYTES[tunable.key.dtype]

    limit = SHARED_MEMORY
    if device.type == "cuda":
        properties: Any = torch.cuda.get_device_properties(device)  # torch's stubs lack the field
        limit = properties.shared_memory_per_block_optin
    fitting = [config for config in tunable.configs if shared_bytes(config) <= limit]
    return fitting[:MAX_CONFIGS] or [min(tunable.configs, key=shared_bytes)]


@functools.cache
def _announce(device: str) -> None:
    """Once in a process: says why a first step takes minutes."""
    _log.warning(
        "autotuning kernels for %s: the first step compiles and measures them, which takes minutes; the measurements"
        " are stored in %s for the next time (RESNET_FUSED_BACKEND=triton or vendor turns autotuning off)",
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


def _compile(tunable: Tunable, configs: Sequence[Config], device: torch.device) -> dict[Config, str]:
    """Compiles in parallel what the runs would compile one after the other; returns rejections."""
    rejections: dict[Config, str] = {}
    launches: list[tuple[Config, Launch]] = []
    for config in configs:
        with record_rejection(rejections, config, tunable.key, device):
            with capture_launches() as captured:
                tunable.run(config)
            launches += [(config, launch) for launch in captured]

    def compile_one(pair: tuple[Config, Launch]) -> None:
        config, launch = pair
        with record_rejection(rejections, config, tunable.key, device):
            launch.compile()

    if launches:
        threads = min(len(launches), os.cpu_count() or 1)
        with _without_garbage_collection(), ThreadPoolExecutor(threads) as pool:
            list(pool.map(compile_one, launches))
    return rejections


def _verify(tunable: Tunable, configs: Sequence[Config], device: torch.device) -> dict[Config, str]:
    """Compares results with the exact ones; returns rejections."""
    rejections: dict[Config, str] = {}
    if configs:
        eps = verification.EPS[tunable.key.dtype]
        verifier = Verifier(tunable.exact, tunable.vendor, eps, device)
    for config in configs:
        with record_rejection(rejections, config, tunable.key, device):
            verifier.check(functools.partial(tunable.run, config))
    return rejections


def _medians(
    tunable: Tunable, configs: Sequence[Config], device: torch.device, rejections: dict[Config, str]
) -> dict[Config | None, float]:
    """Milliseconds of configurations and, under None, of the vendor's implementation.

    Interleaved, so that a changing clock rate affects all alike. What fails only now is added to the rejections.
    """
    runs: dict[Config | None, Callable[[], Any]] = {c: functools.partial(tunable.run, c) for c in configs}
    if tunable.vendor is not None:
        runs[None] = tunable.vendor
    rounds: dict[Config | None, list[float]] = {config: [] for config in runs}
    repetitions: dict[Config | None, int] = {}

    def measure_one(config: Config | None) -> None:
        ms = measure(runs[config], device, repetitions.get(config, 1))
        if config in repetitions:
            rounds[config].append(ms)
        else:
            fitting = int(TIME_PER_CONFIG / ROUNDS / max(ms, 1e-6))
            repetitions[config] = max(1, min(MAX_REPETITIONS, fitting))

    for _ in range(1 + ROUNDS):
        for config in [config for config in runs if config not in rejections]:
            if config is None:
                measure_one(config)
            else:
                with record_rejection(rejections, config, tunable.key, device):
                    measure_one(config)
    return {c: statistics.median(times) for c, times in rounds.items() if c not in rejections}

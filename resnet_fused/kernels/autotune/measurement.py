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

from resnet_fused.kernels.autotune import cache
from resnet_fused.kernels.autotune.timing import measure
from resnet_fused.kernels.autotune.tunable import Timing, Timings, Tunable, sorted_timings
from resnet_fused.kernels.autotune.verification import EPS, Rejections, Unverifiable, Verifier
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
    configs = tunable.configs[:MAX_CONFIGS]
    rejections = Rejections(tunable.key, device)
    try:
        _compile(tunable, configs, rejections)
        if len(rejections) < len(configs):
            verifier = Verifier(tunable.exact, tunable.vendor, EPS[tunable.key.dtype], device)
        for config in [c for c in configs if c not in rejections]:
            with rejections.catch(config):
                verifier.check(functools.partial(tunable.run, config))
        medians = _medians(tunable, configs, device, rejections)
    except torch.OutOfMemoryError as error:
        raise Unverifiable(str(error)) from None
    if configs and len(rejections) == len(configs):
        reason = next(iter(rejections.values()))
        warnings.warn(f"every configuration of {tunable.key} is rejected: {reason}", stacklevel=3)
    timings = [Timing(config, ms) for config, ms in medians.items()]
    return sorted_timings([*timings, *(Timing(config, None, why) for config, why in rejections.items())])


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
    another thread parse.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _compile(tunable: Tunable, configs: Sequence[Config], rejections: Rejections) -> None:
    """Compiles in parallel what the runs would compile one after the other."""
    launches: list[tuple[Config, Launch]] = []
    for config in configs:
        with rejections.catch(config), capture_launches() as captured:
            tunable.run(config)
            launches += [(config, launch) for launch in captured]

    def compile_one(pair: tuple[Config, Launch]) -> None:
        config, launch = pair
        with rejections.catch(config):
            launch.compile()

    if launches:
        threads = min(len(launches), os.cpu_count() or 1)
        with _without_garbage_collection(), ThreadPoolExecutor(threads) as pool:
            list(pool.map(compile_one, launches))


def _medians(
    tunable: Tunable, configs: Sequence[Config], device: torch.device, rejections: Rejections
) -> dict[Config | None, float]:
    """Milliseconds of configurations that are not rejected and, under None, of the vendor's implementation.

    Interleaved, so that a changing clock rate affects all alike. What fails only now is added to the rejections.
    """
    runs: dict[Config | None, Callable[[], Any]] = {c: functools.partial(tunable.run, c) for c in configs}
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
            with rejections.catch(config):
                measure_one(config)
    return {c: statistics.median(times) for c, times in rounds.items() if c not in rejections}

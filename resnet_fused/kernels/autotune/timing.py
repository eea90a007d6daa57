"""Time that a GPU takes for some launches, independent of the host's time to start them."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

#: Milliseconds that the GPU is kept busy before the timed launches: the least, per run, and the most.
MIN_SLEEP, SLEEP_PER_RUN, MAX_SLEEP = 1.0, 0.15, 200.0
ATTEMPTS = 6
_CYCLES = 2_000_000


def measure(run: Callable[[], Any], device: torch.device, repetitions: int = 1) -> float:
    """Milliseconds of one run. Synchronizes this stream alone: a collective on another one may wait for other ranks.

    The GPU sleeps first, so that all runs are queued before the first one begins. Where that was too short it is
    repeated with a sleep twice as long, or half again as long as the host took to launch, whichever is longer.
    """
    with torch.cuda.device(device):
        sleep = max(MIN_SLEEP, SLEEP_PER_RUN * repetitions)
        for _ in range(ATTEMPTS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(int(sleep * _cycles_per_ms(device)))
            start.record()
            before = time.perf_counter()
            for _ in range(repetitions):
                run()
            host_ms = 1e3 * (time.perf_counter() - before)
            end.record()
            was_queued = not start.query()
            end.synchronize()
            if was_queued or sleep == MAX_SLEEP:
                break
            sleep = min(MAX_SLEEP, max(2 * sleep, 1.5 * host_ms))
    return float(start.elapsed_time(end)) / repetitions


@functools.cache
def _cycles_per_ms(device: torch.device) -> float:
    """Of the clock that ``torch.cuda._sleep`` counts."""
    with torch.cuda.device(device):
        for _ in range(2):  # the first one raises the clock
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            torch.cuda._sleep(_CYCLES)
            end.record()
            end.synchronize()
        return _CYCLES / max(float(start.elapsed_time(end)), 1e-3)

"""How long a device takes for something, whatever time the processor takes to start it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

#: Milliseconds that a device is kept busy before it starts what is timed: at least, for each run, and at most.
LEAST, EACH, MOST = 1.0, 0.15, 200.0
ATTEMPTS = 6
_CYCLES = 2_000_000


def measure(run: Callable[[], Any], device: torch.device, repetitions: int = 1) -> float:
    """Milliseconds of one run. Waits for this stream alone: a collective on another one may wait for other ranks.

    The processor gets a head start, so that all runs wait on the device before the first one begins. Where it was too
    short it is doubled, or made half again as long as the processor took to launch, whichever is longer.
    """
    with torch.cuda.device(device):
        head_start = max(LEAST, EACH * repetitions)
        for _ in range(ATTEMPTS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(int(head_start * _cycles_per_ms(device)))
            start.record()
            before = time.perf_counter()
            for _ in range(repetitions):
                run()
            launching = 1e3 * (time.perf_counter() - before)
            end.record()
            was_ahead = not start.query()
            end.synchronize()
            if was_ahead or head_start == MOST:
                break
            head_start = min(MOST, max(2 * head_start, 1.5 * launching))
    return float(start.elapsed_time(end)) / repetitions


@functools.cache
def _cycles_per_ms(device: torch.device) -> float:
    """Of the clock that ``torch.cuda._sleep`` counts."""
    with torch.cuda.device(device):
        for _ in range(2):  # the first wakes the device up
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            torch.cuda._sleep(_CYCLES)
            end.record()
            end.synchronize()
        return _CYCLES / max(float(start.elapsed_time(end)), 1e-3)

"""timing.measure times the device, however slow the host is: with simulated clocks."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from resnet_fused.kernels.autotune import timing
from tests.kernels.simulated_gpu import DEVICE

CYCLES_PER_MS = 1.7e6


class Timeline:
    """Milliseconds: the time on the host, and when the device will have finished what is queued."""

    def __init__(self) -> None:
        self.host, self.device = 0.0, 0.0

    def start(self, launching: float, running: float) -> None:
        self.host += launching
        self.device = max(self.device, self.host) + running

    def event(self, enable_timing: bool = False) -> Event:
        return Event(self)


class Event:
    def __init__(self, timeline: Timeline) -> None:
        self.timeline, self.at = timeline, 0.0

    def record(self) -> None:
        self.at = max(self.timeline.device, self.timeline.host)

    def query(self) -> bool:
        return self.at <= self.timeline.host

    def synchronize(self) -> None:
        self.timeline.host = max(self.timeline.host, self.at)

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


@pytest.fixture
def timeline(monkeypatch: pytest.MonkeyPatch) -> Timeline:
    clocks = Timeline()
    monkeypatch.setattr(torch.cuda, "Event", clocks.event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: clocks.start(0.005, cycles / CYCLES_PER_MS))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clocks.host / 1e3))
    timing._cycles_per_ms.cache_clear()
    return clocks


@pytest.mark.parametrize("repetitions", [1, 20])
@pytest.mark.parametrize("launching", [0.0, 0.01, 0.09, 0.4, 3.0])
@pytest.mark.parametrize("running", [0.004, 0.02, 2.0])
def test_the_device_is_timed(timeline: Timeline, launching: float, running: float, repetitions: int) -> None:
    found = timing.measure(lambda: timeline.start(launching, running), DEVICE, repetitions)
    assert found == pytest.approx(running)


def test_a_run_that_synchronizes(timeline: Timeline) -> None:
    def run() -> None:
        timeline.start(0.01, 0.02)
        timeline.host = max(timeline.host, timeline.device)

    assert timing.measure(run, DEVICE, 20) >= 0.02
    assert timeline.host < timing.ATTEMPTS * (timing.MAX_SLEEP + 20)

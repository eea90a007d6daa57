"""What is timed is the device, however slow the processor is: on clocks that are invented."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fused.kernels.autotune import search, timing
from tests.kernels.invented_gpu import FIRST, GPU, SECOND, THIRD, VENDOR, Bench

CYCLES_PER_MS = 1.7e6


class Timeline:
    """Milliseconds at which the processor is, and at which the device will have done what it was given."""

    def __init__(self) -> None:
        self.processor, self.device = 0.0, 0.0

    def start(self, launching: float, running: float) -> None:
        self.processor += launching
        self.device = max(self.device, self.processor) + running

    def event(self, enable_timing: bool = False) -> Event:
        return Event(self)


class Event:
    def __init__(self, timeline: Timeline) -> None:
        self.timeline, self.at = timeline, 0.0

    def record(self) -> None:
        self.at = max(self.timeline.device, self.timeline.processor)

    def query(self) -> bool:
        return self.at <= self.timeline.processor

    def synchronize(self) -> None:
        self.timeline.processor = max(self.timeline.processor, self.at)

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


@pytest.fixture
def timeline(monkeypatch: pytest.MonkeyPatch) -> Timeline:
    clocks = Timeline()
    monkeypatch.setattr(torch.cuda, "Event", clocks.event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: clocks.start(0.005, cycles / CYCLES_PER_MS))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clocks.processor / 1e3))
    timing._cycles_per_ms.cache_clear()
    return clocks


def naively(timeline: Timeline, run: Callable[[], Any], repetitions: int) -> float:
    start, end = timeline.event(), timeline.event()
    start.record()
    for _ in range(repetitions):
        run()
    end.record()
    return start.elapsed_time(end) / repetitions


@pytest.mark.parametrize("repetitions", [1, 20])
@pytest.mark.parametrize("launching", [0.0, 0.01, 0.09, 0.4, 3.0])
@pytest.mark.parametrize("running", [0.004, 0.02, 2.0])
def test_the_device_is_timed(timeline: Timeline, launching: float, running: float, repetitions: int) -> None:
    found = timing.measure(lambda: timeline.start(launching, running), GPU, repetitions)
    assert found == pytest.approx(running)


def test_what_waits_for_the_device_ends(timeline: Timeline) -> None:
    def run() -> None:
        timeline.start(0.01, 0.02)
        timeline.processor = max(timeline.processor, timeline.device)

    assert timing.measure(run, GPU, 20) >= 0.02
    assert timeline.processor < timing.ATTEMPTS * (timing.MOST + 20)


def test_a_slow_launcher_changes_no_choice(
    bench: Bench, timeline: Timeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher that takes 90 us, of a kernel that takes 20, and others that take 10 and 30."""
    launching_running: dict[Any, tuple[float, float]] = dict.fromkeys((FIRST, THIRD, VENDOR), (0.01, 0.03))
    launching_running[SECOND] = (0.09, 0.02)
    plain = bench.result

    def result(what: Any) -> list[Tensor]:
        timeline.start(*launching_running[what])
        return plain(what)

    monkeypatch.setattr(bench, "result", result)
    slow, quick = (
        naively(timeline, lambda config=config: bench.run(config), 20) for config in (SECOND, FIRST)
    )
    assert slow > quick, "nothing is shown"
    monkeypatch.setattr(search, "measure", timing.measure)
    assert bench.choose() == SECOND
    ((_, config, ms),) = search.entries()
    assert config == SECOND and ms == pytest.approx(0.02)

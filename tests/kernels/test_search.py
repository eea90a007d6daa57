"""What the autotuner measures and what it chooses, for one tuning key and for several, on a simulated GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import resnet_fused
from resnet_fused.kernels.autotune import measurement, search
from resnet_fused.kernels.launch import Config, Launch
from tests.kernels.simulated_gpu import (
    CONFIGS,
    CONV,
    DGRAD,
    FIRST,
    SECOND,
    THIRD,
    VENDOR,
    SimulatedGPU,
    cache_file,
)

# What is chosen


def test_the_fastest_is_chosen_and_measured_once(sim: SimulatedGPU) -> None:
    assert sim.choose() == SECOND
    before = sim.measured.copy()
    assert set(before) == {*CONFIGS, VENDOR}
    assert sim.choose() == SECOND
    assert sim.measured == before
    assert sim.choose(DGRAD) == SECOND
    assert sim.measured != before


def test_the_vendor_is_chosen_where_it_is_faster_or_as_fast(sim: SimulatedGPU) -> None:
    sim.times[VENDOR] = sim.times[SECOND]
    assert sim.choose() is None
    sim.times[VENDOR] = 1.01
    assert sim.choose(DGRAD) == SECOND


def test_where_there_is_no_kernel_the_vendor_runs(sim: SimulatedGPU) -> None:
    assert sim.choose(configs=[]) is None
    with resnet_fused.backend("triton"):
        assert sim.choose(configs=[]) is None
    assert not sim.measured


def test_the_median_of_interleaved_rounds_decides(sim: SimulatedGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = {
        FIRST: iter([0.1, 2, 2, 2]),
        SECOND: iter([50, 90, 1, 1]),
        THIRD: iter([9, 0.1, 3, 3]),
        VENDOR: iter([0.1, 0.2, 4, 4]),
    }
    order = []

    def measure(run: Callable[[], Any], device: torch.device, repetitions: int = 1) -> float:
        run()
        order.append(sim.last)
        return next(rounds[sim.last])

    monkeypatch.setattr(measurement, "measure", measure)
    assert sim.choose() == SECOND
    assert order == [*CONFIGS, VENDOR] * 4


def test_repetitions_fit_into_the_time(sim: SimulatedGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    sim.times = {FIRST: 100.0, SECOND: 0.5, THIRD: 0.0, VENDOR: 100.0}
    repeated: dict[Any, set[int]] = {}

    def measure(run: Callable[[], Any], device: torch.device, repetitions: int = 1) -> float:
        run()
        repeated.setdefault(sim.last, set()).add(repetitions)
        return sim.times[sim.last]

    monkeypatch.setattr(measurement, "measure", measure)
    sim.choose()
    assert repeated == {
        FIRST: {1},
        SECOND: {1, 3},
        THIRD: {1, measurement.MAX_REPETITIONS},
        VENDOR: {1},
    }


# What is compiled


def test_at_most_eight_are_compiled(sim: SimulatedGPU) -> None:
    many = [Config(16, 16, 16, splits=i + 1) for i in range(30)]
    sim.times |= {config: 1.9 - i / 100 for i, config in enumerate(many)}
    assert sim.choose(configs=many) == many[7]


def test_autotuning_is_announced_once(sim: SimulatedGPU, caplog: pytest.LogCaptureFixture) -> None:
    measurement._announce.cache_clear()
    sim.choose(CONV)
    sim.choose(DGRAD)
    (record,) = caplog.records
    assert "autotuning kernels for NVIDIA H100" in record.message
    assert str(cache_file().parent) in record.message


def test_any_other_error_is_raised(sim: SimulatedGPU) -> None:
    sim.errors[SECOND] = ValueError("a bug")
    with pytest.raises(ValueError, match="a bug"):
        sim.choose()
    del sim.errors[SECOND]
    assert sim.choose() == SECOND


def test_no_garbage_is_collected_while_threads_compile(
    sim: SimulatedGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    enabled: list[bool] = []
    monkeypatch.setattr(Launch, "compile", lambda self: enabled.append(gc.isenabled()))
    arguments = {"x": torch.empty(1, device="meta")}

    def run(config: Config) -> list[Tensor]:
        Launch(None, (1,), arguments, {}, config).start()
        return sim.run(config)

    sim.choose(run=run)
    assert enabled == [False] * len(CONFIGS) and gc.isenabled()


# What is not measured


@pytest.mark.parametrize(
    ("module", "function"),
    [(torch.cuda, "is_current_stream_capturing"), (torch.compiler, "is_compiling")],
    ids=["capturing", "compiling"],
)
def test_nothing_is_measured_while_recording(
    sim: SimulatedGPU, monkeypatch: pytest.MonkeyPatch, module: Any, function: str
) -> None:
    with monkeypatch.context() as recording:
        recording.setattr(module, function, lambda: True)
        assert sim.choose() is None, "a configuration that was never verified"
    assert not sim.measured and all(ms is None for *_, ms in search.entries())
    assert sim.choose() == SECOND, "the default was remembered"
    before = sim.measured.copy()
    with monkeypatch.context() as recording:
        recording.setattr(module, function, lambda: True)
        assert sim.choose() == SECOND
        search.forget_measurements()
        assert sim.choose() == SECOND, "the cache was not read"
    assert sim.measured == before


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_nothing_is_measured_without_a_gpu(sim: SimulatedGPU, device: str) -> None:
    assert sim.choose(device=torch.device(device)) == FIRST
    assert not sim.measured and not cache_file().exists()


def test_backend_triton_never_uses_the_vendor(sim: SimulatedGPU) -> None:
    sim.times[VENDOR] = 0.5
    with resnet_fused.backend("triton"):
        assert sim.choose() == FIRST
        assert not sim.measured and all(ms is None for *_, ms in search.entries())
    assert sim.choose() is None
    measured = sim.measured.copy()
    with resnet_fused.backend("triton"):
        assert sim.choose() == SECOND, "memory"
        search.forget_measurements()
        assert sim.choose() == SECOND, "cache"
        assert sim.choose(DGRAD) == FIRST
    assert sim.measured == measured


@pytest.mark.parametrize("choice", ["vendor", "reference"])
def test_backend_vendor_always_uses_the_vendor(sim: SimulatedGPU, choice: str) -> None:
    with resnet_fused.backend(choice):
        assert sim.choose() is None
    assert not sim.measured
    assert sim.choose() == SECOND
    with resnet_fused.backend(choice):
        assert sim.choose() is None

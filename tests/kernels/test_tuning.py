"""What is measured, and what is chosen. The GPU and its times are invented: no kernel runs."""

from __future__ import annotations

import ast
import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
from triton.runtime.errors import OutOfResources

import resnet_fused
from resnet_fused.kernels.autotune import search
from resnet_fused.kernels.autotune.search import TuningKey
from resnet_fused.kernels.launch import Config, Launch, launch
from tests.kernels.invented_gpu import (
    CANDIDATES,
    CONV,
    DGRAD,
    FIRST,
    SECOND,
    THIRD,
    VENDOR,
    Bench,
    cache_file,
    only_warning,
)

# What wins


def test_the_fastest_wins_and_is_measured_once(bench: Bench) -> None:
    assert bench.choose() == SECOND
    before = bench.measured.copy()
    assert set(before) == {*CANDIDATES, VENDOR}
    assert bench.choose() == SECOND
    assert bench.measured == before
    assert bench.choose(DGRAD) == SECOND
    assert bench.measured != before


def test_vendor_wins_when_it_is_faster_or_as_fast(bench: Bench) -> None:
    bench.times[VENDOR] = bench.times[SECOND]
    assert bench.choose() is None
    bench.times[VENDOR] = 1.01
    assert bench.choose(DGRAD) == SECOND


def test_without_a_vendor_a_configuration_wins(bench: Bench) -> None:
    bench.times[VENDOR] = 0.1
    assert bench.choose(vendor=False) == SECOND
    assert VENDOR not in bench.measured


def test_one_slow_round_decides_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = {FIRST: iter([0.1, 2, 2, 2]), SECOND: iter([50, 90, 1, 1]), THIRD: iter([9, 0.1, 3, 3])}
    order = []

    def measure(run: Callable[[], Any], device: torch.device, repetitions: int = 1) -> float:
        run()
        order.append(bench.last)
        return next(rounds[bench.last])

    monkeypatch.setattr(search, "measure", measure)
    assert bench.choose(vendor=False) == SECOND
    assert order == CANDIDATES * 4, "rounds are not interleaved"


def test_repetitions_keep_to_the_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.times = {FIRST: 100.0, SECOND: 0.5, THIRD: 0.0}
    seen: dict[Any, set[int]] = {}

    def measure(run: Callable[[], Any], device: torch.device, repetitions: int = 1) -> float:
        run()
        seen.setdefault(bench.last, set()).add(repetitions)
        return bench.times[bench.last]

    monkeypatch.setattr(search, "measure", measure)
    bench.choose(vendor=False)
    assert seen == {FIRST: {1}, SECOND: {1, 3}, THIRD: {1, search.MOST_REPETITIONS}}


def test_nothing_to_choose_from(bench: Bench) -> None:
    assert bench.choose(candidates=[]) is None
    with pytest.raises(ValueError, match="neither"):
        bench.choose(candidates=[], vendor=False)


# What is compiled


def test_what_exceeds_shared_memory_is_not_compiled(bench: Bench) -> None:
    fits, large = Config(128, 128, 64, stages=3), Config(256, 256, 64, stages=4)
    bench.errors[large] = AssertionError("was run")
    bench.times |= {fits: 1.0, large: 0.1}
    assert bench.choose(candidates=[large, fits]) == fits
    half = TuningKey("conv", (1,), "fp32")  # twice the bytes: now 192 KiB, and 4 stages are too many
    four = Config(128, 128, 64, stages=4)
    bench.errors[four] = AssertionError("was run")
    assert bench.choose(half, candidates=[four, fits]) == fits


def test_where_all_seem_too_large_the_smallest_is_tried(bench: Bench) -> None:
    larger, large = Config(512, 512, 64), Config(256, 512, 64)
    bench.times |= {larger: 0.1, large: 1.0}
    assert bench.choose(candidates=[larger, large]) == large
    assert set(bench.measured) == {large, VENDOR}


def test_at_most_eight_are_compiled(bench: Bench) -> None:
    many = [Config(16, 16, 16, splits=i + 1) for i in range(30)]
    bench.times |= {config: 9.0 - i / 10 for i, config in enumerate(many)}
    assert bench.choose(candidates=many, vendor=False) == many[7]


def test_a_slow_first_step_is_announced_once(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    search._announce.cache_clear()
    bench.choose(CONV)
    bench.choose(DGRAD)
    (record,) = caplog.records
    assert "choosing kernels for NVIDIA H100" in record.message and str(cache_file().parent) in record.message


def refusals() -> list[Exception]:
    return [OutOfResources(1, 0, "shared memory"), triton.CompilationError("x", ast.parse("x").body[0], "no")]


@pytest.mark.parametrize("error", refusals(), ids=lambda error: type(error).__name__)
def test_what_does_not_compile_is_left_out(bench: Bench, error: Exception) -> None:
    bench.errors[SECOND] = error
    assert bench.choose() is None
    assert SECOND not in bench.measured
    assert bench.choose(DGRAD, vendor=False) == FIRST


def test_no_garbage_is_collected_while_threads_compile(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    enabled: list[bool] = []
    monkeypatch.setattr(Launch, "compile", lambda self: enabled.append(gc.isenabled()))
    nothing = {"x": torch.empty(1, device="meta")}

    def run(config: Config) -> list[torch.Tensor]:
        launch(None, (1,), nothing, {}, config)
        return bench.run(config)

    bench.choose(run=run)
    assert enabled == [False] * len(CANDIDATES) and gc.isenabled()


def test_where_nothing_compiles_it_says_so(bench: Bench) -> None:
    bench.errors = dict.fromkeys(CANDIDATES, refusals()[0])
    with only_warning("no configuration", "shared memory"):
        assert bench.choose() is None
    with only_warning("no configuration"), pytest.raises(ValueError, match="neither"):
        bench.choose(DGRAD, vendor=False)


def test_any_other_error_gets_out(bench: Bench) -> None:
    bench.errors[SECOND] = ValueError("a bug")
    with pytest.raises(ValueError, match="a bug"):
        bench.choose()
    del bench.errors[SECOND]
    assert bench.choose() == SECOND


# What is not measured


@contextlib.contextmanager
def recording(patch: pytest.MonkeyPatch, where: str) -> Iterator[None]:
    module, name = {
        "capture": (torch.cuda, "is_current_stream_capturing"),
        "compile": (torch.compiler, "is_compiling"),
    }[where]
    with patch.context() as inner:
        inner.setattr(module, name, lambda: True)
        yield


@pytest.mark.parametrize("where", ["capture", "compile"])
def test_nothing_is_measured_while_recording(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    with recording(monkeypatch, where):
        assert bench.choose() is None, "a configuration that was never verified"
        assert bench.choose(vendor=False) == FIRST
    assert not bench.measured and all(ms is None for *_, ms in search.entries())
    assert bench.choose() == SECOND, "the default was remembered"
    before = bench.measured.copy()
    with recording(monkeypatch, where):
        assert bench.choose() == SECOND
        search.clear_cache()
        assert bench.choose() == SECOND, "the cache was not read"
    assert bench.measured == before


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_nothing_is_measured_without_a_gpu(bench: Bench, device: str) -> None:
    assert bench.choose(device=torch.device(device)) == FIRST
    assert not bench.measured and not cache_file().exists()


def test_triton_is_never_the_vendor(bench: Bench) -> None:
    bench.times[VENDOR] = 0.5
    with resnet_fused.backend("triton"):
        assert bench.choose() == FIRST
        assert not bench.measured and all(ms is None for *_, ms in search.entries())
    assert bench.choose() is None
    measured = bench.measured.copy()
    with resnet_fused.backend("triton"):
        assert bench.choose() == SECOND, "memory"
        search.clear_cache()
        assert bench.choose() == SECOND, "cache"
        assert bench.choose(DGRAD) == FIRST
        assert bench.choose(candidates=[]) is None
    assert bench.measured == measured


@pytest.mark.parametrize("choice", ["vendor", "reference"])
def test_vendor_is_always_the_vendor(bench: Bench, choice: str) -> None:
    with resnet_fused.backend(choice):
        assert bench.choose() is None
        assert bench.choose(vendor=False) == FIRST
    assert not bench.measured
    assert bench.choose() == SECOND
    with resnet_fused.backend(choice):
        assert bench.choose() is None
        assert bench.choose(vendor=False) == SECOND

"""A configuration whose results are wrong is never chosen. The GPU is invented; the results are computed on the CPU."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import resnet_fused
from resnet_fused.kernels.autotune import search, verification
from resnet_fused.kernels.autotune.search import TuningKey
from resnet_fused.kernels.autotune.verification import PoisonedMemory
from tests.kernels.invented_gpu import (
    CANDIDATES,
    CONV,
    DGRAD,
    FIRST,
    GPU,
    SECOND,
    THIRD,
    VENDOR,
    Bench,
    cache_file,
    only_warning,
)

Results = list[Tensor]
PASS_FAILED = RuntimeError("PassManager::run failed")


def a_wrong_tile(results: Results) -> Results:
    results[0][16:32, :16] = results[0][32:48, :16]
    return results


def a_nan(results: Results) -> Results:
    results[0][3, 5] = math.nan
    return results


def an_unwritten_tile(results: Results) -> Results:
    out = torch.empty_like(results[0])
    out[:48] = results[0][:48]
    return [out]


def an_unwritten_workspace(results: Results) -> Results:
    """Of a sum in parts one that no program wrote."""
    parts = results[0].new_empty(4, *results[0].shape)
    parts[0] = results[0]
    parts[1:3] = 0
    return [parts.sum(0)]


def another_shape(results: Results) -> Results:
    return [results[0][:, :32]]


def no_result(results: Results) -> Results:
    return []


WRONG = [a_wrong_tile, a_nan, an_unwritten_tile, an_unwritten_workspace, another_shape, no_result]


def now_and_then(input_stride: int) -> Callable[[Results], Results]:
    """One element of one run in so many is off by its last bit."""
    calls = 0

    def change(results: Results) -> Results:
        nonlocal calls
        calls += 1
        if calls % input_stride == 0:
            results[0].view(torch.int16)[7, 7] ^= 1
        return results

    return change


@pytest.fixture(autouse=True)
def _plain_memory() -> None:
    """What the other tests get from conftest has to come from verification here."""
    torch.use_deterministic_algorithms(False)


def rows() -> list[dict[str, object]]:
    (entry,) = json.loads(cache_file().read_text())["entries"]
    return list(entry["times"])


def check_refused(bench: Bench, caplog: pytest.LogCaptureFixture, reason: str) -> None:
    """SECOND, the fastest, is not chosen, now or later; it is logged and written why."""
    with caplog.at_level(logging.WARNING, "resnet_fused"):
        assert bench.choose() is None
    (record,) = [record for record in caplog.records if "refused" in record.message]
    assert record.levelname == "WARNING" and record.name == "resnet_fused"
    assert all(part in record.message for part in (str(SECOND), str(CONV), reason))
    assert SECOND not in bench.measured and set(bench.measured) == {FIRST, THIRD, VENDOR}
    (row,) = [row for row in rows() if "refused" in row]
    assert row["config"] == SECOND.as_dict() and str(row["refused"]).startswith(reason)
    before = bench.measured.copy(), bench.verified.copy()
    for _ in range(2):
        assert bench.choose() is None
        with resnet_fused.backend("triton"):
            assert bench.choose() == FIRST
            assert bench.choose(candidates=[SECOND, THIRD]) == THIRD
            assert bench.choose(candidates=[SECOND]) is None
        assert search.summary()[reason] == 1
        search.clear_cache()
    assert (bench.measured, bench.verified) == before


@pytest.mark.parametrize("change", WRONG, ids=lambda f: f.__name__)
def test_a_wrong_configuration_is_refused(
    bench: Bench, caplog: pytest.LogCaptureFixture, change: Callable[[Results], Results]
) -> None:
    bench.results[SECOND] = change
    check_refused(bench, caplog, "wrong")


@pytest.mark.parametrize("every", [2, 3])
def test_an_unstable_configuration_is_refused(
    bench: Bench, caplog: pytest.LogCaptureFixture, input_stride: int
) -> None:
    bench.results[SECOND] = now_and_then(input_stride)
    check_refused(bench, caplog, "unstable")


def test_an_error_of_a_compiler_pass_refuses(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.errors[SECOND] = PASS_FAILED
    check_refused(bench, caplog, "compile")


def test_a_refusal_is_in_the_table_that_is_shipped(bench: Bench) -> None:
    bench.results[SECOND] = a_wrong_tile
    bench.choose()
    table = cache_file().parents[2] / "h100.json"
    search.write_table(table, GPU)
    cache_file().unlink()
    search.clear_cache()
    with resnet_fused.backend("triton"):
        assert bench.choose() == FIRST
    assert bench.choose() is None
    assert search.summary()["wrong"] == 1
    assert not cache_file().exists()


def test_where_all_are_refused_the_vendor_runs(bench: Bench) -> None:
    bench.results = dict.fromkeys(CANDIDATES, a_nan)
    with only_warning("no configuration", "wrong"):
        assert bench.choose() is None
    with resnet_fused.backend("triton"):
        assert bench.choose() is None
        search.clear_cache()
        assert bench.choose() is None
    with only_warning("no configuration"), pytest.raises(ValueError, match="neither"):
        bench.choose(DGRAD, vendor=False)


def errors_of_the_device() -> list[Exception]:
    text = "CUDA error: an illegal memory access was encountered"
    return [torch.AcceleratorError(text), RuntimeError(text)]


@pytest.mark.parametrize("error", errors_of_the_device(), ids=lambda error: type(error).__name__)
def test_an_error_of_the_device_gets_out(bench: Bench, error: Exception) -> None:
    bench.errors[SECOND] = error
    with pytest.raises(RuntimeError, match="illegal memory access") as caught:
        bench.choose()
    assert str(SECOND) in str(caught.value) and str(CONV) in str(caught.value)
    assert not cache_file().exists() and search.entries() == []


def test_an_error_that_the_device_keeps_gets_out(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's launcher says it in other words; or it shows when the device is waited for."""

    def wait(device: torch.device) -> None:
        if bench.last == SECOND:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    def launch(results: Results) -> Results:
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    monkeypatch.setattr(verification, "wait", wait)
    for change in (launch, lambda results: results):
        bench.results[SECOND] = change
        with pytest.raises(RuntimeError, match="nothing on it can be trusted") as caught:
            bench.choose()
        assert str(SECOND) in str(caught.value)


def test_what_fails_only_when_it_is_timed_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def measure(run: Callable[[], object], device: torch.device, repetitions: int = 1) -> float:
        nonlocal calls
        ms = bench.measure(run, device, repetitions)
        calls += bench.last == SECOND
        if bench.last == SECOND and calls == 3:
            raise PASS_FAILED
        return ms

    monkeypatch.setattr(search, "measure", measure)
    assert bench.choose() is None
    assert search.summary()["compile"] == 1


# What the rule allows


def off_by(size: float) -> Callable[[Results], Results]:
    def change(results: Results) -> Results:
        noise = torch.randn(results[0].shape, generator=torch.Generator().manual_seed(1))
        return [(results[0].float() + size * noise).bfloat16(), *results[1:]]

    return change


@pytest.mark.parametrize(
    ("candidate", "vendor", "right"),
    [(0.02, 0.0, True), (0.05, 0.0, False), (0.13, 0.1, True), (0.2, 0.1, False), (1.0, 1.0, True)],
)
def test_the_limit_is_the_vendors_error_and_four_roundings(
    bench: Bench, candidate: float, vendor: float, right: bool
) -> None:
    bench.results |= {SECOND: off_by(candidate), VENDOR: off_by(vendor)}
    assert bench.choose() == (SECOND if right else None)


def test_without_a_vendor_four_roundings_are_allowed(bench: Bench) -> None:
    bench.results[SECOND] = off_by(0.05)
    assert bench.choose(vendor=False) == FIRST
    bench.results[SECOND] = off_by(0.02)
    assert bench.choose(DGRAD, vendor=False) == SECOND


def test_eps_is_that_of_the_problem(bench: Bench) -> None:
    """Results of float32 that were made in TF32 have its roundings."""
    bench.results[SECOND] = lambda results: [(bench.exact[0] + 2e-3 * results[0].float().roll(1))]
    bench.results |= dict.fromkeys((FIRST, THIRD, VENDOR), lambda results: [*bench.exact])
    assert bench.choose(TuningKey("conv", (1,), "fp32")) is None
    assert bench.choose(TuningKey("conv", (1,), "tf32")) == SECOND


def with_mask(results: Results) -> Results:
    mask = torch.arange(2048, dtype=torch.int64).to(torch.uint8)
    return [*results, mask]


@pytest.fixture
def masked(bench: Bench) -> Iterator[Bench]:
    bench.exact = with_mask(bench.exact)

    def rounded(results: Results) -> Results:
        return with_mask(results[:1])

    bench.results = dict.fromkeys((*CANDIDATES, VENDOR), rounded)
    yield bench


@pytest.mark.parametrize(("mask", "right"), [(0, True), (16, True), (18, False), (500, False)])
def test_bits_of_a_mask_may_differ_in_one_of_a_thousand(masked: Bench, mask: int, right: bool) -> None:
    def change(results: Results) -> Results:
        results = with_mask(results[:1])
        results[1][:mask] ^= 1
        return results

    masked.results[SECOND] = change
    assert masked.choose() == (SECOND if right else None)
    masked.results[VENDOR] = change
    assert masked.choose(DGRAD) == SECOND


def test_an_unwritten_mask_is_refused(masked: Bench) -> None:
    masked.results[SECOND] = lambda results: [results[0], torch.empty(2048, dtype=torch.uint8)]
    assert masked.choose() is None


# What can't be verified


def test_operands_that_show_nothing_are_asked_for_again(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """An overflow under a loss scale, or a gradient that is zero, say nothing of a kernel."""
    good = bench.exact
    for bad in (good[0] * math.inf, good[0] * 0):
        bench.exact = [bad]
        assert bench.choose() is None
        assert not bench.measured and not cache_file().exists()
        assert search.summary()["problems"] == 0
    assert len([r for r in caplog.records if r.levelname == "WARNING" and "not measured" in r.message]) == 1
    bench.exact = good
    assert bench.choose() == SECOND


def test_they_are_asked_for_a_few_times_only(bench: Bench) -> None:
    good, bench.exact = bench.exact, [bench.exact[0] * 0]
    for _ in range(search.TRIES):
        assert bench.choose() is None
    bench.exact = good
    assert bench.choose() is None
    assert search.summary()["unknown"] == 1 and not bench.measured
    search.clear_cache()
    assert bench.choose() == SECOND


def test_too_little_memory_refuses_nothing(bench: Bench) -> None:
    bench.errors[SECOND] = torch.OutOfMemoryError("CUDA out of memory")
    assert bench.choose() is None
    assert not cache_file().exists()
    bench.errors.clear()
    assert bench.choose() == SECOND

    def exact() -> Results:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert bench.choose(DGRAD, exact=exact) is None
    assert bench.choose(DGRAD) == SECOND


def test_exact_and_vendor_are_computed_once(bench: Bench) -> None:
    calls = 0

    def exact() -> Results:
        nonlocal calls
        calls += 1
        assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"
        return bench.exact

    before = torch.backends.cudnn.allow_tf32
    bench.choose(exact=exact)
    assert calls == 1
    assert torch.backends.cudnn.allow_tf32 == before
    assert bench.verified[VENDOR] == 1 + bench.measured[VENDOR]
    assert bench.verified[SECOND] == 1 + verification.RUNS + bench.measured[SECOND]


def test_summary(bench: Bench) -> None:
    bench.results = {SECOND: a_nan, THIRD: now_and_then(2)}
    bench.choose()
    bench.errors[SECOND] = PASS_FAILED
    bench.times[FIRST] = 1.5
    bench.choose(DGRAD)
    assert search.summary() == {
        "problems": 2, "candidates": 6, "compile": 1, "wrong": 1, "unstable": 2, "vendor": 1, "unknown": 0
    }  # fmt: skip


# Poisoned memory


def test_memory_is_poisoned_in_an_op_of_the_dispatcher() -> None:
    library = torch.library.Library("resnet_fused_test", "FRAGMENT")
    library.define("allocate(Tensor x) -> Tensor[]")

    def allocate(x: Tensor) -> list[Tensor]:
        with PoisonedMemory():
            return [
                torch.empty(3, 4, dtype=x.dtype),
                torch.empty_like(x),
                torch.empty_like(x, memory_format=torch.channels_last),
                torch.empty_strided((2, 2), (4, 1), dtype=x.dtype),
                x.new_empty(5),
                x.new_empty_strided((2, 2), (4, 1)),
                torch.empty(4, dtype=torch.uint8),
                torch.empty(4, dtype=torch.int32),
            ]

    library.impl("allocate", allocate, "CPU")
    x = torch.zeros(1, 2, 3, 4, dtype=torch.bfloat16)
    for _ in range(3):  # memory that was zero before
        del (zeros := [torch.zeros(64) for _ in range(20)])[:]
        *floating, small, large = torch.ops.resnet_fused_test.allocate(x)
        assert all(t.isnan().all() for t in floating)
        assert (small == 255).all() and (large == -1).all()
    assert not zeros

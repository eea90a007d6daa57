"""A configuration with wrong results is never chosen, on a simulated GPU."""

from __future__ import annotations

import ast
import json
import logging
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

import resnet_fused
from resnet_fused.kernels.autotune import measurement, search, verification
from resnet_fused.kernels.autotune.tunable import TuningKey
from resnet_fused.kernels.autotune.verification import PoisonedMemory
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
    only_warning,
)

Results = list[Tensor]
Change = Callable[[Results], Results]
PASS_FAILED = RuntimeError("PassManager::run failed")


def wrong_tile(results: Results) -> Results:
    results[0][16:32, :16] = results[0][32:48, :16]
    return results


def nan(results: Results) -> Results:
    results[0][3, 5] = math.nan
    return results


def unwritten_tile(results: Results) -> Results:
    out = torch.empty_like(results[0])
    out[:48] = results[0][:48]
    return [out]


def unwritten_partial_sum(results: Results) -> Results:
    partial_sums = results[0].new_empty(4, *results[0].shape)
    partial_sums[0] = results[0]
    partial_sums[1:3] = 0
    return [partial_sums.sum(0)]


def other_shape(results: Results) -> Results:
    return [results[0][:, :32]]


def no_result(results: Results) -> Results:
    return []


def unstable(period: int) -> Change:
    """One element of every ``period``-th run differs in its last bit."""
    calls = 0

    def change(results: Results) -> Results:
        nonlocal calls
        calls += 1
        if calls % period == 0:
            results[0].view(torch.int16)[7, 7] ^= 1
        return results

    return change


def raises(error: Exception) -> Change:
    def change(results: Results) -> Results:
        raise error

    return change


#: By the reason of the rejection.
REJECTED: dict[str, dict[str, Change]] = {
    "wrong result": {
        f.__name__: f
        for f in (wrong_tile, nan, unwritten_tile, unwritten_partial_sum, other_shape, no_result)
    },
    "unstable result": {f"every_{period}": unstable(period) for period in (2, 3)},
    "compile error": {
        type(error).__name__: raises(error)
        for error in (
            PASS_FAILED,
            OutOfResources(1, 0, "shared memory"),
            triton.CompilationError("x", ast.parse("x").body[0], "no"),
        )
    },
}


@pytest.fixture(autouse=True)
def _plain_memory() -> None:
    """Without the poisoned memory of the other tests: it has to come from the verification."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("reason", "name"), [(reason, name) for reason, changes in REJECTED.items() for name in changes]
)
def test_rejection(sim: SimulatedGPU, caplog: pytest.LogCaptureFixture, reason: str, name: str) -> None:
    """SECOND, the fastest, is not chosen, now or later; the reason is logged and stored."""
    sim.results[SECOND] = REJECTED[reason][name]
    with caplog.at_level(logging.WARNING, "resnet_fused"):
        assert sim.choose() is None
    (record,) = [record for record in caplog.records if "rejected" in record.message]
    assert record.levelname == "WARNING" and record.name == "resnet_fused"
    assert all(part in record.message for part in (str(SECOND), str(CONV), reason))
    assert SECOND not in sim.measured and set(sim.measured) == {FIRST, THIRD, VENDOR}
    (entry,) = json.loads(cache_file().read_text())["entries"]
    (row,) = [row for row in entry["timings"] if "rejection" in row]
    assert row["config"] == SECOND._asdict() and row["rejection"].startswith(reason)
    before = sim.measured.copy(), sim.ran.copy()
    for _ in range(2):
        assert sim.choose() is None
        with resnet_fused.backend("triton"):
            assert sim.choose() == FIRST
        assert search.summary()[reason] == 1
        search.forget_measurements()
    assert (sim.measured, sim.ran) == before


def test_where_all_are_rejected_the_vendor_runs(sim: SimulatedGPU) -> None:
    sim.results = dict.fromkeys(CONFIGS, nan)
    with only_warning("every configuration", "wrong result"):
        assert sim.choose() is None
    with resnet_fused.backend("triton"):
        assert sim.choose() is None
        search.forget_measurements()
        assert sim.choose() is None


ILLEGAL_ACCESS = "CUDA error: an illegal memory access was encountered"


@pytest.mark.parametrize("error", [torch.AcceleratorError, RuntimeError], ids=lambda error: error.__name__)
def test_a_device_error_is_raised(sim: SimulatedGPU, error: type[Exception]) -> None:
    sim.errors[SECOND] = error(ILLEGAL_ACCESS)
    with pytest.raises(RuntimeError, match="illegal memory access") as caught:
        sim.choose()
    assert str(SECOND) in str(caught.value) and str(CONV) in str(caught.value)
    assert not cache_file().exists() and search.entries() == []


def test_an_error_that_synchronizing_shows_is_raised(
    sim: SimulatedGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's launcher reports it in other words, or not at all."""

    def wait(device: torch.device) -> None:
        if sim.last == SECOND:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(verification, "wait", wait)
    error = RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
    for change in (raises(error), lambda results: results):
        sim.results[SECOND] = change
        with pytest.raises(RuntimeError, match="no result can be trusted") as caught:
            sim.choose()
        assert str(SECOND) in str(caught.value)


def test_a_configuration_that_fails_while_it_is_timed(
    sim: SimulatedGPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def measure(run: Callable[[], object], device: torch.device, repetitions: int = 1) -> float:
        nonlocal calls
        ms = sim.measure(run, device, repetitions)
        calls += sim.last == SECOND
        if sim.last == SECOND and calls == 3:
            raise PASS_FAILED
        return ms

    monkeypatch.setattr(measurement, "measure", measure)
    assert sim.choose() is None
    assert search.summary()["compile error"] == 1


# The limit of the accuracy rule


def off_by(size: float) -> Change:
    def change(results: Results) -> Results:
        noise = torch.randn(results[0].shape, generator=torch.Generator().manual_seed(1))
        return [(results[0].float() + size * noise).bfloat16(), *results[1:]]

    return change


@pytest.mark.parametrize(
    ("error", "vendor_error", "allowed"),
    [(0.02, 0.0, True), (0.05, 0.0, False), (0.13, 0.1, True), (0.2, 0.1, False), (1.0, 1.0, True)],
)
def test_limit(sim: SimulatedGPU, error: float, vendor_error: float, allowed: bool) -> None:
    sim.results |= {SECOND: off_by(error), VENDOR: off_by(vendor_error)}
    assert sim.choose() == (SECOND if allowed else None)


def test_eps_is_that_of_the_key(sim: SimulatedGPU) -> None:
    """float32 results of TF32 GEMMs have the rounding of TF32."""
    sim.results[SECOND] = lambda results: [(sim.exact[0] + 2e-3 * results[0].float().roll(1))]
    sim.results |= dict.fromkeys((FIRST, THIRD, VENDOR), lambda results: [*sim.exact])
    assert sim.choose(TuningKey("conv_bn_stats", (1,), "fp32")) is None
    assert sim.choose(TuningKey("conv_bn_stats", (1,), "tf32")) == SECOND


def with_mask(results: Results) -> Results:
    mask = torch.arange(2048, dtype=torch.int64).to(torch.uint8)
    return [*results, mask]


@pytest.fixture
def masked(sim: SimulatedGPU) -> Iterator[SimulatedGPU]:
    sim.exact = with_mask(sim.exact)

    def rounded(results: Results) -> Results:
        return with_mask(results[:1])

    sim.results = dict.fromkeys((*CONFIGS, VENDOR), rounded)
    yield sim


@pytest.mark.parametrize(("bits", "allowed"), [(0, True), (16, True), (18, False), (500, False)])
def test_one_bit_of_a_thousand_of_a_mask_may_differ(masked: SimulatedGPU, bits: int, allowed: bool) -> None:
    def change(results: Results) -> Results:
        results = with_mask(results[:1])
        results[1][:bits] ^= 1
        return results

    masked.results[SECOND] = change
    assert masked.choose() == (SECOND if allowed else None)
    masked.results[VENDOR] = change
    assert masked.choose(DGRAD) == SECOND


def test_an_unwritten_mask_is_rejected(masked: SimulatedGPU) -> None:
    masked.results[SECOND] = lambda results: [results[0], torch.empty(2048, dtype=torch.uint8)]
    assert masked.choose() is None


# Operands that verify nothing


def test_operands_that_verify_nothing_are_tried_again(
    sim: SimulatedGPU, caplog: pytest.LogCaptureFixture
) -> None:
    """With an overflow under a loss scale, or a gradient of zero, a wrong kernel would pass."""
    good = sim.exact
    for bad in (good[0] * math.inf, good[0] * 0):
        sim.exact = [bad]
        assert sim.choose() is None
        assert not sim.measured and not cache_file().exists()
        assert search.summary()["tuning keys"] == 0
    assert len([r for r in caplog.records if r.levelname == "WARNING" and "not measured" in r.message]) == 1
    sim.exact = good
    assert sim.choose() == SECOND


def test_after_some_attempts_the_vendor_stays(sim: SimulatedGPU) -> None:
    good, sim.exact = sim.exact, [sim.exact[0] * 0]
    for _ in range(search.MAX_ATTEMPTS):
        assert sim.choose() is None
    sim.exact = good
    assert sim.choose() is None
    assert search.summary()["not measured"] == 1 and not sim.measured
    search.forget_measurements()
    assert sim.choose() == SECOND


def test_too_little_memory_rejects_nothing(sim: SimulatedGPU) -> None:
    sim.errors[SECOND] = torch.OutOfMemoryError("CUDA out of memory")
    assert sim.choose() is None
    assert not cache_file().exists()
    sim.errors.clear()
    assert sim.choose() == SECOND

    def exact() -> Results:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert sim.choose(DGRAD, exact=exact) is None
    assert sim.choose(DGRAD) == SECOND


def test_exact_and_vendor_are_computed_once(sim: SimulatedGPU) -> None:
    calls = 0

    def exact() -> Results:
        nonlocal calls
        calls += 1
        assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"
        return sim.exact

    before = torch.backends.cudnn.allow_tf32
    sim.choose(exact=exact)
    assert calls == 1
    assert torch.backends.cudnn.allow_tf32 == before
    assert sim.ran[VENDOR] == 1 + sim.measured[VENDOR]
    assert sim.ran[SECOND] == 1 + verification.RUNS + sim.measured[SECOND]


def test_summary(sim: SimulatedGPU) -> None:
    sim.results = {SECOND: nan, THIRD: unstable(2)}
    sim.choose()
    sim.errors[SECOND] = PASS_FAILED
    sim.times[FIRST] = 1.5
    sim.choose(DGRAD)
    assert search.summary() == {
        "tuning keys": 2,
        "configurations": 6,
        "compile error": 1,
        "wrong result": 1,
        "unstable result": 2,
        "vendor fastest": 1,
        "not measured": 0,
    }


# Poisoned memory


def test_memory_is_poisoned_within_ops() -> None:
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

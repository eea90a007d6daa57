"""Options, the paired timing fixture, and the table at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import Comparison, milliseconds, table, write_results

_comparisons: list[Comparison] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("resnet_fused")
    group.addoption("--device", default="cpu", help="cpu or cuda (default: cpu)")
    group.addoption("--results", type=Path, help="write the measured rows to this JSON file")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def compare(
    benchmark: BenchmarkFixture, device: torch.device
) -> Callable[[Comparison, Callable[[], object], Callable[[], object], int], None]:
    """Times eager and fused in turns: pytest-benchmark times the fused run, its setup hook the eager one before."""

    def run(
        comparison: Comparison, eager: Callable[[], object], fused: Callable[[], object], rounds: int
    ) -> None:
        for _ in range(2):
            eager(), fused()

        def time_eager() -> None:
            comparison.eager_ms.append(milliseconds(eager, device))

        def time_fused() -> None:
            comparison.fused_ms.append(milliseconds(fused, device))

        benchmark.pedantic(time_fused, setup=time_eager, rounds=rounds, iterations=1)
        low, high = comparison.spread()
        benchmark.extra_info.update(eager_over_fused=comparison.ratio, p20=low, p80=high)
        _comparisons.append(comparison)

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not _comparisons:
        return
    terminalreporter.section(f"eager beside fused, {torch.get_num_threads()} threads")
    terminalreporter.write_line(table(_comparisons))
    if path := config.getoption("--results"):
        write_results(path, torch.device(config.getoption("--device")), _comparisons)
        terminalreporter.write_line(f"written to {path}")

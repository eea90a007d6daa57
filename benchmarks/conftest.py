"""Options, who takes part, the timing fixture, and what is printed and written at the end."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import OURS, Case, Contest, Entrant, table, write_results
from benchmarks.implementations import IMPLS, default_impls
from benchmarks.precision import PRECISIONS, Precision
from benchmarks.roofline import H100, Ceilings, measure

Compare = Callable[[Case, list[Entrant], int], None]

_contests: list[Contest] = []
_ceilings: dict[str, Ceilings] = {}
_begun = time.monotonic()
_compiled = tempfile.TemporaryDirectory(prefix="resnet_fused_bench_")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("resnet_fused")
    group.addoption("--device", default="cpu", help="cpu or cuda (default: cpu)")
    group.addoption(
        "--dtypes", default="fp32,bf16", help=f"some of {','.join(PRECISIONS)} (default: fp32,bf16)"
    )
    group.addoption(
        "--impls", help=f"some of {','.join(IMPLS)} (default: all on a GPU, at most four on a CPU)"
    )
    group.addoption("--results", type=Path, help="write the measured rows to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    # What the compiler made in an earlier run would make its first step look short.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _compiled.name
    _chosen(config, "--impls", IMPLS)
    if "tf32" in _chosen(config, "--dtypes", tuple(PRECISIONS)) and config.getoption("--device") == "cpu":
        raise pytest.UsageError("a CPU has no tf32: leave it out of --dtypes")


def pytest_unconfigure() -> None:
    _compiled.cleanup()


def _chosen(config: pytest.Config, option: str, choices: tuple[str, ...]) -> list[str]:
    names = config.getoption(option).split(",") if config.getoption(option) else []
    if unknown := [name for name in names if name not in choices]:
        raise pytest.UsageError(f"{option} {','.join(unknown)}: choose some of {','.join(choices)}")
    return names


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "precision" in metafunc.fixturenames:
        names = _chosen(metafunc.config, "--dtypes", tuple(PRECISIONS))
        metafunc.parametrize("precision", [PRECISIONS[name] for name in names], ids=names)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def impls(request: pytest.FixtureRequest, device: torch.device) -> tuple[str, ...]:
    """Who takes part; ours always."""
    wanted = _chosen(request.config, "--impls", IMPLS) or default_impls(device, request.module.LAYER)
    return tuple(dict.fromkeys((OURS, *wanted)))


@pytest.fixture(autouse=True)
def _tf32(request: pytest.FixtureRequest) -> Iterator[None]:
    precision: Precision = request.getfixturevalue("precision")
    with precision.allowed():
        yield


@pytest.fixture
def ceilings(device: torch.device, precision: Precision) -> Ceilings:
    """What the device can do in this dtype: known of an H100, else measured once."""
    if precision.name not in _ceilings:
        known = (
            device.type == "cuda"
            and "H100" in torch.cuda.get_device_name(device)
            and precision.dtype != torch.float32
        )
        _ceilings[precision.name] = H100 if known else measure(precision.name, device)
    return _ceilings[precision.name]


@pytest.fixture
def compare(benchmark: BenchmarkFixture, device: torch.device) -> Compare:
    """Times entrants in turns: pytest-benchmark times ours, its setup hook all others before. Ours has to be right."""

    def run(case: Case, entrants: list[Entrant], rounds: int) -> None:
        contest = Contest(case, entrants, device)
        _contests.append(contest)
        contest.warm_up()
        benchmark.pedantic(contest.our_turn, setup=contest.others, rounds=rounds, iterations=1)
        assert contest.ours.checked, contest.ours.note

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    measured = [contest for contest in _contests if contest.ours.times]
    if not measured:
        return
    terminalreporter.section(f"how many times as fast ours is, {torch.get_num_threads()} threads")
    terminalreporter.write_line(table(measured))
    if path := config.getoption("--results"):
        device = torch.device(config.getoption("--device"))
        write_results(path, device, measured, time.monotonic() - _begun, _ceilings)
        terminalreporter.write_line(f"written to {path}")

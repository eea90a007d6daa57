"""What every test gets: fixed seeds, poisoned memory, and no more threads than cores."""

from __future__ import annotations

import gc
import os
import random
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from resnet_fused import native
from resnet_fused.backend import interprets
from tests.accuracy import DTYPES, LAYOUTS
from tools.reliability import record

#: The module: the package resnet_fused.ops has the function under its name.
RESIDUAL_BLOCK = sys.modules["resnet_fused.ops.residual_block"]
#: Another value draws other random inputs, for all tests; see `make soak`.
_SEED = "RESNET_FUSED_TEST_SEED"
#: Files whose tests share what took long to make: one worker of pytest-xdist runs them all.
_SHARING = {
    "tests/compat/test_many_processes.py",
    "tests/emulated_cuda/test_emulated_cuda.py",
    "tests/kernels/test_ahead_of_time.py",
    "tests/sanitizers/test_sanitizers.py",
    "tests/test_curves.py",
    "tests/test_memory.py",
}


#: {a test's first line: {outcome: cases}}, for docs/reliability.md
_outcomes: dict[str, Counter[str]] = {}
_start = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record", metavar="CHECK", help="record outcomes as this part of docs/reliability.json"
    )


def pytest_configure(config: pytest.Config) -> None:
    # Through the environment, so that the workers of pytest-xdist and the processes of a test get the same.
    os.environ.setdefault(_SEED, "0")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(min(2, cores)))
    # Two threads show races, one would not. Workers have more of them than there are cores: who waits must not spin.
    if getattr(config.option, "numprocesses", None):
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # What cuBLAS asks for in deterministic mode, which poisons memory below.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if file in _SHARING else nodeid

    return Scheduling(config, log)


def pytest_report_header() -> str:
    return f"random inputs: {_SEED}={os.environ[_SEED]}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("interpreter") and not interprets():
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1: `make test` runs it so"))

        item.user_properties.append(
            ("docstring", (item.function.__doc__ or "").partition("\n")[0].rstrip("."))
        )


def pytest_collection_finish() -> None:
    # What is there by now stays, and tests make much of what the collector counts: with its defaults an eighth of their
    # time goes into looking for garbage.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)


def outcome_of(report: pytest.TestReport) -> str:
    """How a test ended, with the reason where it was skipped."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    return str(report.outcome)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.passed:
        return
    properties: dict[str, Any] = dict(report.user_properties)
    # Without properties: a worker crashed.
    tried = properties.get("docstring") or report.nodeid.partition("[")[0]
    _outcomes.setdefault(tried, Counter())[outcome_of(report)] += properties.get("cases", 1)


def pytest_sessionfinish(session: pytest.Session) -> None:
    check = session.config.getoption("--record")
    if check and not hasattr(session.config, "workerinput"):
        seed = int(session.config.getoption("--hypothesis-seed", None) or os.environ[_SEED])
        # Of seed 0 inputs are the same in every run.
        record(check, dict(sorted(_outcomes.items())), time.monotonic() - _start, seed or None)


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """Seeds the generators from the run's seed and the test's name: a test alone draws what it draws in a run."""
    run = os.environ[_SEED]
    seed = zlib.crc32(f"{run} {request.node.nodeid}".encode())
    torch.manual_seed(seed)
    random.seed(seed)
    request.node.add_report_section("setup", "seed", f"{_SEED}={run}")


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fills torch.empty with NaN (with the largest value, in integer tensors), so that reading it shows."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    buffers = native.use_buffers(False)  # PyTorch fills what it allocates itself
    yield
    native.use_buffers(buffers)
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def buffers(_poisoned_memory: None) -> Iterator[None]:
    """Large results use memory again, as outside of tests, which no NaN poisons then."""
    before = native.use_buffers(True)
    yield
    native.use_buffers(before)


@pytest.fixture(autouse=True)
def _folds_small_batches() -> Iterator[None]:
    """Folds convolutions of a few pixels too, as tests have them, for which folding doesn't pay."""
    with mock.patch.multiple(RESIDUAL_BLOCK, FOLD_BYTES=0, RECOMPUTE_BYTES=0):
        yield


@pytest.fixture(autouse=True)
def _fuses_small_batches() -> Iterator[None]:
    """Runs blocks fused for a few small images too, which plain PyTorch trains faster on a CPU."""
    with mock.patch("resnet_fused.modules.is_measured", lambda *_: False):
        yield


@pytest.fixture(params=list(DTYPES.values()), ids=list(DTYPES))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """float32, bfloat16 and float16."""
    chosen: torch.dtype = request.param
    return chosen


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    """ "contiguous" and "channels_last"."""
    chosen: str = request.param
    return chosen


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The names "cpu" and, where there is one, "cuda"."""
    chosen: str = request.param
    return chosen

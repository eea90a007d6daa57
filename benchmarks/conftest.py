"""Options, fixtures, and what is printed and written at the end of the benchmark suite."""

from __future__ import annotations

import gc
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from benchmarks.providers import NAMES, default_names
from benchmarks.roofline import Ceilings, ceilings_of
from resnet_fused.cli.precision import PRECISIONS, Precision
from resnet_fused.cli.text import columns, shown
from resnet_fused.measure import OURS, Case, Comparison, Provider, header

Compare = Callable[[Case, list[Provider], int], None]

_comparisons: list[Comparison] = []
_ceilings: dict[str, Ceilings] = {}
_begun = time.monotonic()
_compiled = tempfile.TemporaryDirectory(prefix="resnet_fused_bench_")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("resnet_fused")
    group.addoption("--device", default="cpu", help="cpu or cuda (default: cpu)")
    group.addoption("--dtypes", default="fp32,bf16", help=f"some of {','.join(PRECISIONS)} (fp32,bf16)")
    group.addoption("--impls", help=f"some of {','.join(NAMES)} (all on a GPU, at most four on a CPU)")
    group.addoption("--results", type=Path, help="write the measured rows to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    # What torch.compile cached in an earlier run would make its first step look short.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _compiled.name
    _chosen(config, "--impls", NAMES)
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
def names(request: pytest.FixtureRequest, device: torch.device) -> tuple[str, ...]:
    """Of the providers; ours always."""
    wanted = _chosen(request.config, "--impls", NAMES) or default_names(device, request.module.LAYER)
    return tuple(dict.fromkeys((OURS, *wanted)))


@pytest.fixture(autouse=True)
def _cudnn(precision: Precision, device: torch.device) -> Iterator[None]:
    """TF32 for tf32 alone, and on a GPU cuDNN's fastest algorithms."""
    tf32, matmul = precision.name == "tf32", torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, tf32
    with torch.backends.cudnn.flags(enabled=True, benchmark=device.type == "cuda", allow_tf32=tf32):
        yield
    matmul.allow_tf32 = before


@pytest.fixture
def ceilings(device: torch.device, precision: Precision) -> Ceilings:
    """What the device can do in this dtype: known of an H100, else measured once."""
    if precision.name not in _ceilings:
        _ceilings[precision.name] = ceilings_of(precision.name, device)
    return _ceilings[precision.name]


@pytest.fixture
def compare(device: torch.device) -> Iterator[Compare]:
    """Times providers in turns, without garbage collection. Ours must be right."""

    def run(case: Case, providers: list[Provider], rounds: int) -> None:
        model = case.layer == "model"
        # Several steps, so that the processor runs ahead of a GPU as it does in training.
        repeats = 5 if model and device.type == "cuda" else 1
        comparison = Comparison(case, providers, device, repeats, cold_cache=not model)
        _comparisons.append(comparison)
        comparison.warm_up(measure_peak=not model)
        gc.collect()
        gc.disable()
        for _ in comparison.rounds(rounds):
            pass
        assert comparison.ours.checked, comparison.ours.note

    yield run
    gc.enable()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    measured = [comparison for comparison in _comparisons if comparison.ours.times]
    if not measured:
        return
    rows = [row for comparison in measured for row in comparison.rows()]
    terminalreporter.section(f"times / ours, {torch.get_num_threads()} threads")
    case = ("name", "mode", "dtype", "shape", "impl")
    cells = [
        [
            *(str(row[key]) for key in case),
            shown("{:.2f}", row["median_ms"]),
            shown("{:.2f}x  {:.2f} - {:.2f}", row["ratio"], row["ratio_p20"], row["ratio_p80"]),
            row["note"],
        ]
        for row in rows
    ]
    terminalreporter.write_line("\n".join(columns([[*case, "ms", "time / ours", ""], *cells])))
    if path := config.getoption("--results"):
        device = torch.device(config.getoption("--device"))
        ceilings = {dtype: asdict(of_dtype) for dtype, of_dtype in _ceilings.items()}
        head = header(device, time.monotonic() - _begun, ceilings)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"header": head, "rows": rows}, indent=1) + "\n")
        terminalreporter.write_line(f"written to {path}")

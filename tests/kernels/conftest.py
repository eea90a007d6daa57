"""A simulated GPU, for each test anew."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import resnet_fused
from resnet_fused.kernels.autotune import search
from tests.kernels.simulated_gpu import FIRST, SECOND, THIRD, VENDOR, SimulatedGPU, simulate


@pytest.fixture
def sim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedGPU]:
    """SECOND is the fastest, and the vendor is between it and the others. Warnings are errors."""
    with resnet_fused.backend("auto"), warnings.catch_warnings():
        warnings.simplefilter("error")
        yield simulate(monkeypatch, tmp_path, {FIRST: 3.0, SECOND: 1.0, THIRD: 4.0, VENDOR: 2.0})
    search.forget_measurements()

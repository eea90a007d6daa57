"""300 calls of ops with operands that do not fit (see ill_fitting.py), in a process that may crash."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from resnet_fused.backend import interprets

COMMAND = [sys.executable, "-m", "tests.ops.ill_fitting", "--seed"]


def run(seed: int, cases: int, **environment: str) -> None:
    command = [*COMMAND, str(seed), "--cases", str(cases)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=500, env={**os.environ, **environment}
    )
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, f"exit status {done.returncode} after {last}\n{done.stderr[-5000:]}"
    assert f"{cases} cases" in done.stderr


def test_ill_fitting_operands() -> None:
    run(0, 300)


@pytest.mark.interpreter
def test_ill_fitting_operands_of_triton_kernels() -> None:
    assert interprets()
    run(0, 60, RESNET_FUSED_BACKEND="triton")

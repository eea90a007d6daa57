"""The console script and `--version`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import resnet_fused

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """What an installer makes of [project.scripts]."""
    section = (ROOT / "pyproject.toml").read_text().partition("[project.scripts]\n")[2].partition("\n[")[0]
    ((name, value),) = re.findall(r'^(\S+) = "(.+)"$', section, re.MULTILINE)
    module, _, function = value.partition(":")
    assert callable(EntryPoint(name, value, "console_scripts").load())
    path = tmp_path / name
    path.write_text(
        f"#!{sys.executable}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n"
    )
    path.chmod(0o755)
    return path


def run(*command: object, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"} | variables
    return subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=60
    )


def test_console_script(script: Path) -> None:
    done = run(script, "--version")
    assert (done.returncode, done.stdout) == (0, f"resnet_fused {resnet_fused.__version__}\n")
    done = run(script, "train", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: resnet-fused train ")
    done = run(script, "train", "--epochs", "0")
    assert done.returncode == 2
    assert done.stderr.startswith("resnet_fused: error: ") and done.stderr.endswith(
        "; see resnet-fused train --help\n"
    )
    assert done.stderr.count("\n") == 1


def test_module() -> None:
    done = run(sys.executable, "-m", "resnet_fused", "--version")
    assert (done.returncode, done.stdout) == (0, f"resnet_fused {resnet_fused.__version__}\n")
    done = run(sys.executable, "-m", "resnet_fused", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m resnet_fused ")


def test_a_misspelt_variable(script: Path) -> None:
    """An environment variable with an unknown value: one line of the command line, ValueError in a program."""
    backend = "RESNET_FUSED_BACKEND must be one of auto, triton, vendor, reference, got 'refrence'"
    done = run(sys.executable, "-m", "resnet_fused", "info", RESNET_FUSED_BACKEND="refrence")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"resnet_fused: error: {backend}\n")
    done = run(script, "info", RESNET_FUSED_CPU_ISA="AVX2")
    isa = "RESNET_FUSED_CPU_ISA must be one of avx512, avx2, baseline, got 'AVX2'"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"resnet_fused: error: {isa}\n")
    done = run(sys.executable, "-c", "import resnet_fused", RESNET_FUSED_BACKEND="refrence")
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == f"ValueError: {backend}"

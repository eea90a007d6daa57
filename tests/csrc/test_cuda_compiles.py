"""Every .cu compiles for every supported architecture, warnings as errors, without spilling registers.

Needs nvcc, not a GPU. The binding's CUDA side is compiled too, against the headers of whatever torch is installed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

CSRC = Path(__file__).parents[2] / "csrc"
ARCHITECTURES = ("80", "90", "100")

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


def run(*command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("source", sorted((CSRC / "cuda").glob("*.cu")), ids=lambda p: p.stem)
def test_kernels_compile_without_spills(source: Path, tmp_path: Path) -> None:
    # PTX of the oldest, which a source without __CUDA_ARCH__ shares, and machine code of all.
    assert "__CUDA_ARCH__" not in source.read_text()
    targets = [
        f"-gencode=arch=compute_{ARCHITECTURES[0]},code=[{','.join(f'sm_{a}' for a in ARCHITECTURES)}]"
    ]
    flags = ["-std=c++17", "-O3", "--Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra", "-Xptxas", "-v"]
    report = run(
        "nvcc", "-c", *flags, *targets, "--threads", "2", "-I", CSRC, source, "-o", tmp_path / "out.o"
    )
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) >= len(ARCHITECTURES), "ptxas reported no kernels"
    assert set(spills) == {("0", "0")}


def test_bindings_compile_with_cuda(tmp_path: Path) -> None:
    includes = [f"-I{path}" for path in (CSRC, *include_paths(), sysconfig.get_paths()["include"])]
    defines = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x03090000"]
    warnings = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror"]
    run(
        "g++",
        "-std=c++17",
        "-fPIC",
        *warnings,
        *defines,
        *includes,
        "-c",
        CSRC / "bindings.cpp",
        "-o",
        tmp_path / "b.o",
    )

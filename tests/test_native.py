"""The extension that isn't there: one warning with the reason, unless that was asked for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resnet_fused import native
from resnet_fused.backend import backend, summary

ROOT = Path(__file__).parents[1]
#: Takes away what pip install -e adds, so that only folders on sys.path are searched.
PREPARE = (
    "import importlib.util, sys\n"
    "sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in repr(finder).lower()]\n"
)
PROGRAM = (
    f"{PREPARE}"
    "import resnet_fused\n"
    "from resnet_fused import backend, native, functional\n"
    "print(native.missing_reason)\n"
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A clone in which nothing is built."""
    ignore = shutil.ignore_patterns("_C.*.so", "_build.json", "__pycache__")
    shutil.copytree(ROOT / "resnet_fused", tmp_path / "clone" / "resnet_fused", ignore=ignore)
    shutil.copy(ROOT / "setup.py", tmp_path / "clone")
    return tmp_path / "clone"


def import_in(folder: Path, **environ: str) -> tuple[str, list[str]]:
    """The reason that importing there finds, and the warnings."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "RESNET_FUSED_BACKEND")
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=folder,
        env=clean | environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), [line for line in done.stderr.splitlines() if "Warning" in line]


def test_a_checkout_that_is_not_built(checkout: Path) -> None:
    reason, warned = import_in(checkout)
    assert reason.startswith("the extension isn't built in") and "`pip install -e .`" in reason
    message = f"RuntimeWarning: resnet_fused runs plain PyTorch, nothing fused: {reason}"
    assert warned == [f"<string>:3: {message}"]  # the line of the import
    assert import_in(checkout, RESNET_FUSED_BACKEND="reference") == (reason, [])


def test_a_checkout_that_hides_the_installed_package(checkout: Path, tmp_path: Path) -> None:
    installed = tmp_path / "site" / "resnet_fused"
    installed.mkdir(parents=True)
    (installed / "_C.abi3.so").touch()
    reason, warned = import_in(checkout, PYTHONPATH=str(tmp_path / "site"))
    assert f"imports the source folder {checkout}/resnet_fused, which has no extension" in reason
    assert f"the installed package in {installed}: start Python from another folder" in reason
    assert len(warned) == 1 and reason in warned[0]


def test_an_extension_of_other_sources_is_not_used(checkout: Path) -> None:
    """pip install -e makes Python search its sources for whatever these don't have."""
    if not native.is_loaded:
        pytest.skip("needs an extension that could be taken")
    program = (
        f"{PREPARE}"
        "class Finder:\n"
        "    @staticmethod\n"
        "    def find_spec(name, path=None, target=None):\n"
        f"        return importlib.util.spec_from_file_location(name, {native._C.__file__!r}) if name == "
        "'resnet_fused._C' else None\n"
        "sys.meta_path.append(Finder)\n"
        "from resnet_fused import native\n"
        "print(native.missing_reason)"
    )
    found = subprocess.check_output(
        [sys.executable, "-c", program], cwd=checkout, text=True, stderr=subprocess.DEVNULL
    )
    assert f"instead of the installed package in {Path(native._C.__file__).parent}" in found


@pytest.mark.parametrize("asked", [True, False])
def test_an_installation_without_extension(checkout: Path, asked: bool) -> None:
    (checkout / "setup.py").unlink()
    record = {"extension": False, "missing": "built without its extension: the moon is full", "asked": asked}
    (checkout / "resnet_fused" / "_build.json").write_text(json.dumps(record))
    reason, warned = import_in(checkout)
    assert reason == "resnet_fused was built without its extension: the moon is full"
    assert len(warned) == (0 if asked else 1)


@pytest.mark.parametrize("library", ["libcudart.so.99", "libc10_cuda.so", "libtorch_cuda.so"])
def test_a_cuda_build_with_another_torch(library: str) -> None:
    error = ImportError(f"{library}: cannot open shared object file: No such file or directory")
    reason = native._why_not_loaded(error)
    assert f"was built for CUDA and needs {library}, but torch {torch.__version__} is" in reason
    assert "pip install --no-build-isolation" in reason and "\n" not in reason


def test_an_extension_that_does_not_load(checkout: Path) -> None:
    (checkout / "resnet_fused" / "_C.abi3.so").write_text("no library")
    reason, warned = import_in(checkout)
    assert reason.startswith("resnet_fused._C doesn't load here: ") and len(warned) == 1


@pytest.mark.skipif(not native.is_loaded, reason="needs the extension")
def test_what_runs_in_one_line() -> None:
    assert summary("cpu") == "runs fused: native CPU kernels"
    if not native.has_cuda:
        assert summary("cuda") == f"runs plain PyTorch, nothing fused: {native.missing_cuda_reason}"
        assert native.summary().startswith("CPU kernels only, built without CUDA")
    with backend("reference"):
        assert summary("cpu") == "runs plain PyTorch, nothing fused: forced by the backend setting"

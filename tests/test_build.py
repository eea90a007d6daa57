"""setup.py: which CUDA toolkit it takes, what it builds where one doesn't fit, and what an sdist holds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import setup
from csrc.cuda_toolkit import NoToolkit, Toolkit, find_toolkit
from resnet_fused import native

ROOT = Path(__file__).parents[1]
NOWHERE = Path("/nowhere")


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def make_toolkit(root: Path, version: str = "13.0", leave_out: str = "", compiles: str = "exit 1") -> Path:
    """The nvcc of a folder that is laid out like NVIDIA's."""
    target = root / "targets" / "x86_64-linux"
    for file in ("include/cuda_runtime.h", "lib/stubs/libcuda.so", "lib/libcudart.so"):
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        if not leave_out or leave_out not in file:
            (target / file).touch()
    return script(
        root / "bin" / "nvcc",
        f"""case $1 in
--version) echo 'Cuda compilation tools, release {version}, V{version}.88';;
--dryrun) cat >&2 <<'END'
#$ _HERE_={root}/bin
#$ TOP={root}/bin/..
#$ INCLUDES="-I{root}/bin/../targets/x86_64-linux/include"
#$ SYSTEM_INCLUDES="-isystem" "{root}/bin/../targets/x86_64-linux/include/cccl"
#$ LIBRARIES=  "-L{target}/lib/stubs" "-L{target}/lib"
END
;;
*) {compiles};;
esac""",
    )


def find(path: Path, cuda: str = "13.0", wheels: Path = NOWHERE, **environ: str) -> Toolkit:
    return find_toolkit(cuda, {"PATH": str(path), **environ}, wheels, prefix=NOWHERE)


def test_a_toolkit_that_fits(tmp_path: Path) -> None:
    root = tmp_path / "cuda"
    found = find(make_toolkit(root).parent)
    target = root / "targets" / "x86_64-linux"
    assert found == Toolkit(root, (13, 0), target / "include", target / "lib" / "libcudart.so")
    assert found.architectures == "8.0;9.0;10.0+PTX"


def test_nvcc_without_sm_100(tmp_path: Path) -> None:
    make_toolkit(tmp_path, "12.6")
    assert find(tmp_path / "bin", "12.8").architectures == "8.0;9.0+PTX"


@pytest.mark.parametrize("wrapper", ["script", "link"])
def test_a_wrapper_outside_its_toolkit(tmp_path: Path, wrapper: str) -> None:
    nvcc, path = make_toolkit(tmp_path / "cuda"), tmp_path / "tools"
    if wrapper == "script":
        script(path / "nvcc", f'exec {nvcc} "$@"')
    else:
        path.mkdir()
        (path / "nvcc").symlink_to(nvcc)
    assert find(path).home == tmp_path / "cuda"


def test_the_nvcc_of_a_distribution(tmp_path: Path) -> None:
    """Its headers and libraries are the system's."""
    make_toolkit(tmp_path / "lib" / "cuda", leave_out="cu")
    for file in ("include/cuda_runtime.h", "lib/x86_64-linux-gnu/libcudart.so"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    settings = f"""echo '#$ TOP={tmp_path}/lib/cuda'
echo '#$ INCLUDES="-I{tmp_path}/include"'
echo '#$ LIBRARIES= -L{tmp_path}/lib/x86_64-linux-gnu'"""
    script(tmp_path / "bin" / "nvcc", f"[ $1 = --version ] && echo 'release 12.4,' || {{ {settings}\n}}")
    found = find(tmp_path / "bin", "12.8")
    assert (found.home, found.include) == (tmp_path / "lib" / "cuda", tmp_path / "include")
    assert found.cudart == tmp_path / "lib" / "x86_64-linux-gnu" / "libcudart.so"


def test_what_is_missing_may_come_with_torch(tmp_path: Path) -> None:
    """The wheel has libcudart.so.13, without the link libcudart.so that -lcudart needs."""
    nvcc = make_toolkit(tmp_path / "cuda", leave_out="cudart")
    wheel = tmp_path / "nvidia" / "cu13" / "lib" / "libcudart.so.13"
    wheel.parent.mkdir(parents=True)
    wheel.touch()
    assert find(nvcc.parent, wheels=tmp_path).cudart == wheel


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ({"leave_out": "cudart"}, "has no libcudart.so to link: install the libraries of CUDA 13.x"),
        ({"leave_out": "runtime"}, "has no cuda_runtime.h: install the headers of CUDA 13.x"),
        ({"version": "12.4"}, "is of CUDA 12.4, but torch is built for CUDA 13.0: install"),
        ({"version": "14.0"}, "is of CUDA 14.0, but torch is built for CUDA 13.0: install"),
    ],
    ids=lambda value: next(iter(value.values())) if isinstance(value, dict) else "",
)
def test_a_toolkit_that_does_not_fit(tmp_path: Path, broken: dict[str, str], reason: str) -> None:
    nvcc = make_toolkit(tmp_path / "broken", **broken)
    with pytest.raises(NoToolkit) as problem:
        find(nvcc.parent)
    assert str(problem.value).startswith(f"{nvcc} {reason}") and "\n" not in str(problem.value)
    # Another that fits is taken.
    good = make_toolkit(tmp_path / "good")
    assert find(nvcc.parent, CUDA_PATH=str(tmp_path / "good")).home == good.parents[1]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("echo one; echo 'no such toolkit' >&2; exit 3", "fails with exit code 3: no such toolkit"),
        ("exit 0", "names no release"),
        ("[ $1 = --version ] && echo 'release 13.0,'; exit 0", "does not tell in which toolkit it is"),
    ],
)
def test_an_nvcc_that_does_not_work(tmp_path: Path, text: str, reason: str) -> None:
    script(tmp_path / "wrapper" / "nvcc", text)
    with pytest.raises(NoToolkit, match=reason):
        find(tmp_path / "wrapper")


def test_no_nvcc() -> None:
    with pytest.raises(NoToolkit, match=r"no nvcc found; torch needs that of CUDA 12\.x"):
        find(NOWHERE, "12.8", CUDA_HOME="/nowhere/else")


def test_the_newest_of_several_toolkits(tmp_path: Path) -> None:
    for version in ("12.9", "13.2", "13.10"):
        make_toolkit(tmp_path / f"cuda-{version}", version)
    assert find_toolkit("13.0", {}, NOWHERE, prefix=tmp_path).version == (13, 10)
    assert find_toolkit("12.6", {}, NOWHERE, prefix=tmp_path).version == (12, 9)


@pytest.mark.parametrize(
    ("text", "cuda"), [("cuda: Optional[str] = '13.0'", "13.0"), ("cuda: Optional[str] = None", "")]
)
def test_the_torch_that_build_isolation_hides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, cuda: str
) -> None:
    """CUDA kernels for another major version than its own would keep the extension from loading."""
    monkeypatch.setattr(setup.sysconfig, "get_path", lambda name: str(tmp_path))
    assert setup.installed_cuda() is None
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text(
        f"__version__ = '2.13.0'\ndebug = False\n{text}\nhip = None\n"
    )
    assert setup.installed_cuda() == cuda
    monkeypatch.setattr(torch.version, "cuda", "99.1")
    with pytest.raises(NoToolkit, match="builds for the installed one"):
        setup.fitting_toolkit()


def test_a_torch_that_is_missing_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(
        SystemExit, match=r"^resnet_fused needs torch >= 2\.11, and torch 2\.9\.1\+cpu is installed: run"
    ):
        setup.check_torch()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match=r"^resnet_fused builds against torch, .*, or install torch first$"):
        setup.check_torch()


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of what is built, with an extension that compiles in a second."""
    root = tmp_path / "sources"
    ignore = shutil.ignore_patterns("_C.*.so", "_build.json", "__pycache__")
    shutil.copytree(ROOT / "resnet_fused", root / "resnet_fused", ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc/cuda_toolkit.py"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    (root / "csrc" / "bindings.cpp").write_text("int resnet_fused;\n")
    (root / "csrc" / "cuda").mkdir()
    (root / "csrc" / "cuda" / "kernel.cu").touch()
    return root


def build(root: Path, cuda: str | None, **environ: str) -> subprocess.CompletedProcess[str]:
    """Runs setup.py with a torch that says it is built for that CUDA; the result is in root / "lib"."""
    program = (
        "import sys, torch, setup\n"
        f"torch.version.cuda = {cuda!r}\n"
        "setup.installed_cuda = lambda: None\n"
        "sys.argv = ['setup.py', '-q', 'build', '--build-lib', 'lib']\n"
        "setup.main()\n"
    )
    names = ("CUDA_HOME", "CUDA_PATH", "CXX", "RESNET_FUSED_BUILD", "TORCH_CUDA_ARCH_LIST")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=root, env=clean | environ, capture_output=True, text=True, timeout=120)


def recorded(root: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((root / "lib" / "resnet_fused" / "_build.json").read_text())
    return found


def has_extension(root: Path) -> bool:
    return bool(list((root / "lib" / "resnet_fused").glob("_C.*.so")))


FAILS = "echo 'unsupported compiler' >&2; exit 1"
MAKES_NO_OBJECT_FILE = 'while [ "$1" != -o ]; do shift; done; echo "no object file" > "$2"'


@pytest.mark.parametrize("compiles", [FAILS, MAKES_NO_OBJECT_FILE], ids=["compiler", "linker"])
def test_a_cuda_build_that_fails(sources: Path, tmp_path: Path, compiles: str) -> None:
    """In nvcc, or at the link: what is left is the CPU's, and the reason."""
    make_toolkit(tmp_path / "cuda", compiles=compiles)
    home = str(tmp_path / "cuda")
    done = build(sources, "13.0", CUDA_HOME=home)
    assert done.returncode == 0, done.stderr
    assert has_extension(sources)
    lines = [line for line in done.stderr.splitlines() if line.startswith("resnet_fused: ")]
    assert len(lines) == 1 and "built without CUDA: its kernels don't compile or link" in lines[0]
    assert "RESNET_FUSED_BUILD=cuda insists" in lines[0]
    assert recorded(sources) == {
        "extension": True,
        "missing": lines[0].removeprefix("resnet_fused: "),
        "asked": False,
    }
    assert build(sources, "13.0", CUDA_HOME=home, RESNET_FUSED_BUILD="cuda").returncode != 0


def test_no_compiler(sources: Path) -> None:
    """A machine without compilers: the installation succeeds, and importing it warns once and says what to do."""
    done = build(sources, None, PATH="/nowhere")
    assert done.returncode == 0, done.stderr
    assert not has_extension(sources)
    reason = "there is no C++ compiler (c++): install g++, then resnet_fused again"
    missing = f"built without its extension: {reason}"
    assert recorded(sources) == {"extension": False, "missing": missing, "asked": False}
    info = subprocess.run(
        [sys.executable, "-m", "resnet_fused", "info"], cwd=sources / "lib", capture_output=True, text=True
    )
    assert info.returncode == 0 and missing in info.stdout
    warned = [line for line in info.stderr.splitlines() if "Warning" in line]
    message = f"RuntimeWarning: resnet_fused runs plain PyTorch, nothing fused: resnet_fused was {missing}"
    assert len(warned) == 1 and warned[0].endswith(message), info.stderr


def insists_in_vain(mode: str, reason: str) -> None:
    with pytest.raises(SystemExit) as ended:
        setup.make_plan(mode)
    assert str(ended.value).startswith(f"RESNET_FUSED_BUILD={mode}: ") and reason in str(ended.value)


def test_what_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default with the reason, and not where it was asked for."""
    path = make_toolkit(tmp_path / "cuda", "11.8").parent
    monkeypatch.setenv("PATH", f"{path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_HOME", str(path.parent))
    monkeypatch.setattr(setup, "installed_cuda", lambda: None)
    for cuda, reason in (
        ("99.0", f"{path}/nvcc is of CUDA 11.8, but torch is built for CUDA 99.0"),
        (None, "has no CUDA support"),
    ):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        plan = setup.make_plan("auto")
        assert plan.extension is not None and f"built without CUDA: {reason}" in plan.missing.replace(
            f"torch {torch.__version__} ", ""
        )
        assert not plan.asked and not plan.may_fall_back
        insists_in_vain("cuda", reason)
    monkeypatch.setenv("CXX", "")
    insists_in_vain("cpu", "there is no C++ compiler (CXX is empty): unset it")
    monkeypatch.setenv("CXX", "no-such-compiler")
    insists_in_vain("cpu", "there is no C++ compiler (no-such-compiler)")
    assert setup.make_plan("none").extension is None and setup.make_plan("none").asked


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_check_of_a_release(tmp_path: Path, backend: str) -> None:
    """The program that the release workflow runs with each package: it passes with kernels that run, and else fails."""
    kernels = "cuda" if native.has_cuda else "cpu" if native.is_loaded else "none"
    command = [sys.executable, str(ROOT / ".github" / "check_wheel.py"), kernels]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "RESNET_FUSED_BACKEND": backend}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120)
    if backend == "auto" or kernels == "none":
        assert done.returncode == 0 and done.stdout.startswith("resnet_fused "), done.stderr
    else:
        assert done.returncode == 1 and done.stderr.startswith("not fused: "), done.stderr


def test_the_sdist_holds_all_sources(tmp_path: Path) -> None:
    """Whatever would be compiled here; wanted are at least the files in csrc/."""
    root = tmp_path / "sources"
    ignore = shutil.ignore_patterns("_C.*.so", "_build.json", "__pycache__")
    for name in ("csrc", "resnet_fused", "docs"):
        shutil.copytree(ROOT / name, root / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, root)
    program = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    environ = {**os.environ, "RESNET_FUSED_BUILD": "none"}
    out = subprocess.check_output([sys.executable, "-c", program], cwd=root, env=environ, text=True)
    with tarfile.open(root / "dist" / out.splitlines()[-1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    files = [file for part in ("csrc", "docs") for file in (root / part).rglob("*") if file.is_file()]
    wanted = {str(file.relative_to(root)) for file in files}
    assert len(wanted) > 25 and wanted <= names, sorted(wanted - names)

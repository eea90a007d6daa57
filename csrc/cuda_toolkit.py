"""Finds a CUDA toolkit that fits torch: a compiler that runs, its headers, and a libcudart to link.

setup.py uses it instead of torch.utils.cpp_extension's search, which takes the folder above whichever nvcc is on PATH:
that folder has neither headers nor libraries where nvcc is a wrapper script or a distribution's.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

#: What nvcc assembles for: A100, H100, B200, and later GPUs through PTX. Before CUDA 12.8 there is no sm_100.
ARCHITECTURES = "8.0;9.0;10.0+PTX"
OLDER_ARCHITECTURES, OLDER_THAN = "8.0;9.0+PTX", (12, 8)


class NoToolkit(Exception):
    """Why no CUDA toolkit can be used, in one line."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit that fits torch.

    Attributes:
        home: what CUDA_HOME has to be: its bin/nvcc is the compiler.
        version: (major, minor).
        include: the folder with cuda_runtime.h.
        cudart: the shared library to link.
    """

    home: Path
    version: tuple[int, int]
    include: Path
    cudart: Path

    @property
    def architectures(self) -> str:
        """The default of TORCH_CUDA_ARCH_LIST."""
        return OLDER_ARCHITECTURES if self.version < OLDER_THAN else ARCHITECTURES


def find_toolkit(
    torch_cuda: str, environ: Mapping[str, str], site_packages: Path, prefix: Path = Path("/usr/local")
) -> Toolkit:
    """The first toolkit that fits, of CUDA_HOME, CUDA_PATH, PATH, ``prefix``/cuda* and the nvidia-* wheels.

    Args:
        torch_cuda: ``torch.version.cuda``; the major version has to be the same.
        environ: the environment variables.
        site_packages: where torch is installed, and the nvidia-* wheels that it depends on.
        prefix: where NVIDIA's installers put toolkits.

    Raises:
        NoToolkit: none fits; says what is wrong with the first.
    """
    major = int(torch_cuda.partition(".")[0])
    problems = []
    for nvcc in _candidates(environ, site_packages, prefix):
        try:
            return _inspect(nvcc, torch_cuda, major, site_packages)
        except NoToolkit as problem:
            problems.append(str(problem))
    raise NoToolkit(problems[0] if problems else f"no nvcc found; torch needs that of CUDA {major}.x")


def _candidates(environ: Mapping[str, str], site_packages: Path, prefix: Path) -> Iterator[Path]:
    """Every nvcc to try, each once."""
    found = [Path(environ[name], "bin", "nvcc") for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    found += [Path(folder, "nvcc") for folder in environ.get("PATH", "").split(os.pathsep) if folder]
    # The newest first.
    found += sorted((path / "bin" / "nvcc" for path in prefix.glob("cuda*")), key=_numbers, reverse=True)
    found += sorted(site_packages.glob("nvidia/*/bin/nvcc"))
    seen = set()
    for nvcc in found:
        if shutil.which(nvcc) and nvcc.resolve() not in seen:
            seen.add(nvcc.resolve())
            yield nvcc


def _numbers(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", str(path))]


def _inspect(nvcc: Path, torch_cuda: str, major: int, site_packages: Path) -> Toolkit:
    """The toolkit of an nvcc.

    Raises:
        NoToolkit: it does not fit.
    """
    release = re.search(r"release (\d+)\.(\d+)", _run(nvcc, "--version"))
    if release is None:
        raise NoToolkit(f"{nvcc} --version names no release")
    version = int(release[1]), int(release[2])
    if version[0] != major:
        raise NoToolkit(
            f"{nvcc} is of CUDA {version[0]}.{version[1]}, but torch is built for CUDA {torch_cuda}: "
            f"install the toolkit of CUDA {major}.x and set CUDA_HOME"
        )
    # nvcc knows where its parts are, however many scripts and links lead to it.
    settings = dict(re.findall(r"^#\$ (\w+)=(.*)$", _run(nvcc, "--dryrun", "-x", "cu", os.devnull), re.M))
    homes = [Path(settings[name]) for name in ("TOP", "_HERE_") if settings.get(name)]
    homes = [homes[0], *(here.parent for here in homes[1:])] if homes else []
    homes += [nvcc.resolve().parent.parent, nvcc.parent.parent]
    home = next((path.resolve() for path in homes if (path / "bin" / "nvcc").is_file()), None)
    if home is None:
        raise NoToolkit(f"{nvcc} does not tell in which toolkit it is: set CUDA_HOME")
    wheels = sorted(site_packages.glob(f"nvidia/cu{major}")) + sorted(
        site_packages.glob("nvidia/cuda_runtime")
    )
    flags = " ".join(settings.get(name, "") for name in ("INCLUDES", "SYSTEM_INCLUDES"))
    includes = [*_folders(flags), home / "include", *(wheel / "include" for wheel in wheels)]
    include = next((path for path in includes if (path / "cuda_runtime.h").is_file()), None)
    if include is None:
        raise NoToolkit(f"{nvcc} has no cuda_runtime.h: install the headers of CUDA {major}.x")
    libraries = [*_folders(settings.get("LIBRARIES", "")), home / "lib64", home / "lib"]
    names = [folder / "libcudart.so" for folder in libraries]
    # The wheels have no development link, and torch may come with the wheels of another version than this one's.
    names += [wheel / "lib" / f"libcudart.so.{major}" for wheel in wheels]
    cudart = next((path for path in names if path.is_file()), None)
    if cudart is None:
        raise NoToolkit(f"{nvcc} has no libcudart.so to link: install the libraries of CUDA {major}.x")
    return Toolkit(home, version, include.resolve(), cudart.resolve())


def _run(nvcc: Path, *arguments: str) -> str:
    """Its output, errors included.

    Raises:
        NoToolkit: it fails.
    """
    command = [str(nvcc), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoToolkit(f"{nvcc} does not run: {error}") from error
    output = done.stdout + done.stderr
    if done.returncode != 0:
        lines = output.split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no message")
        raise NoToolkit(f"{shlex.join(command)} fails with exit code {done.returncode}: {last}")
    return output


def _folders(flags: str) -> list[Path]:
    """The folders of -I, -L and -isystem flags."""
    words = [word for word in shlex.split(flags) if word != "-isystem"]
    return [Path(re.sub("^-[IL]", "", word)) for word in words]

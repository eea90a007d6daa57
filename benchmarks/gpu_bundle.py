"""What a first run on a GPU would compile, compiled without one: ``python -m benchmarks.gpu_bundle make FILE``.

For sm_90, and for the Python, torch and Triton that run this, which have to be those of the machine with the GPU. In
it: a Triton cache with every kernel that tuning may try for the steps of ``CASES``, the launchers that Triton compiles
with the C compiler, the extension, and pytest with what the tests need of it. ``load FILE`` puts them where
``benchmarks.gpu`` looks for them. ``check FILE`` opens it as that machine would and exits with 1 unless nothing of it
has to be compiled again; ``make`` ends with that too.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu import CACHE, ROOT, TOOLS
from tools.kernel_resources import CompileError, Driver, compile_all, compile_hook, warm_up

#: Architecture and batch of the training steps, in bf16 at 224x224.
CASES = (("resnet50", 256), ("resnet50", 400), ("resnet50", 64), ("resnet18", 256))
ARCH = 90
#: Files of an entry of Triton's cache that it reads again; the text of the compiler's stages it does not.
READ = (".cubin", ".json", ".so")
EXTENSION, MANIFEST = "resnet_fused/_C.abi3.so", "build/gpu-bundle.json"
#: What a machine without a network may lack to run the tests.
PACKAGES = ("pytest", "pytest-timeout", "pytest-xdist")


def pack(file: Path, work: Path, entries: Iterable[str], manifest: dict[str, Any]) -> None:
    """Writes a bundle of some entries (folders) of the Triton cache in ``work``, and of all launchers in it."""
    cache, names = work / "triton", set(entries)
    about = work / "manifest.json"
    about.write_text(json.dumps(manifest | {"cache": str(cache)}, indent=1))
    with tarfile.open(file, "w:xz") as tar:
        tar.add(about, MANIFEST)
        tar.add(work / "lib" / EXTENSION, EXTENSION)
        tar.add(work / "python", TOOLS)
        for path in sorted(cache.glob("*/*")):
            if path.suffix in READ and (path.suffix == ".so" or path.parent.name in names):
                tar.add(path, f"{CACHE}/triton/{path.relative_to(cache)}")


def load(file: Path, root: Path = ROOT) -> dict[str, Any]:
    """Extracts a bundle; returns its manifest.

    Raises:
        OSError, tarfile.TarError, lzma.LZMAError: it cannot be read or written.
    """
    (root / EXTENSION).unlink(missing_ok=True)  # never write into a library that a process has loaded
    with tarfile.open(file) as tar:
        tar.extractall(root, filter="data")
    manifest: dict[str, Any] = json.loads((root / MANIFEST).read_text())
    cache = root / CACHE / "triton"
    for group in cache.glob("*/__grp__*"):  # Triton stores absolute paths
        group.write_text(group.read_text().replace(manifest["cache"], str(cache)))
    return manifest


def identity() -> dict[str, str]:
    """What two machines have to agree in for the kernels of one to be valid on the other."""
    import torch
    import triton

    sources = sorted((ROOT / "resnet_fused" / "kernels").rglob("*.py"))
    return {
        "python": ".".join(map(str, sys.version_info[:2])),
        "torch": str(torch.__version__),
        "triton": str(triton.__version__),
        "kernels": hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16],
    }


def differences(manifest: dict[str, Any]) -> list[str]:
    """In what this machine differs from the one that made a bundle; then its kernels are compiled again."""
    theirs = manifest["identity"]
    return [
        f"{name} {here}, bundle {theirs[name]}" for name, here in identity().items() if theirs[name] != here
    ]


# Kernels


@dataclass(frozen=True)
class Kernel:
    """A kernel as "module:function", and what Triton specialises it for, with which another process compiles it."""

    function: str
    specialization_data: str


def candidates(cases: Iterable[tuple[str, int]] = CASES) -> dict[Kernel, Any]:
    """Every kernel that tuning may try for some steps, with a launch of it (resnet_fused.kernels.launch.Launch)."""
    from triton.runtime import driver

    from resnet_fused import plan

    kernels: dict[Kernel, Any] = {}

    def note(*, compile: dict[str, Any], fn: Any, **_: Any) -> None:
        kernel = Kernel(f"{fn.module}:{fn.jit_function.fn.__qualname__}", compile["specialization_data"])
        kernels.setdefault(kernel, launch)

    launches = [x for arch, batch in cases for x in plan.candidates(arch, batch, "bf16", capability=ARCH)]
    driver.set_active(Driver(ARCH))
    with compile_hook(note):
        for launch in launches:
            warm_up(launch, ARCH)
    return kernels


@contextmanager
def driver_library() -> Iterator[None]:
    """Triton links launchers with the CUDA driver's library, which only a machine with a GPU has: an empty one."""
    from triton.backends.nvidia import driver

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "cuda.c")
        texts = Path(driver.dirname, "driver.c").read_text() + Path(driver.__file__).read_text()
        names = sorted(set(re.findall(r"\bcu[A-Z]\w*", texts)))
        source.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in names))
        options = ["-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", f"{folder}/libcuda.so.1"]
        subprocess.run([os.environ.get("CC", "cc"), *options, source], check=True)
        os.environ["TRITON_LIBCUDA_PATH"] = folder
        yield


def make_launcher(kernel: Any) -> None:
    """Compiles the launcher of a CompiledKernel, and what Triton calls the driver with, unless they are cached."""
    from triton.backends.nvidia.driver import CudaLauncher, CudaUtils

    ctypes.CDLL(f"{os.environ['TRITON_LIBCUDA_PATH']}/libcuda.so.1", ctypes.RTLD_GLOBAL)
    CudaUtils()
    CudaLauncher(kernel.src, kernel.metadata)


def cached(kernel: Kernel, arch: int) -> Path:
    """Compiles a kernel and its launcher into Triton's cache; returns its entry there, a folder.

    Raises:
        CompileError: it does not compile.
    """
    from triton.runtime import driver

    driver.set_active(Driver(arch))
    module, _, function = kernel.function.partition(":")
    try:
        compiled = getattr(importlib.import_module(module), function).preload(kernel.specialization_data)
        make_launcher(compiled)
    except Exception as error:  # whatever the compiler raises
        raise CompileError(f"{function}: {type(error).__name__}: {str(error)[:200]}") from error
    return Path(next(iter(compiled.metadata_group.values()))).parent


def compile_kernels(cache: Path, kernels: Iterable[Kernel]) -> tuple[list[str], int]:
    """Fills a Triton cache; its entries, and how many kernels do not compile: tuning leaves them out, too."""
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    entries: list[str] = []
    refused = 0
    with driver_library():
        pairs = [(kernel, ARCH) for kernel in kernels]
        for count, (_, _, result) in enumerate(compile_all(pairs, cached, os.cpu_count()), 1):
            if isinstance(result, str):
                refused += 1
                print(result, flush=True)
            else:
                entries.append(result.name)
            if count % 50 == 0:
                print(f"{count} of {len(pairs)} kernels", flush=True)
    return entries, refused


def build_extension(work: Path) -> None:
    """Compiles the extension for ``ARCH`` with this interpreter's torch."""
    variables = {"TORCH_CUDA_ARCH_LIST": f"{ARCH // 10}.{ARCH % 10}", "RESNET_FUSED_BUILD": "cuda"}
    # nvcc on PATH may be a script that lies elsewhere than its libraries.
    if Path("/usr/local/cuda/bin/nvcc").exists():
        variables |= {"CUDA_HOME": os.environ.get("CUDA_HOME", "/usr/local/cuda")}
    folders = ["--build-lib", f"{work}/lib", "--build-temp", f"{work}/objects"]
    command = [sys.executable, "setup.py", "-q", "build_ext", *folders]
    subprocess.run(command, cwd=ROOT, env=os.environ | variables, check=True)


def install_packages(folder: Path) -> None:
    """Installs PACKAGES for this interpreter."""
    shutil.rmtree(folder, ignore_errors=True)
    options = ["--quiet", "--no-compile", "-c", "constraints.txt", "--target", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *PACKAGES], cwd=ROOT, check=True)


def make(file: Path) -> int:
    begun = time.monotonic()
    work = ROOT / "build" / "gpu-bundle"  # stays: what has not changed since need not be compiled again
    install_packages(work / "python")
    build_extension(work)
    entries, refused = compile_kernels(work / "triton", candidates())
    file.parent.mkdir(parents=True, exist_ok=True)
    pack(file, work, entries, {"identity": identity(), "cases": CASES, "refused": refused})
    print(
        f"{file}: {len(entries)} kernels, {refused} that do not compile, {file.stat().st_size / 2**20:.1f} MiB;"
        f" {time.monotonic() - begun:.0f} s",
        flush=True,
    )
    # In a process of its own, which has compiled nothing.
    return subprocess.run([sys.executable, "-m", "benchmarks.gpu_bundle", "check", file], cwd=ROOT).returncode


def check(file: Path) -> int:
    """Whether a machine with a GPU would compile nothing of what a bundle is made for; 1 if it would."""
    from triton import knobs
    from triton.compiler import ASTSource

    def absent(*_: Any, **__: Any) -> Any:
        raise LookupError("not in the bundle")

    # What Triton calls when it does not find a kernel, and when it does not find a launcher.
    ASTSource.make_ir = absent
    knobs.build.impl = absent
    missed = Counter[str]()
    with tempfile.TemporaryDirectory() as folder, driver_library():
        manifest = load(file, Path(folder))
        os.environ["TRITON_CACHE_DIR"] = f"{folder}/{CACHE}/triton"
        launches = candidates(manifest["cases"])
        for kernel, launch in launches.items():
            try:
                make_launcher(warm_up(launch, ARCH))
            except LookupError:
                missed[kernel.function] += 1
    print(f"hits {len(launches) - missed.total()} of {len(launches)} kernels")
    for line in (*differences(manifest), *(f"{name}: {n} missing" for name, n in missed.items())):
        print(f"  {line}")
    # What does not compile is not there: a GPU would not compile it either, but try.
    return int(missed.total() > manifest["refused"])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_bundle", description=__doc__)
    parser.add_argument("what", choices=("make", "load", "check"))
    parser.add_argument("file", type=Path)
    options = parser.parse_args(arguments)
    if options.what == "load":
        print("; ".join(["bundle extracted", *differences(load(options.file))]))
        return 0
    return check(options.file) if options.what == "check" else make(options.file.absolute())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

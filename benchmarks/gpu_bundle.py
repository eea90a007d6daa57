"""What a first run on a GPU would compile, compiled without one: ``python -m benchmarks.gpu_bundle make FILE``.

For sm_90, and for the Python, torch and Triton that run this, which have to be those of the machine with the GPU. In
it: a Triton cache with every kernel that tuning may try for the steps of ``CASES``, the launchers that Triton compiles
with the C compiler, the extension, and pytest with what the tests need of it. ``check FILE`` opens it as that machine
would and exits with 1 unless nothing of it has to be compiled again; ``make`` ends with that too.

Triton's cache key is a hash of its own wheel, of ptxas's version, of the kernel's source and line number, of types,
alignments and constants, and of the compiler's options. All of it comes from Triton's own code here: kernels are
compiled as a launch would, with a driver that claims an H100 and tensors without memory.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.gpu import ROOT, TOOLS_FOLDER
from tools.kernel_resources import Driver, compile_hook, warm_up

#: Architecture and batch of the training steps, in bf16 at 224x224.
CASES = (("resnet50", 256), ("resnet50", 400), ("resnet50", 64), ("resnet18", 256))
ARCH = 90
#: Files of an entry of Triton's cache that it reads again; the text of the compiler's stages it does not.
READ = (".cubin", ".json", ".so")
GROUP = "__grp__"
EXTENSION = "resnet_fused/_C.abi3.so"
#: What a machine without a network may lack to run the tests; it goes to TOOLS_FOLDER.
TOOLS = ("pytest", "pytest-timeout", "pytest-xdist")


# Files


def pack(
    file: Path, cache: Path, entries: Iterable[str], files: Mapping[str, Path], manifest: dict[str, Any]
) -> None:
    """Writes a bundle of some entries (folders) of a Triton cache, all launchers in it, and files by new names."""
    wanted = set(entries)
    with tarfile.open(file, "w:xz") as tar:

        def add(name: str, content: bytes) -> None:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o755 if name.endswith(".so") else 0o644
            tar.addfile(entry, io.BytesIO(content))

        for path in sorted(p for p in cache.glob("*/*") if p.is_file() and p.suffix in READ):
            if path.suffix != ".so" and path.parent.name not in wanted:
                continue
            content = path.read_bytes()
            if path.name.startswith(GROUP):
                names = [name for name in json.loads(content)["child_paths"] if Path(name).suffix in READ]
                content = _group(names, "")
            add(f"triton/{path.parent.name}/{path.name}", content)
        for name, path in files.items():
            add(name, path.read_bytes())
        add("manifest.json", json.dumps(manifest, indent=1).encode())


def extract(file: Path, cache: Path, root: Path) -> dict[str, Any]:
    """Puts a bundle's kernels into the Triton cache ``cache`` and its other files below ``root``; its manifest.

    Raises:
        OSError, tarfile.TarError, lzma.LZMAError: it cannot be read or written.
    """
    manifest: dict[str, Any] = {}
    with tarfile.open(file, "r:xz") as tar:
        for entry in tar:
            content = tar.extractfile(entry)
            assert content is not None, f"{entry.name} is no file"
            data = content.read()
            if entry.name == "manifest.json":
                manifest = json.loads(data)
                continue
            kind, _, rest = entry.name.partition("/")
            path = cache / rest if kind == "triton" else root / entry.name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.name.startswith(GROUP):
                # Triton stores absolute paths, and ignores those that do not exist.
                data = _group(json.loads(data)["child_paths"], f"{path.parent}/")
            path.unlink(missing_ok=True)  # never into a library that a process has loaded
            path.write_bytes(data)
            path.chmod(entry.mode)
    return manifest


def _group(names: Iterable[str], folder: str) -> bytes:
    """As Triton's cache lists the files of an entry."""
    return json.dumps({"child_paths": {name: folder + name for name in names}}).encode()


def identity() -> dict[str, str]:
    """What two machines have to agree in for the kernels of one to be valid on the other."""
    import torch
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.cache import triton_key

    def short(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    sources = sorted((ROOT / "resnet_fused" / "kernels").rglob("*.py"))
    return {
        "python": ".".join(map(str, sys.version_info[:2])),
        "torch": str(torch.__version__),
        "triton": str(triton.__version__),
        "triton wheel": short(triton_key()),
        "ptxas": short(make_backend(GPUTarget("cuda", ARCH, 32)).hash()),
        "environment": str(sorted(get_cache_invalidating_env_vars().items())),
        "kernels": short("".join(f"{path.name}\0{path.read_text()}\0" for path in sources)),
    }


def differences(manifest: dict[str, Any]) -> list[str]:
    """In what this machine differs from the one that made a bundle; then its kernels are compiled again."""
    made, here = manifest.get("identity", {}), identity()
    return [f"{name} {here[name]}, bundle {made.get(name)}" for name in here if made.get(name) != here[name]]


# Kernels


def candidates(cases: Iterable[tuple[str, int]] = CASES) -> list[Any]:
    """Each launch (resnet_fused.kernels.launch.Launch) of some steps, with everything that tuning may try for them."""
    from resnet_fused import plan

    return [
        launch for arch, batch in cases for launch in plan.candidates(arch, batch, "bf16", capability=ARCH)
    ]


def distinct(launches: Iterable[Any]) -> list[Any]:
    """One launch of those for which Triton compiles the same kernel."""
    chosen: dict[Any, Any] = {}

    def note(*, key: Any, fn: Any, **_: Any) -> None:
        chosen.setdefault((fn.module, fn.name, key), launch)

    with compile_hook(note):
        for launch in launches:
            warm_up(launch, ARCH)
    return list(chosen.values())


@contextmanager
def without_gpu() -> Iterator[None]:
    """Triton can compile kernels and launchers for an H100, but not launch."""
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    driver.set_active(Driver(ARCH))
    with tempfile.TemporaryDirectory() as folder:
        # Triton links launchers with the CUDA driver's library, which only a machine with a GPU has.
        source, library = Path(folder, "cuda.c"), Path(folder, "libcuda.so.1")
        texts = Path(nvidia.dirname, "driver.c").read_text() + Path(nvidia.__file__).read_text()
        names = sorted(set(re.findall(r"\bcu[A-Z]\w*", texts)))
        source.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in names))
        options = ["-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([os.environ.get("CC", "cc"), *options, "-o", library, source], check=True)
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        os.environ["TRITON_LIBCUDA_PATH"] = folder
        yield


def _make_launcher(kernel: Any) -> None:
    from triton.backends.nvidia.driver import CudaLauncher

    CudaLauncher(kernel.src, kernel.metadata)


#: In a process that compiles: ``without_gpu`` for as long as it lives, and the launches, which cannot be pickled.
_state: list[Any] = []


def _begin() -> None:
    from triton.backends.nvidia.driver import CudaUtils

    context = without_gpu()
    context.__enter__()
    CudaUtils()
    _state[:] = [context, distinct(candidates())]


def _compile(index: int) -> tuple[str, str]:
    """The entry in Triton's cache, and what went wrong."""
    launch = _state[1][index]
    try:
        kernel = warm_up(launch, ARCH)
        _make_launcher(kernel)
    except Exception as error:  # whatever the compiler raises: tuning leaves it out in the same way
        return "", f"{launch.name} {launch.config}: {type(error).__name__}: {str(error)[:200]}"
    return Path(next(iter(kernel.metadata_group.values()))).parent.name, ""


def compile_all(cache: Path, processes: int) -> tuple[list[str], int]:
    """Fills a Triton cache; its entries, and how many kernels do not compile."""
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    with without_gpu():
        count = len(distinct(candidates()))
    begun, entries, refused = time.monotonic(), [], 0
    # Not forked: a child would inherit the locks of torch's threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _begin) as pool:
        for done, (entry, why) in enumerate(pool.map(_compile, range(count), chunksize=4), 1):
            entries += [entry] if entry else []
            refused += bool(why)
            if why or done % 50 == 0 or done == count:
                print(f"{done} of {count} kernels, {time.monotonic() - begun:.0f} s {why}", flush=True)
    return entries, refused


def build_extension(folder: Path) -> Path:
    """Compiles the extension for ``ARCH`` with this interpreter's torch."""
    environment = {"TORCH_CUDA_ARCH_LIST": f"{ARCH // 10}.{ARCH % 10}", "RESNET_FUSED_BUILD": "cuda"}
    # nvcc on PATH may be a script that lies elsewhere than its libraries.
    if Path("/usr/local/cuda/bin/nvcc").exists():
        environment |= {"CUDA_HOME": os.environ.get("CUDA_HOME", "/usr/local/cuda")}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", f"{folder}/lib"]
    command += ["--build-temp", f"{folder}/objects"]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, **options)
    if done.returncode:
        sys.exit(f"{done.stdout[-4000:]}\nthe extension does not compile")
    return folder / "lib" / EXTENSION


def install_tools(folder: Path) -> dict[str, Path]:
    """Installs TOOLS for this interpreter; the files of it by the names that they have in a bundle."""
    shutil.rmtree(folder, ignore_errors=True)
    options = ["--quiet", "--no-compile", "-c", "constraints.txt", "--target", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *TOOLS], cwd=ROOT, check=True)
    return {f"{TOOLS_FOLDER}/{x.relative_to(folder)}": x for x in sorted(folder.rglob("*")) if x.is_file()}


def make(file: Path, processes: int, with_extension: bool) -> int:
    begun = time.monotonic()
    work = ROOT / "build" / "gpu-bundle"  # stays: what has not changed since need not be compiled again
    files = install_tools(work / "python")
    if with_extension:
        print("compiling the extension", flush=True)
        files[EXTENSION] = build_extension(work)
    entries, refused = compile_all(work / "triton", processes)
    file.parent.mkdir(parents=True, exist_ok=True)
    pack(file, work / "triton", entries, files, {"identity": identity(), "cases": CASES, "refused": refused})
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
    from triton.backends.nvidia.driver import CudaUtils
    from triton.compiler import ASTSource

    def absent(*_: Any, **__: Any) -> Any:
        raise LookupError("not in the bundle")

    # What Triton calls when it does not find a kernel, and when it does not find a launcher.
    ASTSource.make_ir = absent
    knobs.build.impl = absent
    missed = Counter[str]()
    with tempfile.TemporaryDirectory() as folder, without_gpu():
        os.environ["TRITON_CACHE_DIR"] = folder
        manifest = extract(file, Path(folder), Path(folder, "root"))
        launches = distinct(candidates())
        for launch in launches:
            try:
                _make_launcher(warm_up(launch, ARCH))
            except LookupError:
                missed[launch.name] += 1
        try:
            CudaUtils()  # what Triton compiles of its own driver
        except LookupError:
            missed["cuda_utils"] += 1
        launchers = len(list(Path(folder).glob("*/__triton_launcher*.so")))
    print(f"hits {len(launches) - missed.total()} of {len(launches)} kernels, {launchers} launchers")
    for line in (*differences(manifest), *(f"{name}: {n} not found" for name, n in missed.items())):
        print(f"  {line}")
    # What does not compile is not there: a GPU would not compile it either, but try.
    return int(missed.total() > manifest["refused"])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_bundle", description=__doc__)
    parser.add_argument("what", choices=("make", "check"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="(default: all processors)")
    parser.add_argument("--no-extension", action="store_true", help="kernels only")
    options = parser.parse_args(arguments)
    if options.what == "check":
        return check(options.file)
    return make(options.file.absolute(), options.processes, not options.no_extension)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

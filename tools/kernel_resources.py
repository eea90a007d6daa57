"""Registers, shared memory and tensor-core instructions of the kernels of a training step, without a GPU.

    python -m tools.kernel_resources [--help]

Compiles them for every architecture and prints a table. The exit status is 1, with a line per finding, when a kernel
spills, exceeds the registers or the shared memory of a multiprocessor, multiplies matrices without tensor cores, or may
read registers while they change.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from resnet_fused.kernels.launch import Config, Launch, compiler_options, reads_changing_registers
from resnet_fused.plan import launches

#: Compute capability: bytes of shared memory per program.
ARCHITECTURES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
#: Registers per thread, and of a multiprocessor.
REGISTERS, ALL_REGISTERS = 255, 65536
MODELS = ("resnet50", "resnet18")
DTYPES = ("bf16", "fp16", "tf32", "fp32")

_MMA = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b")
_DOT = re.compile(r"tt\.dot(?:_scaled)? (.*?) : tensor<(?:\d+x)+(\w+)")
_LOAD = re.compile(r"\bld\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[a-z](\d+)\b")
_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\S*\s.*?\],\s*\[.*?\],\s*(0x[0-9a-f]+|\d+)")
_BULK = re.compile(r"\bcp\.async\.bulk\.(?:tensor\S*\.)?shared::\w+\.global")


class CompileError(RuntimeError):
    """A kernel does not compile."""


@dataclass(frozen=True)
class Specialisation:
    """What Triton compiles once: a kernel with the types, constants and alignment that its launches have in common.

    Args:
        kernel: module and name, as "package.module:function", so that another process finds it.
        signature: a type for each parameter, "constexpr" for those whose values are the ``constants``.
        divisible: indices of the parameters that are multiples of 16.
    """

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    warps: int
    stages: int

    @property
    def name(self) -> str:
        return self.kernel.partition(":")[2].removesuffix("_kernel")

    @property
    def config(self) -> str:
        """As ``Config`` prints it, without the splits, which the compiler does not see."""
        blocks = "x".join(str(value) for name, value in self.constants if name.startswith("BLOCK"))
        return f"{blocks} {self.warps}w{self.stages}s".strip()

    @property
    def details(self) -> str:
        """What differs between specialisations of the same kernel and config."""
        values = {name: value for name, value in self.constants if not name.startswith("BLOCK")}
        types = [kind for _, kind in self.signature if kind.startswith("*")]
        narrow = [
            name
            for index, (name, kind) in enumerate(self.signature)
            if kind != "constexpr" and index not in self.divisible
        ]
        known = " ".join(f"{name}={value}" for name, value in values.items() if value is not None)
        absent = " ".join(name for name, value in values.items() if value is None)
        rest = [("", known), ("without ", absent), ("not by 16: ", " ".join(narrow))]
        return "; ".join([" ".join(dict.fromkeys(types)), *(head + text for head, text in rest if text)])


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes of a multiprocessor.

    Args:
        mma, wgmma: tensor-core instructions, and those of sm_90 alone; None: it multiplies no matrices.
        operands: types in which matrices are multiplied: bf16, f16, tf32 or f32.
        vector_load_bytes: the widest load from global memory by one thread; 0 for none.
        unsafe: see ``launch.reads_changing_registers``.
        serialized: ptxas has every wgmma wait for the one before it.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    mma: int | None
    wgmma: int
    operands: frozenset[str]
    vector_load_bytes: int
    unsafe: bool
    serialized: bool


class Driver:
    """Triton's interface to a GPU, for compiling alone. The device's index is its architecture: 90 is sm_90."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


def warm_up(launch: Launch, arch: int) -> Any:
    """Compiles what a launch needs with the active driver, or finds it in Triton's cache; a CompiledKernel."""
    options = compiler_options(launch.config, arch)
    return launch.kernel.warmup(*launch.arguments.values(), grid=launch.grid, **launch.constants, **options)


@contextmanager
def compile_hook(hook: Callable[..., None]) -> Iterator[None]:
    """Calls ``hook`` with what Triton would compile, instead of compiling it."""
    from triton import knobs

    def note(**what: Any) -> bool:
        hook(**what)
        return True

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, note
    try:
        yield
    finally:
        knobs.runtime.jit_cache_hook = before


def specialisation(launch: Launch, arch: int = 90) -> Specialisation:
    """What Triton would compile for a launch whose tensors start at multiples of 16 bytes (meta tensors do)."""
    from triton.runtime import driver

    specialisations: list[Specialisation] = []

    def note(*, compile: dict[str, Any], fn: Any, **_: Any) -> None:
        names = list(compile["signature"])
        constants = {names[index]: value for (index,), value in compile["constants"].items()}
        divisible = (index for (index,), attributes in compile["configs"][0].items() if attributes)
        specialisations.append(
            Specialisation(
                f"{fn.module}:{fn.jit_function.fn.__qualname__}",
                tuple(compile["signature"].items()),
                tuple((name, constants[name]) for name in names if name in constants),
                tuple(sorted(divisible)),
                launch.config.warps,
                launch.config.stages,
            )
        )

    before = driver._active  # None before the first use
    driver.set_active(Driver(arch))
    try:
        with compile_hook(note):
            warm_up(launch, arch)
    finally:
        driver.set_active(before)
    return specialisations[0]


def binary(what: Specialisation, arch: int) -> Any:
    """Triton's CompiledKernel for an architecture.

    Raises:
        CompileError: it does not compile; the message says why.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import PTXASError

    module, _, name = what.kernel.partition(":")
    function = getattr(importlib.import_module(module), name)
    divisible = {(index,): [["tt.divisibility", 16]] for index in what.divisible}
    source = ASTSource(function, dict(what.signature), dict(what.constants), divisible)
    options = compiler_options(Config(warps=what.warps, stages=what.stages), arch)
    try:
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except (
        CompilationError,
        PTXASError,
        RuntimeError,
    ) as error:  # RuntimeError: a pass of the compiler failed
        raise CompileError(f"{what.name} {what.config} on sm_{arch} does not compile: {error}") from error


def compiled(what: Specialisation, arch: int) -> Resources:
    """Resources on an architecture; raises as ``binary`` does."""
    kernel = binary(what, arch)
    needed, ptx = usage(kernel.asm["cubin"]), kernel.asm["ptx"]
    # Newer cubins list the driver's own KiB, which the limits leave out.
    static = needed["SHARED"] - (1024 if arch >= 90 and needed["SHARED"] else 0)
    operands = frozenset(
        "tf32" if kind == "f32" and "inputPrecision = tf32" in text else kind
        for text, kind in _DOT.findall(kernel.asm["ttir"])
    )
    instructions = _MMA.findall(ptx)
    return Resources(
        registers=needed["REG"],
        # Spills are part of the stack, and Triton's kernels have nothing else there.
        spill_bytes=needed["STACK"] + needed["LOCAL"],
        shared_bytes=kernel.metadata.shared + static,
        mma=len(instructions) if operands else None,
        wgmma=instructions.count("wgmma.mma_async"),
        operands=operands,
        vector_load_bytes=widest_load(ptx),
        unsafe=reads_changing_registers(kernel.asm["ttgir"]),
        serialized="wgmma.mma_async" in instructions and _is_serialized(ptx),
    )


class _Stopped(Exception):
    """Ends a compilation before LLVM; the message is the kernel so far."""


def is_unsafe(what: Specialisation, arch: int) -> bool:
    """``Resources.unsafe`` alone, in a third of the time: neither LLVM nor ptxas runs. Raises as ``binary`` does."""
    from triton import knobs

    def stop(module: Any, metadata: Any) -> None:
        raise _Stopped(str(module))

    def stages_hook(self: Any = None, stages: Any = None, *_: Any, **__: Any) -> Any:
        if stages is None:  # asked for a key of Triton's cache
            return "before LLVM", "before LLVM"
        stages["llir"] = stop
        return None

    with knobs.runtime.scope():
        knobs.runtime.add_stages_inspection_hook = stages_hook
        try:
            ttgir = binary(what, arch).asm["ttgir"]  # Triton 3.6 finds it in its cache all the same
        except _Stopped as stopped:
            ttgir = str(stopped)
    return reads_changing_registers(ttgir)


def nvidia_tool(name: str) -> Path:
    """A program that Triton brings: ptxas, cuobjdump or nvdisasm."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _is_serialized(ptx: str) -> bool:
    """Whether ptxas warns of it, as C7510 to C7519, for sm_90."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [str(nvidia_tool("ptxas")), "-v", "--gpu-name=sm_90a", str(path), "-o", f"{path}.cubin"]
        messages = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return re.search(r"\bC751\d\b", messages) is not None


def widest_load(ptx: str) -> int:
    """Bytes of the widest load from global memory; what the copy engine fetches counts as 16."""
    loads = [int(count or 1) * int(bits) // 8 for count, bits in _LOAD.findall(ptx)]
    copies = [int(size, 0) for size in _COPY.findall(ptx)]
    return max([0, *loads, *copies, *(16 for _ in _BULK.findall(ptx))])


def usage(cubin: bytes) -> dict[str, int]:
    """Registers (REG) and bytes of STACK, SHARED and LOCAL memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(nvidia_tool("cuobjdump")), "-res-usage", str(path)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", output)}


def violations(what: Specialisation, arch: int, resources: Resources | str) -> list[str]:
    """A line for everything that a kernel must not do."""
    if isinstance(resources, str):
        return [resources]
    threads, limit = 32 * what.warps, ARCHITECTURES[arch]
    without_mma = (
        bool(resources.operands - {"f32", "f64"}) and not resources.mma
    )  # those have no tensor cores
    checks = {
        f"spills {resources.spill_bytes} bytes": resources.spill_bytes > 0,
        f"needs {resources.registers} registers of {REGISTERS}": resources.registers > REGISTERS,
        f"needs {resources.registers} registers in each of {threads} threads: too many to launch": (
            resources.registers * threads > ALL_REGISTERS
        ),
        f"needs {resources.shared_bytes} bytes of shared memory of {limit}": resources.shared_bytes > limit,
        "multiplies without tensor cores": without_mma,
        "multiplies without wgmma": (
            arch == 90
            and not without_mma
            and bool(resources.operands & {"bf16", "f16"})
            and not resources.wgmma
        ),
        "may read registers while they change": resources.unsafe,
    }
    lines = [line for line, is_violated in checks.items() if is_violated]
    return [f"{what.name} {what.config} on sm_{arch}: {line} ({what.details})" for line in lines]


def _result_or_error(what: Any, arch: int, compiler: Callable[[Any, int], Any]) -> Any:
    try:
        return compiler(what, arch)
    except CompileError as error:
        return str(error)


def compile_all(
    pairs: Iterable[tuple[Any, int]],
    compiler: Callable[[Any, int], Any] = compiled,
    processes: int | None = None,
) -> Iterator[tuple[Any, int, Any]]:
    """What ``compiler`` returns for kernel and architecture, or why it does not compile, in the order of completion.

    Args:
        processes: None is as many as PyTorch has threads.
    """
    # Not forked: a child would inherit the locks of torch's threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes or torch.get_num_threads(), mp_context=context) as pool:
        waiting = {pool.submit(_result_or_error, *pair, compiler): pair for pair in pairs}
        try:
            for done in as_completed(waiting):
                yield *waiting[done], done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def main(arguments: list[str]) -> int:
    import pandas as pd

    parser = argparse.ArgumentParser(prog="python -m tools.kernel_resources", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--model", nargs="+", default=MODELS, help=f"(default: {' '.join(MODELS)})")
    parser.add_argument("--dtype", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("interpreted kernels cannot be compiled: unset TRITON_INTERPRET")
    try:
        pairs = {
            (specialisation(launch, arch), arch): None
            for arch in options.arch
            for model in options.model
            for dtype in options.dtype
            for launch in launches(model, 256, dtype, capability=arch)
        }
    except ValueError as error:
        parser.error(str(error))
    results = {(what, arch): resources for what, arch, resources in compile_all(pairs)}
    rows = [
        {
            "kernel": what.name,
            "arch": f"sm_{arch}",
            "config": what.config,
            **asdict(resources),
            "details": what.details,
        }
        for what, arch in pairs
        if isinstance(resources := results[what, arch], Resources)
    ]
    table = pd.DataFrame(rows).drop(columns=["operands", "unsafe"], errors="ignore")
    print(table.to_json(orient="records", indent=1) if options.json else table.to_string(index=False))
    wrong = [line for pair in pairs for line in violations(*pair, results[pair])]
    print("".join(f"{line}\n" for line in wrong), end="", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

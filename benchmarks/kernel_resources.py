"""What the compiler makes of the kernels of a training step: ``python -m benchmarks.kernel_resources [--help]``.

For every architecture and without a GPU. The exit status is 1, with a line per finding, when a kernel spills, needs
more shared memory than there is, multiplies without tensor cores, or may read registers while they change.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_fused.kernels.launch import Config, Launch, compiler_options, reads_changing_registers

__all__ = [
    "ARCHITECTURES",
    "CompileError",
    "Resources",
    "Specialisation",
    "binary",
    "compile_all",
    "compiled",
    "is_unsafe",
    "main",
]

#: Compute capability: bytes of shared memory that a program may have.
ARCHITECTURES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
REGISTERS = 255
#: Of a multiprocessor, which one program must not exceed.
ALL_REGISTERS = 65536
MODELS = ("resnet50", "resnet18")
DTYPES = ("bf16", "fp16", "tf32", "fp32")

_TYPES = {
    torch.bool: "u1", torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64",
}  # fmt: skip
_MMA = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b")
_DOT = re.compile(r"tt\.dot(?:_scaled)? (.*?) : tensor<(?:\d+x)+(\w+)")
_LOAD = re.compile(r"\bld\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[a-z](\d+)\b")
_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\S*\s.*?\],\s*\[.*?\],\s*(0x[0-9a-f]+|\d+)")
_BULK = re.compile(r"\bcp\.async\.bulk\.(?:tensor\S*\.)?shared::\w+\.global")


class CompileError(RuntimeError):
    """A kernel does not compile."""


@dataclass(frozen=True)
class Specialisation:
    """What Triton compiles anew: a kernel, with all that its launches have in common.

    Args:
        kernel: module and name, as "package.module:function", so that another process finds it.
        signature: a type for each parameter, "constexpr" for those whose values are the ``constants``.
        divisible: places of the parameters that are multiples of 16.
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
        """As ``Config`` prints it; the splits of a sum are no matter of the compiler's."""
        blocks = "x".join(str(value) for name, value in self.constants if name.startswith("BLOCK"))
        return f"{blocks} {self.warps}w{self.stages}s".strip()

    @property
    def details(self) -> str:
        """What tells it from others of the same kernel and config."""
        values = {name: value for name, value in self.constants if not name.startswith("BLOCK")}
        absent = [name for name, value in values.items() if value is None]
        types = [kind for _, kind in self.signature if kind.startswith("*")]
        changing = [(place, name) for place, (name, kind) in enumerate(self.signature) if kind != "constexpr"]
        narrow = [name for place, name in changing if place not in self.divisible]
        known = " ".join(f"{name}={value}" for name, value in values.items() if value is not None)
        rest = [("", known), ("without ", " ".join(absent)), ("not by 16: ", " ".join(narrow))]
        return "; ".join([" ".join(dict.fromkeys(types)), *(head + text for head, text in rest if text)])

    def function(self) -> Any:
        """The triton.jit function; raises RuntimeError where Triton was told to interpret kernels."""
        module, _, name = self.kernel.partition(":")
        return _not_interpreted(getattr(importlib.import_module(module), name))


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs of a multiprocessor.

    Args:
        mma, wgmma: tensor-core instructions, and those that sm_90 alone has; None: it multiplies no matrices.
        products: what matrices are multiplied in: bf16, f16, tf32 or f32.
        vector_load_bytes: of the widest load from global memory by one thread; 0 for none.
        unsafe: whether a product may read registers while they change (launch.reads_changing_registers).
        serialized: whether ptxas has every wgmma wait for the one before it.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    mma: int | None
    wgmma: int
    products: frozenset[str]
    vector_load_bytes: int
    unsafe: bool
    serialized: bool


def _not_interpreted(kernel: Any) -> Any:
    if type(kernel).__name__ == "InterpretedFunction":
        raise RuntimeError(
            f"{kernel.__name__} is interpreted and cannot be compiled: unset TRITON_INTERPRET before triton is imported"
        )
    return kernel


def specialisation(launch: Launch) -> Specialisation:
    """What Triton would compile for a launch; its tensors are taken to start at multiples of 16 bytes.

    Raises:
        TypeError: an argument of a type that kernels do not have, or a parameter that is not given.
        ValueError: a kernel within a function, which no other process can find.
        RuntimeError: Triton was told to interpret kernels.
    """
    kernel = _not_interpreted(launch.kernel)
    if "<locals>" in kernel.fn.__qualname__:
        raise ValueError(f"{kernel.fn.__qualname__} is local: define it in a module")
    signature: list[tuple[str, str]] = []
    constants: list[tuple[str, Any]] = []
    divisible = []
    for place, parameter in enumerate(kernel.params):
        name = parameter.name
        given = launch.constants if parameter.is_constexpr else launch.arguments
        if name not in given:
            raise TypeError(f"{kernel.__name__}: {name} is not given")
        value = given[name]
        one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or one:
            signature.append((name, "constexpr"))
            constants.append((name, value))
            continue
        signature.append((name, _type(kernel.__name__, name, value)))
        aligned = isinstance(value, Tensor) or (type(value) is int and value % 16 == 0)
        if aligned and not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment):
            divisible.append(place)
    where, known, config = f"{kernel.fn.__module__}:{kernel.fn.__qualname__}", tuple(constants), launch.config
    return Specialisation(where, tuple(signature), known, tuple(divisible), config.warps, config.stages)


def _type(kernel: str, name: str, value: object) -> str:
    if isinstance(value, Tensor) and value.dtype in _TYPES:
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    kind = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else repr(value)
    raise TypeError(f"{kernel}: {name} is {kind}, which kernels do not take")


def binary(what: Specialisation, arch: int) -> Any:
    """It as Triton's CompiledKernel, for an architecture, a key of ``ARCHITECTURES``.

    Raises:
        CompileError: it does not compile; the message says why.
        RuntimeError: Triton was told to interpret kernels.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import PTXASError

    divisible = {(place,): [["tt.divisibility", 16]] for place in what.divisible}
    source = ASTSource(what.function(), dict(what.signature), dict(what.constants), divisible)
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
    """What it needs on an architecture; raises as ``binary`` does."""
    made = binary(what, arch)
    needed, code = usage(made.asm["cubin"]), made.asm["ptx"]
    # The driver's own KiB, which newer cubins list; the limits leave it out.
    static = needed["SHARED"] - (1024 if arch >= 90 and needed["SHARED"] else 0)
    products = frozenset(
        "tf32" if kind == "f32" and "inputPrecision = tf32" in operands else kind
        for operands, kind in _DOT.findall(made.asm["ttir"])
    )
    instructions = _MMA.findall(code)
    return Resources(
        registers=needed["REG"],
        # Spills are part of the stack, and Triton's kernels have nothing else there.
        spill_bytes=needed["STACK"] + needed["LOCAL"],
        shared_bytes=made.metadata.shared + static,
        mma=len(instructions) if products else None,
        wgmma=instructions.count("wgmma.mma_async"),
        products=products,
        vector_load_bytes=widest_load(code),
        unsafe=reads_changing_registers(made.asm["ttgir"]),
        serialized="wgmma.mma_async" in instructions and _is_serialized(code),
    )


def is_unsafe(what: Specialisation, arch: int) -> bool:
    """``Resources.unsafe`` alone, in a third of the time: neither LLVM nor ptxas runs. Raises as ``binary`` does."""
    from triton import knobs

    with knobs.runtime.scope():
        knobs.runtime.add_stages_inspection_hook = _stop_before_llvm
        try:
            ttgir = binary(what, arch).asm["ttgir"]  # Triton 3.6 finds it in its cache all the same
        except _Stopped as stopped:
            ttgir = str(stopped)
    return reads_changing_registers(ttgir)


#: Looks at what it makes of a kernel for an architecture.
Compiler = Callable[[Specialisation, int], Any]


class _Stopped(Exception):
    """A kernel, instead of going on."""


def _stop_before_llvm(
    self: Any = None, stages: Any = None, options: Any = None, language: Any = None, capability: Any = None
) -> Any:
    if stages is None:  # asked for what to tell kernels apart by
        return "before LLVM", "before LLVM"

    def stop(module: Any, metadata: Any) -> None:
        raise _Stopped(str(module))

    stages["llir"] = stop
    return None


def nvidia_tool(name: str) -> Path:
    import triton

    # Triton's own, which knows every architecture that it compiles for.
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _is_serialized(code: str) -> bool:
    """What ptxas warns of as C7510 to C7519, for sm_90."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(code)
        command = [str(nvidia_tool("ptxas")), "-v", "--gpu-name=sm_90a", str(path), "-o", f"{path}.cubin"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return re.search(r"\bC751\d\b", told) is not None


def widest_load(ptx: str) -> int:
    """Bytes of the widest load from global memory; what the copy engine fetches counts as 16."""
    loads = [int(count or 1) * int(bits) // 8 for count, bits in _LOAD.findall(ptx)]
    copies = [int(size, 0) for size in _COPY.findall(ptx)]
    return max([0, *loads, *copies, *(16 for _ in _BULK.findall(ptx))])


def usage(cubin: bytes) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        told = subprocess.run(
            [nvidia_tool("cuobjdump"), "-res-usage", path], capture_output=True, text=True, check=True
        ).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", told)}


def violations(what: Specialisation, arch: int, found: Resources | str) -> list[str]:
    """A line for everything that a kernel must not do."""
    if isinstance(found, str):
        return [found]
    wrong = []
    if found.spill_bytes:
        wrong.append(f"spills {found.spill_bytes} bytes")
    if found.registers > REGISTERS:
        wrong.append(f"needs {found.registers} registers of {REGISTERS}")
    if found.registers * 32 * what.warps > ALL_REGISTERS:
        wrong.append(
            f"needs {found.registers} registers in each of {32 * what.warps} threads: too many to launch"
        )
    if found.shared_bytes > ARCHITECTURES[arch]:
        wrong.append(f"needs {found.shared_bytes} bytes of shared memory of {ARCHITECTURES[arch]}")
    if found.products - {"f32", "f64"} and not found.mma:  # those have no tensor cores
        wrong.append("multiplies without tensor cores")
    elif arch == 90 and found.products & {"bf16", "f16"} and not found.wgmma:
        wrong.append("multiplies without wgmma")
    if found.unsafe:
        wrong.append("may read registers while they change")
    return [f"{what.name} {what.config} on sm_{arch}: {line} ({what.details})" for line in wrong]


def step_specialisations(
    models: Iterable[str], dtypes: Iterable[str], batch: int = 256, arch: int = 90
) -> list[Specialisation]:
    """All that the steps of some models need on an architecture, each once."""
    # Only here: kernels from elsewhere can be looked at without it.
    plan = importlib.import_module("resnet_fused.plan")
    dtypes = tuple(dtypes)
    launches = (
        x for model in models for dtype in dtypes for x in plan.launches(model, batch, dtype, capability=arch)
    )
    return list(dict.fromkeys(map(specialisation, launches)))


def _compiled_or_why_not(what: Specialisation, arch: int, compiler: Compiler) -> Any:
    try:
        return compiler(what, arch)
    except CompileError as error:
        return str(error)


def compile_all(
    pairs: Iterable[tuple[Specialisation, int]], compiler: Compiler = compiled, processes: int | None = None
) -> Iterator[tuple[Specialisation, int, Any]]:
    """What ``compiler`` returns, as it is done. What does not compile gives the reason.

    Args:
        processes: that compile beside each other; None is as many as PyTorch has threads.
    """
    # A process of its own for each: a forked one would inherit the locks of torch's threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes or torch.get_num_threads(), mp_context=context) as pool:
        waiting = {pool.submit(_compiled_or_why_not, *pair, compiler): pair for pair in pairs}
        try:
            for done in as_completed(waiting):
                yield *waiting[done], done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def row(what: Specialisation, arch: int, found: Resources) -> dict[str, Any]:
    names = ("registers", "spill_bytes", "shared_bytes", "mma", "vector_load_bytes", "serialized")
    heads = {"kernel": what.name, "arch": f"sm_{arch}", "config": f"{what.config}; {what.details}"}
    return heads | {name: getattr(found, name) for name in names}


def table(rows: list[dict[str, Any]]) -> str:
    heads = "".join(f"{head:>10}" for head in ("registers", "spilled", "shared", "mma", "load", "serial"))
    lines = [f"{'kernel':20}{'arch':8}{heads}  config"]
    for kernel, arch, config, *numbers in (x.values() for x in rows):
        text = "".join(f"{'-' if number is None else int(number):>10}" for number in numbers)
        lines.append(f"{kernel:20}{arch:8}{text}  {config}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_resources", description=__doc__)
    archs = ", ".join(map(str, ARCHITECTURES))
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), help=f"of {archs}; all")
    parser.add_argument("--model", nargs="+", default=MODELS, help=f"(default: {' '.join(MODELS)})")
    parser.add_argument("--dtype", nargs="+", default=DTYPES, help=f"of {', '.join(DTYPES)}; all")
    parser.add_argument(
        "--processes",
        type=int,
        default=torch.get_num_threads(),
        help="that compile (default: as many as PyTorch's threads)",
    )
    parser.add_argument("--json", action="store_true", help="a list of rows instead of a table")
    return parser


def main(arguments: list[str]) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    for name, given, known in (("arch", options.arch, ARCHITECTURES), ("dtype", options.dtype, DTYPES)):
        for value in given:
            if value not in known:
                parser.error(f"unknown --{name} {value}: choose of {', '.join(map(str, known))}")
    if options.processes < 1:
        parser.error(f"--processes must be positive, got {options.processes}")
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("interpreted kernels cannot be compiled: unset TRITON_INTERPRET")
    try:
        needed = {
            arch: step_specialisations(options.model, options.dtype, arch=arch)
            for arch in dict.fromkeys(options.arch)
        }
    except ValueError as error:
        parser.error(str(error))
    pairs = [(what, arch) for arch, all_of_it in needed.items() for what in all_of_it]
    results: dict[tuple[Specialisation, int], Resources | str] = {}
    for what, arch, found in compile_all(pairs, processes=options.processes):
        results[what, arch] = found
        print(f"\r{len(results)} of {len(pairs)} compiled", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    rows, wrong = [], []
    for what, arch in pairs:
        found = results[what, arch]
        wrong += violations(what, arch, found)
        if isinstance(found, Resources):
            rows.append(row(what, arch, found))
    print(json.dumps(rows, indent=1) if options.json else table(rows))
    print("".join(f"{line}\n" for line in wrong), end="", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

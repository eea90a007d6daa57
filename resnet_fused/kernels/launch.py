"""Launches of Triton kernels: all go through ``Launch``, so that they can be counted, timed and compiled ahead of time.

On meta tensors no kernel runs, only observers are called. That is how a machine without a GPU lists the launches of a
step (plan).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: A run-time argument of a kernel.
Argument = Tensor | int | float | None


class Config(NamedTuple):
    """Tile sizes and compiler options of a kernel. A field that a kernel does not use has its default.

    Args:
        block_m, block_n, block_k: sizes of a tile; the kernels say of what.
        warps: num_warps of a program; stages: num_stages, stages of the loop's pipelined loads.
        splits: programs that share the sum over the pixels of one tile.
    """

    block_m: int = 1
    block_n: int = 1
    block_k: int = 1
    warps: int = 4
    stages: int = 3
    splits: int = 1

    def __str__(self) -> str:
        split = f"/{self.splits}" if self.splits > 1 else ""
        return f"{self.block_m}x{self.block_n}x{self.block_k}{split} {self.warps}w{self.stages}s"

    def blocks(self) -> dict[str, int]:
        """The sizes of a tile as tl.constexpr parameters."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}


def _specialization_key(arguments: Mapping[str, Argument]) -> list[Any]:
    """What Triton specializes a kernel for: dtypes, alignment to 16 bytes, integers equal to 1, divisible by 16."""
    return [
        (x % 16 if x != 1 else "one")
        if type(x) is int  # most arguments are, and for these isinstance would take longer
        else (x.dtype, x.data_ptr() % 16)
        if isinstance(x, Tensor)
        else x
        for x in arguments.values()
    ]


class Launch(NamedTuple):
    """One launch of a kernel.

    Args:
        kernel: a triton.jit function.
        grid: programs, up to three numbers.
        arguments: tensors, numbers or None by the names of the kernel's parameters, in their order; first a tensor.
        constants: the tl.constexpr parameters by name, in their order.
        config: its tile sizes and splits are already part of constants and grid.
        flops: floating point operations, two for a multiply-add.
        partial_bytes: bytes that are read of tensors which the kernel reads only in part, by name.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, int | bool | str]
    config: Config
    flops: int = 0
    partial_bytes: Mapping[str, int] | None = None

    @property
    def name(self) -> str:
        return str(self.kernel.__name__).removesuffix("_kernel")

    @property
    def bytes(self) -> int:
        """Bytes read and written, each tensor once."""
        partial = self.partial_bytes or {}
        tensors = {name: x for name, x in self.arguments.items() if isinstance(x, Tensor)}
        return sum(partial.get(name, x.numel() * x.element_size()) for name, x in tensors.items())

    def start(self) -> None:
        """Starts the kernel, unless it is captured or its tensors are on no device, and calls the observers."""
        captured = getattr(_thread, "captured", None)
        if captured is not None:
            captured.append(self)
            return
        if not next(iter(self.arguments.values())).is_meta:
            self.run()
        for observer in list(_observers):
            observer(self)

    def run(self) -> None:
        """Starts the kernel alone. It can run again with the same result: no kernel reads what it writes."""
        kernel, grid, arguments, constants, config, _, _ = self
        device = next(iter(arguments.values())).device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self.run()
        # Triton's own look-up takes half of a launch's host time: it is skipped from the second launch on.
        cache_key = (
            kernel.fn,
            device,
            config.warps,
            config.stages,
            *_specialization_key(arguments),
            *constants.values(),
        )
        compiled = _compiled.get(cache_key)
        if compiled is None:
            options = compiler_options(config, architecture(device))
            _compiled[cache_key] = kernel[grid](*arguments.values(), **constants, **options)
        else:
            compiled[(*grid, 1, 1)[:3]](*arguments.values(), *constants.values())
        return None

    def compile(self) -> None:
        """Compiles the kernel as the first ``run`` would; needs a GPU, from any thread.

        Raises:
            triton.TritonError: it does not compile.
            RuntimeError: the code may read registers while they change (``reads_changing_registers``).
        """
        device = next(iter(self.arguments.values())).device
        options = compiler_options(self.config, architecture(device))
        with torch.cuda.device(device):
            compiled = self.kernel.warmup(
                *self.arguments.values(), grid=self.grid, **self.constants, **options
            )
        if compiled is not None and reads_changing_registers(compiled.asm.get("ttgir", "")):
            raise RuntimeError(
                f"{self.name} {self.config} reads registers while they may change (triton#9433)"
            )


_REGISTER_OPERAND = re.compile(r"\bwarp_group_dot\b.* : tensor<")
_PARTIAL_WAIT = re.compile(r"\bwarp_group_dot_wait\b.*\bpendings = [1-9]")


def reads_changing_registers(ttgir: str) -> bool:
    """Whether a wgmma with an operand in registers is not waited for at once: it may read the registers' next values.

    Args:
        ttgir: a kernel in Triton's GPU dialect.
    """
    return bool(_REGISTER_OPERAND.search(ttgir) and _PARTIAL_WAIT.search(ttgir))


def cdiv(size: int, part: int) -> int:
    """ceil(size / part). triton.cdiv takes microseconds outside of kernels."""
    return -(-size // part)


@cache
def architecture(device: torch.device) -> int:
    """90 for sm_90 and so on; 0 for the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def compiler_options(config: Config, arch: int) -> dict[str, Any]:
    """Options of Triton's compiler for a configuration and an architecture (90 is sm_90)."""
    options: dict[str, Any] = {
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": True,
    }
    if arch not in (0, 90):
        # Else ptxas limits itself to 80 or 128 registers, so that more programs fit, and spills; on sm_90 it does not.
        options["maxnreg"] = 255
    return options


#: Compiled kernels, by device and all that Triton specializes for.
_compiled: dict[tuple[Any, ...], Any] = {}
_observers: list[Callable[[Launch], None]] = []
_thread = threading.local()


@contextmanager
def observe_launches(observer: Callable[[Launch], None]) -> Iterator[None]:
    """In this context ``observer`` is called with every launch of the process, after its start."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


@contextmanager
def capture_launches() -> Iterator[list[Launch]]:
    """In this context this thread's launches are appended to the list instead of being started."""
    captured: list[Launch] = []
    _thread.captured = captured
    try:
        yield captured
    finally:
        _thread.captured = None

"""How a Triton kernel is started: one door for all of them, so that launches can be counted, timed and compiled ahead.

On meta tensors nothing runs: the launch is only told to those who observe. That is how a machine without a GPU prints
what a step would launch.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """How a kernel divides its work. What a kernel has no use for keeps its default.

    Args:
        block_m, block_n, block_k: elements of a tile of the result, and of what is summed at a time.
        warps, stages: of a program; stages of loads in flight.
        splits: programs that share one tile of a sum over the pixels.
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

    def as_dict(self) -> dict[str, int]:
        return asdict(self)

    def blocks(self) -> dict[str, int]:
        """The sizes of a tile as constants of a kernel."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}


def _specialization_key(arguments: Mapping[str, Any]) -> list[Any]:
    """By what Triton compiles kernels anew: types, alignment to 16 bytes, sizes of 1 and multiples of 16."""
    return [
        (x.dtype, x.data_ptr() % 16)
        if isinstance(x, Tensor)
        else (x % 16 if x != 1 else "one")
        if type(x) is int
        else x
        for x in arguments.values()
    ]


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Args:
        kernel: a triton.jit function.
        grid: programs, up to three numbers.
        arguments: by name; tensors, numbers or None.
        constants: the tl.constexpr parameters by name.
        config: warps and stages are the launch's own; the rest has gone into constants and grid.
        flops: floating point operations, two for a multiply-add.
        touched: bytes of those tensors of which the kernel touches only a part, by name.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    config: Config
    flops: int = 0
    touched: Mapping[str, int] | None = None

    @property
    def name(self) -> str:
        return str(self.kernel.__name__).removesuffix("_kernel")

    @cached_property
    def bytes(self) -> int:
        """Read and written: each tensor once."""
        touched = self.touched or {}
        tensors = {name: x for name, x in self.arguments.items() if isinstance(x, Tensor)}
        return sum(touched.get(name, x.numel() * x.element_size()) for name, x in tensors.items())

    def run(self) -> None:
        """Starts the kernel; what it writes depends on nothing that it wrote before, so it may run again."""
        _start(self.kernel, self.grid, self.arguments, self.constants, self.config)

    def compile(self) -> None:
        """What the first ``run`` would begin with; on a GPU, in any thread.

        Raises:
            triton.TritonError: it does not compile.
            RuntimeError: it does, to code that would read registers while they change.
        """
        device = next(iter(self.arguments.values())).device
        options = compiler_options(self.config, architecture(device))
        with torch.cuda.device(device):
            made = self.kernel.warmup(*self.arguments.values(), grid=self.grid, **self.constants, **options)
        if made is not None and reads_changing_registers(made.asm.get("ttgir", "")):
            raise RuntimeError(
                f"{self.name} {self.config} reads registers while they may change (triton#9433)"
            )


_REGISTER_OPERAND = re.compile(r"\bwarp_group_dot\b.* : tensor<")
_PARTIAL_WAIT = re.compile(r"\bwarp_group_dot_wait\b.*\bpendings = [1-9]")


def reads_changing_registers(ttgir: str) -> bool:
    """Whether a wgmma has an operand in registers and is not waited for at once: what is next in them it may read.

    Args:
        ttgir: a kernel as Triton has it before LLVM.
    """
    return bool(_REGISTER_OPERAND.search(ttgir) and _PARTIAL_WAIT.search(ttgir))


def cdiv(size: int, part: int) -> int:
    """Parts that ``size`` has, the last of which may be smaller. Triton's own takes microseconds outside of kernels."""
    return -(-size // part)


@cache
def architecture(device: torch.device) -> int:
    """90 for sm_90 and so on; 0 for the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def compiler_options(config: Config, arch: int) -> dict[str, Any]:
    """What a configuration asks of Triton's compiler, for an architecture (90 is sm_90)."""
    options: dict[str, Any] = {
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": True,
    }
    if arch not in (0, 90):
        # ptxas would stop at 80 or 128 registers, to fit more programs, and spill some bytes; on sm_90 it does not.
        options["maxnreg"] = 255
    return options


#: What is compiled for a device, by all that Triton tells launches apart by.
_compiled: dict[tuple[Any, ...], Any] = {}


def _start(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Mapping[str, Any],
    constants: Mapping[str, Any],
    config: Config,
) -> None:
    device = next(iter(arguments.values())).device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _start(kernel, grid, arguments, constants, config)
    # Triton's own search takes as long as all else that a launch takes of the processor: it is left out the next time.
    seen = (
        kernel.fn,
        device,
        config.warps,
        config.stages,
        *_specialization_key(arguments),
        *constants.values(),
    )
    found = _compiled.get(seen)
    if found is None:
        options = compiler_options(config, architecture(device))
        _compiled[seen] = kernel[grid](*arguments.values(), **constants, **options)
    else:
        found[(*grid, 1, 1)[:3]](*arguments.values(), *constants.values())
    return None


_observers: list[Callable[[Launch], None]] = []
_thread = threading.local()


@contextmanager
def observe_launches(tell: Callable[[Launch], None]) -> Iterator[None]:
    """Within, ``tell`` is called with every launch of this process, after it was started."""
    _observers.append(tell)
    try:
        yield
    finally:
        _observers.remove(tell)


@contextmanager
def capture_launches() -> Iterator[list[Launch]]:
    """Within, this thread's launches are put into the list instead of being started."""
    held: list[Launch] = []
    _thread.held = held
    try:
        yield held
    finally:
        _thread.held = None


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Mapping[str, Any],
    constants: Mapping[str, Any],
    config: Config,
    *,
    flops: int = 0,
    touched: Mapping[str, int] | None = None,
) -> None:
    """Starts a kernel. Arguments: those of ``Launch``, in the order of the kernel's parameters, the first a tensor."""
    held = getattr(_thread, "held", None)
    if held is not None:
        held.append(Launch(kernel, grid, arguments, constants, config, flops, touched))
        return
    if not next(iter(arguments.values())).is_meta:
        _start(kernel, grid, arguments, constants, config)
    if _observers:
        started = Launch(kernel, grid, arguments, constants, config, flops, touched)
        for tell in list(_observers):
            tell(started)

"""How a Triton kernel is started: one door for all of them, so that launches can be counted, timed and compiled ahead.

On meta tensors nothing runs: the launch is only told to those who observe. That is how a machine without a GPU prints
what a step would launch.
"""

from __future__ import annotations

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
        device = next(x.device for x in self.arguments.values() if isinstance(x, Tensor))
        options = compiler_options(self.config, architecture(device))
        self.kernel[self.grid](*self.arguments.values(), **self.constants, **options)


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


_observers: list[Callable[[Launch], None]] = []


@contextmanager
def observing(tell: Callable[[Launch], None]) -> Iterator[None]:
    """Within, ``tell`` is called with every launch of this process, after it was started."""
    _observers.append(tell)
    try:
        yield
    finally:
        _observers.remove(tell)


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
    """Starts a kernel. Arguments: those of ``Launch``; they must be in the order of the kernel's parameters."""
    started = Launch(kernel, grid, arguments, constants, config, flops, touched)
    if not any(isinstance(x, Tensor) and x.is_meta for x in arguments.values()):
        started.run()
    for tell in list(_observers):
        tell(started)

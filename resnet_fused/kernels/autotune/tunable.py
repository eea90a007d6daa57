"""What the autotuner chooses for: a kernel's configurations and the vendor's library, for one tuning key."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from resnet_fused.kernels.arguments import precision
from resnet_fused.kernels.launch import Config


class TuningKey(NamedTuple):
    """What identifies launches that have the same fastest configuration.

    Args:
        kernel: "conv_bn_stats", "dgrad", ...
        sizes: shapes, strides and which operands are given, as integers.
        dtype: bf16, fp16, fp32 or tf32 (``dtype_name``).
    """

    kernel: str
    sizes: tuple[int, ...]
    dtype: str


class Tunable(NamedTuple):
    """Implementations of the same computation: a Triton kernel in some configurations, and the vendor's library.

    Args:
        key: under which measurements are stored.
        configs: of the kernel. The first one is the default: it is chosen where nothing is known, nothing can be
            measured, and the vendor is not allowed. Empty where there is no kernel.
        run: starts the kernel on the device and returns its results; called many times while measuring.
        vendor: the same by the vendor's library.
        exact: computes the same results with more bits.
    """

    key: TuningKey
    configs: Sequence[Config]
    run: Callable[[Config], Any]
    vendor: Callable[[], Any]
    exact: Callable[[], Any]


class Timing(NamedTuple):
    """A measurement of one implementation.

    Args:
        config: None for the vendor's.
        ms: None where it was not timed.
        rejection: why it must not be chosen; None where it may be.
    """

    config: Config | None
    ms: float | None = None
    rejection: str | None = None


#: All that was measured for a tuning key: the fastest first, rejected configurations last.
Timings = tuple[Timing, ...]


def dtype_name(dtype: torch.dtype) -> str:
    """bf16, fp16, fp32 or tf32: the precision of GEMMs of activations of ``dtype``."""
    if dtype == torch.float32:
        return "tf32" if precision(dtype) == "tf32" else "fp32"
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def sorted_timings(timings: Iterable[Timing]) -> Timings:
    """The fastest first; the vendor before configurations that are no faster."""
    return tuple(sorted(timings, key=lambda t: (t.rejection is not None, t.ms or 0.0, t.config is not None)))

"""Which implementation runs an op, and why one is missing.

Every op has a reference in plain PyTorch, which defines what it must compute, and a native implementation (C++ on the
CPU, CUDA on the GPU) or the vendor's GEMMs and convolutions with native ops around them. For these there are Triton
kernels too, on a GPU.

``with resnet_fused.backend(choice):`` or the environment variable ``RESNET_FUSED_BACKEND=choice`` decides:

- auto: native, for 3x3 convolutions on a CPU where they were measured to be faster, and with few images there blocks as
  PyTorch's operators (ops.cpu_rules); of Triton and the vendor's library the faster one, measured at first use and
  remembered on disk;
- triton: as auto, but Triton wherever it can, and nothing is measured;
- vendor: all blocks fused, all convolutions by the vendor's library;
- reference: plain PyTorch everywhere, for debugging.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from resnet_fused import environment, native

CHOICES = ("auto", "triton", "vendor", "reference")
#: What Triton's tensor-core instructions and asynchronous copies ask for.
OLDEST_GPU = (8, 0)
#: Whether triton is installed; it is not loaded before a kernel runs.
FINDS_TRITON = importlib.util.find_spec("triton") is not None


_choice = environment.read("RESNET_FUSED_BACKEND", CHOICES)


@contextmanager
def backend(choice: str) -> Iterator[None]:
    """Runs every op with the chosen implementation inside a ``with`` block, process-wide.

    Args:
        choice: "auto", "triton", "vendor" or "reference"; see above.

    Raises:
        ValueError: for any other choice.
    """
    global _choice
    if choice not in CHOICES:
        raise ValueError(f"backend must be one of {', '.join(CHOICES)}, got {choice!r}")
    before, _choice = _choice, choice
    try:
        yield
    finally:
        _choice = before


def choice() -> str:
    """What was chosen: auto, triton, vendor or reference."""
    return _choice


def uses_reference() -> bool:
    """Whether the reference is forced."""
    return _choice == "reference"


def why_not_native(device_type: str) -> str | None:
    """Why the native kernels do not support a device type ("cpu", "cuda", ...); None when they do."""
    if device_type == "meta":
        return None
    if not native.is_loaded:
        return native.missing_reason
    if device_type == "cuda" and not native.has_cuda:
        return native.missing_cuda_reason
    if device_type not in ("cpu", "cuda"):
        return f"there are no kernels for {device_type} devices"
    return None


def interprets() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _is_too_old(device: int) -> bool:
    return torch.cuda.get_device_capability(device) < OLDEST_GPU


def why_not_triton(device_type: str) -> str | None:
    """Why Triton kernels do not support a device type; None when they do, if only where they are the fastest."""
    if _choice in ("vendor", "reference"):
        return "switched off by the backend setting"
    if device_type == "cpu" and not (interprets() and _choice == "triton"):
        return "Triton has no CPU"
    if not FINDS_TRITON:
        return "triton is not installed: a CUDA build of torch brings the one that fits"
    # Not while torch.compile traces, which may not look at the device: then each op asks again when it runs.
    compiling = torch.compiler.is_compiling()
    if device_type == "cuda" and not compiling and _is_too_old(torch.cuda.current_device()):
        return f"the GPU is older than sm_{OLDEST_GPU[0]}{OLDEST_GPU[1]}"
    return (
        None if device_type in ("cpu", "cuda", "meta") else f"there are no kernels for {device_type} devices"
    )


def why_not_fused(device_type: str) -> str | None:
    """Why blocks on a device type run unfused PyTorch; None when they run fused."""
    return None if uses_reference() else why_not_native(device_type)


def warn_unless_native() -> None:
    """Warns the importer of the package where nothing can run fused, unless that was asked for."""
    if not (native.is_loaded or native.missing_on_request or uses_reference()):
        message = f"resnet_fused runs plain PyTorch, nothing fused: {native.missing_reason}"
        warnings.warn(message, RuntimeWarning, stacklevel=3)  # the line that imports resnet_fused


def why_plain(device_type: str) -> str | None:
    """Why ops on a device type run in plain PyTorch; None when they run native kernels."""
    return "forced by the backend setting" if uses_reference() else why_not_native(device_type)


def summary(device_type: str) -> str:
    """What runs on a device type, in one line: which kernels, or why plain PyTorch."""
    if (reason := why_plain(device_type)) is not None:
        return f"runs plain PyTorch, nothing fused: {reason}"
    if device_type == "cpu":
        return "runs fused: native CPU kernels"
    without = why_not_triton(device_type)
    return (
        f"runs fused: CUDA {'and Triton kernels' if without is None else f'kernels, no Triton ({without})'}"
    )

"""Which implementation runs an op, and why one is missing.

Every op has a native implementation (C++ on the CPU, CUDA on the GPU) and a reference in plain PyTorch. The native
one runs wherever it is loaded; the reference defines what it must compute, and can be forced for debugging with
``with resnet_fused.backend("reference"):`` or the environment variable ``RESNET_FUSED_BACKEND=reference``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from resnet_fused import native

CHOICES = ("auto", "reference")


def _checked(choice: str, source: str) -> str:
    if choice not in CHOICES:
        raise ValueError(f"{source} must be one of {', '.join(CHOICES)}, got {choice!r}")
    return choice


_choice = _checked(os.environ.get("RESNET_FUSED_BACKEND", "auto"), "RESNET_FUSED_BACKEND")


@contextmanager
def backend(choice: str) -> Iterator[None]:
    """Runs every op with the chosen implementation inside a ``with`` block, process-wide.

    Args:
        choice: "auto" (native where it is loaded) or "reference" (plain PyTorch).

    Raises:
        ValueError: for any other choice.
    """
    global _choice
    before, _choice = _choice, _checked(choice, "backend")
    try:
        yield
    finally:
        _choice = before


def uses_reference() -> bool:
    """Whether the reference is forced."""
    return _choice == "reference"


def why_not_native(device_type: str) -> str | None:
    """Why the native kernels do not serve a device type ("cpu", "cuda", ...); None when they do."""
    if device_type == "meta":
        return None
    if not native.is_loaded:
        return native.missing_reason
    if device_type == "cuda" and not native.has_cuda:
        return "resnet_fused._C was built without CUDA: rebuild with nvcc on PATH and a CUDA build of torch"
    if device_type not in ("cpu", "cuda"):
        return f"there are no kernels for {device_type} devices"
    return None


def why_not_fused(device_type: str) -> str | None:
    """Why blocks on a device type run their plain composition; None when they run fused."""
    return None if uses_reference() else why_not_native(device_type)


def status() -> list[dict[str, str]]:
    """One row per op and device type: {op, device, implementation, reason}; reason is "" for native."""
    from resnet_fused.ops import PRIMITIVES

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    rows = []
    for device in devices:
        reason = "forced by the backend setting" if uses_reference() else why_not_native(device)
        for op in PRIMITIVES:
            implementation = "native" if reason is None else "reference"
            rows.append(
                {"op": op, "device": device, "implementation": implementation, "reason": reason or ""}
            )
    return rows

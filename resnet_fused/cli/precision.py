"""What activations are computed in: float32, TF32, or a 16-bit dtype under autocast."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from resnet_fused.accuracy import TF32_EPS
from resnet_fused.cli.errors import UserError


@dataclass(frozen=True)
class Precision:
    """Parameters are float32 in each; autocast runs what is not."""

    name: str
    dtype: torch.dtype  # of activations
    eps: float

    def autocast(self, device_type: str) -> contextlib.AbstractContextManager[Any]:
        """The context that a forward runs in."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(device_type, self.dtype)


PRECISIONS = {
    name: Precision(name, dtype, TF32_EPS if name == "tf32" else torch.finfo(dtype).eps)
    for name, dtype in (
        ("fp32", torch.float32),
        ("tf32", torch.float32),
        ("bf16", torch.bfloat16),
        ("fp16", torch.float16),
    )
}


def check_precision(name: str, device: torch.device) -> None:
    """Tries a convolution, forward and backward.

    Raises:
        UserError: this device cannot train in that precision.
    """
    dtype = PRECISIONS[name].dtype
    supported = True
    if device.type == "cuda" and dtype == torch.bfloat16:
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    if supported and dtype != torch.float32:
        image = torch.ones(2, 8, 8, 8, dtype=dtype, device=device, requires_grad=True)
        weight = torch.ones(8, 8, 3, 3, dtype=dtype, device=device, requires_grad=True)
        try:
            F.conv2d(image, weight, padding=1).sum().backward()
        except RuntimeError:  # what torch raises for a dtype without a kernel
            supported = False
    if not supported:
        raise UserError(f"--precision {name} is not supported on {device}: use --precision fp32")

"""The dtypes of the suite: what tensors are made in, and what autocast does with them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """``dtype``: of activations. Parameters are float32, and autocast runs what is not."""

    name: str
    dtype: torch.dtype

    @property
    def eps(self) -> float:
        """Of the products' inputs: TF32 keeps ten bits of a float32's fraction."""
        return 2.0**-10 if self.name == "tf32" else torch.finfo(self.dtype).eps

    @contextlib.contextmanager
    def cast(self, device_type: str, dtype: torch.dtype | None = None) -> Iterator[None]:
        """Autocast where it is due; not for a computation in float64, which ``dtype`` says."""
        mixed = self.dtype != torch.float32 and dtype != torch.float64
        with torch.autocast(device_type, dtype=self.dtype) if mixed else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """TF32 in convolutions and products for tf32 alone."""
        before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = self.name == "tf32"
        try:
            yield
        finally:
            torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


PRECISIONS = {
    name: Precision(name, dtype)
    for name, dtype in (
        ("fp32", torch.float32),
        ("tf32", torch.float32),
        ("bf16", torch.bfloat16),
        ("fp16", torch.float16),
    )
}

"""Whole models under AddressSanitizer. pytest doesn't collect this file by itself: `make sanitize` names it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import resnet_fused
from tests.accuracy import LAYOUTS
from tests.model_pairs import make_model, nodes

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def model_and_input(kind: str, dtype: torch.dtype, layout: str) -> tuple[torch.nn.Module, Tensor]:
    place: dict[str, Any] = {"dtype": dtype, "memory_format": LAYOUTS[layout]}
    return make_model(resnet_fused, kind).to(**place), torch.randn(3, 3, 67, 45).to(**place)


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training(kind: str, dtype: torch.dtype, layout: str) -> None:
    """A training step of a short ResNet-18 or ResNet-50, forward and backward, with an input's gradient."""
    model, x = model_and_input(kind, dtype, layout)
    out = model(x.requires_grad_())
    assert {"_ResidualBlockBackward", "_BnAddReluBackward"} & set(nodes(out))  # the latter when contiguous
    out.float().square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in [x, *model.parameters()])


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_evaluation(kind: str, dtype: torch.dtype, layout: str) -> None:
    """Evaluation of a short ResNet-18 or ResNet-50, with and without gradients."""
    model, x = model_and_input(kind, dtype, layout)
    model.eval()
    with torch.no_grad():
        assert bool(model(x).isfinite().all())
    model(x).float().square().mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)

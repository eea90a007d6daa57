"""The formulas of docs/training-fold.md are accurate, and its table may differ between processors."""

from __future__ import annotations

import pytest
import torch

from benchmarks.training_fold import eager, error, folded, inputs, similar


@pytest.mark.parametrize("ratio", [0, 10, 1000])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_centring_is_as_accurate_as_rounding_allows(dtype: torch.dtype, most: float, ratio: float) -> None:
    """Whatever the mean of the input."""
    t = inputs(ratio, dtype)
    t["grad"] = t["grad"].masked_fill(eager(t, torch.float64)[0] < 0.05, 0.0)
    exact = eager(t, torch.float64)
    assert max(error(x, e) for x, e in zip(folded(t, centred=True), exact, strict=True)) < most


def test_pages_of_two_processors() -> None:
    assert similar("| fp32 | 2e-7 |", "| fp32 | 4e-7 |") and similar("| 2e0 |", "| 7e-1 |")
    assert not similar("| fp32 | 2e-7 |", "| fp32 | 6e-7 |") and not similar("| a 2e-7 |", "| b 2e-7 |")

"""Errors of large tensors are taken in parts; masks are compared bit by bit."""

from __future__ import annotations

import math

import pytest
import torch

from resnet_fused import accuracy
from resnet_fused.accuracy import (
    MASK_PART,
    bits_that_differ,
    element_error,
    relative_error,
    why_mask_is_wrong,
)


@pytest.mark.parametrize("part", [1, 100, 2**24])
def test_parts_change_nothing(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = torch.randn(3, 5, 7, 4, dtype=torch.float64)
    x = exact.bfloat16().contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(accuracy, "PART", part)
    error = x.double() - exact
    rms = exact.square().mean().sqrt()
    assert relative_error(x, exact) == pytest.approx(float(error.norm() / exact.norm()))
    expected = (error.abs() / (exact.abs() + rms)).pow(6).mean().pow(1 / 6)
    assert element_error(x, exact) == pytest.approx(float(expected))
    assert element_error(x, exact.float()) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
def test_what_is_far_off_is_no_error_of_python(value: float) -> None:
    exact = torch.full((4,), 1e-30)
    x = exact.clone()
    x[2] = value
    for measure in (relative_error, element_error):
        assert not measure(x, exact) <= 1e6


def test_no_dimensions_and_no_elements() -> None:
    assert relative_error(torch.tensor(2.0), torch.tensor(1.0)) == 1
    assert relative_error(torch.empty(0, 3), torch.empty(0, 3)) == 0
    assert element_error(torch.empty(0, 3), torch.empty(0, 3)) == 0


def test_bits_are_counted() -> None:
    a, b = (torch.randint(256, (3 * MASK_PART + 5,), dtype=torch.uint8) for _ in range(2))
    expected = [bin(x ^ y).count("1") for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    counted = bits_that_differ(a.view(1, -1), b.view(1, -1))
    assert counted.tolist() == [sum(expected[i : i + MASK_PART]) for i in range(0, len(expected), MASK_PART)]


def test_a_mask_may_differ_in_a_few_bits_anywhere_and_in_few_of_a_part() -> None:
    size = 1000 * MASK_PART
    exact = torch.randint(256, (size,), dtype=torch.uint8)

    def why(mask: torch.Tensor, vendor: torch.Tensor | None = None) -> str | None:
        by_vendor = 0 if vendor is None else bits_that_differ(vendor, exact)
        return why_mask_is_wrong(bits_that_differ(mask, exact), by_vendor, size)

    scattered = exact.clone()
    scattered[:: size // 8000] ^= 1
    assert why(exact) is why(scattered) is None
    more = exact.clone()
    more[:: size // 9000] ^= 1
    assert "bits of a mask differ" in (why(more) or "")
    assert why(more, more) is None
    tile = exact.clone()
    tile[5 * MASK_PART : 5 * MASK_PART + 512] ^= 0x11
    assert f"1024 bits of a mask differ in {MASK_PART} bytes from {5 * MASK_PART} on" == why(tile)
    assert why(tile, scattered) is not None and why(tile, tile) is None


def test_one_bit_of_a_small_mask_may_differ() -> None:
    size = 2 * MASK_PART + 1
    exact = torch.zeros(size, dtype=torch.uint8)
    mask = exact.clone()
    mask[-1] = 7
    assert why_mask_is_wrong(bits_that_differ(mask, exact), 0, size) is None
    tile = exact.clone()
    tile[0] = 1
    tile[-40:] = 255
    assert why_mask_is_wrong(bits_that_differ(tile, exact), 0, size) is not None

"""Layouts, the formats of masks and indices, spelled out element by element, and what the reference refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resnet_fused.layout import (
    dense,
    is_channels_last,
    like_layout,
    pack_mask,
    statistics_dtype,
    stored,
    unpack_mask,
)
from resnet_fused.reference.bn_relu import bn_relu, bn_relu_backward
from resnet_fused.reference.bn_relu_maxpool import (
    bn_relu_maxpool,
    bn_relu_maxpool_backward,
    bn_relu_maxpool_backward_reduce,
)
from tests.accuracy import LAYOUTS, hostile_input
from tests.ops.operands import reference_of


@pytest.mark.parametrize(
    ("shape", "of_contiguous", "of_channels_last"),
    [
        ((2, 3, 4, 5), False, True),
        ((2, 3, 1, 1), True, True),  # one description is as good as the other: rows of channels
        ((2, 1, 4, 5), False, False),  # one plane
        ((1, 1, 1, 1), True, True),
        ((0, 3, 4, 5), False, False),
        ((1, 3, 1, 5), False, True),
    ],
)
def test_is_channels_last(shape: tuple[int, ...], of_contiguous: bool, of_channels_last: bool) -> None:
    x = torch.empty(shape)
    assert is_channels_last(x) == of_contiguous
    assert is_channels_last(x.contiguous(memory_format=torch.channels_last)) == of_channels_last


@pytest.mark.parametrize("name", ["sliced", "sliced_channels", "permuted"])
def test_dense_copies_to_the_nearest_layout(name: str, layout: str) -> None:
    x = hostile_input(name, torch.float32, layout).y
    y = dense(x)
    assert torch.equal(x, y)
    assert y.is_contiguous(memory_format=LAYOUTS[layout])
    assert dense(y) is y


def test_dense_takes_one_channel_as_planes() -> None:
    x = torch.randn(2, 1, 4, 8)[..., ::2]
    assert dense(x).is_contiguous()


def test_like_layout_copies_only_what_differs(layout: str) -> None:
    y = hostile_input("plain", torch.float32, layout).y
    assert like_layout(y, y) is y
    other = hostile_input("plain", torch.float32, "contiguous").y.to(memory_format=torch.channels_last)
    expanded = torch.randn(1, 1, 1, 1).expand_as(y)
    for x in (other, expanded):
        assert like_layout(x, y).stride() == y.stride()
        assert torch.equal(like_layout(x, y), x)


def test_stored_has_the_strides_of_y() -> None:
    y = torch.randn(3, 1, 1, 5).to(memory_format=torch.channels_last)
    values = torch.randn(3, 1, 1, 5, dtype=torch.float64).transpose(0, 3).contiguous().transpose(0, 3)
    out = stored(values, y)
    assert out.stride() == y.stride() and out.dtype == y.dtype
    assert torch.equal(out, values.float())


def test_statistics_dtype() -> None:
    expected = {
        torch.float64: torch.float64,
        torch.float32: torch.float32,
        torch.bfloat16: torch.float32,
        torch.float16: torch.float32,
    }
    assert {dtype: statistics_dtype(dtype) for dtype in expected} == expected
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        statistics_dtype(torch.int64)


@pytest.mark.parametrize("shape", [(2, 11, 3, 5), (1, 8, 2, 4), (3, 1, 1, 9), (2, 17, 1, 1)])
def test_mask_is_one_bit_per_element_in_memory_order(shape: tuple[int, ...], layout: str) -> None:
    y = torch.empty(shape).contiguous(memory_format=LAYOUTS[layout])
    kept = torch.rand(shape) < 0.5
    mask = pack_mask(kept, y)
    n, c, h, w = shape
    by_rows = is_channels_last(y)
    rows, cols = (n * h * w, c) if by_rows else (n * c, h * w)
    assert mask.dtype == torch.uint8
    assert mask.shape == (rows, -(-cols // 8))
    matrix = (kept.permute(0, 2, 3, 1) if by_rows else kept).reshape(rows, cols).tolist()
    for row, found in zip(matrix, mask.tolist(), strict=True):
        expected = [0] * len(found)
        for column, bit in enumerate(row):
            expected[column // 8] |= bit << (column % 8)
        assert found == expected
    assert torch.equal(unpack_mask(mask, y), kept)
    assert unpack_mask(mask, y).is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("stem", ["bn_add_relu", "bn_bn_add_relu"])
def test_mask_of_an_op_says_what_is_positive(stem: str, layout: str) -> None:
    case = hostile_input("odd_channels", torch.float64, layout)
    c = case.y.shape[1]
    mean, ones = torch.zeros(c, dtype=torch.float64), torch.ones(c, dtype=torch.float64)
    affine = (mean, ones, case.weight, case.bias)
    extra = (case.skip, *affine) if stem == "bn_bn_add_relu" else (case.residual,)
    out, mask = reference_of(stem)(case.y, *affine, *extra)
    assert torch.equal(mask, pack_mask(out > 0, case.y))
    assert 0 < (out > 0).sum() < out.numel()


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (5, 4), (7, 9)])
def test_indices_name_the_first_maximum(size: tuple[int, int], layout: str) -> None:
    y = _few_values(2, 3, *size).contiguous(memory_format=LAYOUTS[layout])  # so that there are ties
    zeros, ones = torch.zeros(3), torch.ones(3)
    out, indices = bn_relu_maxpool(y, zeros, ones, None, None)
    height, width = size
    assert indices.dtype == torch.uint8
    assert out.shape == indices.shape == (2, 3, (height - 1) // 2 + 1, (width - 1) // 2 + 1)
    assert is_channels_last(out) == is_channels_last(indices) or out.shape[2:] == (1, 1)
    for n, c, oh, ow in torch.cartesian_prod(*(torch.arange(s) for s in out.shape)).tolist():
        largest, index = 0.0, 9
        for kh in range(3):
            for kw in range(3):
                h, w = 2 * oh - 1 + kh, 2 * ow - 1 + kw
                if 0 <= h < height and 0 <= w < width and y[n, c, h, w] > largest:
                    largest, index = y[n, c, h, w].item(), 3 * kh + kw
        assert (out[n, c, oh, ow].item(), indices[n, c, oh, ow].item()) == (largest, index)


def _few_values(*shape: int) -> Tensor:
    return torch.randint(-3, 3, shape).float()


def test_overlapping_windows_add_their_gradients() -> None:
    y = torch.zeros(1, 1, 3, 3)
    y[0, 0, 1, 1] = 1.0  # the maximum of all four windows
    vectors = (torch.zeros(1), torch.ones(1))
    _, indices = bn_relu_maxpool(y, *vectors, None, None)
    assert indices.flatten().tolist() == [8, 6, 2, 0]
    grad = torch.tensor([[[[1.0, 2.0], [4.0, 8.0]]]])
    dy = bn_relu_maxpool_backward(grad, indices, y, *vectors, None, None, None)
    assert dy.flatten().tolist() == [0, 0, 0, 0, 15, 0, 0, 0, 0]
    assert [s.item() for s in bn_relu_maxpool_backward_reduce(grad, indices, y, *vectors)] == [
        15,
        15,
    ]


def test_only_one_of_two_sums_is_refused() -> None:
    y, vectors = torch.randn(2, 3, 4, 4), [torch.ones(3) for _ in range(5)]
    with pytest.raises(ValueError, match="sum_dz and sum_dz_xhat must be given together"):
        bn_relu_backward(y, y, *vectors, None)


@pytest.mark.parametrize(
    ("y", "vector", "error", "message"),
    [
        (torch.ones(2, 3, 4), torch.ones(3), ValueError, r"expected 4D input \(got 3D input\)"),
        (torch.ones(2, 3, 4, 4), torch.ones(1), ValueError, "one element per channel"),
        (torch.ones(2, 3, 4, 4, dtype=torch.int32), torch.ones(3), TypeError, "got torch.int32"),
        (torch.ones(2, 3, 4, 4, dtype=torch.float8_e4m3fn), torch.ones(3), TypeError, "got torch.float8"),
    ],
    ids=["rank", "channels", "integers", "float8"],
)
def test_bad_input(y: Tensor, vector: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bn_relu(y, vector, vector, None, None)

"""torch.library.opcheck on every primitive: schema, fake results with the kernel's strides, compilation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fused.layout import dense, is_channels_last
from resnet_fused.ops.dispatch import IMPLEMENTATIONS

OPS = torch.ops.resnet_fused


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def permuted(x: Tensor) -> Tensor:
    """Neither contiguous nor channels_last: memory order W, N, C, H."""
    return x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)


def sliced(x: Tensor) -> Tensor:
    """channels_last with every other column of a wider tensor."""
    wide = torch.zeros(*x.shape[:3], 2 * x.shape[3], dtype=x.dtype).to(memory_format=torch.channels_last)
    wide[..., ::2] = x
    return wide[..., ::2]


#: The modules of the reference whose primitives have a kernel in csrc, with all that starts with their names.
STEMS = ("batch_norm_stats", "bn_relu_maxpool", "bn_relu", "bn_add_relu", "bn_bn_add_relu", "masked_grad")
KERNELS = [name for name in IMPLEMENTATIONS if name.startswith(STEMS)]
LAYOUTS = [contiguous, channels_last, permuted, sliced]
N, C, H, W = 2, 11, 5, 3


def arguments(
    name: str, layout: Any, dtype: torch.dtype, affine: bool, shape: tuple[int, ...] = (N, C, H, W)
) -> tuple[Any, ...]:
    """Arguments for a primitive, the results of its forward pass among them."""
    batch, channels, *image = shape

    def activation(size: Sequence[int] = image) -> Tensor:
        x: Tensor = layout(torch.randn(batch, channels, *size).to(dtype))
        return x

    def vectors(count: int) -> list[Tensor]:
        return [
            torch.rand(channels, dtype=torch.float64 if dtype is torch.float64 else torch.float32)
            for _ in range(count)
        ]

    y, skip, grad = activation(), activation(), activation()
    mean, invstd = vectors(2)
    weight, bias = vectors(2) if affine else (None, None)
    sums = vectors(2) if affine else (None, None)
    if name == "batch_norm_stats":
        return y, 1e-5
    if name.startswith("bn_relu_maxpool"):
        if name == "bn_relu_maxpool":
            return y, mean, invstd, weight, bias
        _, indices = OPS.bn_relu_maxpool(y, mean, invstd, weight, bias)
        grad = activation((indices.shape[2], indices.shape[3]))
        forward = (grad, indices, y, mean, invstd)
        return forward if name.endswith("reduce") else (*forward, weight, *sums)
    if name.startswith("bn_relu"):
        forward = (y, mean, invstd, weight, bias)
        if name == "bn_relu":
            return (*forward, *(vectors(1) if affine else [None]))
        return (grad, *forward) if name.endswith("reduce") else (grad, *forward, *sums)
    if name == "masked_grad":
        out, mask = OPS.bn_add_relu(y, mean, invstd, weight, bias, skip)
        return grad, mask, out, affine, torch.rand(channels, dtype=torch.float64) if affine else None
    if name.startswith("bn_add_relu"):
        forward = (y, mean, invstd, weight, bias, skip)
        if name == "bn_add_relu":
            return forward
        out, mask = OPS.bn_add_relu(*forward)
        if name.endswith("out"):
            return *forward, torch.zeros_like(out), torch.zeros_like(mask)
        return (grad, mask, y, mean, invstd, *([] if name.endswith("reduce") else [weight, *sums]))
    both = (y, mean, invstd, weight, bias, skip, mean, invstd, weight, bias)
    if name == "bn_bn_add_relu":
        return both
    out, mask = OPS.bn_bn_add_relu(*both)
    if name.endswith("out"):
        return *both, torch.zeros_like(out), torch.zeros_like(mask)
    if name.endswith("reduce"):
        return grad, mask, y, mean, invstd, skip, mean, invstd
    return grad, mask, y, mean, invstd, weight, *sums, skip, mean, invstd, weight, *sums


def copied(args: tuple[Any, ...]) -> list[Any]:
    """With their strides."""
    return [copy.deepcopy(x) for x in args]


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    if results is None:
        return ()
    return (results,) if isinstance(results, Tensor) else tuple(results)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", KERNELS)
def test_opcheck(name: str, dtype: torch.dtype, layout: Any, affine: bool) -> None:
    torch.library.opcheck(getattr(OPS, name).default, arguments(name, layout, dtype, affine))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", KERNELS)
def test_native_equals_reference(name: str, layout: Any) -> None:
    """Bit for bit in what is discrete (masks, indices), to rounding in what is not, with the same strides."""
    import resnet_fused.reference as reference

    stem = next(s for s in STEMS if name.startswith(s))
    args = arguments(name, layout, torch.float64, True)
    # With the arguments themselves, some of which an op may write to.
    by_native, by_reference = (
        as_tuple(op(*copies)) + tuple(x for x in copies if isinstance(x, Tensor))
        for op, copies in (
            (getattr(OPS, name), copied(args)),
            (getattr(getattr(reference, stem), name), copied(args)),
        )
    )
    for ours, theirs in zip(by_native, by_reference, strict=True):
        assert ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_layouts_are_what_they_are_called(layout: Any) -> None:
    x = layout(torch.randn(N, C, H, W))
    assert x.is_contiguous() == (layout is contiguous)
    assert (dense(x) is x) == (layout in (contiguous, channels_last))
    assert is_channels_last(dense(x)) == (layout in (channels_last, sliced))


def test_masks_of_another_layout_are_refused() -> None:
    y, mean, invstd, weight, bias, skip = arguments("bn_add_relu", contiguous, torch.float32, True)
    _, mask = OPS.bn_add_relu(y, mean, invstd, weight, bias, skip)
    with pytest.raises(RuntimeError, match="mask must be the contiguous uint8 tensor"):
        OPS.bn_add_relu_backward_reduce(y, mask, channels_last(y), mean, invstd)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: (a[0][0], *a[1:]), "expected a 4-D activation"),
        (lambda a: (a[0].to(torch.int32), *a[1:]), "must be float32, float64, bfloat16 or float16"),
        (lambda a: (a[0], a[1][:-1], *a[2:]), "mean must be a vector of 11 channels"),
        (lambda a: (a[0], a[1], a[2].double(), *a[3:]), "invstd must be float64 for a float64"),
        (lambda a: (*a[:5], a[5][:, :, :-1]), "residual must have the shape"),
        (lambda a: (*a[:5], a[5].double()), "residual must have the activation's dtype"),
    ],
)
def test_native_checks_its_arguments(change: Any, message: str) -> None:
    args = change(arguments("bn_add_relu", contiguous, torch.float32, True))
    with pytest.raises(RuntimeError, match=message):
        OPS.bn_add_relu(*args)

"""The accuracy rule, and the inputs that try to break it.

The rule is resnet_fused.accuracy's, with the computation in float64 as the exact one and eager PyTorch, run on the same
inputs and device, for the vendor. There are no other tolerances.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resnet_fused.accuracy import element_error, limit, relative_error


def assert_as_accurate(
    name: str, fused: Tensor, eager: Tensor, exact: Tensor, dtype: torch.dtype | None = None
) -> None:
    """Raises Inaccurate unless ``fused`` obeys the rule.

    Args:
        name: what the result is, for the message.
        fused, eager: the two results, of one shape and dtype, without NaN.
        exact: the float64 result.
        dtype: what eps is taken of; the results' dtype unless given. For a float32 result of a computation that
            rounds to fewer bits on its way: the dtype of that.
    """
    assert exact.dtype == torch.float64, f"{name}: the exact result is {exact.dtype}"
    assert fused.shape == eager.shape == exact.shape, (
        f"{name}: shapes {fused.shape}, {eager.shape}, {exact.shape}"
    )
    assert fused.dtype == eager.dtype, f"{name}: dtypes {fused.dtype}, {eager.dtype}"
    for what, x in (("fused", fused), ("eager", eager), ("exact", exact)):
        assert not x.isnan().any(), f"{name}: NaN in the {what} result"
    eps = torch.finfo(dtype or fused.dtype).eps
    for measure in (relative_error, element_error):
        by_fused, by_eager = measure(fused, exact), measure(eager, exact)
        most = limit(by_eager, eps)
        if not by_fused <= most:
            allowed = f"{most:.3g} = 1.5 * {by_eager:.3g} (eager) + 4 * {eps:.3g}"
            raise Inaccurate(f"{name}: {measure.__name__} {by_fused:.3g} > {allowed}")


class Inaccurate(AssertionError):
    """A result that breaks the rule."""


def in_some_draw(test: Callable[..., None]) -> Callable[..., None]:
    """For a test that draws its own inputs: the rule has to hold in one of four draws.

    Where a sum cancels luck breaks it in up to one of fifty draws, for results whose errors are eager's on median; what
    is less accurate by its making breaks it in all. Whatever else is asserted has to hold in every draw.
    """

    @functools.wraps(test)
    def drawn(*args: Any, **kwargs: Any) -> None:
        for left in reversed(range(4)):
            try:
                return test(*args, **kwargs)
            except Inaccurate:
                if not left:
                    raise

    return drawn


@dataclass
class Case:
    """An input of the batch norm ops. All activations have the shape, dtype and strides of ``y``.

    ``weight`` and ``bias`` (C,), like running statistics, are in the statistics dtype; those of ``skip`` likewise.
    """

    name: str
    y: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor
    skip: Tensor
    skip_weight: Tensor
    skip_bias: Tensor
    grad: Tensor


#: What is hostile about each case; see hostile_input.
HOSTILE_CASES = (
    "plain",
    "mean",
    "constant_channel",
    "gamma",
    "two_values",
    "odd_channels",
    "odd_size",
    "sliced",
    "sliced_channels",
    "permuted",
    "batch_1",
)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_SHAPES = {
    "two_values": (2, 2048, 1, 1),  # the end of a ResNet-50 for small images
    "odd_channels": (4, 13, 10, 6),
    "odd_size": (3, 16, 13, 7),
    "batch_1": (1, 16, 12, 10),
}


def hostile_input(name: str, dtype: torch.dtype, layout: str, device: str = "cpu") -> Case:
    """One case of HOSTILE_CASES with fresh random values from the global generator.

    - mean: per-channel |mean| / std of 1e3, either sign, in both branches;
    - constant_channel: two channels without variance;
    - gamma: weights of zero and below;
    - two_values: two values per channel, one more than the minimum;
    - odd_channels, odd_size: nothing is a multiple of 8;
    - sliced, sliced_channels, permuted: strided views;
    - batch_1.

    Args:
        dtype: of the activations.
        layout: "contiguous" or "channels_last"; what views are taken of, where the case is a view.
    """
    shape = _SHAPES.get(name, (4, 16, 10, 8))
    channels = shape[1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def activation(mean: float = 0.0) -> Tensor:
        x = torch.randn(shape)
        if name == "mean":
            x += 1e3 * torch.randn(channels).sign().view(-1, 1, 1)
        else:
            if name == "two_values":
                # Far enough apart for their mean: |mean| >> std is the matter of another case.
                x = (0.5 + torch.rand(shape)) * torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
            x = x * (0.5 + torch.rand(channels, 1, 1)) + mean * torch.randn(channels, 1, 1)
        if name == "constant_channel":
            x[:, 1], x[:, 5] = 0.3, 0.0
        return _strided(x.to(dtype), name, layout).to(device)

    def weight() -> Tensor:
        vector = 0.5 + torch.rand(channels)
        if name == "gamma":
            vector[::3], vector[1::3] = 0.0, -vector[1::3]
        return vector.to(device, wide)

    def bias() -> Tensor:
        return torch.randn(channels).mul(0.3).to(device, wide)

    y, skip = activation(mean=1.0), activation(mean=1.0)
    residual = _strided(torch.randn(shape).relu().to(dtype), name, layout).to(device)
    grad = _strided(torch.randn(shape).to(dtype), name, layout).to(device)
    return Case(name, y, weight(), bias(), residual, skip, weight(), bias(), grad)


def hostile_inputs(
    dtype: torch.dtype, layout: str, names: Sequence[str] = HOSTILE_CASES, device: str = "cpu"
) -> list[Case]:
    """All cases, or those named."""
    return [hostile_input(name, dtype, layout, device) for name in names]


def _strided(x: Tensor, name: str, layout: str) -> Tensor:
    """The values of ``x`` in the strides that the case asks for; whatever a view leaves out is NaN."""
    n, c, h, w = x.shape
    if name == "permuted":
        x = x.transpose(2, 3).contiguous(memory_format=LAYOUTS[layout]).transpose(2, 3)
        assert not x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last)
    elif name in ("sliced", "sliced_channels"):
        skipped_channels, skipped_columns = (0, 3) if name == "sliced" else (5, 0)
        whole = torch.full((n, c + skipped_channels, h, w + skipped_columns), math.nan, dtype=x.dtype)
        view = whole.contiguous(memory_format=LAYOUTS[layout])[:, skipped_channels:, :, skipped_columns:]
        x = view.copy_(x)
        assert not x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last)
    else:
        x = x.contiguous(memory_format=LAYOUTS[layout])
    return x

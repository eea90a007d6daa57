"""The accuracy rule, and the inputs that try to break it.

With e the error of a result against the same computation in float64 on the same (rounded) inputs, a fused result passes
if e_fused <= 1.5 * e_eager + 4 * eps(dtype), where both errors are geometric means over a fixed number of draws of the
inputs, and eager PyTorch runs on the same inputs and device. There are no other tolerances.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resnet_fused.accuracy import element_error, limit, relative_error

#: Draws of the inputs that the errors are averaged over.
DRAWS = 5
#: In float32, where the mean of an input is a thousand deviations: the error of its variance comes from the rounding of
#: the values of few channels, and differs by luck. Over 5 draws those of two equal computations were 2.3 times apart.
DRAWS_OF_MEAN = 15
#: Of eps: what smaller errors count as. A correctly rounded result has an error of about a fifth of eps; one draw that
#: is exact by chance would make the geometric mean of all draws zero.
LEAST_ERROR = 1 / 16
#: How many times the limit of eager's largest error the fused error of one draw may be. Far above eps the rule itself
#: holds one draw of five to 1.5**5 = 7.6 times eager's; near eps it would let unrelated values pass in bfloat16.
ONE_DRAW = 8.0

Results = Mapping[str, Tensor]


class Inaccurate(AssertionError):
    """A result that breaks the rule."""


def assert_accurate(
    draw: Callable[[], tuple[Results, Results, Results]],
    dtype: torch.dtype | None = None,
    count: int = DRAWS,
) -> None:
    """Raises Inaccurate unless all results obey the rule, as vectors and by elements, over ``count`` draws.

    Args:
        draw: draws inputs from the global generator; returns the results by name: fused, eager, and in float64.
            None may be NaN.
        dtype: what eps is taken of; the results' dtype unless given. For a float32 result of a computation that
            rounds to fewer bits on its way: the dtype of that.
    """
    draws: dict[tuple[str, float], list[tuple[float, float]]] = {}
    for _ in range(count):
        fused, eager, exact = draw()
        assert fused.keys() == eager.keys() == exact.keys() != set()
        for name, truth in exact.items():
            ours, theirs = fused[name], eager[name]
            assert truth.dtype == torch.float64, f"{name}: the exact result is {truth.dtype}"
            assert ours.shape == theirs.shape == truth.shape, (name, ours.shape, theirs.shape, truth.shape)
            assert ours.dtype == theirs.dtype, (name, ours.dtype, theirs.dtype)
            for what, x in (("fused", ours), ("eager", theirs), ("exact", truth)):
                assert not x.isnan().any(), f"{name}: NaN in the {what} result"
            for measure in (relative_error, element_error):
                key = f"{name}: {measure.__name__}", torch.finfo(dtype or ours.dtype).eps
                draws.setdefault(key, []).append((measure(ours, truth), measure(theirs, truth)))
    for (name, eps), pairs in draws.items():
        assert len(pairs) == count, f"{name}: only in {len(pairs)} draws"
        by_fused, by_eager = zip(*pairs, strict=True)
        assert math.isfinite(max(by_eager)), f"{name} of eager is {max(by_eager)}"
        means = (_geometric_mean(values, LEAST_ERROR * eps) for values in (by_fused, by_eager))
        _assert_within_limit(name, *means, eps)
        _assert_within_limit(f"{name} of one draw", max(by_fused), max(by_eager), eps, ONE_DRAW)


def _assert_within_limit(name: str, by_fused: float, by_eager: float, eps: float, times: float = 1.0) -> None:
    most = times * limit(by_eager, eps)
    if not by_fused <= most:
        factor = "" if times == 1 else f"{times:g} * "
        raise Inaccurate(
            f"{name} {by_fused:.3g} > {most:.3g} = {factor}(1.5 * {by_eager:.3g} (eager) + 4 * {eps:.3g})"
        )


def _geometric_mean(values: Sequence[float], least: float) -> float:
    """Of values that are at least ``least``, or count as that."""
    return math.exp(sum(math.log(max(value, least)) for value in values) / len(values))


def shift_from_zero(values: Tensor) -> Tensor:
    """(C,), to be added to ``values`` (N, C, H, W), the inputs of a ReLU: puts zero into a wide gap between them.

    On which side of zero a ReLU's input lies moves gradients by orders of magnitude more than rounding does. The gap is
    the widest of each channel among the middle seven eighths of its values; a constant channel stays where it is.
    """
    if values[:, 0].numel() < 2:
        return values.new_zeros(values.shape[1])
    ordered = values.transpose(0, 1).flatten(1).sort(1).values
    count = ordered.shape[1]
    inner = ordered[:, count // 16 : -(-count * 15 // 16)]
    width, below = inner.diff(dim=1).max(1, keepdim=True)
    middle = inner.gather(1, below) + width / 2
    return torch.where(width > 1e-6, -middle, 0.0).flatten()


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


def hostile_input(
    name: str, dtype: torch.dtype, layout: str, device: str = "cpu", level: float = 1e3
) -> Case:
    """One case of HOSTILE_CASES with fresh random values from the global generator.

    - mean: per-channel |mean| / std of ``level``, either sign, in both branches;
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
            x += level * torch.randn(channels).sign().view(-1, 1, 1)
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

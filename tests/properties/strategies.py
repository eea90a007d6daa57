"""What hypothesis draws: shapes, places in memory, norms, and the calls of ops, blocks and models that have them.

Values come from a seed that is drawn too, so that examples shrink to small shapes and plain layouts. Sizes are such
that an example takes some tens of milliseconds: channels are many only where pixels are few.
"""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

CHANNELS = (1, 2, 3, 4, 7, 8, 13, 16, 31, 32, 33, 64, 65, 127, 128, 256, 511, 512, 520)
SIDES = (1, 2, 3, 4, 5, 7, 8, 11, 13, 16, 17, 23)
BATCHES = (1, 2, 3, 5)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WIDE = (torch.float64, torch.float32)
ORDERS = ((0, 3, 2, 1), (1, 0, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1), (0, 1, 3, 2), (0, 3, 1, 2))
NON_FINITE = (math.inf, -math.inf, math.nan)

seeds = st.integers(0, 2**32 - 1)
rarely = st.integers(0, 15).map(lambda n: n == 15)
GRAD_MODES = {
    "grad": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}
grad_modes = st.sampled_from(("grad", "grad", "grad", "grad", *GRAD_MODES))


@st.composite
def activation_shapes(
    draw: st.DrawFn, elements: int, channels: int | None = None, empty: bool = True
) -> tuple[int, int, int, int]:
    """(N, C, H, W) of at most ``elements`` elements, or of none, which is rare.

    Args:
        channels: C, if it is given.
        empty: whether one of the sizes may be 0.
    """
    c = draw(st.sampled_from(CHANNELS)) if channels is None else channels
    left = max(1, elements // c)
    shape = [1, c, 1, 1]
    # Largest first, which are also what hypothesis draws first and most often.
    for axis, sizes, share in ((2, SIDES, 0.6), (3, SIDES, 0.9), (0, BATCHES, 1.0)):
        fitting = [size for size in sizes if size <= max(1, left**share)]
        shape[axis] = draw(st.sampled_from(fitting[::-1]))
        left //= shape[axis]
    if empty and draw(rarely):
        shape[draw(st.sampled_from((0, 2, 3)))] = 0
    n, c, h, w = shape
    return n, c, h, w


class Placement(NamedTuple):
    """How the values of an activation lie in memory.

    order: of the dimensions, the outermost first. gaps: the dimensions of which every second element is one.
    expanded: the dimensions of stride 0. flipped: those that run backwards in the memory of a copy. offset: elements of
    the storage before the first. negated: the values are negative in memory (torch.is_neg).
    """

    order: tuple[int, int, int, int] = (0, 1, 2, 3)
    gaps: tuple[int, ...] = ()
    expanded: tuple[int, ...] = ()
    flipped: tuple[int, ...] = ()
    offset: int = 0
    negated: bool = False

    def narrow(self, values: Tensor) -> Tensor:
        """With equal values along the dimensions that are expanded."""
        for axis in self.expanded:
            values = values.narrow(axis, 0, min(1, values.shape[axis]))
        return values

    def place(self, values: Tensor) -> Tensor:
        """The values; of a dimension that is expanded the first ones."""
        shape, values = values.shape, self.narrow(values)
        sizes = [values.shape[axis] * (2 if axis in self.gaps else 1) for axis in self.order]
        # What lies between the elements is NaN: no result may show it.
        storage = torch.full((self.offset + math.prod(sizes),), math.nan, dtype=values.dtype)
        there = storage[self.offset :].view(sizes).permute([self.order.index(axis) for axis in range(4)])
        there = there[tuple(slice(None, None, 2 if axis in self.gaps else 1) for axis in range(4))]
        if self.flipped:
            there.copy_(values.flip(self.flipped))
            there = there.flip(self.flipped)
        else:
            there.copy_(values)
        if self.negated:
            there = torch._neg_view(there.neg())
        return there.expand(shape)


CONTIGUOUS, CHANNELS_LAST = Placement(), Placement((0, 2, 3, 1))


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    """Two of three as they are mostly, channels_last; of the others each is one thing more."""
    plain = Placement(draw(st.sampled_from((CHANNELS_LAST.order,) * 3 + (CONTIGUOUS.order,))))
    kind = draw(st.sampled_from(("",) * 12 + Placement._fields))
    axes = draw(st.lists(st.integers(0, 3), min_size=1, max_size=2, unique=True).map(tuple))
    if kind == "order":
        return plain._replace(order=draw(st.sampled_from(ORDERS)))
    if kind == "offset":
        return plain._replace(offset=draw(st.sampled_from((1, 3, 5))))
    if kind == "negated":
        return plain._replace(negated=True)
    return plain._replace(**{kind: axes}) if kind else plain


class Fault(NamedTuple):
    """One element of an operand that is not finite.

    place: of the element, as a fraction of the operand's size.
    """

    operand: str
    value: float
    place: float

    def put_into(self, values: Tensor) -> None:
        if values.numel():
            values.view(-1)[int(self.place * values.numel())] = self.value


def place_with(faults: tuple[Fault, ...], placement: Placement, values: Tensor) -> Tensor:
    """The values at their place, which is not expanded where there are faults.

    Of equal values the variance is zero, and rounding, which faults are compared beyond, grows by 1 / sqrt(eps) a norm.
    """
    return (placement._replace(expanded=()) if faults else placement).place(values)


def faults(operands: st.SearchStrategy[str]) -> st.SearchStrategy[tuple[Fault, ...]]:
    """One or two."""
    places = st.floats(0, 1, exclude_max=True, width=32)
    one = st.builds(Fault, operands, st.sampled_from(NON_FINITE), places)
    return st.lists(one, min_size=1, max_size=2).map(tuple)

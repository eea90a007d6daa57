"""What the two ways to run a block share: its parameters and plan, what forward leaves, the bookkeeping of backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused.ops._branch import Fold, FoldedGradients, Stage, folded_gradients
from resnet_fused.ops.batch_norm_stats import Statistics
from resnet_fused.reference.batch_norm import scale

MaybeTensor = Tensor | None


class Parameters(NamedTuple):
    """Of one convolution and its batch norm, as autograd knows them."""

    weight: Tensor
    gamma: MaybeTensor
    beta: MaybeTensor


class Plan(NamedTuple):
    """A block's stages; the last of ``stages`` ends the main path. ``fused``: Triton kernels run it where they win."""

    stages: tuple[Stage, ...]
    downsample: Stage | None
    fused: bool = False

    @property
    def ends(self) -> tuple[Stage, ...]:
        """The stages that the shortcut and the main path end with."""
        return (self.stages[-1], *([] if self.downsample is None else [self.downsample]))


class Forwarded(NamedTuple):
    """What forward makes; all but ``out`` and ``running`` is kept for backward.

    ``used``: statistics of all stages in order, the shortcut's last. ``folds`` and ``kept``: of each end of the block
    what is needed where it is folded, and its convolution's output where it is not.
    """

    out: Tensor
    mask: Tensor
    ys: list[Tensor]
    used: list[Statistics]
    folds: list[Fold]
    kept: list[MaybeTensor]
    running: list[Tensor]


def grouped(flat: Sequence[MaybeTensor]) -> list[Parameters]:
    return [Parameters(*flat[i : i + 3]) for i in range(0, len(flat), 3)]  # type: ignore[arg-type]


class Backward:
    """One backward pass of a block; ``run`` returns the gradient of its input.

    Gradients of parameters are collected in ``grads``, in the order of the parameters.
    """

    def __init__(
        self,
        plan: Plan,
        needs: Sequence[bool],
        x: Tensor,
        mask: Tensor,
        parameters: list[Parameters],
        ys: list[Tensor],
        used: list[Statistics],
        folds: list[Fold],
        kept: list[MaybeTensor],
    ) -> None:
        self.plan, self.needs = plan, needs
        self.x, self.mask, self.parameters = x, mask, parameters
        self.ys, self.used, self.folds, self.kept = ys, used, folds, kept
        self.grads: list[tuple[MaybeTensor, ...]] = [(None, None, None)] * len(parameters)
        self.chain = len(ys)

    def run(self, grad: Tensor) -> MaybeTensor:
        raise NotImplementedError

    def gradients(self, grad: Tensor) -> tuple[MaybeTensor, ...]:
        """Of the block's input, its plan, and its parameters; None where none is needed."""
        dx = self.run(grad)
        flat = [g for grads in self.grads for g in grads]
        return tuple(g if needed else None for g, needed in zip((dx, None, *flat), self.needs, strict=True))

    def place(self, end: int) -> int:
        """Where the parameters of an end of the block are."""
        return self.chain + end

    def note_norm(self, place: int, dgamma: Tensor, dbeta: Tensor) -> None:
        self.grads[place] = (self.grads[place][0], dgamma, dbeta)

    def note_fold_norm(self, place: int, dgamma: Tensor, sum_dz: Tensor) -> None:
        """Of a folded convolution; both branches have the same sum, and no two gradients may share memory."""
        self.note_norm(place, dgamma, sum_dz if place == self.chain else sum_dz.clone())

    def note_weight(self, place: int, dweight: MaybeTensor) -> None:
        if dweight is not None:
            weight = self.parameters[place].weight
            found = dweight.view_as(weight).to(weight.dtype)
            if weight.shape[2:] == (1, 1):
                # Eager's strides on channels_last input, also of dimensions of size 1: DDP compares them.
                inputs = weight.shape[1]
                found = found.contiguous().as_strided(weight.shape, (inputs, 1, inputs, inputs))
            self.grads[place] = (found, *self.grads[place][1:])

    def scaled(self, place: int, dtype: torch.dtype) -> Tensor:
        """The weight of a folded convolution times the scale of its batch norm, (N, K)."""
        weight, gamma, _ = self.parameters[place]
        return (weight.flatten(1) * scale(self.used[place].invstd, gamma)[:, None]).to(dtype)

    def fold_gradients(
        self, place: int, stage: Stage, fold: Fold, sum_dz: Tensor, product: Tensor
    ) -> FoldedGradients:
        """What is left of a folded convolution's backward; the gradients of its parameters are noted."""
        weight, gamma, _ = self.parameters[place]
        wide = weight.to(self.x.dtype).flatten(1).to(sum_dz.dtype)
        pixels = len(self.mask)
        found = folded_gradients(wide, gamma, self.used[place], fold, stage, sum_dz, product, pixels)
        self.note_weight(place, found.weight)
        self.note_fold_norm(place, found.gamma, sum_dz)
        return found

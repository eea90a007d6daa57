"""What makes the state after an error that of the last step of the optimizer again."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Unfinished:
    """The batches since the last step of the optimizer, which have changed the model's running statistics alone.

    Attributes:
        start: the step of the epoch that the first of them is; None where there are none.
        updating: whether the optimizer is at its step: after an error some weights would be new and others old.
    """

    def __init__(self) -> None:
        self.start: int | None = None
        self.updating = False
        self._saved: dict[torch.dtype, list[Tensor]] = {}

    def begin(self, model: nn.Module, step: int) -> None:
        """Copies the running statistics."""
        self.start = step
        for dtype, buffers in _buffers(model).items():
            if dtype not in self._saved:
                self._saved[dtype] = [buffer.clone() for buffer in buffers]
            else:
                torch._foreach_copy_(self._saved[dtype], buffers)  # one kernel on a GPU

    def end(self) -> None:
        """After the step of the optimizer."""
        self.start = None
        self.updating = False

    @torch.no_grad()
    def undo(self, model: nn.Module) -> None:
        """Copies the running statistics back."""
        for dtype, buffers in _buffers(model).items():
            torch._foreach_copy_(buffers, self._saved[dtype])
        self.start = None


def _buffers(model: nn.Module) -> dict[torch.dtype, list[Tensor]]:
    buffers: dict[torch.dtype, list[Tensor]] = {}
    for buffer in model.buffers():
        buffers.setdefault(buffer.dtype, []).append(buffer)
    return buffers

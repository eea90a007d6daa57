"""What autograd keeps for backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def saving(*known: Tensor) -> Iterator[dict[int, int]]:
    """Bytes of each storage that autograd saves, but those of ``known``, by address. Valid while the graph lives."""
    own = {x.untyped_storage().data_ptr() for x in known}
    found: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield found

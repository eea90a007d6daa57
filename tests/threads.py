"""Numbers of threads: how tests choose one, and how they hold that results don't depend on it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads while the context lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_independent_of_threads(run: Callable[[], Sequence[Tensor]]) -> None:
    """The same bits with 1, 2, 3 and 4 threads."""
    with threads(1):
        expected = run()
    for count in (2, 3, 4):
        with threads(count):
            assert_same_bits(run(), expected, f"with {count} threads")


def assert_same_bits(results: Sequence[Tensor], expected: Sequence[Tensor], where: str) -> None:
    pairs = enumerate(zip(results, expected, strict=True))
    differ = [index for index, pair in pairs if not torch.equal(*pair)]
    assert not differ, (
        f"{where}: {len(differ)} of {len(expected)} tensors differ, the first is number {differ[0]}"
    )

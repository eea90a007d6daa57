"""Which configurations of a kernel are worth a try for a problem, the most promising first.

The order is a model's: padding, waves of programs over the multiprocessors, and instructions: those that make a tile of
an operand are many beside the one that multiplies it, so that a tile should be multiplied with as much as registers
hold. It decides alone where nothing is measured; on a GPU ``tuning`` measures.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused.kernels.launch import Config, architecture, cdiv

#: Multiprocessors of an H100, for a device that cannot be asked; its rates weigh arithmetic against traffic.
MULTIPROCESSORS = 132
FLOPS, BANDWIDTH = 790e12, 3.0e12
#: Instructions that make and copy an element of an operand's tile, in elements of the other operand that tensor cores
#: multiply it with in that time: with arithmetic on the way, and without. Counted in what is compiled for sm_90.
MADE, COPIED = 192, 64


class Limits(NamedTuple):
    """What compiles without spills.

    Args:
        sizes: of a tile's sides.
        gemm, sums: elements that a thread holds at a time, float32 or two of 16 bits; with 4 warps at most the least.
        gemm_shared, sums_shared: bytes of a program.
    """

    sizes: tuple[int, ...]
    gemm: int
    gemm_shared: int
    sums: int
    sums_shared: int


#: On every architecture, and 16-bit operands where a warp group multiplies from shared memory.
EVERYWHERE = Limits((32, 64, 128), 112, 72 << 10, 112, 72 << 10)
HOPPER = Limits((32, 64, 128, 256), 150, 160 << 10, 191, 128 << 10)

_assumed = 90


@contextmanager
def assuming(arch: int) -> Iterator[None]:
    """Within, tensors that are on no GPU get configurations for an architecture (90 is sm_90, the default)."""
    global _assumed
    before, _assumed = _assumed, arch
    try:
        yield
    finally:
        _assumed = before


def _limits(x: Tensor) -> Limits:
    arch = architecture(x.device) if x.device.type == "cuda" else _assumed
    return HOPPER if arch == 90 and x.element_size() == 2 else EVERYWHERE


def tile(size: int, largest: int = 128) -> int:
    """A power of two of at least 16, as tensor cores ask for, that wastes little of ``size``."""
    return max(16, min(largest, 1 << (size - 1).bit_length()))


def multiprocessors(x: Tensor) -> int:
    if x.device.type != "cuda":
        return MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(x.device).multi_processor_count)


def gemm_configs(
    x: Tensor,
    m: int,
    n: int,
    k: int,
    *,
    taps: int = 1,
    loaded: int = 1,
    epilogue: int = 1,
    products: int = 1,
) -> list[Config]:
    """For a result of m x n with sums of k products at each of some taps.

    Args:
        loaded: tiles of block_m x block_k that an operand is made of.
        epilogue: tiles of block_m x block_n that live at the end beside other sums.
        products: results that live at a time.
    """
    processors, limits = multiprocessors(x), _limits(x)
    scored = []
    for block_m, block_n, warps in itertools.product(
        {tile(m, min(size, 128)) for size in limits.sizes[1:]},
        {tile(n, size) for size in limits.sizes},
        (4, 8),
    ):
        tiles = cdiv(m, block_m) * cdiv(n, block_n)
        slots = processors * (2 if warps == 4 else 1)
        waves = cdiv(tiles, slots) * slots
        cost = waves * block_m * block_n * (1 + COPIED / block_m + MADE * loaded / block_n)
        for block_k in {tile(k, row // x.element_size()) for row in (64, 128)}:  # bytes
            made = loaded * block_k * block_m
            if limits is HOPPER:
                held = products * block_m * block_n + max(made // 2, (epilogue - 1) * block_m * block_n)
            else:
                held = products * block_m * block_n + max(made, epilogue * block_m * block_n)
            stage = (loaded * block_m + block_n) * block_k * x.element_size()
            # No more than there are steps: what is not needed is another program's.
            stages = min(4, max(2, taps * cdiv(k, block_k)), limits.gemm_shared // stage)
            most = limits.gemm if warps == 8 else EVERYWHERE.gemm
            if held > most * 32 * warps or stages < 2:
                continue
            padded = cdiv(k, block_k) * block_k / k
            scored.append(
                (cost * padded * (1 + 4 / block_k), Config(block_m, block_n, block_k, warps, stages))
            )
    return _varied(scored, lambda config: (config.block_m, config.block_n, config.warps))


def sum_configs(
    x: Tensor, rows: int, n: int, k: int, *, taps: int = 1, loaded: int = 2, square: bool = False
) -> list[Config]:
    """For sums over ``rows`` pixels of n x k products, at each of some taps; block_m pixels at a time.

    Args:
        loaded: tiles of block_m x (block_n or block_k) that the operands are made of.
        square: block_n and block_k are one.
    """
    processors, limits = multiprocessors(x), _limits(x)
    scored = []
    for block_n, block_k, rows_at_once, fill in itertools.product(
        {tile(n, min(size, 128)) for size in limits.sizes},
        {tile(k, size) for size in limits.sizes},
        (32, 64),
        (1, 2, 4),
    ):
        block_m = tile(rows, rows_at_once)
        warps = 4 if block_n * block_k <= 64 * 64 else 8
        widest = max(block_n, block_k)
        made = loaded * block_m * widest
        # Of several taps the pixels' places are held too.
        places = block_m * widest if taps > 1 else 0
        held = block_n * block_k + ((made + places) // 2 if limits is HOPPER else made)
        stages = min(4, limits.sums_shared // (made * x.element_size()))
        if held > limits.sums * 32 * warps or stages < 2 or (square and block_n != block_k):
            continue
        tiles = cdiv(n, block_n) * cdiv(k, block_k) * taps
        splits = max(1, min(round(fill * processors / tiles), cdiv(rows, 8 * block_m)))
        padded = cdiv(n, block_n) * block_n * cdiv(k, block_k) * block_k * taps
        slots = 2 * processors if warps == 4 else processors
        idle = cdiv(tiles * splits, slots) * slots / (tiles * splits)
        # All but one of the tiles make the gradient, which is multiplied with block_k channels; that one with block_n.
        making = MADE * ((loaded - 1) / block_k + 1 / block_n)
        work = 2 * rows * padded * idle * (1 + making) * (1 + 4 / block_m)
        # What the splits have found is written and read again.
        parts = 0 if splits == 1 else 8 * splits * n * k * taps
        cost = work / FLOPS + parts / BANDWIDTH
        scored.append((cost, Config(block_m, block_n, block_k, warps, stages, splits)))
    found = _varied(scored, lambda config: (config.block_n, config.block_k, config.splits))
    return list(dict.fromkeys(found))


def _varied(scored: list[tuple[float, Config]], kind: Callable[[Config], object]) -> list[Config]:
    """The cheapest first, then rather another kind than nearly the same again: only the first few are measured."""
    seen: Counter[object] = Counter()
    ranked = []
    for cost, config in sorted(scored, key=lambda pair: (pair[0], str(pair[1]))):
        ranked.append((cost * (1 + seen[kind(config)] / 4), config))
        seen[kind(config)] += 1
    return [config for _, config in sorted(ranked, key=lambda pair: (pair[0], str(pair[1])))]

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
#: Registers and bytes of shared memory of a multiprocessor, and the most programs that share one.
REGISTERS, SHARED, MOST_PROGRAMS = 65536, 227 << 10, 4
#: What a program that shares its multiprocessor with none is held to cost: nothing runs while it loads its first tiles
#: and stores its last one.
ALONE = 1.15
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
def assume_architecture(arch: int) -> Iterator[None]:
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


def _programs(threads: int, registers: float, shared: int) -> int:
    """Programs that share a multiprocessor of an H100, by estimate; ``registers`` of a thread."""
    return max(1, min(MOST_PROGRAMS, int(REGISTERS // (threads * registers)), SHARED // (shared + 1024)))


class _Scored(NamedTuple):
    """A configuration, what it is held to cost, and the programs that share a multiprocessor."""

    cost: float
    programs: int
    config: Config


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
        threads, element = 32 * warps, x.element_size()
        for block_k, budget in itertools.product(
            {tile(k, row // element) for row in (64, 128)},  # bytes
            {limits.gemm_shared, min(limits.gemm_shared, SHARED // 2)},
        ):
            made = loaded * block_k * block_m
            if limits is HOPPER:
                held = products * block_m * block_n + max(made // 2, (epilogue - 1) * block_m * block_n)
            else:
                held = products * block_m * block_n + max(made, epilogue * block_m * block_n)
            stage = (loaded * block_m + block_n) * block_k * element
            # No more than there are steps: what is not needed is another program's.
            stages = min(4, max(2, taps * cdiv(k, block_k)), budget // stage)
            most = limits.gemm if warps == 8 else EVERYWHERE.gemm
            if held > most * threads or stages < 2:
                continue
            # Terms of channels are held beside what is made; the computed tile has a buffer of its own.
            values = products * block_m * block_n + made + (epilogue - 1) * block_m * block_n / 2
            registers = 60 + 40 * (loaded - 1) + values / threads
            programs = _programs(
                threads, registers, stages * stage + (1 - loaded) * block_m * block_k * element
            )
            if programs == 1 and budget < limits.gemm_shared:
                continue  # fewer stages let no other program in
            slots = processors * programs
            waves = cdiv(tiles, slots) * slots
            padded = cdiv(k, block_k) * block_k / k
            cost = waves * block_m * block_n * (1 + COPIED / block_m + MADE * loaded / block_n)
            cost *= padded * (1 + 4 / block_k)
            scored.append(_Scored(cost, programs, Config(block_m, block_n, block_k, warps, stages)))
    return _varied(scored, lambda config: (config.block_m, config.block_n, config.warps))


def sum_configs(
    x: Tensor,
    rows: int,
    n: int,
    k: int,
    *,
    taps: int = 1,
    loaded: int = 2,
    square: bool = False,
    largest: int = 256 * 256,
) -> list[Config]:
    """For sums over ``rows`` pixels of n x k products, at each of some taps; block_m pixels at a time.

    Args:
        loaded: tiles of block_m x (block_n or block_k) that the operands are made of.
        square: block_n and block_k are one.
        largest: block_n * block_k at most.
    """
    processors, limits = multiprocessors(x), _limits(x)
    scored = []
    for block_n, block_k, rows_at_once, fill, warps in itertools.product(
        {tile(n, min(size, 128)) for size in limits.sizes},
        {tile(k, size) for size in limits.sizes},
        (32, 64),
        (1, 2, 4),
        (4, 8),
    ):
        if block_n * block_k > largest or (warps == 8 and block_n * block_k <= 64 * 64):
            continue
        block_m, threads = tile(rows, rows_at_once), 32 * warps
        widest = max(block_n, block_k)
        made = loaded * block_m * widest
        # Of several taps the pixels' places are held too.
        places = block_m * widest if taps > 1 else 0
        held = block_n * block_k + ((made + places) // 2 if limits is HOPPER else made)
        stages = min(4, limits.sums_shared // (made * x.element_size()))
        most = limits.sums if warps == 8 or block_n * block_k <= 64 * 64 else EVERYWHERE.sums
        if held > most * threads or stages < 2 or (square and block_n != block_k):
            continue
        tiles = cdiv(n, block_n) * cdiv(k, block_k) * taps
        splits = max(1, min(round(fill * processors / tiles), cdiv(rows, 8 * block_m)))
        padded = cdiv(n, block_n) * block_n * cdiv(k, block_k) * block_k * taps
        registers = 60 + (block_n * block_k + made) / threads
        programs = _programs(threads, registers, stages * made * x.element_size())
        slots = programs * processors
        idle = cdiv(tiles * splits, slots) * slots / (tiles * splits)
        # All but one of the tiles make the gradient, which is multiplied with block_k channels; that one with block_n.
        making = MADE * ((loaded - 1) / block_k + 1 / block_n)
        work = 2 * rows * padded * idle * (1 + making) * (1 + 4 / block_m)
        # What the splits have found is written and read again.
        parts = 0 if splits == 1 else 8 * splits * n * k * taps
        cost = work / FLOPS + parts / BANDWIDTH
        scored.append(_Scored(cost, programs, Config(block_m, block_n, block_k, warps, stages, splits)))
    return _varied(scored, lambda config: (config.block_n, config.block_k, config.splits))


def _varied(scored: list[_Scored], kind: Callable[[Config], object]) -> list[Config]:
    """The cheapest first, then rather another kind than nearly the same again: only the first few are measured."""
    seen: Counter[object] = Counter()
    ranked = []
    for cost, programs, config in sorted(scored, key=_order):
        cost *= 1 if programs > 1 else ALONE
        ranked.append(_Scored(cost * (1 + seen[kind(config)] / 4), programs, config))
        seen[kind(config)] += 1
    ranked.sort(key=_order)
    # Which is faster, two programs beside each other or one of larger tiles, is for measuring to say: both are early.
    for place, alone in ((1, True), (2, False), (3, True), (4, False)):
        later = (i for i in range(place, len(ranked)) if (ranked[i].programs == 1) == alone)
        if sum((row.programs == 1) == alone for row in ranked[:place]) < 2 and (i := next(later, None)):
            ranked.insert(place, ranked.pop(i))
    return list(dict.fromkeys(row.config for row in ranked))


def _order(row: _Scored) -> tuple[float, str]:
    return row.cost, str(row.config)

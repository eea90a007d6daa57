"""Configurations of a kernel for a shape, those that a cost model expects to be fastest first.

The model counts padding, waves of programs over the multiprocessors, and instructions. The prologue, which computes a
tile of an operand, has many instructions where tensor cores have one, so a tile should be multiplied with as many
columns as registers hold. The model decides where nothing is measured; on a GPU autotune.search measures.
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

#: Of an H100: multiprocessors, assumed for tensors that are not on a GPU; FLOP/s and bytes/s, as measured.
MULTIPROCESSORS = 132
FLOPS, BANDWIDTH = 790e12, 3.0e12
#: Of an H100's multiprocessor: registers, bytes of shared memory, and the most programs that the model lets share it.
REGISTERS, SHARED_MEMORY, MAX_PROGRAMS = 65536, 227 << 10, 4
#: Cost factor of a program that has a multiprocessor to itself: nothing runs while it loads its first tiles and stores
#: its last one.
ALONE_COST = 1.15
#: Cost of loading an element of an operand's tile, with the arithmetic of a prologue and without, in elements of the
#: other operand that tensor cores multiply it with in that time. Counted in code compiled for sm_90.
PROLOGUE_COST, COPY_COST = 192, 64


class Limits(NamedTuple):
    """Limits within which kernels compile without spills.

    Args:
        sizes: lengths of a tile's sides.
        gemm, sums: live elements per thread, float32 or two of 16 bits, for programs of 8 warps; programs of 4 warps
            have the limit of ``ALL_ARCHITECTURES``.
        gemm_shared, sums_shared: bytes of shared memory of a program.
    """

    sizes: tuple[int, ...]
    gemm: int
    gemm_shared: int
    sums: int
    sums_shared: int


#: ``HOPPER``: of 16-bit operands on sm_90, where wgmma reads them from shared memory.
ALL_ARCHITECTURES = Limits((32, 64, 128), 112, 72 << 10, 112, 72 << 10)
HOPPER = Limits((32, 64, 128, 256), 150, 160 << 10, 191, 128 << 10)

_assumed = 90


@contextmanager
def assume_architecture(arch: int) -> Iterator[None]:
    """In this context tensors that are not on a GPU get configurations for ``arch`` (90, the default, is sm_90)."""
    global _assumed
    before, _assumed = _assumed, arch
    try:
        yield
    finally:
        _assumed = before


def _limits(x: Tensor) -> Limits:
    arch = architecture(x.device) if x.device.type == "cuda" else _assumed
    return HOPPER if arch == 90 and x.element_size() == 2 else ALL_ARCHITECTURES


def tile(size: int, largest: int = 128) -> int:
    """The next power of two of ``size``, from 16, the least of tensor cores, to ``largest``."""
    return max(16, min(largest, 1 << (size - 1).bit_length()))


def multiprocessors(x: Tensor) -> int:
    if x.device.type != "cuda":
        return MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(x.device).multi_processor_count)


def _programs(threads: int, registers: float, shared: int) -> int:
    """Programs that fit on a multiprocessor at the same time; ``registers`` per thread, ``shared`` bytes."""
    by_registers, by_shared = int(REGISTERS // (threads * registers)), SHARED_MEMORY // (shared + 1024)
    return max(1, min(MAX_PROGRAMS, by_registers, by_shared))


class _Scored(NamedTuple):
    """A configuration, its cost by the model, and how many of its programs share a multiprocessor."""

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
    gemms: int = 1,
) -> list[Config]:
    """Of a GEMM with a result of m x n and an inner dimension of k at each of ``taps`` kernel positions.

    Args:
        loaded: tiles of block_m x block_k that the prologue loads to compute one operand.
        epilogue: tiles of block_m x block_n that are live in the epilogue.
        gemms: results that are live at a time.
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
            {limits.gemm_shared, min(limits.gemm_shared, SHARED_MEMORY // 2)},
        ):
            prologue, result = loaded * block_k * block_m, block_m * block_n
            if limits is HOPPER:
                live = gemms * result + max(prologue // 2, (epilogue - 1) * result)
            else:
                live = gemms * result + max(prologue, epilogue * result)
            stage = (loaded * block_m + block_n) * block_k * element
            # No more than the loop has steps: shared memory that is not needed lets another program in.
            stages = min(4, max(2, taps * cdiv(k, block_k)), budget // stage)
            limit = limits.gemm if warps == 8 else ALL_ARCHITECTURES.gemm
            if live > limit * threads or stages < 2:
                continue
            # Per-channel coefficients take registers too; the computed tile has a shared buffer of its own.
            values = gemms * result + prologue + (epilogue - 1) * result / 2
            registers = 60 + 40 * (loaded - 1) + values / threads
            programs = _programs(
                threads, registers, stages * stage + (1 - loaded) * block_m * block_k * element
            )
            if programs == 1 and budget < limits.gemm_shared:
                continue  # fewer stages, and still no second program fits
            slots = processors * programs
            waves = cdiv(tiles, slots) * slots
            padded = cdiv(k, block_k) * block_k / k
            cost = waves * result * (1 + COPY_COST / block_m + PROLOGUE_COST * loaded / block_n)
            cost *= padded * (1 + 4 / block_k)
            scored.append(_Scored(cost, programs, Config(block_m, block_n, block_k, warps, stages)))
    return _diversified(scored, lambda config: (config.block_m, config.block_n, config.warps))


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
    """Of a GEMM with a result of n x k, summed over ``rows`` pixels, at each of ``taps`` kernel positions.

    Args:
        loaded: tiles of block_m x (block_n or block_k) that the prologues load.
        square: whether block_n and block_k have to be equal.
        largest: bound of block_n * block_k.
    """
    processors, limits = multiprocessors(x), _limits(x)
    scored = []
    for block_n, block_k, block_rows, fill, warps in itertools.product(
        {tile(n, min(size, 128)) for size in limits.sizes},
        {tile(k, size) for size in limits.sizes},
        (32, 64),
        (1, 2, 4),
        (4, 8),
    ):
        if block_n * block_k > largest or (warps == 8 and block_n * block_k <= 64 * 64):
            continue
        block_m, threads = tile(rows, block_rows), 32 * warps
        widest = max(block_n, block_k)
        prologue = loaded * block_m * widest
        # With several taps the pixels' offsets are live too.
        offsets = block_m * widest if taps > 1 else 0
        live = block_n * block_k + ((prologue + offsets) // 2 if limits is HOPPER else prologue)
        stages = min(4, limits.sums_shared // (prologue * x.element_size()))
        limit = limits.sums if warps == 8 or block_n * block_k <= 64 * 64 else ALL_ARCHITECTURES.sums
        if live > limit * threads or stages < 2 or (square and block_n != block_k):
            continue
        tiles = cdiv(n, block_n) * cdiv(k, block_k) * taps
        splits = max(1, min(round(fill * processors / tiles), cdiv(rows, 8 * block_m)))
        padded = cdiv(n, block_n) * block_n * cdiv(k, block_k) * block_k * taps
        registers = 60 + (block_n * block_k + prologue) / threads
        programs = _programs(threads, registers, stages * prologue * x.element_size())
        slots = programs * processors
        idle = cdiv(tiles * splits, slots) * slots / (tiles * splits)
        # All but one of the tiles are the gradient's, which is multiplied with block_k columns; that one with block_n.
        loading = PROLOGUE_COST * ((loaded - 1) / block_k + 1 / block_n)
        flops = 2 * rows * padded * idle * (1 + loading) * (1 + 4 / block_m)
        # Partial sums are written and read again.
        partial_bytes = 0 if splits == 1 else 8 * splits * n * k * taps
        cost = flops / FLOPS + partial_bytes / BANDWIDTH
        scored.append(_Scored(cost, programs, Config(block_m, block_n, block_k, warps, stages, splits)))
    return _diversified(scored, lambda config: (config.block_n, config.block_k, config.splits))


def _diversified(scored: list[_Scored], kind: Callable[[Config], object]) -> list[Config]:
    """The cheapest first, but each further one of a ``kind`` later: only the first few are measured."""
    counts: Counter[object] = Counter()
    ranked = []
    for cost, programs, config in sorted(scored, key=_order):
        cost *= 1 if programs > 1 else ALONE_COST
        ranked.append(_Scored(cost * (1 + counts[kind(config)] / 4), programs, config))
        counts[kind(config)] += 1
    ranked.sort(key=_order)
    # The model can't tell whether two programs per multiprocessor or one of larger tiles is faster: both are early.
    for index, alone in ((1, True), (2, False), (3, True), (4, False)):
        later = (i for i in range(index, len(ranked)) if (ranked[i].programs == 1) == alone)
        if sum((row.programs == 1) == alone for row in ranked[:index]) < 2 and (i := next(later, None)):
            ranked.insert(index, ranked.pop(i))
    return list(dict.fromkeys(row.config for row in ranked))


def _order(row: _Scored) -> tuple[float, str]:
    return row.cost, str(row.config)

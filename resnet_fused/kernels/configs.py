"""Which configurations of a kernel are worth a try for a problem, the most promising first.

The order is a model's: padding, waves of programs over the multiprocessors, and what a tile reads per multiplication.
It decides alone where nothing is measured; on a GPU ``tuning`` measures.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from resnet_fused.kernels.launch import Config, cdiv

#: Multiprocessors of an H100, for a device that cannot be asked; its rates weigh arithmetic against traffic.
MULTIPROCESSORS = 132
FLOPS, BANDWIDTH = 790e12, 3.0e12
#: Of shared memory for a program: one fits on every architecture, two or three on the larger ones.
SHARED_BYTES = 72 << 10
#: Elements of tiles that a thread holds at a time: what compiles without spills for every architecture.
_HELD = 112
_SIZES = (32, 64, 128)


def tile(size: int, largest: int = 128) -> int:
    """A power of two of at least 16, as tensor cores ask for, that wastes little of ``size``."""
    return max(16, min(largest, 1 << (size - 1).bit_length()))


def multiprocessors(x: Tensor) -> int:
    if x.device.type != "cuda":
        return MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(x.device).multi_processor_count)


def gemm_configs(x: Tensor, m: int, n: int, k: int, *, loaded: int = 1, epilogue: int = 1) -> list[Config]:
    """For a result of m x n with sums of k products.

    Args:
        loaded: tiles of block_m x block_k that an operand is made of.
        epilogue: tiles of block_m x block_n that live beside the sums at the end.
    """
    processors = multiprocessors(x)
    scored = []
    for block_m, block_n, warps in itertools.product(
        {tile(m, size) for size in _SIZES[1:]}, {tile(n, size) for size in _SIZES}, (4, 8)
    ):
        tiles = cdiv(m, block_m) * cdiv(n, block_n)
        slots = processors * (2 if warps == 4 else 1)
        waves = cdiv(tiles, slots) * slots
        cost = waves * block_m * block_n * (1 + 32 / block_m + 32 / block_n)
        for block_k in {tile(k, 64), tile(k, 32)}:
            held = block_m * (block_n + max(loaded * block_k, epilogue * block_n)) / (32 * warps)
            stage = (loaded * block_m + block_n) * block_k * x.element_size()
            stages = min(4, SHARED_BYTES // stage)
            if held > _HELD or stages < 2:
                continue
            padded = cdiv(k, block_k) * block_k / k
            scored.append(
                (cost * padded * (1 + 4 / block_k), Config(block_m, block_n, block_k, warps, stages))
            )
    return [config for _, config in sorted(scored, key=lambda pair: (pair[0], str(pair[1])))]


def sum_configs(
    x: Tensor, rows: int, n: int, k: int, *, taps: int = 1, loaded: int = 2, square: bool = False
) -> list[Config]:
    """For sums over ``rows`` pixels of n x k products, at each of some taps; block_m pixels at a time.

    Args:
        loaded: tiles of block_m x (block_n or block_k) that the operands are made of.
        square: block_n and block_k are one.
    """
    processors = multiprocessors(x)
    scored = []
    for block_n, block_k, rows_at_once, fill in itertools.product(
        {tile(n, size) for size in _SIZES}, {tile(k, size) for size in _SIZES}, (32, 64), (1, 2, 4)
    ):
        block_m = tile(rows, rows_at_once)
        warps = 4 if block_n * block_k <= 64 * 64 else 8
        widest = max(block_n, block_k)
        held = (block_n * block_k + loaded * block_m * widest) / (32 * warps)
        stages = min(4, SHARED_BYTES // (loaded * block_m * widest * x.element_size()))
        if held > _HELD or stages < 2 or (square and block_n != block_k):
            continue
        tiles = cdiv(n, block_n) * cdiv(k, block_k) * taps
        splits = max(1, min(round(fill * processors / tiles), cdiv(rows, 8 * block_m)))
        padded = cdiv(n, block_n) * block_n * cdiv(k, block_k) * block_k * taps
        slots = 2 * processors if warps == 4 else processors
        idle = cdiv(tiles * splits, slots) * slots / (tiles * splits)
        work = 2 * rows * padded * idle * (1 + 32 / block_n + 32 / block_k) * (1 + 4 / block_m)
        # What the splits have found is written and read again.
        parts = 0 if splits == 1 else 8 * splits * n * k * taps
        cost = work / FLOPS + parts / BANDWIDTH
        scored.append((cost, Config(block_m, block_n, block_k, warps, stages, splits)))
    found = [config for _, config in sorted(scored, key=lambda pair: (pair[0], str(pair[1])))]
    return list(dict.fromkeys(found))

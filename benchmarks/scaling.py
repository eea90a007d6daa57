"""Step time and memory over batch, image size, depth and ranks: ``python -m benchmarks.scaling FILE [--quick]``.

Training steps of resnet_fused beside eager channels_last, on a GPU where there is one. Times are interleaved in one
process, memory is measured in processes of their own, and losses and gradients are compared with float64 first.
``python -m benchmarks.scaling_page --write`` puts the latest file in benchmarks/results/scaling into docs/scaling.md.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.roofline import measure
from resnet_fused.cli.probe import probe
from resnet_fused.cli.steps import TrainingStep
from resnet_fused.measure import (
    EAGER,
    EXACT,
    OURS,
    Comparison,
    Provider,
    check_accuracy,
    device_name,
    header,
)

IMPLS = (OURS, EAGER)
#: What ranks share: nothing, gradients, or statistics (without DDP, which refuses SyncBatchNorm on a CPU).
ALONE, DDP, SYNC = "alone", "ddp", "syncbn"
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is measured. ``base`` is on all curves of one process; ``check`` gives batch and image size."""

    base: TrainingStep
    batches: tuple[int, ...]
    sizes: tuple[int, ...]
    archs: tuple[str, ...]
    ranks: tuple[int, ...]
    of_rank: TrainingStep
    check: tuple[int, int]
    rounds: int


def plan(device: torch.device, quick: bool) -> Plan:
    """On two cores within 8 minutes; ``quick`` in some seconds, to see that it works."""
    if quick:
        tiny = TrainingStep("resnet18", 4, 32, "fp32", str(device))
        return Plan(tiny, (4,), (32,), ("resnet18",), (1, 2), tiny, (4, 32), 2)
    archs, sizes = ("resnet18", "resnet34", "resnet50", "resnet101"), (96, 128, 160, 192, 224, 288)
    if device.type == "cuda":
        base = TrainingStep("resnet50", 128, 224, "bf16", str(device))
        ranks = tuple(2**i for i in range(torch.cuda.device_count().bit_length()))
        return Plan(base, (16, 32, 64, 128, 256, 512), sizes, archs, ranks, base, (16, 128), 20)
    base = TrainingStep("resnet50", 8, 160, "fp32", str(device))
    of_rank = replace(base, batch=4, image_size=128)
    ranks = tuple(ranks for ranks in (1, 2, 4) if ranks <= len(os.sched_getaffinity(0)))
    return Plan(base, (2, 4, 8, 16, 32), sizes, archs, ranks, of_rank, (8, 96), 7)


@cache
def verdicts(step: TrainingStep) -> dict[str, str]:
    """What is wrong with losses and gradient of each implementation beside float64, or nothing."""
    return check_accuracy(step.draw({impl: step.model(impl) for impl in (*IMPLS, EXACT)}), IMPLS, step.eps)


def point(step: TrainingStep, check: tuple[int, int], rounds: int) -> list[Row]:
    """A row for each implementation at one point, without its curve."""
    print(
        f"{step.arch}, batch {step.batch}, {step.image_size}x{step.image_size}", file=sys.stderr, flush=True
    )
    notes = verdicts(replace(step, batch=check[0], image_size=check[1]))
    providers = [
        Provider(
            impl,
            step.one_step(step.model(impl)),
            notes[impl],
            probe(step, impl, benchmark=True).get("peak_mb"),
        )
        for impl in IMPLS
    ]
    return rows_of(step, Comparison(step.case(), providers, torch.device(step.device)), rounds)


def rows_of(step: TrainingStep, comparison: Comparison, rounds: int, ranks: int = 1) -> list[Row]:
    """Times the steps; a row for each implementation."""
    for _ in range(2):  # DDP rebuilds its buckets after the first
        comparison.warm_up()
    for _ in comparison.rounds(rounds):
        pass
    rows = comparison.rows()
    for row in rows:
        row |= {"arch": step.arch, "image_size": step.image_size}
        row["images_per_s"] = row["median_ms"] and 1e3 * ranks * step.batch / row["median_ms"]
    return rows


class RanksComparison(Comparison):
    """Times of the slowest rank; all start together."""

    def _time(self, provider: Provider) -> float:
        dist.barrier()
        taken = torch.tensor([super()._time(provider)], device=self.device)
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        return taken.item()


def ranks_rows(step: TrainingStep, ranks: int, rounds: int, notes: dict[str, str]) -> list[Row]:
    """A row for each variant and implementation, of so many ranks at once."""
    print(f"{ranks} ranks of {step.arch}, batch {step.batch} each", file=sys.stderr, flush=True)
    gc.collect()
    if step.device != "cpu":
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory(prefix="resnet_fused_scaling_") as folder:
        mp.spawn(_rank, (ranks, step, rounds, notes, folder), nprocs=ranks)
        rows: list[Row] = json.loads(Path(folder, "rows.json").read_text())
    return rows


def _rank(rank: int, ranks: int, step: TrainingStep, rounds: int, notes: dict[str, str], folder: str) -> None:
    torch.set_num_threads(1)
    device = torch.device(step.device)
    if device.type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        step = replace(step, device=str(device))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    rows = []
    try:
        for variant in (ALONE, DDP, SYNC) if ranks > 1 else (ALONE,):
            # PyTorch's SyncBatchNorm needs a GPU.
            impls = IMPLS if variant != SYNC or device.type == "cuda" else (OURS,)
            providers = [
                Provider(impl, step.one_step(shared(step.model(impl), variant, device), rank), notes[impl])
                for impl in impls
            ]
            comparison = RanksComparison(step.case(), providers, device)
            rows += [{"variant": variant, **row} for row in rows_of(step, comparison, rounds, ranks)]
        if rank == 0:
            Path(folder, "rows.json").write_text(json.dumps(rows))
    finally:
        dist.destroy_process_group()
        gc.collect()  # DDP, which holds its group, is part of a cycle


def shared(model: nn.Module, variant: str, device: torch.device) -> nn.Module:
    """The model as a variant trains it."""
    if variant == SYNC:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if variant == DDP:
        ids = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(model, ids, process_group=dist.new_group())
    return model


def run(device: torch.device, quick: bool) -> dict[str, Any]:
    """All curves: what the JSON file holds."""
    begin = time.monotonic()
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    todo = plan(device, quick)
    ceilings = {todo.base.dtype: asdict(measure(todo.base.dtype, device))}
    at = cache(functools.partial(point, check=todo.check, rounds=todo.rounds))
    curves = [
        *(("batch", x, replace(todo.base, batch=x)) for x in todo.batches),
        *(("image_size", x, replace(todo.base, image_size=x)) for x in todo.sizes),
        *(("depth", int(x.removeprefix("resnet")), replace(todo.base, arch=x)) for x in todo.archs),
    ]
    rows = [
        {"curve": curve, "x": x, "variant": ALONE, **row} for curve, x, case in curves for row in at(case)
    ]
    notes = verdicts(replace(todo.of_rank, batch=todo.check[0], image_size=todo.check[1]))
    for ranks in todo.ranks:
        of_ranks = ranks_rows(todo.of_rank, ranks, todo.rounds, notes)
        rows += [{"curve": "ranks", "x": ranks, **row} for row in of_ranks]
    return {"header": header(device, time.monotonic() - begin, ceilings), "curves": rows}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("file", type=Path, help="the JSON file to write")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    options = parser.parse_args(arguments)
    if options.file.is_dir() or options.file.suffix != ".json":
        parser.error(f"{options.file}: name a file that ends in .json")
    if "RANK" in os.environ:
        parser.error("start it without torchrun: it starts its ranks itself")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{device_name(device)}, {torch.get_num_threads()} threads", file=sys.stderr)
    results = run(device, options.quick)
    options.file.parent.mkdir(parents=True, exist_ok=True)
    options.file.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

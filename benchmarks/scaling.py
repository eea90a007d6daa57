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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.apart import ProcessFailed, two_steps_apart
from benchmarks.roofline import measure
from resnet_fused.cli.learner import AUTOCAST
from resnet_fused.cli.steps import EAGER, OURS, Case, exactly, excuse, objection, outcome, relative_errors
from resnet_fused.cli.timing import device_name, header, milliseconds, quantile, quantiles

IMPLS = (OURS, EAGER)
#: What ranks share: nothing, gradients, or statistics (without DDP, which refuses SyncBatchNorm on a CPU).
ALONE, DDP, SYNC = "alone", "ddp", "syncbn"
DRAWS = 5  # batches of a check: in one small batch a single ReLU may decide the error
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is measured. ``base`` is on all curves of one process; ``check`` gives batch and image size."""

    base: Case
    batches: tuple[int, ...]
    sizes: tuple[int, ...]
    archs: tuple[str, ...]
    ranks: tuple[int, ...]
    of_rank: Case
    check: tuple[int, int]
    rounds: int


def plan(device: torch.device, quick: bool) -> Plan:
    """On two cores within 8 minutes; ``quick`` in some seconds, to see that it works."""
    if quick:
        tiny = Case("resnet18", 4, 32, "fp32", str(device))
        return Plan(tiny, (4,), (32,), ("resnet18",), (1, 2), tiny, (4, 32), 2)
    archs, sizes = ("resnet18", "resnet34", "resnet50", "resnet101"), (96, 128, 160, 192, 224, 288)
    if device.type == "cuda":
        base = Case("resnet50", 128, 224, "bf16", str(device))
        ranks = tuple(2**i for i in range(torch.cuda.device_count().bit_length()))
        return Plan(base, (16, 32, 64, 128, 256, 512), sizes, archs, ranks, base, (16, 128), 20)
    base = Case("resnet50", 8, 160, "fp32", str(device))
    of_rank = replace(base, batch=4, image_size=128)
    ranks = tuple(ranks for ranks in (1, 2, 4) if ranks <= len(os.sched_getaffinity(0)))
    return Plan(base, (2, 4, 8, 16, 32), sizes, archs, ranks, of_rank, (8, 96), 7)


# One process


def peak_mb(case: Case, impl: str) -> float | None:
    """The most memory of a training step in a fresh process, in 1e6 bytes; None where the GPU has not enough."""
    try:
        return two_steps_apart(case, impl, benchmark=True)[1]
    except ProcessFailed as failed:
        if "OutOfMemoryError" in str(failed):
            return None
        raise


@cache
def verdicts(case: Case) -> dict[str, str]:
    """What is wrong with losses and gradient of each implementation beside float64, or nothing."""
    errors: dict[str, list[tuple[float, float]]] = {impl: [] for impl in IMPLS}
    models = {impl: case.model(impl) for impl in IMPLS}
    in_float64 = exactly(case.model(EAGER))
    for draw in range(DRAWS):
        images, labels = case.data(draw)
        exact = outcome(case, in_float64, images.double(), labels)
        for impl, model in models.items():
            errors[impl].append(relative_errors(outcome(case, model, images, labels), exact))
    eps = torch.finfo(AUTOCAST.get(case.precision, torch.float32)).eps
    return {impl: objection(errors[impl], errors[EAGER], eps) for impl in IMPLS}


def point(case: Case, check: tuple[int, int], rounds: int) -> list[Row]:
    """A row for each implementation at one point, without its curve."""
    print(
        f"{case.arch}, batch {case.batch}, {case.image_size}x{case.image_size}", file=sys.stderr, flush=True
    )
    notes = dict(verdicts(replace(case, batch=check[0], image_size=check[1])))
    peaks = {impl: peak_mb(case, impl) for impl in IMPLS}
    steps: dict[str, Callable[[], None]] = {}
    for impl in IMPLS:
        step = functools.partial(case.step(case.model(impl)), *case.data(0))
        try:
            step()
        except torch.OutOfMemoryError as error:
            notes[impl] = excuse(impl, error)
        else:
            steps[impl] = step
    device = torch.device(case.device)
    times = interleaved(steps, rounds, lambda step: milliseconds(step, device))
    return rows_of(case, {impl: times.get(impl, []) for impl in IMPLS}, notes, peaks)


def interleaved(
    steps: dict[str, Callable[[], None]], rounds: int, time_of: Callable[[Callable[[], None]], float]
) -> dict[str, list[float]]:
    """Milliseconds of each step, which alternate in an order that is reversed from round to round."""
    times: dict[str, list[float]] = {key: [] for key in steps}
    for turn in range(rounds):
        for key in sorted(steps, reverse=bool(turn % 2)):
            times[key].append(time_of(steps[key]))
    return times


def rows_of(
    case: Case,
    times: dict[str, list[float]],
    notes: dict[str, str],
    peaks: dict[str, float | None],
    ranks: int = 1,
) -> list[Row]:
    """A row for each implementation. ``ratio``: over the rounds, its time / ours, where both were checked."""
    rows = []
    for impl, own in times.items():
        comparable = impl != OURS and not notes[impl] and not notes[OURS]
        ratios = sorted(x / ours for x, ours in zip(own, times[OURS], strict=False)) if comparable else []
        rows.append(
            {
                "impl": impl,
                **{"dtype": case.dtype, "arch": case.arch, "batch": case.batch},
                **{"image_size": case.image_size, "rounds": len(own)},
                **quantiles(sorted(own), "median_ms", "p20_ms", "p80_ms"),
                "peak_mb": peaks.get(impl),
                "images_per_s": ranks * case.batch / quantile(sorted(own), 0.5) * 1e3 if own else None,
                "checked": bool(own) and not notes[impl],
                **quantiles(ratios, "ratio", "ratio_p20", "ratio_p80"),
                "note": notes[impl],
            }
        )
    return rows


# Several processes


def ranks_times(case: Case, ranks: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of the slowest rank by variant and implementation, of so many ranks at once."""
    print(f"{ranks} ranks of {case.arch}, batch {case.batch} each", file=sys.stderr, flush=True)
    gc.collect()
    if case.device != "cpu":
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory(prefix="resnet_fused_scaling_") as folder:
        mp.spawn(_rank, (ranks, case, rounds, folder), nprocs=ranks)
        found: dict[str, dict[str, list[float]]] = json.loads(Path(folder, "times.json").read_text())
    return found


def _rank(rank: int, ranks: int, case: Case, rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    device = torch.device(case.device)
    if device.type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        case = replace(case, device=str(device))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    try:
        steps: dict[str, Callable[[], None]] = {}
        for impl in IMPLS:
            for variant in (ALONE, DDP, SYNC) if ranks > 1 else (ALONE,):
                if variant == SYNC and impl == EAGER and device.type == "cpu":
                    continue  # PyTorch's SyncBatchNorm needs a GPU
                model = case.model(impl)
                if variant == SYNC:
                    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
                elif variant == DDP:
                    ids = [device.index] if device.type == "cuda" else None
                    model = DistributedDataParallel(model, ids, process_group=dist.new_group())
                step = functools.partial(case.step(model), *case.data(rank))
                for _ in range(2):  # DDP rebuilds its buckets after the first
                    step()
                steps[f"{variant} {impl}"] = step
        times = interleaved(steps, rounds, lambda step: _slowest(step, device))
        if rank == 0:
            found: dict[str, dict[str, list[float]]] = {}
            for key, own in times.items():
                variant, impl = key.split()
                found.setdefault(variant, {})[impl] = own
            Path(folder, "times.json").write_text(json.dumps(found))
    finally:
        dist.destroy_process_group()
        gc.collect()  # DDP, which holds its group, is part of a cycle


def _slowest(step: Callable[[], None], device: torch.device) -> float:
    """Milliseconds of the slowest rank; all start together."""
    dist.barrier()
    taken = torch.tensor([milliseconds(step, device)], device=device)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return taken.item()


# The whole run


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
        for variant, times in ranks_times(todo.of_rank, ranks, todo.rounds).items():
            found = rows_of(todo.of_rank, times, notes, {}, ranks)
            rows += [{"curve": "ranks", "x": ranks, "variant": variant, **row} for row in found]
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
    found = run(device, options.quick)
    options.file.parent.mkdir(parents=True, exist_ok=True)
    options.file.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""How step time and memory grow: ``python -m benchmarks.scaling --json FILE [--quick]``, or ``--page``.

Training steps of resnet_fused beside eager channels_last, over batch, image size, depth and ranks, on a GPU where there
is one. Times are taken in turns in one process, memory in processes of their own; gradients are held to float64 first.
``--page`` puts what the latest file in benchmarks/results/scaling says, and the model, into docs/scaling.md.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import statistics
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
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.roofline import measure
from resnet_fused.cli.probe import probe
from resnet_fused.cli.steps import TrainingStep as Case
from resnet_fused.measure import (
    EAGER,
    EXACT,
    OURS,
    check_accuracy,
    device_name,
    failure,
    header,
    milliseconds,
    quantiles,
)

IMPLS = (OURS, EAGER)
#: What ranks do together: nothing, sum gradients, share statistics (without DDP, which refuses it on a CPU).
ALONE, DDP, SYNC = "alone", "ddp", "syncbn"
LARGE = 25 << 20  # bytes of a sum that shows bandwidth: a bucket of DDP
SMALL = 256  # bytes of one that shows latency


@dataclass(frozen=True)
class Plan:
    """What is measured. ``base`` is the point that all curves go through; ``check`` gives batch and image size."""

    base: Case
    batches: tuple[int, ...]
    sizes: tuple[int, ...]
    archs: tuple[str, ...]
    ranks: tuple[int, ...]
    of_rank: Case
    check: tuple[int, int]
    rounds: int


def plan(device: torch.device, quick: bool) -> Plan:
    """What is measured on a device: on two cores within 8 minutes; ``quick`` in some seconds, to see that it works."""
    if quick:
        tiny = Case("resnet18", 4, 32, "fp32", str(device))
        return Plan(tiny, (4,), (32,), ("resnet18",), (2,), tiny, (4, 32), 2)
    archs = ("resnet18", "resnet34", "resnet50", "resnet101")
    if device.type == "cuda":
        base = Case("resnet50", 128, 224, "bf16", str(device))
        ranks = tuple(2**i for i in range(torch.cuda.device_count().bit_length()))
        sizes = (96, 128, 160, 192, 224, 288)
        return Plan(base, (16, 32, 64, 128, 256, 512), sizes, archs, ranks, base, (16, 128), 20)
    base = Case("resnet50", 8, 160, "fp32", str(device))
    of_rank = replace(base, batch=4, image_size=128)
    sizes = (96, 128, 160, 192, 224, 288)
    return Plan(base, (2, 4, 8, 16, 32), sizes, archs, (1, 2, 4), of_rank, (8, 96), 7)


# One process.


def peak_mb(case: Case, impl: str) -> float | None:
    """The most memory of a training step in a fresh process, in 1e6 bytes; None where it has not enough."""
    peak: float | None = probe(case, impl, benchmark=True).get("peak_mb")
    return peak


@cache
def verdicts(case: Case) -> dict[str, str]:
    """What is wrong with losses and gradient of each implementation beside float64, or nothing."""
    return check_accuracy(case.draw({impl: case.model(impl) for impl in (*IMPLS, EXACT)}), IMPLS, case.eps)


def point(case: Case, check: tuple[int, int], rounds: int) -> list[dict[str, Any]]:
    """The two implementations at one point: a row of each, without its curve."""
    say(f"{case.arch}, batch {case.batch}, {case.image_size}x{case.image_size}, {case.dtype}")
    small = replace(case, batch=check[0], image_size=check[1])
    notes = dict(verdicts(small))
    peaks = {impl: peak_mb(case, impl) for impl in IMPLS}
    device, data = torch.device(case.device), case.data(0)
    steps: dict[str, Callable[[], None]] = {}
    times: dict[str, list[float]] = {impl: [] for impl in IMPLS}
    for impl in IMPLS:
        try:
            steps[impl] = functools.partial(case.train(case.model(impl)), *data)
            steps[impl]()
        except torch.OutOfMemoryError as error:
            steps.pop(impl, None)
            notes[impl] = failure(impl, error)
    for turn in range(rounds):
        for impl in sorted(steps, reverse=bool(turn % 2)):
            times[impl].append(milliseconds(steps[impl], device))
    return rows_of(case, times, notes, peaks)


def rows_of(
    case: Case,
    times: dict[str, list[float]],
    notes: dict[str, str],
    peaks: dict[str, float | None],
    ranks: int = 1,
) -> list[dict[str, Any]]:
    """A row for each implementation. ``ratio``: over the rounds, its time / ours, where both were checked."""
    rows = []
    for impl, own in times.items():
        comparable = impl != OURS and not notes[impl] and not notes[OURS]
        ratios = sorted(x / ours for x, ours in zip(own, times[OURS], strict=False)) if comparable else []
        rows.append(
            {
                **{"impl": impl, "dtype": case.dtype, "arch": case.arch, "batch": case.batch},
                **{"image_size": case.image_size, "rounds": len(own)},
                **quantiles(sorted(own), "median_ms", "p20_ms", "p80_ms"),
                "peak_mb": peaks[impl],
                "images_per_s": ranks * case.batch / statistics.median(own) * 1e3 if own else None,
                "checked": bool(own) and not notes[impl],
                **quantiles(ratios, "ratio", "ratio_p20", "ratio_p80"),
                "note": notes[impl],
            }
        )
    return rows


# Many processes.


def why_not(ranks: int, device: torch.device) -> str:
    """Why so many ranks are not measured here, or nothing: each wants a core, or a GPU, of its own."""
    here = torch.cuda.device_count() if device.type == "cuda" else len(os.sched_getaffinity(0))
    what = "GPU" if device.type == "cuda" else "core"
    if ranks <= here:
        return ""
    return f"not measured: {ranks} ranks need a {what} each, and there {'is' if here == 1 else 'are'} {here}"


def over_ranks(case: Case, ranks: int, rounds: int) -> dict[str, Any]:
    """What ``rank_work`` finds, for so many ranks at once."""
    say(f"{ranks} ranks of {case.arch}, batch {case.batch} each, {case.image_size}x{case.image_size}")
    gc.collect()
    if case.device != "cpu":
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory(prefix="resnet_fused_scaling_") as folder:
        mp.spawn(rank_work, (ranks, case, rounds, folder), nprocs=ranks)
        found: dict[str, Any] = json.loads(Path(folder, "found.json").read_text())
    return found


def rank_work(rank: int, ranks: int, case: Case, rounds: int, folder: str) -> None:
    """Trains beside the other ranks, without and with sums of gradients, and leaves what rank 0 has found."""
    torch.set_num_threads(1)
    device = torch.device(case.device)
    if device.type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        case = replace(case, device=str(device))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
    )
    try:
        found = trained(case, rank, ranks, rounds)
        found["collectives"] = collectives(device, ranks) if ranks > 1 else []
        if rank == 0:
            Path(folder, "found.json").write_text(json.dumps(found))
    finally:
        dist.destroy_process_group()
        gc.collect()  # DDP, which keeps its group, is part of a cycle


def trained(case: Case, rank: int, ranks: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of steps by variant and implementation, the slowest rank's; what is wrong; calls of collectives."""
    device, data = torch.device(case.device), case.data(rank)
    steps: dict[tuple[str, str], Callable[[], None]] = {}
    notes: dict[tuple[str, str], str] = {}
    calls: dict[str, int] = {}
    for impl in IMPLS:
        own: Tensor | None = None
        for variant in (ALONE, DDP, SYNC) if ranks > 1 else (ALONE,):
            if variant == SYNC and impl == EAGER and device.type == "cpu":
                notes[variant, impl] = "PyTorch's SyncBatchNorm runs on GPUs alone"
                continue
            model = case.model(impl)
            if variant == SYNC:
                model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
            if variant == DDP:
                ids = [device.index] if device.type == "cuda" else None
                model = DistributedDataParallel(model, device_ids=ids, process_group=dist.new_group())
            step = functools.partial(case.train(model), *data)
            counts = called(step)
            if variant == SYNC and impl == OURS:
                calls = counts
            if variant == ALONE:
                own = gradient(model)
            notes[variant, impl] = ""
            if variant == DDP:
                assert own is not None
                notes[variant, impl] = disagreement(gradient(model), own, max(1e-5, 4 * case.eps))
            elif variant == SYNC and not everywhere(
                torch.cat([b.double().flatten() for b in model.buffers()])
            ):
                notes[variant, impl] = "wrong: running statistics differ between ranks"
            steps[variant, impl] = step
    for again in steps.values():  # DDP lays its buckets anew after its first step
        again()
    times: dict[tuple[str, str], list[float]] = {key: [] for key in notes}
    for turn in range(rounds):
        for key in sorted(steps, reverse=bool(turn % 2)):
            times[key].append(slowest(steps[key], device))
    keyed = [{"variant": v, "impl": i, "times": times[v, i], "note": note} for (v, i), note in notes.items()]
    return {"steps": keyed, "calls": calls}


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def everywhere(values: Tensor) -> bool:
    """Whether all ranks have these values, to the bit."""
    most, least = values.clone(), values.clone()
    dist.all_reduce(most, dist.ReduceOp.MAX)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return torch.equal(most, least)


def disagreement(summed: Tensor, own: Tensor, most: float) -> str:
    """What is wrong with a gradient that was summed over the ranks, or nothing: it is the mean of what each had."""
    if not everywhere(summed):
        return "wrong: gradients differ between ranks"
    mean = own.clone()
    dist.all_reduce(mean)
    mean /= dist.get_world_size()
    error = ((summed - mean).norm() / mean.norm()).item()
    if not error <= most:
        return f"wrong: the gradient is not the mean over the ranks, relative error {error:.2g}"
    return ""


def called(run: Callable[[], None]) -> dict[str, int]:
    """Runs it, and counts the collectives that Python asks for; those of DDP itself are not among them."""
    original, count = dist.all_reduce, 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return original(*args, **kwargs)

    dist.all_reduce = counted
    try:
        run()
    finally:
        dist.all_reduce = original
    return {"all_reduce": count}


def slowest(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of the slowest rank; all start together."""
    dist.barrier()
    taken = torch.tensor([milliseconds(run, device)], device=device)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return taken.item()


def collectives(device: torch.device, ranks: int) -> list[dict[str, Any]]:
    """What sums take, of a few bytes and of a bucket of them."""
    rows = []
    for size, rounds in ((SMALL, 40), (LARGE, 8)):
        data = torch.ones(size // 4, device=device)
        once = functools.partial(dist.all_reduce, data)
        once()
        times = []
        for _ in range(rounds):
            data.fill_(1.0)  # sums of sums would overflow, which some processors are slow with
            times.append(slowest(once, device))
        found = quantiles(sorted(times), "median_ms", "p20_ms", "p80_ms")
        rows.append({"ranks": ranks, "op": "all_reduce", "bytes": size, **found})
    return rows


# The whole run.


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def run(device: torch.device, quick: bool) -> dict[str, Any]:
    """All curves: what the JSON file holds."""
    begin = time.monotonic()
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    todo = plan(device, quick)
    say(f"{device_name(device)}, {torch.get_num_threads()} threads")
    ceilings = {todo.base.dtype: asdict(measure(todo.base.dtype, device))}
    at = cache(functools.partial(point, check=todo.check, rounds=todo.rounds))
    base = todo.base
    curves = [
        *(("batch", x, replace(base, batch=x)) for x in todo.batches),
        *(("image_size", x, replace(base, image_size=x)) for x in todo.sizes),
        *(("depth", int(x.removeprefix("resnet")), replace(base, arch=x)) for x in todo.archs),
    ]
    rows = [
        {"curve": curve, "x": x, "variant": ALONE, **row} for curve, x, case in curves for row in at(case)
    ]
    of_ranks, sums, calls = ranks_curve(todo, device)
    head = header(device, time.monotonic() - begin, ceilings)
    return {"header": head, "curves": rows + of_ranks, "collectives": sums, "calls": calls}


def ranks_curve(
    todo: Plan, device: torch.device
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, int]]:
    """Rows of weak scaling, what collectives take, and how many of them SyncBatchNorm asks for in a step."""
    rows: list[dict[str, Any]] = []
    sums: list[dict[str, Any]] = []
    calls: dict[str, int] = {}
    case = todo.of_rank
    small = replace(case, batch=todo.check[0], image_size=todo.check[1])
    notes = verdicts(small)
    nothing: dict[str, float | None] = dict.fromkeys(IMPLS)
    wanted = todo.ranks if todo.ranks != (1,) else (1, 2)  # one GPU: the note says what is missing
    for ranks in wanted:
        found: dict[tuple[str, str], tuple[list[float], str]]
        if missing := why_not(ranks, device):
            found = {(v, i): ([], missing) for v in (ALONE, DDP, SYNC) for i in IMPLS}
        else:
            result = over_ranks(case, ranks, todo.rounds)
            found = {(s["variant"], s["impl"]): (s["times"], s["note"]) for s in result["steps"]}
            sums, calls = sums + result["collectives"], result["calls"] or calls
        for variant in dict.fromkeys(v for v, _ in found):
            times = {impl: found[variant, impl][0] for impl in IMPLS}
            wrong = {impl: notes[impl] or found[variant, impl][1] for impl in IMPLS}
            label = {"curve": "ranks", "x": ranks, "variant": variant}
            rows += [{**label, **row} for row in rows_of(case, times, wrong, nothing, ranks)]
    return rows, sums, calls


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--json", type=Path, help="measure, and write this file")
    what.add_argument("--page", action="store_true", help="write docs/scaling.md and its picture anew")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: to see that it works, not to measure"
    )
    options = parser.parse_args(arguments)
    if options.page:
        if options.quick:
            parser.error("--quick goes with --json: a page is not made from tiny sizes")
        from benchmarks.scaling_page import write

        return write()
    if options.json.is_dir() or options.json.suffix != ".json":
        parser.error(f"--json {options.json}: name a file that ends in .json")
    if "RANK" in os.environ:
        parser.error("start it without torchrun: it starts its ranks itself")
    found = run(torch.device("cuda" if torch.cuda.is_available() else "cpu"), options.quick)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    say(f"{options.json}, {found['header']['seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

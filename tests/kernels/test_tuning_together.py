"""Threads, processes and ranks of a job that choose at the same time. The GPU is invented."""

from __future__ import annotations

import json
import multiprocessing
import threading
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import resnet_fused
from resnet_fused.kernels.autotune import cache, search
from resnet_fused.kernels.autotune.search import Timing, TuningKey
from resnet_fused.kernels.launch import Config
from tests.kernels.invented_gpu import (
    CANDIDATES,
    CONV,
    DGRAD,
    FIRST,
    GPU,
    SECOND,
    VENDOR,
    Bench,
    pretend,
)


def write_some(process: int, folder: str, start: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        pretend(patch, Path(folder), {})
        start.wait()
        for i in range(25):
            cache.keep(
                GPU, TuningKey("conv", (process, i), "bf16"), (Timing(FIRST, 1.0 + i), Timing(None, 30.0))
            )


def test_processes_do_not_lose_each_others_entries(bench: Bench, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(4)
    writers = [context.Process(target=write_some, args=(i, str(tmp_path), start)) for i in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
        assert writer.exitcode == 0
    for process in range(4):
        for i in range(25):
            assert bench.choose(TuningKey("conv", (process, i), "bf16")) == FIRST
    assert not bench.measured


def test_threads_measure_one_after_another(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    running, most = 0, 0
    count = threading.Lock()

    def measure(run: Callable[[], Any], device: torch.device, repetitions: int = 1) -> float:
        nonlocal running, most
        with count:
            running += 1
            most = max(most, running)
        time.sleep(0.002)
        with count:
            running -= 1
        return bench.measure(run, device, repetitions)

    monkeypatch.setattr(search, "measure", measure)
    chosen = []
    threads = [
        threading.Thread(target=lambda problem=problem: chosen.append(bench.choose(problem)))
        for problem in [CONV, DGRAD] * 4
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert chosen == [SECOND] * 8
    assert most == 1
    assert bench.measured[FIRST] == 2 * (1 + search.ROUNDS), "a problem was measured twice"


# The ranks of a job

PROBLEMS = [TuningKey("conv", (i,), "bf16") for i in range(4)]


def numbered(config: Config | None) -> int | None:
    return None if config is None else CANDIDATES.index(config)


def agree(rank: int, bench: Bench, store: dist.Store) -> dict[str, Any]:
    """What each rank chooses alone first, then for all problems, then for one that the other never asks for."""
    bench.times = {config: float((i - rank) % 3) for i, config in enumerate(CANDIDATES)} | {VENDOR: 9.0}
    alone = numbered(bench.choose(PROBLEMS[0]))
    join(rank, store)
    bench.measured.clear()
    for problem in PROBLEMS[rank:] + PROBLEMS[:rank]:  # out of order: each answers some
        bench.choose(problem)
    repetitions = bench.measured.total()
    together = [numbered(bench.choose(problem)) for problem in PROBLEMS]
    assert bench.measured.total() == repetitions
    other = numbered(bench.choose(DGRAD)) if rank == 0 else None
    with resnet_fused.backend("triton"):
        # Each rank's own cache knows another answer for the first problem, and only one knows the last.
        search.clear_cache()
        cache.keep(GPU, PROBLEMS[0], (Timing(CANDIDATES[rank], 1.0),))
        bench.times = {}
        untuned = [numbered(bench.choose(problem)) for problem in [PROBLEMS[0], CONV]]
    return {"alone": alone, "together": together, "other": other, "untuned": untuned}


def fail(rank: int, bench: Bench, store: dist.Store) -> dict[str, Any]:
    """Rank 0 fails while rank 1 waits for it."""
    join(rank, store)
    bench.times = dict.fromkeys([*CANDIDATES, VENDOR], 1.0) | {SECOND: 0.1}

    def run(config: Config) -> Config:
        store.set("claimed", "")
        time.sleep(0.5)
        raise ValueError("a bug")

    raised, warned = "", []
    if rank == 0:
        try:
            bench.choose(run=run)
        except ValueError as error:
            raised = str(error)
    store.get("claimed")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chosen = numbered(bench.choose())
        again = numbered(bench.choose())
        warned = [str(warning.message) for warning in caught]
    later = numbered(bench.choose(DGRAD))
    return {"raised": raised, "chosen": [chosen, again], "warned": warned, "later": later}


def join(rank: int, store: dist.Store) -> None:
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)


def work(rank: int, part: Callable[..., dict[str, Any]], port: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    own = Path(folder, str(rank))
    own.mkdir()
    with resnet_fused.backend("auto"), pytest.MonkeyPatch.context() as patch:
        found = part(rank, pretend(patch, own, {}), store)
        (own / "found.json").write_text(json.dumps(found))
        dist.destroy_process_group()


def on_two_ranks(part: Callable[..., dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mp.spawn(work, (part, server.port, str(folder)), nprocs=2)
    return [json.loads((folder / str(rank) / "found.json").read_text()) for rank in range(2)]


def test_ranks_choose_the_same(tmp_path: Path) -> None:
    first, second = on_two_ranks(agree, tmp_path)
    assert (first["alone"], second["alone"]) == (0, 1), "the ranks must differ alone, or nothing is shown"
    assert first["together"] == second["together"]
    assert first["untuned"] == second["untuned"]
    assert first["other"] == 0


def test_a_rank_that_fails_leaves_no_other_waiting(tmp_path: Path) -> None:
    first, second = on_two_ranks(fail, tmp_path)
    assert first["raised"] == "a bug" and second["raised"] == ""
    for found in (first, second):
        assert found["chosen"] == [None, None], "a configuration that was never verified"
        assert found["later"] == 1
        assert len(found["warned"]) == 1 and "a bug" in found["warned"][0]

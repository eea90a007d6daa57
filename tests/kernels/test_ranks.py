"""Threads, processes and ranks of a job that autotune at the same time, on a simulated GPU."""

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
from resnet_fused.kernels.autotune import cache, measurement, search
from resnet_fused.kernels.autotune.tunable import Timing, TuningKey
from resnet_fused.kernels.launch import Config
from tests.kernels.simulated_gpu import (
    CONFIGS,
    CONV,
    DEVICE,
    DGRAD,
    FIRST,
    SECOND,
    VENDOR,
    SimulatedGPU,
    simulate,
)


def write_some(process: int, folder: str, start: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        simulate(patch, Path(folder), {})
        start.wait()
        for i in range(25):
            cache.store(
                DEVICE,
                TuningKey("conv_bn_stats", (process, i), "bf16"),
                (Timing(FIRST, 1.0 + i), Timing(None, 30.0)),
            )


def test_processes_store_at_the_same_time(sim: SimulatedGPU, tmp_path: Path) -> None:
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
            assert sim.choose(TuningKey("conv_bn_stats", (process, i), "bf16")) == FIRST
    assert not sim.measured


def test_threads_measure_one_at_a_time(sim: SimulatedGPU, monkeypatch: pytest.MonkeyPatch) -> None:
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
        return sim.measure(run, device, repetitions)

    monkeypatch.setattr(measurement, "measure", measure)
    chosen = []
    threads = [
        threading.Thread(target=lambda key=key: chosen.append(sim.choose(key))) for key in [CONV, DGRAD] * 4
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert chosen == [SECOND] * 8
    assert most == 1
    assert sim.measured[FIRST] == 2 * (1 + measurement.ROUNDS), "a key was measured twice"


# The ranks of a job

KEYS = [TuningKey("conv_bn_stats", (i,), "bf16") for i in range(4)]


def index_of(config: Config | None) -> int | None:
    return None if config is None else CONFIGS.index(config)


def agree(rank: int, sim: SimulatedGPU, store: dist.Store) -> dict[str, Any]:
    """What each rank chooses alone, then for all keys together, then for one that the other never asks for."""
    sim.times = {config: float((i - rank) % 3) for i, config in enumerate(CONFIGS)} | {VENDOR: 9.0}
    alone = index_of(sim.choose(KEYS[0]))
    join(rank, store)
    sim.measured.clear()
    for key in KEYS[rank:] + KEYS[:rank]:  # out of order: each answers some
        sim.choose(key)
    repetitions = sim.measured.total()
    together = [index_of(sim.choose(key)) for key in KEYS]
    assert sim.measured.total() == repetitions
    other = index_of(sim.choose(DGRAD)) if rank == 0 else None
    with resnet_fused.backend("triton"):
        # Each rank's cache has another answer for the first key, and only one rank's has the last key.
        search.forget_measurements()
        cache.store(DEVICE, KEYS[0], (Timing(CONFIGS[rank], 1.0),))
        sim.times = {}
        untuned = [index_of(sim.choose(key)) for key in [KEYS[0], CONV]]
    return {"alone": alone, "together": together, "other": other, "untuned": untuned}


def fail(rank: int, sim: SimulatedGPU, store: dist.Store) -> dict[str, Any]:
    """Rank 0 fails while rank 1 waits for it."""
    join(rank, store)
    sim.times = dict.fromkeys([*CONFIGS, VENDOR], 1.0) | {SECOND: 0.1}

    def run(config: Config) -> Config:
        store.set("claimed", "")
        time.sleep(0.5)
        raise ValueError("a bug")

    raised, warned = "", []
    if rank == 0:
        try:
            sim.choose(run=run)
        except ValueError as error:
            raised = str(error)
    store.get("claimed")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chosen = index_of(sim.choose())
        again = index_of(sim.choose())
        warned = [str(warning.message) for warning in caught]
    later = index_of(sim.choose(DGRAD))
    return {"raised": raised, "chosen": [chosen, again], "warned": warned, "later": later}


def join(rank: int, store: dist.Store) -> None:
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)


def run_rank(rank: int, part: Callable[..., dict[str, Any]], port: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    own = Path(folder, str(rank))
    own.mkdir()
    with resnet_fused.backend("auto"), pytest.MonkeyPatch.context() as patch:
        answers = part(rank, simulate(patch, own, {}), store)
        (own / "answers.json").write_text(json.dumps(answers))
        dist.destroy_process_group()


def on_two_ranks(part: Callable[..., dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mp.spawn(run_rank, (part, server.port, str(folder)), nprocs=2)
    return [json.loads((folder / str(rank) / "answers.json").read_text()) for rank in range(2)]


def test_ranks_choose_the_same(tmp_path: Path) -> None:
    first, second = on_two_ranks(agree, tmp_path)
    assert (first["alone"], second["alone"]) == (0, 1), (
        "the ranks must differ alone, or the test shows nothing"
    )
    assert first["together"] == second["together"]
    assert first["untuned"] == second["untuned"]
    assert first["other"] == 0


def test_no_rank_waits_for_one_that_failed(tmp_path: Path) -> None:
    first, second = on_two_ranks(fail, tmp_path)
    assert first["raised"] == "a bug" and second["raised"] == ""
    for answers in (first, second):
        assert answers["chosen"] == [None, None], "a configuration that was never verified"
        assert answers["later"] == 1
        assert len(answers["warned"]) == 1 and "a bug" in answers["warned"][0]

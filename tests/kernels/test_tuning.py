"""What is measured, remembered, written and agreed on. The GPU and its times are invented: no kernel runs."""

from __future__ import annotations

import ast
import contextlib
import json
import multiprocessing
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import triton
from triton.runtime.errors import OutOfResources

import resnet_fused
from resnet_fused.kernels import tuning, tuning_files
from resnet_fused.kernels.launch import Config
from resnet_fused.kernels.tuning import Problem, choose

GPU = torch.device("cuda", 0)
FIRST, SECOND, THIRD = CANDIDATES = [Config(64, 64, block_k) for block_k in (16, 32, 64)]
CONV, DGRAD = (Problem(kernel, (16, 56, 56, 64, 256), "bf16") for kernel in ("conv", "dgrad"))
VENDOR = "vendor"


class Bench:
    """Stands for a GPU that takes ``times`` milliseconds for a configuration or the vendor."""

    def __init__(self, times: dict[Any, float]) -> None:
        self.times = times
        self.measured: Counter[Any] = Counter()
        self.errors: dict[Config, Exception] = {}

    def run(self, config: Config) -> Config:
        if config in self.errors:
            raise self.errors[config]
        return config

    def measure(self, run: Callable[[], Any], device: torch.device, repetitions: int = 1) -> float:
        assert device == GPU and repetitions >= 1
        what = run()
        self.measured[what] += 1
        return self.times[what]

    def choose(self, problem: Problem = CONV, *, vendor: bool = True, **other: Any) -> Config | None:
        arguments = {"candidates": CANDIDATES, "run": self.run, "device": GPU} | other
        return choose(problem, vendor=(lambda: VENDOR) if vendor else None, **arguments)


def pretend(patch: pytest.MonkeyPatch, folder: Path, times: dict[Any, float]) -> Bench:
    """An H100 whose cache and shipped tables are in ``folder``."""
    bench = Bench(times)
    properties = SimpleNamespace(shared_memory_per_block_optin=227 << 10)
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    patch.setattr(tuning_files, "TUNED", folder)
    patch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    patch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    patch.setattr(tuning, "_measure", bench.measure)
    tuning.forget()
    return bench


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """SECOND is the fastest, and the vendor is between it and the others. Warnings are errors."""
    with resnet_fused.backend("auto"), warnings.catch_warnings():
        warnings.simplefilter("error")
        yield pretend(monkeypatch, tmp_path, {FIRST: 3.0, SECOND: 1.0, THIRD: 4.0, VENDOR: 2.0})
    tuning.forget()


def cache_file() -> Path:
    return tuning_files._cache_path(tuning_files.header(GPU))


@contextlib.contextmanager
def only_warning(*parts: str) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 1 and all(part in texts[0] for part in parts), texts


# What wins


def test_the_fastest_wins_and_is_measured_once(bench: Bench) -> None:
    assert bench.choose() == SECOND
    before = bench.measured.copy()
    assert set(before) == {*CANDIDATES, VENDOR}
    assert bench.choose() == SECOND
    assert bench.measured == before
    assert bench.choose(DGRAD) == SECOND
    assert bench.measured != before


def test_vendor_wins_when_it_is_faster_or_as_fast(bench: Bench) -> None:
    bench.times[VENDOR] = bench.times[SECOND]
    assert bench.choose() is None
    bench.times[VENDOR] = 1.01
    assert bench.choose(DGRAD) == SECOND


def test_without_a_vendor_a_configuration_wins(bench: Bench) -> None:
    bench.times[VENDOR] = 0.1
    assert bench.choose(vendor=False) == SECOND
    assert VENDOR not in bench.measured


def test_one_slow_round_decides_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = {FIRST: iter([0.1, 2, 2, 2]), SECOND: iter([50, 90, 1, 1]), THIRD: iter([9, 0.1, 3, 3])}
    order = []

    def measure(run: Callable[[], Any], device: torch.device, repetitions: int = 1) -> float:
        order.append(run())
        return next(rounds[order[-1]])

    monkeypatch.setattr(tuning, "_measure", measure)
    assert bench.choose(vendor=False) == SECOND
    assert order == CANDIDATES * 4, "rounds are not interleaved"


def test_repetitions_keep_to_the_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.times = {FIRST: 100.0, SECOND: 0.5, THIRD: 0.0}
    seen: dict[Any, set[int]] = {}

    def measure(run: Callable[[], Any], device: torch.device, repetitions: int = 1) -> float:
        seen.setdefault(run(), set()).add(repetitions)
        return bench.times[run()]

    monkeypatch.setattr(tuning, "_measure", measure)
    bench.choose(vendor=False)
    assert seen == {FIRST: {1}, SECOND: {1, 3}, THIRD: {1, tuning.MOST_REPETITIONS}}


def test_nothing_to_choose_from(bench: Bench) -> None:
    assert bench.choose(candidates=[]) is None
    with pytest.raises(ValueError, match="neither"):
        bench.choose(candidates=[], vendor=False)


# What is compiled


def test_what_exceeds_shared_memory_is_not_compiled(bench: Bench) -> None:
    fits, large = Config(128, 128, 64, stages=3), Config(256, 256, 64, stages=4)
    bench.errors[large] = AssertionError("was run")
    bench.times |= {fits: 1.0, large: 0.1}
    assert bench.choose(candidates=[large, fits]) == fits
    half = Problem("conv", (1,), "fp32")  # twice the bytes: now 192 KiB, and 4 stages are too many
    four = Config(128, 128, 64, stages=4)
    bench.errors[four] = AssertionError("was run")
    assert bench.choose(half, candidates=[four, fits]) == fits


def test_where_all_seem_too_large_the_smallest_is_tried(bench: Bench) -> None:
    larger, large = Config(512, 512, 64), Config(256, 512, 64)
    bench.times |= {larger: 0.1, large: 1.0}
    assert bench.choose(candidates=[larger, large]) == large
    assert set(bench.measured) == {large, VENDOR}


def test_at_most_eight_are_compiled(bench: Bench) -> None:
    many = [Config(16, 16, 16, splits=i + 1) for i in range(30)]
    bench.times |= {config: 9.0 - i / 10 for i, config in enumerate(many)}
    assert bench.choose(candidates=many, vendor=False) == many[7]


def test_a_slow_first_step_is_announced_once(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    tuning._announce.cache_clear()
    bench.choose(CONV)
    bench.choose(DGRAD)
    (record,) = caplog.records
    assert "choosing kernels for NVIDIA H100" in record.message and str(cache_file().parent) in record.message


def refusals() -> list[Exception]:
    return [OutOfResources(1, 0, "shared memory"), triton.CompilationError("x", ast.parse("x").body[0], "no")]


@pytest.mark.parametrize("error", refusals(), ids=lambda error: type(error).__name__)
def test_what_does_not_compile_is_left_out(bench: Bench, error: Exception) -> None:
    bench.errors[SECOND] = error
    assert bench.choose() is None
    assert SECOND not in bench.measured
    assert bench.choose(DGRAD, vendor=False) == FIRST


def test_where_nothing_compiles_it_says_so(bench: Bench) -> None:
    bench.errors = dict.fromkeys(CANDIDATES, refusals()[0])
    with only_warning("no configuration", "shared memory"):
        assert bench.choose() is None
    with only_warning("no configuration"):
        assert bench.choose(DGRAD, vendor=False) == FIRST


def test_any_other_error_gets_out(bench: Bench) -> None:
    bench.errors[SECOND] = ValueError("a bug")
    with pytest.raises(ValueError, match="a bug"):
        bench.choose()
    del bench.errors[SECOND]
    assert bench.choose() == SECOND


# What is not measured


@contextlib.contextmanager
def recording(patch: pytest.MonkeyPatch, where: str) -> Iterator[None]:
    module, name = {
        "capture": (torch.cuda, "is_current_stream_capturing"),
        "compile": (torch.compiler, "is_compiling"),
    }[where]
    with patch.context() as inner:
        inner.setattr(module, name, lambda: True)
        yield


@pytest.mark.parametrize("where", ["capture", "compile"])
def test_nothing_is_measured_while_recording(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    with recording(monkeypatch, where):
        assert bench.choose() == FIRST
    assert not bench.measured and all(ms is None for *_, ms in tuning.entries())
    assert bench.choose() == SECOND, "the default was remembered"
    before = bench.measured.copy()
    with recording(monkeypatch, where):
        assert bench.choose() == SECOND
        tuning.forget()
        assert bench.choose() == SECOND, "the cache was not read"
    assert bench.measured == before


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_nothing_is_measured_without_a_gpu(bench: Bench, device: str) -> None:
    assert bench.choose(device=torch.device(device)) == FIRST
    assert not bench.measured and not cache_file().exists()


def test_triton_is_never_the_vendor(bench: Bench) -> None:
    bench.times[VENDOR] = 0.5
    with resnet_fused.backend("triton"):
        assert bench.choose() == FIRST
        assert not bench.measured and all(ms is None for *_, ms in tuning.entries())
    assert bench.choose() is None
    measured = bench.measured.copy()
    with resnet_fused.backend("triton"):
        assert bench.choose() == SECOND, "memory"
        tuning.forget()
        assert bench.choose() == SECOND, "cache"
        assert bench.choose(DGRAD) == FIRST
        assert bench.choose(candidates=[]) is None
    assert bench.measured == measured


@pytest.mark.parametrize("choice", ["vendor", "reference"])
def test_vendor_is_always_the_vendor(bench: Bench, choice: str) -> None:
    with resnet_fused.backend(choice):
        assert bench.choose() is None
        assert bench.choose(vendor=False) == FIRST
    assert not bench.measured
    assert bench.choose() == SECOND
    with resnet_fused.backend(choice):
        assert bench.choose() is None
        assert bench.choose(vendor=False) == SECOND


# Files


def test_cache_outlives_the_process(bench: Bench) -> None:
    assert (bench.choose(), bench.choose(DGRAD, vendor=False)) == (SECOND, SECOND)
    tuning.forget()
    assert tuning.entries() == []
    bench.times = {}
    assert (bench.choose(), bench.choose(DGRAD, vendor=False)) == (SECOND, SECOND)
    assert tuning.entries() == [(CONV, SECOND, 1.0), (DGRAD, SECOND, 1.0)]


@pytest.mark.parametrize("field", ["torch", "triton", "resnet_fused", "source", "device", "capability"])
def test_cache_is_of_one_version_and_device(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    bench.choose()
    tuning.forget()
    before, real = cache_file(), tuning_files.header
    monkeypatch.setattr(tuning_files, "header", lambda device: real(device) | {field: "7.7"})
    assert cache_file() != before
    measured = bench.measured.total()
    bench.choose()
    assert bench.measured.total() == 2 * measured


def test_source_is_that_of_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = set()
    monkeypatch.setattr(tuning_files, "__file__", str(tmp_path / "tuning_files.py"))
    for text in ("a", "b"):
        (tmp_path / "conv.py").write_text(text)
        tuning_files._source_hash.cache_clear()
        hashes.add(tuning_files._source_hash())
    tuning_files._source_hash.cache_clear()
    assert len(hashes) == 2


def edited(change: Callable[[Any], Any]) -> Callable[[str], str]:
    def edit(text: str) -> str:
        content = json.loads(text)
        change(content)
        return json.dumps(content)

    return edit


def first_time(content: Any) -> Any:
    return content["entries"][0]["times"][0]


DAMAGE: dict[str, Callable[[str], str]] = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "binary": lambda text: "\udcff\udcfe",
    "deep": lambda text: "[" * 100_000,
    "list": lambda text: "[]",
    "no header": edited(lambda c: c.pop("header")),
    "foreign header": edited(lambda c: c["header"].update(torch="1.0")),
    "no entries": edited(lambda c: c.pop("entries")),
    "entries": edited(lambda c: c.update(entries={"a": 1})),
    "entry": edited(lambda c: c["entries"].append(3)),
    "field": edited(lambda c: c["entries"][0].pop("dtype")),
    "kernel": edited(lambda c: c["entries"][0].update(kernel=[1])),
    "sizes": edited(lambda c: c["entries"][0].update(sizes=[1.5])),
    "no times": edited(lambda c: c["entries"][0].update(times=[])),
    "time": edited(lambda c: first_time(c).update(ms="1")),
    "nan": edited(lambda c: first_time(c).update(ms=float("nan"))),
    "huge": edited(lambda c: first_time(c).update(ms=10**400)),
    "config": edited(lambda c: first_time(c).update(config="cudnn")),
    "config's fields": edited(lambda c: first_time(c)["config"].pop("warps")),
    "config's values": edited(lambda c: first_time(c)["config"].update(warps="4")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_cache_is_ignored(bench: Bench, damage: str) -> None:
    bench.choose()
    path = cache_file()
    path.write_text(DAMAGE[damage](path.read_text()), errors="surrogateescape")
    tuning.forget()
    bench.measured.clear()
    with only_warning(str(path), "delete"):
        assert bench.choose() == SECOND
        assert bench.choose(DGRAD) == SECOND
    assert bench.measured
    tuning.forget()
    bench.times = {}
    assert bench.choose() == SECOND, "the file was not made anew"


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_table_is_ignored(bench: Bench, tmp_path: Path, damage: str) -> None:
    bench.choose()
    path = tmp_path / "h100.json"
    tuning.write_table(path, GPU)
    if damage == "foreign header":
        path.write_text(path.read_text().replace("H100", "A100"))
    else:
        path.write_text(DAMAGE[damage](path.read_text()), errors="surrogateescape")
    cache_file().unlink()
    tuning.forget()
    bench.measured.clear()
    with only_warning(str(path), "delete"):
        assert bench.choose() == SECOND
    assert bench.measured


def test_cache_that_cannot_be_read_is_ignored(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise (
            PermissionError(13, "Permission denied", str(path)) if path == cache_file() else FileNotFoundError
        )

    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr(tuning_files, "_source_hash", lambda: "0")
    with only_warning(str(cache_file()), "Permission denied", "delete it"):
        assert bench.choose() == SECOND
        assert bench.choose(DGRAD) == SECOND


@pytest.mark.parametrize("source", ["cache", "table"])
def test_configuration_that_is_no_candidate_is_ignored(bench: Bench, tmp_path: Path, source: str) -> None:
    bench.choose()
    path = cache_file()
    if source == "table":
        path = tmp_path / "h100.json"
        tuning.write_table(path, GPU)
        cache_file().unlink()
    tuning.forget()
    with only_warning(str(path), "delete", str(SECOND)):
        assert bench.choose(candidates=[FIRST, THIRD]) is None


def test_folder_that_cannot_be_written(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with only_warning("not kept", "XDG_CACHE_HOME"):
        assert bench.choose() == SECOND
        assert bench.choose(DGRAD) == SECOND
    before = bench.measured.copy()
    assert bench.choose() == SECOND
    assert bench.measured == before


def test_nothing_is_left_beside_the_cache(bench: Bench) -> None:
    bench.choose()
    bench.choose(DGRAD)
    path = cache_file()
    assert set(path.parent.iterdir()) == {path, path.with_suffix(".lock")}


def test_table_goes_before_cache_and_keeps_the_losers(bench: Bench, tmp_path: Path) -> None:
    bench.choose()
    tuning.write_table(tmp_path / "h100.json", GPU)
    content = json.loads((tmp_path / "h100.json").read_text())
    (row,) = content["entries"]
    assert [time["ms"] for time in row.pop("times")] == [1.0, 2.0, 3.0, 4.0]
    assert row == {"kernel": "conv", "sizes": [16, 56, 56, 64, 256], "dtype": "bf16"}
    assert content["header"]["device"] == "NVIDIA H100 80GB HBM3"

    cache_file().unlink()
    tuning.forget()
    bench.times = {FIRST: 1.0, SECOND: 9.0, THIRD: 9.0, VENDOR: 9.0}
    assert bench.choose() == SECOND
    assert bench.choose(DGRAD) == FIRST
    tuning_files.keep(GPU, CONV, ((FIRST, 0.5),))
    tuning.forget()
    assert bench.choose() == SECOND


def test_shipped_tables_can_be_read(bench: Bench) -> None:
    shipped = sorted((Path(tuning_files.__file__).parent / "tuned").iterdir())
    assert "h100.json" in [path.name for path in shipped]
    for path in shipped:
        tuning_files._read(path, lambda header, path=path: tuning_files._slug(header["device"]) == path.stem)


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100"),
        ("NVIDIA H100NVL", "h100"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090"),
    ],
)
def test_slug(name: str, slug: str) -> None:
    assert tuning_files._slug(name) == slug


# Many at once


def write_some(process: int, folder: str, start: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        pretend(patch, Path(folder), {})
        start.wait()
        for i in range(25):
            tuning_files.keep(GPU, Problem("conv", (process, i), "bf16"), ((FIRST, 1.0 + i), (None, 30.0)))


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
            assert bench.choose(Problem("conv", (process, i), "bf16")) == FIRST
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

    monkeypatch.setattr(tuning, "_measure", measure)
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
    assert bench.measured[FIRST] == 2 * (1 + tuning.ROUNDS), "a problem was measured twice"


# The ranks of a job

PROBLEMS = [Problem("conv", (i,), "bf16") for i in range(4)]


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
        tuning.forget()
        tuning_files.keep(GPU, PROBLEMS[0], ((CANDIDATES[rank], 1.0),))
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
        assert found["chosen"] == [0, 0]
        assert found["later"] == 1
        assert len(found["warned"]) == 1 and "a bug" in found["warned"][0]

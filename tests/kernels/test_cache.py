"""Measurements as files: the cache on disk, and the tables that the package ships. The GPU is simulated."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resnet_fused.kernels.autotune import cache, search
from resnet_fused.kernels.autotune.tunable import Timing
from tests.kernels.simulated_gpu import (
    CONV,
    DEVICE,
    DGRAD,
    FIRST,
    SECOND,
    THIRD,
    VENDOR,
    SimulatedGPU,
    cache_file,
    forget_all,
    only_warning,
)


def test_cache_outlives_the_process(sim: SimulatedGPU) -> None:
    assert (sim.choose(), sim.choose(DGRAD)) == (SECOND, SECOND)
    search.forget_measurements()
    assert search.entries() == []
    sim.times = {}
    assert (sim.choose(), sim.choose(DGRAD)) == (SECOND, SECOND)
    assert search.entries() == [(CONV, SECOND, 1.0), (DGRAD, SECOND, 1.0)]


@pytest.mark.parametrize("field", ["torch", "triton", "resnet_fused", "source", "device", "capability"])
def test_cache_is_of_one_version_and_device(
    sim: SimulatedGPU, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    sim.choose()
    search.forget_measurements()
    before, real = cache_file(), cache.header
    monkeypatch.setattr(cache, "header", lambda device: real(device) | {field: "7.7"})
    assert cache_file() != before
    measured = sim.measured.total()
    sim.choose()
    assert sim.measured.total() == 2 * measured


def test_source_is_that_of_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all their files, those of the autotuner included."""
    assert {"dgrad.py", "autotune/search.py"} <= {
        str(path.relative_to(cache.KERNELS)) for path in cache.KERNELS.rglob("*.py")
    }
    monkeypatch.setattr(cache, "KERNELS", tmp_path)
    (tmp_path / "autotune").mkdir()
    hashes = set()
    for name, text in (("conv.py", "a"), ("conv.py", "b"), ("autotune/search.py", "a"), ("new.py", "")):
        (tmp_path / name).write_text(text)
        cache._source_hash.cache_clear()
        hashes.add(cache._source_hash())
    cache._source_hash.cache_clear()
    assert len(hashes) == 4


FRESH = CONV._replace(kernel="conv_wgrad")
#: Before a test replaces it.
SHIPPED_TABLES = cache.SHIPPED_TABLES


def edited(change: Callable[[Any], Any]) -> Callable[[str], str]:
    def edit(text: str) -> str:
        content = json.loads(text)
        change(content)
        return json.dumps(content)

    return edit


DAMAGE: dict[str, Callable[[str], str]] = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "binary": lambda text: "\udcff\udcfe",
    "deep": lambda text: "[" * 100_000,
    "list": lambda text: "[]",
    "no header": edited(lambda c: c.pop("header")),
    "foreign header": edited(lambda c: c["header"].update(torch="1.0")),
    "entries": edited(lambda c: c.update(entries={"a": 1})),
    "field": edited(lambda c: c["entries"][0].pop("dtype")),
    "kernel": edited(lambda c: c["entries"][0].update(kernel=[1])),
    "no time": edited(lambda c: c["entries"][0]["timings"][0].pop("ms")),
    "time": edited(lambda c: c["entries"][0]["timings"][0].update(ms="1")),
    "config": edited(lambda c: c["entries"][0]["timings"][0].update(config="cudnn")),
    "config's fields": edited(lambda c: c["entries"][0]["timings"][0]["config"].update(threads=4)),
}


@pytest.mark.parametrize("source", ["cache", "table"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_ignored(sim: SimulatedGPU, tmp_path: Path, damage: str, source: str) -> None:
    sim.choose()
    path = write_source(source, tmp_path)
    if (damage, source) == ("foreign header", "table"):  # which fits any version of torch
        path.write_text(path.read_text().replace("H100", "A100"))
    else:
        path.write_text(DAMAGE[damage](path.read_text()), errors="surrogateescape")
    sim.measured.clear()
    with only_warning(str(path), "delete"):
        assert sim.choose() == SECOND
        assert sim.choose(DGRAD) == SECOND
    assert sim.measured
    search.forget_measurements()
    sim.times = {}
    with contextlib.nullcontext() if source == "cache" else only_warning(str(path)):
        assert sim.choose() == SECOND, "the cache was not written again"


def write_source(source: str, tmp_path: Path) -> Path:
    """Where measurements are read from next: the cache, or a table alone."""
    path = cache_file()
    if source == "table":
        path = tmp_path / "h100.json"
        search.write_table(path, DEVICE)
        cache_file().unlink()
    search.forget_measurements()
    return path


def test_cache_that_cannot_be_read_is_ignored(sim: SimulatedGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    sim.choose()
    search.forget_measurements()
    measured, real = sim.measured.total(), os.open

    def refuse(path: str, flags: int, mode: int = 0o777) -> int:
        if str(path) == str(cache_file()):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, flags, mode)

    monkeypatch.setattr(cache.os, "open", refuse)
    with only_warning(str(cache_file()), "Permission denied", "delete it"):
        assert sim.choose() == SECOND
        assert sim.choose(DGRAD) == SECOND
    assert sim.measured.total() == 3 * measured


@pytest.mark.parametrize("name", ["cache", "lock"])
def test_fifo_in_the_cache(sim: SimulatedGPU, name: str) -> None:
    """A FIFO in the place of the tuning cache, or of its lock."""
    path = cache_file() if name == "cache" else cache_file().with_suffix(".lock")
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    with only_warning(*(["is no regular file", "delete"] if name == "cache" else ["are not stored"])):
        assert sim.choose() == SECOND
        assert sim.choose(DGRAD) == SECOND
    search.forget_measurements()
    sim.times = {}
    if name == "cache":
        assert sim.choose() == SECOND, "the cache was not written again"


def test_locked_cache(sim: SimulatedGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tuning cache while a process that was stopped holds its lock: one wait, one warning, then as ever."""
    monkeypatch.setattr(cache, "LOCK_SECONDS", 0.5)
    path = cache_file()
    path.parent.mkdir(parents=True)
    with open(path.with_suffix(".lock"), "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        began = time.monotonic()
        with only_warning("not stored", "another process holds", ".lock"):
            assert sim.choose() == SECOND
            assert time.monotonic() - began > 0.5
            began = time.monotonic()
            assert sim.choose(DGRAD) == SECOND
            assert time.monotonic() - began < 0.5
    assert not path.exists()
    sim.choose(FRESH)
    assert path.exists()


def test_lock_that_is_soon_released(sim: SimulatedGPU) -> None:
    """The tuning cache while another process stores to it."""
    path = cache_file()
    path.parent.mkdir(parents=True)
    with open(path.with_suffix(".lock"), "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        release = threading.Timer(0.2, fcntl.flock, (held, fcntl.LOCK_UN))
        release.start()
        assert sim.choose() == SECOND
        release.join()
    assert path.exists()


def test_temporary_file_of_a_process_that_was_killed(sim: SimulatedGPU) -> None:
    """A kill while the tuning cache is written: the next process removes what is left, and other caches' files stay."""
    path = cache_file()
    path.parent.mkdir(parents=True)
    left, other = path.with_name(f".{path.name}.1.tmp"), path.with_name(".another.json.1.tmp")
    left.touch()
    other.touch()
    sim.choose()
    assert set(path.parent.iterdir()) == {path, path.with_suffix(".lock"), other}


def test_full_disk_leaves_no_temporary_file(sim: SimulatedGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full while the tuning cache is written."""

    def fill(path: Path, text: str) -> None:
        path.touch()
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", fill)
    with only_warning("not stored", "No space left"):
        assert sim.choose() == SECOND
    assert [*cache_file().parent.iterdir()] == [cache_file().with_suffix(".lock")]


@pytest.mark.parametrize("source", ["cache", "table"])
def test_outdated_configurations_are_ignored(sim: SimulatedGPU, tmp_path: Path, source: str) -> None:
    sim.choose()
    path = write_source(source, tmp_path)
    with only_warning(str(path), "delete", str(SECOND)):
        assert sim.choose(configs=[FIRST, THIRD]) is None


def test_folder_that_cannot_be_written(
    sim: SimulatedGPU, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with only_warning("not stored", "XDG_CACHE_HOME"):
        assert sim.choose() == SECOND
        assert sim.choose(DGRAD) == SECOND
    before = sim.measured.copy()
    assert sim.choose() == SECOND
    assert sim.measured == before


def test_no_temporary_file_is_left(sim: SimulatedGPU) -> None:
    sim.choose()
    sim.choose(DGRAD)
    path = cache_file()
    assert set(path.parent.iterdir()) == {path, path.with_suffix(".lock")}


def test_a_table_has_all_timings_and_precedes_the_cache(sim: SimulatedGPU, tmp_path: Path) -> None:
    sim.choose()
    search.write_table(tmp_path / "h100.json", DEVICE)
    content = json.loads((tmp_path / "h100.json").read_text())
    (row,) = content["entries"]
    assert [timing["ms"] for timing in row.pop("timings")] == [1.0, 2.0, 3.0, 4.0]
    assert row == {"kernel": "conv_bn_stats", "sizes": [16, 56, 56, 64, 256], "dtype": "bf16"}
    assert content["header"]["device"] == "NVIDIA H100 80GB HBM3"

    forget_all()
    sim.times = {FIRST: 1.0, SECOND: 9.0, THIRD: 9.0, VENDOR: 9.0}
    assert sim.choose() == SECOND
    assert sim.choose(DGRAD) == FIRST
    cache.store(DEVICE, CONV, (Timing(FIRST, 0.5),))
    search.forget_measurements()
    assert sim.choose() == SECOND


def test_shipped_tables_can_be_read(sim: SimulatedGPU) -> None:
    shipped = sorted(SHIPPED_TABLES.iterdir())
    assert "h100.json" in [path.name for path in shipped]
    for path in shipped:
        cache.read_table(path, lambda header, path=path: cache._model(header["device"]) == path.stem)


@pytest.mark.parametrize(
    ("name", "model"),
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
def test_model_of_a_device(name: str, model: str) -> None:
    assert cache._model(name) == model

"""What is measured as files: a cache of many processes, and tables that are shipped. The GPU is invented."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resnet_fused.kernels.autotune import cache, search
from resnet_fused.kernels.autotune.search import Timing
from tests.kernels.invented_gpu import (
    CONV,
    DGRAD,
    FIRST,
    GPU,
    SECOND,
    THIRD,
    VENDOR,
    Bench,
    cache_file,
    only_warning,
)


def test_cache_outlives_the_process(bench: Bench) -> None:
    assert (bench.choose(), bench.choose(DGRAD, vendor=False)) == (SECOND, SECOND)
    search.clear_cache()
    assert search.entries() == []
    bench.times = {}
    assert (bench.choose(), bench.choose(DGRAD, vendor=False)) == (SECOND, SECOND)
    assert search.entries() == [(CONV, SECOND, 1.0), (DGRAD, SECOND, 1.0)]


@pytest.mark.parametrize("field", ["torch", "triton", "resnet_fused", "source", "device", "capability"])
def test_cache_is_of_one_version_and_device(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    bench.choose()
    search.clear_cache()
    before, real = cache_file(), cache.header
    monkeypatch.setattr(cache, "header", lambda device: real(device) | {field: "7.7"})
    assert cache_file() != before
    measured = bench.measured.total()
    bench.choose()
    assert bench.measured.total() == 2 * measured


def test_source_is_that_of_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = set()
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "tuning_files.py"))
    for text in ("a", "b"):
        (tmp_path / "conv.py").write_text(text)
        cache._source_hash.cache_clear()
        hashes.add(cache._source_hash())
    cache._source_hash.cache_clear()
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
    "refused vendor": edited(
        lambda c: c["entries"][0]["times"].append({"config": "vendor", "refused": "wrong"})
    ),
    "refused for nothing": edited(lambda c: first_time(c).update(refused=1) or first_time(c).pop("ms")),
    "refused and timed": edited(lambda c: first_time(c).update(refused="wrong: by far")),
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
    search.clear_cache()
    bench.measured.clear()
    with only_warning(str(path), "delete"):
        assert bench.choose() == SECOND
        assert bench.choose(DGRAD) == SECOND
    assert bench.measured
    search.clear_cache()
    bench.times = {}
    assert bench.choose() == SECOND, "the file was not made anew"


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_table_is_ignored(bench: Bench, tmp_path: Path, damage: str) -> None:
    bench.choose()
    path = tmp_path / "h100.json"
    search.write_table(path, GPU)
    if damage == "foreign header":
        path.write_text(path.read_text().replace("H100", "A100"))
    else:
        path.write_text(DAMAGE[damage](path.read_text()), errors="surrogateescape")
    cache_file().unlink()
    search.clear_cache()
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
    monkeypatch.setattr(cache, "_source_hash", lambda: "0")
    with only_warning(str(cache_file()), "Permission denied", "delete it"):
        assert bench.choose() == SECOND
        assert bench.choose(DGRAD) == SECOND


@pytest.mark.parametrize("source", ["cache", "table"])
def test_configuration_that_is_no_candidate_is_ignored(bench: Bench, tmp_path: Path, source: str) -> None:
    bench.choose()
    path = cache_file()
    if source == "table":
        path = tmp_path / "h100.json"
        search.write_table(path, GPU)
        cache_file().unlink()
    search.clear_cache()
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
    search.write_table(tmp_path / "h100.json", GPU)
    content = json.loads((tmp_path / "h100.json").read_text())
    (row,) = content["entries"]
    assert [time["ms"] for time in row.pop("times")] == [1.0, 2.0, 3.0, 4.0]
    assert row == {"kernel": "conv", "sizes": [16, 56, 56, 64, 256], "dtype": "bf16"}
    assert content["header"]["device"] == "NVIDIA H100 80GB HBM3"

    cache_file().unlink()
    search.clear_cache()
    bench.times = {FIRST: 1.0, SECOND: 9.0, THIRD: 9.0, VENDOR: 9.0}
    assert bench.choose() == SECOND
    assert bench.choose(DGRAD) == FIRST
    cache.keep(GPU, CONV, (Timing(FIRST, 0.5),))
    search.clear_cache()
    assert bench.choose() == SECOND


def test_shipped_tables_can_be_read(bench: Bench) -> None:
    shipped = sorted((Path(cache.__file__).parent / "tuned").iterdir())
    assert "h100.json" in [path.name for path in shipped]
    for path in shipped:
        cache._read(path, lambda header, path=path: cache._slug(header["device"]) == path.stem)


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
    assert cache._slug(name) == slug

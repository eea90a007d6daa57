"""Scaling: the model's formulas, a small measured run, and docs/scaling.md, which shows both."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import scaling, scaling_page
from benchmarks.page import with_tables
from benchmarks.roofline import limit
from benchmarks.roofline_model import network, step
from benchmarks.scaling_model import (
    GPUS,
    Bucket,
    Cluster,
    Training,
    exposed,
    largest_of,
    main,
    predict,
    schedule,
    sync_seconds,
)

SIMPLE = Cluster(node_bandwidth=1e9, bandwidth_share=1.0, node_latency=1e-6, launch=0.0)


# The formulas.


@pytest.mark.parametrize("gpus", [2, 4, 8])
def test_a_ring_moves_its_share_of_the_bytes(gpus: int) -> None:
    hops = 2 * (gpus - 1)
    assert math.isclose(SIMPLE.ring(1e6, gpus), hops * 1e-6 + 2 * (gpus - 1) / gpus * 1e-3)


def test_between_nodes_every_gpu_has_a_port() -> None:
    """16 GPUs in two nodes: the ring leaves a node over eight ports, the tree carries an eighth over each."""
    cluster = replace(SIMPLE, network_bandwidth=1e7, node_latency=0.0, network_latency=0.0)
    assert math.isclose(cluster.ring(1e6, 16), 2 * 15 / 16 * 1e6 / 8e7)
    assert math.isclose(cluster.hierarchy(1e6, 16), 2 * 7 / 8 * 1e-3 + 1e6 / 8 / 1e7)
    assert cluster.all_reduce(1e6, 16) == min(cluster.ring(1e6, 16), cluster.hierarchy(1e6, 16))


def test_few_bytes_go_through_a_tree() -> None:
    """Latency grows with the logarithm of the nodes."""
    cluster = replace(SIMPLE, node_latency=0.0, network_latency=1e-6)
    sums = [cluster.all_reduce(0.0, 8 * nodes) for nodes in (2, 4, 8, 16)]
    assert sums == pytest.approx([2e-6, 4e-6, 6e-6, 8e-6])


@pytest.mark.parametrize("gpus", GPUS)
def test_more_bytes_are_never_faster(gpus: int) -> None:
    times = [Cluster().all_reduce(size, gpus) for size in (0, 1, 1e3, 1e6, 1e8)]
    assert times == sorted(times)
    assert (times[0] == times[-1]) == (gpus == 1)


def test_measured_links_give_back_what_was_measured() -> None:
    cluster = Cluster.measured(4, small=3e-4, large=3e-2, size=1e7)
    assert math.isclose(cluster.all_reduce(0.0, 4), 3e-4)
    assert math.isclose(cluster.all_reduce(1e7, 4), 3e-2)
    with pytest.raises(ValueError, match="must take longer"):
        Cluster.measured(4, small=3e-2, large=3e-2, size=1e7)


def test_what_is_exposed() -> None:
    """One sum after the other, each when its bucket is ready; backward ends at 10."""
    buckets = [Bucket(1.0, 0), Bucket(4.0, 0), Bucket(10.0, 0)]
    assert exposed(buckets, [1.0, 1.0, 0.5], 10.0) == 0.5
    assert exposed(buckets, [1.0, 7.0, 0.5], 10.0) == 1.5
    assert exposed(buckets, [5.0, 5.0, 0.5], 10.0) == 1.5
    assert exposed(buckets[:2], [1.0, 5.0], 10.0) == 0.0


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("way", ["eager", "fused", "folded", "vendor"])
def test_schedule(arch: str, way: str) -> None:
    """All gradients in buckets, in time with a backward that is the larger part of the step."""
    training = Training(arch=arch, batch=32, way=way)
    total, end, buckets = schedule(training)
    kernels = step(arch, 32, 224, "bf16", way, whole=True)
    assert math.isclose(total, limit(kernels, training.ceilings) / 0.5)
    assert sum(bucket.size for bucket in buckets) == 4 * network(arch).parameters
    assert all(bucket.size >= 25 << 20 for bucket in buckets[1:-1]) and buckets[0].size >= 1 << 20
    times = [bucket.ready for bucket in buckets]
    assert times == sorted(times) and times[-1] == end < total
    assert total / 4 < times[0] < total / 2  # behind forward, which is a third
    half = replace(training, gradient_bytes=2, step_seconds=2 * total)
    assert [(2 * b.size, b.ready / 2) for b in schedule(half)[2]] == [
        (b.size, pytest.approx(b.ready)) for b in buckets
    ]


def test_one_gpu_loses_nothing() -> None:
    found = predict(1, Training(sync_batch_norm=True), Cluster())
    assert found.efficiency == 1.0
    assert found.images_per_second == found.batch / found.compute


def test_more_gpus_are_faster_together_and_slower_each() -> None:
    for sync in (False, True):
        found = [predict(gpus, Training(sync_batch_norm=sync), Cluster()) for gpus in GPUS]
        assert sorted(found, key=lambda p: -p.efficiency) == found
        assert sorted(found, key=lambda p: p.images_per_second) == found
        for p in found:
            assert math.isclose(p.step, p.compute + p.exposed + p.sync + p.stragglers)


def test_a_long_backward_hides_all_but_the_last_bucket() -> None:
    training = Training(step_seconds=10.0)
    last = Cluster().all_reduce(schedule(training)[2][-1].size, 64)
    assert math.isclose(predict(64, training, Cluster()).exposed, last, rel_tol=1e-6)
    hurried = predict(64, replace(training, step_seconds=1e-6), Cluster())
    assert math.isclose(hurried.exposed, hurried.all_reduce, rel_tol=1e-2)


def test_shared_statistics_cost_by_the_layer() -> None:
    """Where messages cost nothing but their start: two for each of the 53 batch norms of ResNet-50."""
    cluster = Cluster(node_latency=0.0, network_latency=0.0, launch=1e-6, node_bandwidth=1e30)
    for arch, layers in (("resnet18", 20), ("resnet50", 53), ("resnet101", 104)):
        assert math.isclose(sync_seconds(Training(arch=arch), cluster, 8), layers * 2e-6)
    assert sync_seconds(Training(), cluster, 1) == 0.0


def test_the_slowest_of_many() -> None:
    """Known values for normal numbers."""
    assert largest_of(1) == 0.0
    assert largest_of(2) == pytest.approx(1 / math.sqrt(math.pi), abs=1e-4)
    assert largest_of(3) == pytest.approx(1.5 / math.sqrt(math.pi), abs=1e-4)
    assert predict(2, Training(step_seconds=1.0, variation=0.1), Cluster()).stragglers == pytest.approx(
        0.1 / math.sqrt(math.pi), abs=1e-5
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cluster(node_bandwidth=0.0), "node_bandwidth must be positive"),
        (lambda: Cluster(bandwidth_share=1.1), "bandwidth_share must be at most 1"),
        (lambda: Cluster(network_latency=-1.0), "network_latency must not be negative"),
        (lambda: Training(achieved_share=math.nan), "achieved_share must be positive"),
        (lambda: predict(12, Training(), Cluster()), "12 GPUs do not fill nodes of 8"),
        (lambda: predict(0, Training(), Cluster()), "gpus must be positive"),
        (lambda: predict(8, Training(arch="vgg"), Cluster()), "unknown architecture"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_model_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--batch", "64", "--gpus", "1", "16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| 1 | 0 | 0 | 0 | 0 | 100.0% |") and lines[3].startswith("| 16 | ")
    with pytest.raises(SystemExit):
        main(["--gpus", "12"])
    assert "do not fill nodes" in capsys.readouterr().err


# Measuring.


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All four curves, checked; two ranks, or why not."""
    file = tmp_path / "folder" / "quick.json"
    assert scaling.main(["--json", str(file), "--quick"]) == 0
    assert "resnet18, batch 4, 32x32" in capsys.readouterr().err
    found = json.loads(file.read_text())
    assert found["header"]["ceilings"]["fp32"]["bandwidth"] > 0
    rows = found["curves"]
    assert {row["curve"] for row in rows} == {"batch", "image_size", "depth", "ranks"}
    for row in rows:
        what = (row["curve"], row["x"], row["variant"], row["impl"])
        missing = row["note"].startswith(("not measured", "PyTorch's SyncBatchNorm"))
        assert row["checked"] != missing, (what, row["note"])
        assert missing == (row["median_ms"] is None) == (row["images_per_s"] is None), what
        if row["checked"]:
            assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"], what
            many = row["x"] if row["curve"] == "ranks" else 1
            assert row["images_per_s"] == pytest.approx(1e3 * 4 * many / row["median_ms"]), what
            assert (row["peak_mb"] is None) == (row["curve"] == "ranks"), what
            assert (row["ratio"] is None) == (row["impl"] == "resnet_fused"), what
    if not any("need a" in row["note"] for row in rows):
        assert found["calls"] == {"all_reduce": 2 * len(network("resnet18").convs)}
        assert [(row["op"], row["bytes"]) for row in found["collectives"]] == [
            ("all_reduce", 256),
            ("all_reduce", 25 << 20),
        ]


def test_a_core_for_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling.os, "sched_getaffinity", lambda _: {0, 1})
    cpu = torch.device("cpu")
    assert scaling.why_not(2, cpu) == ""
    assert scaling.why_not(4, cpu) == "not measured: 4 ranks need a core each, and there are 2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments --json --page is required"),
        (["--page", "--quick"], "--quick goes with --json"),
        (["--json", "results.txt"], "name a file that ends in .json"),
    ],
)
def test_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        scaling.main(arguments)
    assert message in capsys.readouterr().err


# The page.


@pytest.fixture(scope="module")
def results() -> scaling_page.Found:
    return scaling_page.latest()


def test_the_page_shows_the_file_and_the_model(results: scaling_page.Found) -> None:
    page = scaling_page.PAGE.read_text()
    assert with_tables(page, scaling_page.tables(results)) == page, (
        "run `python -m benchmarks.scaling --page`"
    )


def test_the_picture_is_of_the_file(results: scaling_page.Found) -> None:
    """But for the version of matplotlib that drew it: its text and how many curves there are."""
    drawn, there = scaling_page.chart(results), scaling_page.CHART.read_text()
    assert drawn == scaling_page.chart(results)
    assert "<dc:date>" not in there
    words = [re.findall(r"<text[^>]*>([^<]*)</text>", svg) for svg in (drawn, there)]
    assert words[0] == words[1] and "resnet_fused" in words[0]


def test_what_was_not_checked_is_not_shown(tmp_path: Path, results: scaling_page.Found) -> None:
    row = results.accepted("batch", "resnet_fused")
    first = min(row)
    content = {"header": results.header, "collectives": results.collectives, "calls": results.calls}
    spoilt = [
        {**r, "checked": r["checked"] and (r["curve"], r["x"], r["impl"]) != ("batch", first, "resnet_fused")}
        for r in results.rows
    ]
    (tmp_path / "a.json").write_text(json.dumps({**content, "curves": spoilt}))
    changed = scaling_page.latest(tmp_path)
    assert f"| {first} images |" in scaling_page.curves_table(results)
    assert f"| {first} images |" not in scaling_page.curves_table(changed)


def test_files_that_are_not_there_or_not_ours(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no results: run"):
        scaling_page.latest(tmp_path)
    (tmp_path / "other.json").write_text('{"header": {}, "rows": []}')
    with pytest.raises(ValueError, match="is no file of"):
        scaling_page.latest(tmp_path)


def test_a_straight_line() -> None:
    assert scaling_page.line([(1.0, 5.0), (2.0, 7.0), (4.0, 11.0)]) == pytest.approx((2.0, 3.0))

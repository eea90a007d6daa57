"""`python -m resnet_fused bench`: the table, the files, what is not shown as a speed-up, and what is refused."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import resnet_fused
from resnet_fused import native
from resnet_fused.backend import summary
from resnet_fused.cli import bench, probe
from resnet_fused.cli.bench import COMPILE
from resnet_fused.cli.steps import TrainingStep
from resnet_fused.measure import EAGER, EXACT, OURS, Comparison, Provider
from tests.cli.conftest import Cli, Result
from tests.cli.test_bad_input import assert_refused

PNG = b"\x89PNG\r\n\x1a\n"
SMALL = ("--arch", "resnet18", "--batch", 4, "--image-size", 32, "--seconds", 0.1, "--device", "cpu")
STEP = TrainingStep("resnet18", batch=4, image_size=32, precision="fp32", device="cpu")


def row_of(result: Result, name: str) -> list[str]:
    """The cells of a line of the table."""
    line = next(line for line in result.out.splitlines() if line.startswith(f"{name}  "))
    return re.split(r" {2,}", line)


def test_end_to_end_without_a_compiler(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without = tmp_path / "python"
    without.write_text(f'#!/bin/sh\ncase "$*" in *{COMPILE}*) exit 3;; esac\nexec {sys.executable} "$@"\n')
    without.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(without))
    before, begin = dict(os.environ), time.monotonic()
    result = cli("bench", *SMALL, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert result.err == "" and os.environ == before
    assert "resnet18 in training, batch 4 at 32x32, fp32, channels_last" in result.out
    assert f"resnet_fused {summary('cpu')}" in result.out.splitlines()
    results = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert 0 < results["header"]["seconds"] <= time.monotonic() - begin
    rows = {row["impl"]: row for row in results["rows"]}
    assert list(rows) == [OURS, EAGER, COMPILE]
    for impl in (OURS, EAGER):
        row = rows[impl]
        what = ("layer", "name", "mode", "dtype", "batch", "shape", "note", "checked")
        assert [row[key] for key in what] == ["model", "resnet18", "train", "fp32", 4, "4x3x32x32", "", True]
        assert row["rounds"] >= bench.MIN_ROUNDS
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["first_step_ms"] > 0
        assert row["largest_batch"] is row["roofline_ms"] is None
        # At least weights, gradients and momentum of 11.7 million parameters.
        assert row["peak_mb"] is None or 3 * 4 * 11.7 < row["peak_mb"] < 2000
    assert rows[OURS]["ratio"] is None
    assert 0 < rows[EAGER]["ratio_p20"] <= rows[EAGER]["ratio"] <= rows[EAGER]["ratio_p80"]
    missing = rows[COMPILE]
    assert "exit code 3" in missing["note"] and not missing["checked"] and missing["rounds"] == 0
    assert missing["median_ms"] is missing["ratio"] is missing["peak_mb"] is None
    assert row_of(result, "torch.compile")[1:] == ["-"] * 8
    assert f"torch.compile: {missing['note']}" in result.out
    cells = row_of(result, "resnet_fused")
    assert cells[1] == f"{rows[OURS]['median_ms']:.1f}" and cells[4] == f"{rows[EAGER]['ratio']:.2f}x"
    assert row_of(result, "eager")[4:6] == ["-", "-"]
    assert result.out.splitlines()[-2].endswith((" on this machine.", " memory.", " nothing else."))
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize("provider", [COMPILE, OURS])
def test_only_a_compiler_may_fail(
    provider: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(step: TrainingStep, provider: str) -> torch.nn.Module:
        raise RuntimeError("No working C++ compiler")

    monkeypatch.setattr(TrainingStep, "model", fail)
    request = {"provider": provider, "step": asdict(STEP), "threads": torch.get_num_threads()}
    request |= {"largest_batch": True, "cudnn": {}}
    monkeypatch.setattr(sys, "argv", ["probe", json.dumps(request)])
    if provider == OURS:
        with pytest.raises(RuntimeError, match="No working"):
            probe.main()
    else:
        probe.main()
        assert json.loads(capsys.readouterr().out) == {"note": "RuntimeError: No working C++ compiler"}


@pytest.fixture
def no_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "probe_all", lambda comparison, step, progress: {})


@pytest.mark.usefixtures("no_probes")
def test_a_wrong_gradient_is_no_speed_up(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward is right, and one parameter of 62 has twice its gradient."""
    whole = resnet_fused.resnet18

    def wrong(**arguments: Any) -> torch.nn.Module:
        model = whole(**arguments)
        model.layer3[1].conv2.weight.register_hook(lambda grad: 2 * grad)
        return model

    monkeypatch.setattr(resnet_fused, "resnet18", wrong)
    results = tmp_path / "elsewhere.json"
    result = cli("bench", *SMALL, "--no-compile", "--out", tmp_path / "out", "--json", results)
    assert result.code == 0, result.err
    assert "resnet_fused: wrong result 1: the relative error is " in result.out
    assert "No speed-up is claimed" in result.out and "x as fast" not in result.out
    assert row_of(result, "resnet_fused")[4:6] == ["-", "-"]
    ours, eager = json.loads(results.read_text())["rows"]
    assert not ours["checked"] and ours["note"] and ours["median_ms"] > 0
    assert eager["checked"] and eager["ratio"] is None
    assert not (tmp_path / "out" / "bench.json").exists()


@pytest.mark.usefixtures("no_probes")
def test_what_is_not_fused_is_no_speed_up(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "is_loaded", False)
    monkeypatch.setattr(native, "missing_reason", "the extension is on holiday")
    result = cli("bench", *SMALL, "--no-compile", "--out", tmp_path / "out")
    assert result.code == 0, result.err
    reason = "plain PyTorch, nothing fused: the extension is on holiday"
    assert f"resnet_fused runs {reason}" in result.out.splitlines()
    assert "because the extension is on holiday." in result.out and "x as fast" not in result.out
    assert json.loads((tmp_path / "out" / "bench.json").read_text())["rows"][0]["note"] == reason


def test_check_accepts_what_is_right() -> None:
    """In bfloat16, where no single ReLU decides an error."""
    step = replace(STEP, precision="bf16")
    comparison = Comparison(step.case(), [Provider(OURS), Provider(EAGER)], torch.device("cpu"))
    bench.check(comparison, step, lambda fraction, what: None)
    assert all(provider.checked for provider in comparison.providers)


def test_float64_is_eager_in_float64() -> None:
    """Though its blocks run forward twice."""
    images, labels = STEP.data(0)
    plain = STEP.loss_and_gradient(STEP.model(EAGER).double(), images.double(), labels)
    exact = STEP.loss_and_gradient(STEP.model(EXACT), images.double(), labels)
    assert all(torch.equal(x, y) for x, y in zip(exact, plain, strict=True))
    assert exact[0].shape == (4,) and exact[1].dtype == torch.float64


@pytest.mark.parametrize(
    ("eager", "words"),
    [
        ([20.0, 21.0, 22.0], "trains resnet18 2.10x as fast as eager in 0.60x its memory on this machine."),
        ([8.0, 9.0, 9.5], "slower than eager on this machine: 0.90x as fast, in 0.60x its memory."),
        ([9.0, 10.1, 12.0], "as fast as eager (1.01x, 0.94 to 1.12) in 0.60x its memory on this machine."),
        ([5.0, 10.1, 20.0], "(1.01x, 0.70 to 1.60): run it while the machine does nothing else."),
    ],
)
def test_verdict(eager: list[float], words: str) -> None:
    providers = [
        Provider(name, run=list, times=times, peak_mb=peak)
        for name, times, peak in ((OURS, [10.0, 10.0, 10.0], 60.0), (EAGER, eager, 100.0))
    ]
    assert bench.verdict(Comparison(STEP.case(), providers, torch.device("cpu"))).endswith(words)


@pytest.mark.parametrize("limit", [1, 2, 3, 63, 64, 65, 1000])
def test_largest_batch(limit: int) -> None:
    tried: list[int] = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= limit

    largest = probe.search(fits, 64)
    assert min(tried) >= 2
    assert largest is None if limit < 2 else largest is not None and largest <= limit <= largest * 1.05 + 1


def test_a_killed_process_is_a_users_message(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killer = tmp_path / "python"
    killer.write_text("#!/bin/sh\nkill -9 $$\n")
    killer.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killer))
    result = cli("bench", *SMALL, "--out", tmp_path / "out")
    assert_refused(result, "signal 9", "--batch below 4")


@pytest.mark.gpu
def test_gpu(cli: Cli, tmp_path: Path) -> None:
    result = cli(
        "bench", "--arch", "resnet18", "--batch", 8, "--seconds", 1, "--out", tmp_path, "--precision", "bf16"
    )
    assert result.code == 0, result.err
    assert "largest batch" in result.out
    results = json.loads((tmp_path / "bench.json").read_text())
    assert results["header"]["device_type"] == "cuda" and results["header"]["cuda"]
    for row in results["rows"]:
        assert row["checked"] and row["peak_mb"] > 0, row["note"]

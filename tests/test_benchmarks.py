"""The benchmark suite: its options, its table and its results file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import report
from benchmarks.providers import NAMES, PEERS, make_providers, modules
from resnet_fused import reference
from resnet_fused.measure import EAGER, OURS


@pytest.mark.parametrize("block", ["", "layer2.0"])
def test_modules_have_the_same_weights(block: str) -> None:
    eager, fused = reference.resnet18().get_submodule(block), nn.Identity()
    runnable, missing = modules(NAMES, "resnet18", block, eager, fused)
    assert {*runnable, *missing} == {*NAMES} and {*missing} <= {*PEERS} and runnable[OURS] is fused
    for name in {*NAMES} - {OURS, *missing}:
        assert runnable[name] is not eager, "a step of one would change the weights of another"
        for weight, expected in zip(runnable[name].parameters(), eager.parameters(), strict=True):
            assert torch.equal(weight, expected), name


def test_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    names, block = (OURS, "timm"), nn.Identity()
    runnable, missing = modules(names, "resnet18", "layer1.0", block, block)
    ours, peer = make_providers(names, runnable, {OURS: ""} | missing, lambda name, module: list)
    assert ours.checked and peer.run is None
    assert "timm could not be imported (" in peer.note and "pip install timm" in peer.note


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtypes", "fp31"], "--dtypes fp31: choose some of fp32,tf32,bf16,fp16"),
        (["--dtypes", "tf32"], "a CPU has no tf32"),
        (["--impls", "keras"], "--impls keras: choose some of resnet_fused,eager"),
    ],
)
def test_bad_options(arguments: list[str], message: str) -> None:
    done = suite("benchmarks/test_ops.py", "--collect-only", *arguments)
    assert done.returncode == 4 and message in done.stderr, done.stdout + done.stderr


def test_an_op_end_to_end(tmp_path: Path) -> None:
    """Its results file is one that reports read."""
    path = tmp_path / "deep" / "results.json"
    arguments = ["--dtypes", "fp32", "--impls", f"{EAGER},timm", "-k", "bn_relu-512-7"]
    done = suite("benchmarks/test_ops.py", *arguments, "--results", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    header, rows = report.read(path)
    assert header["ceilings"]["fp32"]["bandwidth"] > 0
    ours, eager = rows.to_dict("records")
    assert (ours["impl"], ours["name"], ours["checked"]) == (OURS, "bn_relu", True)
    assert eager["checked"] and eager["ratio"] > 0 and ours["roofline_ms"] > 0
    assert f"{eager['ratio']:.2f}x" in done.stdout and "2x512x7x7" in done.stdout


def suite(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"RESNET_FUSED_BENCH_BATCH": "2"},
        capture_output=True,
        text=True,
    )

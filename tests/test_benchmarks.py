"""The benchmark suite: its options, its table and its results file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import report
from benchmarks.harness import table, write_results
from benchmarks.peers import PEERS, Missing
from benchmarks.providers import NAMES, make_providers, modules
from benchmarks.roofline import Ceilings
from resnet_fused import reference
from resnet_fused.cli.precision import PRECISIONS
from resnet_fused.measure import EAGER, OURS, Case, Comparison, Provider

CPU = torch.device("cpu")
CASE = Case("block", "resnet18 layer1.0", "fwd_bwd", "fp32", 2, "2x3x4x4", 0.5)


@pytest.fixture
def comparison() -> Comparison:
    """Ours takes 2 ms always, eager 4, 6 and 8; another is wrong, and one is missing."""
    providers = [
        Provider(OURS, list, times=[2.0] * 3),
        Provider(EAGER, list, times=[4.0, 6.0, 8.0]),
        Provider("compile_default", list, "wrong result 0", times=[1.0] * 3),
        Provider("apex", note="not installed"),
    ]
    return Comparison(CASE, providers, CPU)


def test_table(comparison: Comparison) -> None:
    text = table([comparison, comparison])
    assert "3.00x  2.40 - 3.60" in text and "geometric mean" in text and "3.00x  worst 3.00x" in text
    assert "0.50x" not in text, "the speed of what computes something else"
    assert "compile_default, block fp32: wrong result 0" in text
    assert "apex, block fp32: not installed" in text
    comparison.ours.note = "wrong result 1"
    assert "3.00x" not in table([comparison])


def test_results_are_what_reports_read(comparison: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.json"
    write_results(path, CPU, [comparison], 1.0, {"fp32": Ceilings(1e9, 1e12)})
    header, rows = report.read(path)
    assert header["ceilings"] == {"fp32": {"bandwidth": 1e9, "flops": 1e12}}
    found = rows.set_index("impl")
    assert found.loc[EAGER, report.RATIO].tolist() == pytest.approx([3.0, 2.4, 3.6])
    assert found.loc["compile_default", report.RATIO].isna().all()
    assert found.why[["apex", "compile_default"]].tolist() == ["not measured", "not checked"]


def test_modules_have_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchvision", "timm"):
        monkeypatch.setitem(sys.modules, name, None)
    eager, fused = reference.BasicBlock(8, 8), reference.BasicBlock(8, 8)
    found = modules(NAMES, "resnet18", "layer1.0", eager, fused, PRECISIONS["fp32"])
    assert tuple(found) == NAMES and found[OURS] is fused
    assert {name for name, module in found.items() if isinstance(module, Missing)} == set(PEERS)
    for name, module in found.items():
        if isinstance(module, nn.Module) and module is not fused:
            assert module is not eager, "a step of one would change the weights of another"
            assert torch.equal(module.conv1.weight, eager.conv1.weight), name
    providers = make_providers(found, dict.fromkeys(NAMES, ""), lambda name, module: list)
    assert [provider.name for provider in providers if provider.run is None] == list(PEERS)


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
    path = tmp_path / "results.json"
    arguments = ["--dtypes", "fp32", "--impls", f"{EAGER},apex", "-k", "bn_relu-512-7"]
    done = suite("benchmarks/test_ops.py", *arguments, "--results", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    ours, eager, apex = json.loads(path.read_text())["rows"]
    assert (ours["impl"], ours["name"], ours["checked"]) == (OURS, "bn_relu", True)
    assert eager["checked"] and eager["ratio"] > 0 and ours["roofline_ms"] > 0
    assert not apex["checked"] and apex["median_ms"] is None and apex["note"]


def suite(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"RESNET_FUSED_BENCH_BATCH": "2"},
        capture_output=True,
        text=True,
    )

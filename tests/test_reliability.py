"""docs/reliability.md: it shows its data, and every fault names a test that there is."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from benchmarks.page import ROOT
from tools import reliability

FAULTS = json.loads(reliability.RESULTS.read_text())["faults"]


def test_the_page_shows_its_data() -> None:
    assert reliability.PAGE.stale() == []


@pytest.mark.parametrize("test", sorted({fault["test"] for fault in FAULTS}))
def test_tests_of_faults(test: str) -> None:
    file, _, name = test.partition("::")
    tree = ast.parse((ROOT / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_a_check_replaces_its_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "reliability.json"
    path.write_text('{"checks": {"soak": {"seconds": 1}}, "faults": []}')
    reliability.record("soak", {}, 1.0)
    assert json.loads(path.read_text())["checks"] == {"soak": {"seconds": 1}}
    monkeypatch.setenv("RESNET_FUSED_RECORD", str(path))
    reliability.record("soak", {"steps": {"passed": 3}}, 61.2, seed=4)
    reliability.record("memory", {"peak": {"passed": 1, "failed": 2}}, 2.0)
    checks = json.loads(path.read_text())["checks"]
    assert list(checks) == ["soak", "memory"]
    assert (checks["soak"]["seconds"], checks["soak"]["seed"]) == (61, 4)
    assert checks["memory"]["outcomes"] == {"peak": {"passed": 1, "failed": 2}}

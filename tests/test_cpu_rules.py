"""What `python -m benchmarks.cpu_rules` makes of its measurements, and how it writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from benchmarks import block_rules, cpu_rules
from resnet_fused.ops.cpu_rules import RULES


def test_the_batch_from_which_ours_gain() -> None:
    ratios = {1: 0.5, 2: 0.9, 4: 1.3, 8: 0.99, 16: 1.2}  # 8 is noise beside its neighbours
    rows = [
        {"name": name, "channels": 64, "size": 56, "batch": batch, "vendor / ours": ratio * factor}
        for name, factor in (("faster_fp32", 1.0), ("never_fp32", 0.5))
        for batch, ratio in ratios.items()
    ]
    rules = cpu_rules.rule(pd.DataFrame(rows), ["faster_fp32", "never_fp32"])
    assert rules == {"faster_fp32": {"64": {"56": 4}}, "never_fp32": {"64": {"56": cpu_rules.NEVER}}}
    assert block_rules.limited(rules)["never_fp32"] == {"64": {"56": block_rules.largest(56, "fp32")}}


def test_a_machine_replaces_what_was_measured_on_its_like(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rules.json"
    path.write_text(RULES.read_text())
    monkeypatch.setattr(cpu_rules.cpu_rules, "RULES", path)
    before = json.loads(path.read_text())["machines"]
    machine: dict[str, Any] = {
        "isa": "avx512",
        "machine": "another",
        "measured": "today",
        "convolutions": {"forward": {"64": {"56": 1}}},
        "blocks": {"basic_fp32": {"64": {"56": 2}}},
    }
    for measured in ("yesterday", "today"):
        cpu_rules.write(machine | {"measured": measured})
    assert json.loads(path.read_text())["machines"] == [*before, machine]
    # What is committed was written by the command.
    path.write_text('{"machines": []}')
    for each in before:
        cpu_rules.write(each)
    assert path.read_text() == RULES.read_text()

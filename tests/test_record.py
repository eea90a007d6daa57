"""benchmarks.record on a CPU: what is refused, what is timed, and what is in the file when a run is stopped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import record
from resnet_fused.measure import EAGER, OURS, Provider

# In bfloat16 no single ReLU decides an error, not even on images this small.
SMALL = ["--device", "cpu", "--arch", "resnet18", "--batch", "2", "--image-size", "32", "--precision", "bf16"]


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "STEPS", 1)
    file = tmp_path / "record.json"
    file.write_text('{"other": {"rows": []}}')
    ceilings = tmp_path / "ceilings.json"
    ceilings.write_text('{"ceilings": {"bf16": {"bandwidth": 1e10, "flops": 1e11}}}')
    given = ["--json", str(file), "--rounds", "2", "--providers", OURS, EAGER, "--ceilings", str(ceilings)]
    assert record.main([*SMALL, *given]) == 0
    found = json.loads(file.read_text())
    assert list(found) == ["other", "record"] and found["record"]["steps_per_round"] == 1
    rows = {row["impl"]: row for row in found["record"]["rows"]}
    assert set(rows) == {OURS, EAGER}
    assert all(row["rounds"] == 2 and row["checked"] for row in rows.values())
    assert rows[EAGER]["ratio"] > 0 and rows[OURS]["roofline_ms"] > 0
    assert rows[OURS]["img_per_s"] == pytest.approx(2e3 / rows[OURS]["median_ms"])
    assert "img/s" in capsys.readouterr().out.splitlines()[-1]


class Unchecked(record.Record):
    """A record whose providers do nothing."""

    def __init__(self, saved: list[dict[str, Any]], run: Any = lambda: None, note: str = "") -> None:
        super().__init__(record.TrainingStep("resnet18", 2, 32, "fp32", "cpu"), 3, None, saved.append)
        self.one_run, self.note = run, note

    def exact_results(self) -> dict[int, list[Any]]:
        return {}

    def providers(self, names: Sequence[str], exact: dict[int, list[Any]]) -> list[Provider]:
        return [Provider(name, self.one_run, self.note if name == OURS else "") for name in names]


def test_what_is_wrong_has_no_ratio() -> None:
    saved: list[dict[str, Any]] = []
    comparison = Unchecked(saved, note="wrong").run([OURS, EAGER, "compile_default"])
    # A quarter of the rounds for two, then all of them for everybody, each saved, and once at the end.
    expected = [[1, 1]] * 2 + [[n, n, n] for n in (1, 2, 3, 3)]
    assert [[row["rounds"] for row in one["rows"]] for one in saved] == expected
    assert [row["rounds"] for row in saved[-1]["rows_before_compiling"]] == [1, 1]
    assert not comparison.ours.checked and "x ours" not in record.line(comparison)
    assert "(wrong)" in record.line(comparison)


def test_a_compiler_that_breaks_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = record.Record(
        record.TrainingStep("resnet18", 2, 32, "bf16", "cpu"), 1, None, lambda found: None
    )
    whole = record.TrainingStep.model

    def broken(training: record.TrainingStep, name: str) -> Any:
        if name == "compile_default":
            raise RuntimeError("no compiler")
        return whole(training, name)

    monkeypatch.setattr(record.TrainingStep, "model", broken)
    monkeypatch.setattr(record, "check_accuracy", lambda draw, names, eps: dict.fromkeys(names, ""))
    providers = {provider.name: provider for provider in measured.providers([OURS, "compile_default"], {})}
    assert providers["compile_default"].note == "RuntimeError: no compiler"
    assert providers["compile_default"].run is None and providers[OURS].run is not None


def test_an_interruption_leaves_the_rounds_so_far() -> None:
    saved: list[dict[str, Any]] = []
    runs = 0

    def one() -> None:
        nonlocal runs
        runs += 1
        if runs > 3 * 2 * record.STEPS:  # the warm-up and two rounds of both providers
            raise KeyboardInterrupt

    measured = Unchecked(saved, one)
    with pytest.raises(KeyboardInterrupt):
        measured.run([OURS, EAGER])
    assert [row["rounds"] for row in saved[-1]["rows"]] == [2, 2] and "img/s" in measured.summary


def test_needs_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert record.main(["--json", str(tmp_path / "x.json")]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err

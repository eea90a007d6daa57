"""benchmarks.record on a CPU: what is refused, what is timed, and what is in the file when a run is ended."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import record
from benchmarks.harness import Entrant
from resnet_fused.cli.steps import EAGER, OURS

SMALL = ["--device", "cpu", "--arch", "resnet18", "--batch", "2", "--image-size", "32", "--precision", "fp32"]


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(record, "MOST_DRAWS", 1)
    monkeypatch.setattr(record, "STEPS", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other longer than such small layers take
    yield
    torch.set_num_threads(threads)


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "record.json"
    file.write_text('{"other": {"rows": []}}')
    ceilings = tmp_path / "ceilings.json"
    ceilings.write_text('{"ceilings": {"fp32": {"bandwidth": 1e10, "flops": 1e11}}}')
    # The accuracy rule itself has tests; on images this small one ReLU decides the error.
    monkeypatch.setattr(record, "objection", lambda found, eager, eps: "")
    given = ["--json", str(file), "--rounds", "2", "--providers", OURS, EAGER, "--ceilings", str(ceilings)]
    assert record.main([*SMALL, *given]) == 0
    found = json.loads(file.read_text())
    assert list(found) == ["other", "record"] and found["record"]["steps_per_round"] == 1
    rows = {row["impl"]: row for row in found["record"]["rows"]}
    assert set(rows) == {OURS, EAGER}
    assert all(row["rounds"] == 2 and row["checked"] and len(row["errors"]) == 1 for row in rows.values())
    assert rows[EAGER]["ratio"] > 0 and rows[OURS]["roofline_ms"] > 0
    assert rows[OURS]["img_per_s"] == pytest.approx(2e3 / rows[OURS]["median_ms"])
    assert "img/s" in capsys.readouterr().out.splitlines()[-1]


def small_record(saved: list[dict[str, Any]]) -> record.Record:
    return record.Record(record.Training("resnet18", 2, 32, "fp32", "cpu"), 3, None, saved.append)


def test_what_is_wrong_has_no_ratio_and_what_breaks_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[dict[str, Any]] = []
    measured = small_record(saved)
    monkeypatch.setattr(measured, "_exact", list)
    monkeypatch.setattr(
        measured, "_entrant", lambda impl, exact: Entrant(impl, lambda: None, "wrong" if impl == OURS else "")
    )
    contest = measured.run([OURS, EAGER, "compile_default"])
    # A quarter of the rounds for two, then all of them for everybody, each saved, and once at the end.
    assert [[row["rounds"] for row in one["rows"]] for one in saved] == [
        *[[1, 1]] * 2,
        *[[n, n, n] for n in (1, 2, 3, 3)],
    ]
    assert [row["rounds"] for row in saved[-1]["rows_before_compiling"]] == [1, 1]
    assert not contest.ratios(contest.entrants[0])
    assert record._status(measured, [OURS, EAGER]) == 1
    assert "ours" not in record.line(contest) and "(wrong)" in record.line(contest)


def test_a_compiler_that_breaks_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = small_record([])

    def broken(training: object, impl: str) -> torch.nn.Module:
        raise RuntimeError(f"no {impl}")

    monkeypatch.setattr(record, "make_model", broken)
    entrant = measured._entrant("compile_default", [])
    assert entrant.run is None and entrant.note == "RuntimeError: no compile_default"
    with pytest.raises(RuntimeError, match="no resnet_fused"):
        measured._entrant(OURS, [])


def test_an_end_leaves_the_rounds_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[dict[str, Any]] = []
    measured = small_record(saved)
    runs = 0

    def one() -> None:
        nonlocal runs
        runs += 1
        if runs == 6:  # a warm-up of each, a round, and half of the next
            raise KeyboardInterrupt

    monkeypatch.setattr(measured, "_exact", list)
    monkeypatch.setattr(measured, "_entrant", lambda impl, exact: Entrant(impl, one))
    assert record._status(measured, [OURS, EAGER]) == 130
    assert [row["rounds"] for row in saved[-1]["rows"]] == [1, 1] and "img/s" in measured.shown


def test_needs_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert record.main(["--json", str(tmp_path / "x.json")]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err

"""resnet_fused.measure: what is wrong, missing or broken has a row and a note, and never a ratio."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.report import HEADER, ROW
from resnet_fused import measure
from resnet_fused.measure import (
    EAGER,
    EXACT,
    OURS,
    SEEDS,
    Case,
    Comparison,
    Provider,
    Results,
    check_accuracy,
    failure,
    header,
    inaccuracy,
    quantiles,
    saved_storages,
)

CPU = torch.device("cpu")
CASE = Case("block", "resnet18 layer1.0", "fwd_bwd", "fp32", 2, "2x3x4x4", 0.5)
EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def comparison(monkeypatch: pytest.MonkeyPatch) -> Comparison:
    """Ours takes 2, 2 and 4 ms, eager 4, 6 and 16, another is wrong, one is missing, and one fails when it is run."""
    clock = {
        OURS: [9.0, 2.0, 2.0, 4.0],
        EAGER: [9.0, 4.0, 6.0, 16.0],
        "compile_default": [9.0, 1.0, 1.0, 1.0],
    }
    times = {name: iter(milliseconds) for name, milliseconds in clock.items()}  # the first run warms up
    current = ""

    def run(name: str) -> None:
        nonlocal current
        current = name
        if name not in times:
            raise RuntimeError("no such kernel\nand more")

    def milliseconds(function: object, device: torch.device) -> float:
        function()  # type: ignore[operator]
        return next(times[current])

    monkeypatch.setattr(measure, "milliseconds", milliseconds)
    providers = [Provider(name, lambda name=name: run(name)) for name in (*clock, "attorch")]
    providers[2].note = "wrong result 0"
    compared = Comparison(CASE, [*providers, Provider("apex", note="not installed")], CPU)
    compared.warm_up()
    assert list(compared.rounds(3)) == [1, 2, 3]
    return compared


def test_rows(comparison: Comparison) -> None:
    rows = {row["impl"]: row for row in comparison.rows()}
    assert all(row.keys() >= ROW for row in rows.values())
    assert [rows[OURS][key] for key in ("median_ms", "rounds", "checked", "ratio")] == [2, 3, True, None]
    # Of the ratios of rounds 2, 3 and 4; the ratio of the medians is 3, too.
    assert [rows[EAGER][key] for key in ("ratio_p20", "ratio", "ratio_p80")] == pytest.approx([2.4, 3, 3.6])
    wrong, broken, missing = (rows[name] for name in ("compile_default", "attorch", "apex"))
    assert (wrong["median_ms"], wrong["note"]) == (1.0, "wrong result 0")
    assert (broken["median_ms"], broken["note"]) == (None, "RuntimeError: no such kernel")
    assert (missing["median_ms"], missing["note"]) == (None, "not installed")
    assert not any(row["checked"] or row["ratio"] for row in (wrong, broken, missing))


def test_no_ratio_where_ours_is_wrong(comparison: Comparison) -> None:
    comparison.ours.note = "wrong result 1"
    assert not any(row["ratio"] for row in comparison.rows())


def test_ratios_are_of_rounds_and_not_of_medians() -> None:
    ours, eager = Provider(OURS, list, times=[1.0, 2.0, 4.0]), Provider(EAGER, list, times=[3.0, 2.0, 8.0])
    assert Comparison(CASE, [ours, eager], CPU).ratios(ours, eager) == [3, 1, 2]


def test_the_order_rotates_and_repeats_are_timed_together() -> None:
    calls: list[str] = []
    providers = [Provider(name, lambda name=name: calls.append(name)) for name in "abc"]
    comparison = Comparison(CASE, providers, CPU, repeats=2)
    assert list(comparison.rounds(2)) == [1, 2]
    assert "".join(calls) == "aabbccbbccaa"
    assert all(len(provider.times) == 2 for provider in providers)


def test_only_ours_and_eager_must_run() -> None:
    nested = RuntimeError(
        "backend='inductor' raised:\nInvalidCxxCompiler: No working C++ compiler\n\nSet ..."
    )
    assert failure("compile_default", nested) == "RuntimeError: InvalidCxxCompiler: No working C++ compiler"
    assert "OutOfMemoryError" in failure(OURS, torch.OutOfMemoryError("64 GiB"))
    for name in (OURS, EAGER):
        with pytest.raises(RuntimeError, match="No working"):
            failure(name, nested)


def test_quantiles() -> None:
    assert quantiles([]) == {"median": None, "p20": None, "p80": None}
    assert quantiles([7.0]) == {"median": 7, "p20": 7, "p80": 7}
    assert quantiles([float(x) for x in range(10, -1, -1)]) == {"median": 5, "p20": 2, "p80": 8}


# Accuracy.


def errors(*of_seeds: float) -> list[list[float]]:
    return [[error] for error in of_seeds]


@pytest.mark.parametrize(
    ("ours", "accepted"),
    [
        ([1e-3] * 5, True),
        ([1.4e-3] * 5, True),
        ([1.6e-3] * 5, False),
        ([math.nan, 0, 0, 0, 0], False),
        ([math.inf, 0, 0, 0, 0], False),
        ([0.0, 1.0, 1.0, 1.0, 1.0], False),
    ],
)
def test_the_rule_holds_geometric_means(ours: list[float], accepted: bool) -> None:
    """One exact result makes up for no wrong one."""
    assert (inaccuracy(errors(*ours), errors(*[1e-3] * 5), EPS) == "") == accepted


def test_seeds_that_disagree_leave_room_for_it() -> None:
    """A ReLU on the other side of zero in one seed of ours: eager's other seeds show as much."""
    eager, ours = [1e-6, 1e-3, 1e-6, 1e-6, 1e-6], [1e-6, 1e-3, 1e-3, 1e-6, 1e-6]
    assert inaccuracy(errors(*ours), errors(*eager), EPS) == ""
    assert "wrong result 0" in inaccuracy(errors(*[1e-2] * 5), errors(*eager), EPS)


def test_four_eps_are_allowed_whatever_eager_has() -> None:
    assert inaccuracy(errors(*[3.9 * EPS] * 5), errors(*[0.0] * 5), EPS) == ""
    assert "wrong result 0" in inaccuracy(errors(*[4.2 * EPS] * 5), errors(*[0.0] * 5), EPS)


def test_check_accuracy() -> None:
    """Each provider on the inputs of every seed; a failure is a note."""
    drawn: list[int] = []

    def draw(seed: int) -> Results:
        drawn.append(seed)
        generator = torch.Generator().manual_seed(seed)
        exact = [torch.randn(n, dtype=torch.float64, generator=generator) for n in (100, 30)]

        def results(name: str) -> Sequence[Tensor]:
            rounded = [x.float() for x in exact]
            if name == "apex":
                raise RuntimeError("broken")
            if name == "attorch":
                rounded[1] = rounded[1] * (1 + 1e-5)
            return exact if name == EXACT else rounded

        return results

    notes = check_accuracy(draw, [OURS, "apex", "attorch"], EPS)
    assert drawn == list(SEEDS) and list(notes) == [EAGER, OURS, "apex", "attorch"]
    assert notes[OURS] == notes[EAGER] == "" and notes["apex"] == "RuntimeError: broken"
    assert notes["attorch"].startswith("wrong result 1: the relative error is 1e-05")


def test_eager_itself_must_be_right() -> None:
    exact = torch.ones(100, dtype=torch.float64)
    notes = check_accuracy(lambda seed: lambda name: [exact * (1 if name == EXACT else 1.2)], [OURS], EPS)
    assert notes[EAGER] == "wrong result 0: the relative error is 0.2"


def test_no_memory_for_float64() -> None:
    def results(name: str) -> Sequence[Tensor]:
        raise torch.OutOfMemoryError

    notes = check_accuracy(lambda seed: results, [OURS], EPS)
    assert notes.keys() == {OURS, EAGER} and all("not checked" in note for note in notes.values())


# Memory and the header.


PEAK = """
import torch
from resnet_fused.measure import Memory
memory = Memory(torch.device("cpu"))
torch.ones(100_000_000)
memory.start()
torch.ones(20_000_000)
print(memory.peak_mb())
"""


def test_memory_is_a_peak() -> None:
    """A freed tensor counts; one from before `start` does not. In a process whose heap has no holes to reuse."""
    peak = subprocess.check_output([sys.executable, "-c", PEAK], text=True).strip()
    assert peak == "None" or 60 < float(peak) < 200


def test_each_storage_counts_once_and_parameters_do_not() -> None:
    weight, scale = torch.ones(10, 100, requires_grad=True), torch.ones(100)
    x = torch.ones(7, 100, requires_grad=True)
    with saved_storages(weight, scale) as saved:
        z = (x * 2).sigmoid()  # the product saves a number, sigmoid its result
        scaled = z * z * scale  # saves z again, and the scale
        (scaled @ weight.t()).sum().backward()  # saves scaled, and the weight
    assert sorted(saved.values()) == [7 * 100 * 4] * 2


def test_header_is_what_reports_read() -> None:
    head = json.loads(json.dumps(header(CPU, 1.25, {"fp32": {"bandwidth": 1e9, "flops": 1e12}})))
    assert head.keys() >= HEADER
    assert head["seconds"] == 1.2


def test_commit_is_that_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the working directory, nor of a checkout that the package is only installed in."""
    here = header(CPU, 1.0)["commit"]
    monkeypatch.chdir(tmp_path)
    assert header(CPU, 1.0)["commit"] == here
    foreign = Path(measure.__file__).parents[1] / "venv" / "resnet_fused" / "measure.py"
    monkeypatch.setattr(measure, "__file__", str(foreign))
    assert header(CPU, 1.0)["commit"] == ""

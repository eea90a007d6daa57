"""The benchmark suite's honesty: what is wrong, missing or broken has a row and a note, and never a ratio."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import implementations
from benchmarks.harness import Case, Contest, Entrant, table, write_results
from benchmarks.implementations import BASELINE, EXACT, IMPLS, Attempt, modules, verdicts
from benchmarks.peers import PEERS, Missing
from benchmarks.precision import PRECISIONS
from benchmarks.roofline import Ceilings

CPU = torch.device("cpu")
CASE = Case("block", "resnet18 layer1.0", "fwd_bwd", "fp32", 2, "2x3x4x4", 0.5)
FIELDS = (
    "layer name mode dtype batch shape impl median_ms p20_ms p80_ms rounds peak_mb first_step_ms roofline_ms checked"
    " ratio ratio_p20 ratio_p80 note"
)


@pytest.fixture
def contest(monkeypatch: pytest.MonkeyPatch) -> Contest:
    """Ours takes 2 ms always, eager 4, 6 and 8, another is wrong, one missing and one breaks when it is run."""

    def broken() -> None:
        raise RuntimeError("no such kernel\nand more")

    times = {"resnet_fused": [2.0] * 3, BASELINE: [4.0, 6.0, 8.0], "compile_default": [1.0] * 3}
    clocks = {impl: iter([9.0, *ms]) for impl, ms in times.items()}  # the first run warms up
    found = Contest(
        CASE,
        [
            Entrant("resnet_fused", lambda: None),
            Entrant(BASELINE, lambda: None),
            Entrant("compile_default", lambda: None, "result 0 differs"),
            Entrant("apex", None, "not installed"),
            Entrant("attorch", broken),
        ],
        CPU,
    )

    def milliseconds(run: Callable[[], None], device: torch.device) -> float:
        run()
        return next(clocks[next(e.impl for e in found.entrants if e.run is run)])

    monkeypatch.setattr("benchmarks.harness.milliseconds", milliseconds)
    found.warm_up()
    for _ in range(3):
        found.others()
        found.our_turn()
    return found


def test_rows(contest: Contest, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.json"
    write_results(path, CPU, [contest], 1.0, {"fp32": Ceilings(1e9, 1e12)})
    written = json.loads(path.read_text())
    assert written["header"]["ceilings"] == {"fp32": {"bandwidth": 1e9, "flops": 1e12}}
    rows = {row["impl"]: row for row in written["rows"]}
    assert all(sorted(row) == sorted(FIELDS.split()) for row in rows.values())
    assert rows[BASELINE]["median_ms"] == 6.0 and rows[BASELINE]["rounds"] == 3
    assert [rows[BASELINE][key] for key in ("ratio", "ratio_p20", "ratio_p80")] == pytest.approx(
        [3, 2.4, 3.6]
    )
    assert {impl for impl, row in rows.items() if row["checked"]} == {"resnet_fused", BASELINE}
    assert {impl for impl, row in rows.items() if row["ratio"] is not None} == {BASELINE}
    assert (
        rows["compile_default"]["median_ms"] == 1.0 and rows["compile_default"]["note"] == "result 0 differs"
    )
    assert rows["apex"]["median_ms"] is None and rows["apex"]["note"] == "not installed"
    assert rows["attorch"]["median_ms"] is None
    assert rows["attorch"]["note"] == "RuntimeError: no such kernel"


def test_table(contest: Contest) -> None:
    text = table([contest, contest])
    assert "3.00x    2.40 - 3.60" in text and "geometric mean" in text
    assert "0.50x" not in text, "the speed of what computes something else"
    assert (
        "attorch, block fp32: RuntimeError: no such kernel" in text
        and "apex, block fp32: not installed" in text
    )


def test_no_ratio_where_ours_is_wrong(contest: Contest) -> None:
    contest.ours.note = "result 1 differs"
    assert not any(row["ratio"] for row in contest.rows()) and "3.00x" not in table([contest])


def test_ours_has_to_run() -> None:
    def broken() -> None:
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        Contest(CASE, [Entrant("resnet_fused", broken)], CPU).warm_up()


def test_verdicts() -> None:
    exact = [torch.randn(100, dtype=torch.float64), torch.randn(30, dtype=torch.float64)]

    def draw() -> Attempt:
        def attempt(impl: str) -> list[Tensor]:
            rounded = [x.float() for x in exact]
            if impl == "apex":
                raise RuntimeError("broken")
            if impl == "attorch":
                rounded[1] = rounded[1] * (1 + 1e-5)
            if impl == "eager":
                rounded[0][3] = torch.nan
            return exact if impl == EXACT else rounded

        return attempt

    notes = verdicts(
        draw, ["resnet_fused", BASELINE, "eager", "apex", "attorch"], torch.finfo(torch.float32).eps
    )
    assert notes["resnet_fused"] == notes[BASELINE] == "" and notes["apex"] == "RuntimeError: broken"
    assert notes["attorch"].startswith("result 1 differs from float64's by 1e-05")
    assert notes["eager"].startswith("result 0 differs from float64's by nan")


def test_a_yardstick_that_is_wrong_is_noticed() -> None:
    exact = [torch.randn(100, dtype=torch.float64)]
    notes = verdicts(lambda: lambda impl: exact if impl == EXACT else [exact[0] * 1.2], [BASELINE], 1e-7)
    assert notes[BASELINE].startswith("its output differs from float64's by 0.2")


def test_modules_have_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementations, "peer_model", lambda peer, *_: Missing(f"{peer} is not here"))
    eager, fused = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
    found = modules(IMPLS, eager, fused, PRECISIONS["fp32"], CPU)
    assert tuple(found) == IMPLS and found["resnet_fused"] is fused
    assert {impl for impl, module in found.items() if isinstance(module, Missing)} == set(PEERS)
    for impl, module in found.items():
        if isinstance(module, nn.Module) and module is not fused:
            assert module is not eager, "a step of one would change the weights of another"
            assert torch.equal(module.weight, eager.weight), impl


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
    path, arguments = tmp_path / "results.json", ["--dtypes", "fp32", "--benchmark-disable-gc"]
    arguments += ["--impls", "eager_channels_last,apex", "--results", str(path), "-k", "bn_relu-512-7"]
    done = suite("benchmarks/test_ops.py", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    ours, eager, apex = json.loads(path.read_text())["rows"]
    assert (ours["impl"], ours["name"], ours["checked"]) == ("resnet_fused", "bn_relu", True)
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

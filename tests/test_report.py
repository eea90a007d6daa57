"""What is reported is what results files say: tables and charts, of the newest files, and nothing unchecked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report

Row = dict[str, Any]
HEADER = {
    **{"device": "Some CPU", "device_type": "cpu", "threads": 2, "torch": "2.13.0", "commit": "0123456789"},
    **{"clean": True, "date": "2026-01-02T03:04:05+00:00", "seconds": 61.5},
    "ceilings": {"bf16": {"bandwidth": 5e10, "flops": 3e11}},
}
#: Milliseconds of each implementation of a case, where nothing else is said.
TIMES = {"resnet_fused": 10.0, "eager_channels_last": 20.0, "compile_default": 15.0}
MODEL = {"layer": "model", "name": "resnet50", "mode": "train", "shape": "16x3x224x224"}
BLOCK = {"layer": "block", "name": "resnet50 layer1.0", "mode": "fwd_bwd", "shape": "16x64x56x56"}
OP = {"layer": "op", "name": "bn_relu", "mode": "fwd_bwd", "shape": "16x64x112x112"}


def rows(case: Row, times: dict[str, float | None] = TIMES, **changes: Row) -> list[Row]:
    """A row per implementation, with a spread of 10 % to either side; ``changes`` by implementation."""
    of_impls = []
    for impl, time in times.items():
        ratio = None if time is None or impl == "resnet_fused" else time / (times["resnet_fused"] or 1)
        row = {**case, "dtype": "bf16", "batch": 16, "impl": impl, "checked": time is not None, "note": ""}
        for keys, value in ((report.TIME, time), (report.RATIO, ratio)):
            row |= {key: value and value * share for key, share in zip(keys, (1, 0.9, 1.1), strict=True)}
        is_model = case["layer"] == "model" and time is not None
        row |= {"peak_mb": 100 * time if is_model else None, "first_step_ms": 2 * time if is_model else None}
        of_impls.append({**row, "roofline_ms": 4.0, **changes.get(impl, {})})
    return of_impls


def write(folder: Path, name: str, measured: list[Row], **header: object) -> Path:
    path = folder / name
    path.write_text(json.dumps({"header": {**HEADER, **header}, "rows": measured}))
    return path


def texts(folder: Path) -> tuple[str, str]:
    """The tables of README.md and of RESULTS.md."""
    of_devices = report.devices(folder)
    return report.readme(of_devices), report.results(of_devices)


def line(text: str, *words: str) -> list[str]:
    """The cells of the only line of a table that begins with these."""
    lines = [part.strip("| ").split(" | ") for part in text.splitlines()]
    rest = [cells[len(words) :] for cells in lines if cells[: len(words)] == [*words]]
    assert len(rest) == 1, (words, rest)
    return [cell.strip() for cell in rest[0]]


def test_figures_are_those_of_the_file(tmp_path: Path) -> None:
    slower = rows({**BLOCK, "name": "resnet50 layer1.1"}, {**TIMES, "eager_channels_last": 5.0})
    ops = rows(OP, {"resnet_fused": 0.25, "eager": 0.5})
    write(tmp_path, "a.json", [*rows(MODEL), *rows(BLOCK), *slower, *ops])
    readme, results = texts(tmp_path)
    ratios = ["2.00x [1.80-2.20]", "1.50x [1.35-1.65]"]
    assert line(readme, "resnet50, batch 16", "bf16") == ["10.0 [9.0-11.0]", "1,600", *ratios, "0.50x"]
    assert line(readme, "resnet50 blocks, 2", "bf16") == ["1.00x (worst 0.50x)", "1.50x (worst 1.50x)"]
    cells = ["20.0 [18.0-22.0]", "800", ratios[0], "2,000", "0.50x", "40.0", "20%*"]
    assert line(results, "resnet50", "eager_channels_last") == cells
    cells = ["10.0", "40%*", "5.0, 0.50x [0.45-0.55]", "15.0, 1.50x [1.35-1.65]"]
    assert line(results, "layer1.1", "16x64x56x56") == cells
    means = ["1.00x (worst 0.50x)", "1.50x (worst 1.50x)"]
    assert line(results, "**resnet50, geometric mean**")[-2:] == means
    assert line(results, "bn_relu", "16x64x112x112")[-1] == "0.500, 2.00x [1.80-2.20]"
    for fact in ("Some CPU, 2 threads", "2026-01-02 03:04 UTC", "commit 0123456;", "50 GB/s, 300 GFLOP/s"):
        assert fact in results


def test_the_newest_of_each_device_and_layer(tmp_path: Path) -> None:
    def times(ours: float) -> dict[str, float | None]:
        return {**TIMES, "resnet_fused": ours}

    old = [*rows(MODEL, times(11.0)), *rows(BLOCK, times(12.0))]
    write(tmp_path, "z.json", old, commit="aaaaaaaaaa", date="2026-01-01T00:00:00+00:00")
    # By the local clock later than the next, earlier in fact.
    write(tmp_path, "b.json", rows(MODEL, times(13.0)), date="2026-01-02T01:30:00+02:00")
    write(tmp_path, "a.json", rows(MODEL, times(14.0)), date="2026-01-02T00:00:00+00:00", clean=False)
    write(tmp_path, "other.json", rows(MODEL, times(16.0)), threads=4)
    readme, results = texts(tmp_path)
    assert [f"{time}.0 [" in results for time in (11, 13, 14, 16)] == [False, False, True, True]
    assert line(results, "layer1.0", "16x64x56x56")[0] == "12.0"
    assert "a.json" in results and "commit 0123456 (with uncommitted changes)" in results
    assert "z.json" in results and "commit aaaaaaa;" in results
    assert results.count("## Some CPU, ") == readme.count("**Some CPU, ") == 2


@pytest.mark.parametrize("case", [MODEL, BLOCK, OP], ids=lambda case: case["layer"])
@pytest.mark.parametrize("wrong", ["eager_channels_last", "resnet_fused"])
def test_unchecked_is_no_speed_up(tmp_path: Path, case: Row, wrong: str) -> None:
    """Even where a file says so."""
    change = {"checked": False, "note": "a result differs", **dict.fromkeys(report.RATIO, 7.77)}
    write(tmp_path, "a.json", rows(case, TIMES, **{wrong: change}))
    others = 0 if wrong == "resnet_fused" else 1
    for text in texts(tmp_path):
        assert "7.77" not in text and "not checked" in text
        assert len(re.findall(r"\d\.\d\dx \[", text)) == others
    assert "not checked: a result differs" in texts(tmp_path)[1]
    data = report.chart_data(report.devices(tmp_path)[0], case["layer"])
    assert data is None or (wrong not in {*data.impl} and 7.77 not in {*data.value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.pop("header"), "header"),
        (lambda file: file["header"].pop("ceilings"), "it lacks ceilings"),
        (lambda file: [row.pop("roofline_ms") for row in file["rows"]], "it lacks roofline_ms"),
        (lambda file: file["rows"][1].update(dtype="int8"), "dtype int8 is unknown"),
        (lambda file: file["rows"].append(file["rows"][1]), "two rows of one implementation"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    path = write(tmp_path, "broken.json", rows(MODEL))
    file = json.loads(path.read_text())
    change(file)
    path.write_text(json.dumps(file))
    with pytest.raises(ValueError, match=rf"broken\.json is not a results file .*{message}"):
        report.devices(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="make bench RESULTS="):
        report.devices(tmp_path)

"""What is reported is what results files say: tables, charts and README, of the newest files, and nothing unchecked."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report, report_files

Row = dict[str, Any]
HEADER = {
    "device": "Some CPU",
    "device_type": "cpu",
    "driver": None,
    "clocks": None,
    "threads": 2,
    "python": "3.11.7",
    "torch": "2.13.0",
    "triton": None,
    "cuda": None,
    "cudnn": None,
    "resnet_fused": "0.1.0",
    "commit": "0123456789",
    "clean": True,
    "date": "2026-01-02T03:04:05+00:00",
    "seconds": 61.5,
    "ceilings": {"bf16": {"bandwidth": 5e10, "flops": 3e11}},
}
#: Milliseconds of each implementation of a case, where nothing else is said.
TIMES = {"resnet_fused": 10.0, "eager_channels_last": 20.0, "compile_default": 15.0}
MODEL = {"layer": "model", "name": "resnet50", "mode": "train", "shape": "16x3x224x224"}
BLOCK = {"layer": "block", "name": "resnet50 layer1.0", "mode": "fwd_bwd", "shape": "16x64x56x56"}
OP = {"layer": "op", "name": "bn_relu", "mode": "fwd_bwd", "shape": "16x64x112x112"}


def rows(case: Row, times: dict[str, float | None] = TIMES, **changes: Row) -> list[Row]:
    """A row per implementation, with a spread of 10 % to either side; ``changes`` by implementation."""
    found = []
    for impl, time in times.items():
        ratio = None if time is None or impl == "resnet_fused" else time / (times["resnet_fused"] or 1)
        row = {
            **case,
            "dtype": "bf16",
            "batch": 16,
            "impl": impl,
            "rounds": 8,
            "checked": time is not None,
            "note": "",
        }
        for keys, value in (
            (("median_ms", "p20_ms", "p80_ms"), time),
            (("ratio", "ratio_p20", "ratio_p80"), ratio),
        ):
            row |= {key: value and value * share for key, share in zip(keys, (1, 0.9, 1.1), strict=True)}
        model = case["layer"] == "model" and time is not None
        row |= {"peak_mb": 100 * time if model else None, "first_step_ms": 2 * time if model else None}
        found.append({**row, "roofline_ms": 4.0, **changes.get(impl, {})})
    return found


def write(root: Path, name: str, found: list[Row], **header: object) -> Path:
    path = root / "benchmarks" / "results" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"header": {**HEADER, **header}, "rows": found}))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout without results."""
    (tmp_path / "README.md").write_text("before\n<!-- results: start -->\n<!-- results: end -->\nafter\n")
    (tmp_path / "constraints.txt").write_text((report.ROOT / "constraints.txt").read_text())
    return tmp_path


def reported(root: Path, *arguments: str) -> int:
    return report.main(["--root", str(root), *arguments])


def texts(root: Path) -> tuple[str, str]:
    """README.md and RESULTS.md, written anew."""
    assert reported(root) == 0
    return (root / report.README).read_text(), (root / report.RESULTS).read_text()


def line(text: str, *words: str) -> list[str]:
    """The cells of the only line of a table that begins with these."""
    found = [
        cells
        for part in text.splitlines()
        if (cells := part.strip("| ").split(" | "))[: len(words)] == [*words]
    ]
    assert len(found) == 1, (words, found)
    return [cell.strip() for cell in found[0][len(words) :]]


def test_readme_shows_the_newest_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--check"]) == 0, capsys.readouterr().err


def test_figures_are_those_of_the_file(root: Path) -> None:
    slower = rows({**BLOCK, "name": "resnet50 layer1.1"}, {**TIMES, "eager_channels_last": 5.0})
    write(
        root, "a.json", [*rows(MODEL), *rows(BLOCK), *slower, *rows(OP, {"resnet_fused": 0.25, "eager": 0.5})]
    )
    readme, results = texts(root)
    assert readme.startswith("before\n") and readme.endswith("\nafter\n")
    assert line(readme, "resnet50, batch 16", "bf16") == [
        "10.0 [9.0-11.0]",
        "1,600",
        "2.00x [1.80-2.20]",
        "1.50x [1.35-1.65]",
        "0.50x",
    ]
    assert line(readme, "resnet50 blocks, 2", "bf16") == ["1.00x (worst 0.50x)", "1.50x (worst 1.50x)"]
    assert line(results, "resnet50", "eager_channels_last") == [
        *("20.0 [18.0-22.0]", "800", "2.00x [1.80-2.20]", "2,000", "0.50x", "40.0", "20%*"),
    ]
    assert line(results, "layer1.1", "16x64x56x56") == [
        *("10.0", "40%*", "5.0, 0.50x [0.45-0.55]", "15.0, 1.50x [1.35-1.65]"),
    ]
    assert line(results, "**resnet50, geometric mean**")[-2:] == [
        "1.00x (worst 0.50x)",
        "1.50x (worst 1.50x)",
    ]
    assert line(results, "bn_relu", "16x64x112x112")[-1] == "0.500, 2.00x [1.80-2.20]"
    for fact in (
        "Some CPU, 2 threads",
        "2026-01-02 03:04 UTC",
        "commit 0123456;",
        "50 GB/s and 300 GFLOP/s",
        "62 s",
    ):
        assert fact in results
    for chart in re.findall(r"!\[[^]]+\]\(([^)]+)\)", results):
        assert (root / "benchmarks" / chart).is_file()
    bars = (root / report_files.CHARTS / "some-cpu-2-threads-blocks.svg").read_text()
    assert "resnet50 layer1.1" in bars and bars.count("0.50x") == 1 and bars.count("1.50x") == 2


@pytest.mark.parametrize(
    ("path", "before", "after"),
    [
        ("README.md", "2.00x", "2.01x"),
        ("benchmarks/RESULTS.md", "20.0 [", "20.1 ["),
        ("benchmarks/results/charts/some-cpu-2-threads-models.svg", "1,600", "1,700"),
        ("benchmarks/results/charts/some-cpu-2-threads-models.svg", "", None),
        ("benchmarks/RESULTS.md", "", None),
    ],
)
def test_a_change_is_noticed(
    root: Path, path: str, before: str, after: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    write(root, "a.json", rows(MODEL))
    texts(root)
    assert reported(root, "--check") == 0
    good = (root / path).read_text()
    if after is None:
        (root / path).unlink()
    else:
        assert before in good
        (root / path).write_text(good.replace(before, after))
    assert reported(root, "--check") == 1
    said = capsys.readouterr().err
    assert path in said and "make report" in said and "matplotlib" not in said
    assert not (root / path).exists() if after is None else (root / path).read_text() != good, "--check wrote"
    assert reported(root) == 0
    assert (root / path).read_text() == good


def test_charts_of_what_is_gone_are_removed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(root, "a.json", rows(MODEL))
    gone = write(root, "b.json", rows(MODEL), device="Another")
    texts(root)
    gone.unlink()
    chart = report_files.CHARTS / "another-2-threads-models.svg"
    assert reported(root, "--check") == 1
    assert f"of no results: {chart}" in capsys.readouterr().err
    texts(root)
    assert [path.name for path in (root / report_files.CHARTS).iterdir()] == ["some-cpu-2-threads-models.svg"]


def test_another_matplotlib_is_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(root, "a.json", rows(MODEL))
    texts(root)
    (root / "constraints.txt").write_text("matplotlib==0.1\n")
    assert reported(root, "--check") == 0
    chart = next((root / report_files.CHARTS).iterdir())
    chart.write_text("drawn by another version")
    assert reported(root, "--check") == 1
    assert "and 0.1 in constraints.txt" in capsys.readouterr().err


def test_the_newest_of_each_device_and_layer(root: Path) -> None:
    old = [*rows(MODEL, {**TIMES, "resnet_fused": 11.0}), *rows(BLOCK, {**TIMES, "resnet_fused": 12.0})]
    write(root, "z-old.json", old, commit="aaaaaaaaaa", date="2026-01-01T00:00:00+00:00")
    # Later than the next by the clock on the wall, earlier in fact.
    write(root, "b.json", rows(MODEL, {**TIMES, "resnet_fused": 13.0}), date="2026-01-02T01:30:00+02:00")
    write(
        root,
        "a-new.json",
        rows(MODEL, {**TIMES, "resnet_fused": 14.0}),
        date="2026-01-02T00:00:00+00:00",
        clean=False,
    )
    write(root, "other.json", rows(MODEL, {**TIMES, "resnet_fused": 16.0}), threads=4)
    readme, results = texts(root)
    assert [f"{time}.0 [" in results for time in (11, 13, 14, 16)] == [False, False, True, True]
    assert line(results, "layer1.0", "16x64x56x56")[0] == "12.0"
    assert "a-new.json" in results and "commit 0123456 (with uncommitted changes)" in results
    assert "z-old.json" in results and "commit aaaaaaa;" in results
    assert results.count("\n## ") == readme.count("\n**Some CPU, ") == 2


@pytest.mark.parametrize("case", [MODEL, BLOCK, OP])
@pytest.mark.parametrize("wrong", ["eager_channels_last", "resnet_fused"])
def test_unchecked_is_no_speed_up(root: Path, case: Row, wrong: str) -> None:
    # Even where a file says so.
    times = {**TIMES, "eager_channels_last": 77.7}
    change = {
        "checked": False,
        "note": "a result differs",
        "ratio": 7.77,
        "ratio_p20": 7.77,
        "ratio_p80": 7.77,
    }
    write(root, "a.json", rows(case, times, **{wrong: change}))
    readme, results = texts(root)
    charts = [chart.read_text() for chart in (root / report_files.CHARTS).glob("*.svg")]
    assert not any("7.77" in text for text in (readme, results, *charts))
    assert "not checked: a result differs" in results
    others = 1 if wrong != "resnet_fused" else 0
    for text in (readme, results):
        assert len(re.findall(r"\d\.\d\dx \[|\d\.\d\dx \(worst", text)) == others
    if case is MODEL:
        assert line(results, "resnet50", wrong)[1] == "", "images per second"
        assert " reached" not in results and " missed" not in results
        assert line(readme, "resnet50, batch 16", "bf16")[0 if others == 0 else 2] == "not checked"
    assert any("1.50x" in text for text in charts) == (case is BLOCK and others == 1)


@pytest.mark.parametrize("case", [MODEL, BLOCK, OP])
def test_what_is_missing_is_named(root: Path, case: Row) -> None:
    note = {"note": "not installed: | <none>\nat all"}
    write(root, "a.json", rows(case, {**TIMES, "apex": None, "compile_max_autotune": None}, apex=note))
    readme, results = texts(root)
    assert re.search(
        r"apex (\| )*not measured: not installed: \\\| &lt;none> at all", re.sub(r" +", " ", results)
    )
    assert re.search(r"compile_max_autotune [| ]*not measured", results)
    assert "max-autotune / fused" in readme and "not measured" in readme


def test_a_mean_says_what_it_lacks(root: Path) -> None:
    other = rows({**BLOCK, "name": "resnet50 layer1.1"}, {**TIMES, "compile_default": None})
    write(root, "a.json", [*rows(BLOCK), *other])
    readme, results = texts(root)
    assert line(readme, "resnet50 blocks, 2", "bf16")[1] == "1.50x (worst 1.50x, 1 of 2)"
    assert line(results, "layer1.1", "16x64x56x56")[-1] == "- <sup>1</sup>"
    assert "\n<sup>1</sup> compile_default not measured\n" in results


def test_aims_and_what_is_published(root: Path) -> None:
    times = {"resnet_fused": 10.0, "eager_channels_last": 20.0, "compile_max_autotune": 14.0}
    figures = rows(MODEL, times, resnet_fused={"peak_mb": 1200.0})
    write(root, "a.json", figures)
    assert "aims" not in texts(root)[1], "they are for a GPU"
    write(root, "a.json", figures, device="NVIDIA A100", device_type="cuda")
    _, results = texts(root)
    aims = ["2.00x: reached by 0.00x", "1.40x: missed by 0.10x", "0.60x: missed by 0.05x"]
    assert line(results, "resnet50", "bf16") == aims
    assert "MLPerf" not in results
    write(root, "b.json", rows(MODEL, times), device="NVIDIA H100 80GB HBM3", device_type="cuda")
    assert "1,600 in bf16 at batch 16 (0.22x), beside 7,158, NVIDIA's MLPerf" in texts(root)[1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda file: file.pop("header"), "the file lacks header"),
        (lambda file: file["header"].pop("ceilings"), "header lacks ceilings"),
        (lambda file: file["header"].update(date="yesterday"), "yesterday"),
        (lambda file: file["header"].update(date="2026-01-02T03:04:05"), "without +00:00"),
        (lambda file: file["header"].update(clocks={"sm_mhz": 1}), "clocks lacks memory_mhz"),
        (
            lambda file: file["header"].update(ceilings={"bf16": {"flops": 1.0}}),
            "ceilings of bf16 lacks bandwidth",
        ),
        (lambda file: file["rows"][1].pop("roofline_ms"), "row 1 lacks roofline_ms"),
        (lambda file: file["rows"][1].update(median_ms="fast"), "median_ms of row 1 is 'fast'"),
        (lambda file: file["rows"][1].update(checked=1), "checked of row 1 is 1"),
        (lambda file: file["rows"][1].update(dtype="int8"), "dtype of row 1 is 'int8'"),
        (lambda file: file["rows"][1].update(p20_ms=None), "median_ms of row 1"),
        (lambda file: file["rows"][1].update(ratio=float("nan")), "ratio of row 1 is nan"),
        (lambda file: file["rows"].pop(0), "needs one row of resnet_fused"),
        (lambda file: file["rows"].append(file["rows"][1]), "and one of each other"),
    ],
)
def test_a_broken_file_is_refused(
    root: Path, change: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(root, "good.json", rows(MODEL))
    path = write(root, "broken.json", rows(MODEL))
    file = json.loads(path.read_text())
    change(file)
    path.write_text(json.dumps(file))
    readme = (root / "README.md").read_text()
    with pytest.raises(SystemExit, match="2"):
        reported(root)
    error = " ".join(capsys.readouterr().err.split())
    assert "broken.json is not a results file" in error and said in error
    assert (root / "README.md").read_text() == readme


def test_nothing_to_report_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        reported(root)
    assert "make bench RESULTS=" in capsys.readouterr().err
    write(root, "a.json", rows(MODEL))
    (root / "README.md").write_text("no markers")
    with pytest.raises(SystemExit, match="2"):
        reported(root)
    assert "must hold the markers" in capsys.readouterr().err


def test_the_same_bytes_anywhere(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever the hash seed, the current folder and what matplotlib finds there, the zone and the order of files."""
    other = tmp_path_factory.mktemp("other")
    for name in ("README.md", "constraints.txt"):
        (other / name).write_text((root / name).read_text())
    files = {"a.json": "A", "b.json": "B", "c.json": "A"}
    for place, names in ((root, files), (other, reversed(files))):
        for name in names:
            write(place, name, [*rows(MODEL), *rows(BLOCK), *rows(OP)], device=files[name], commit=name)
    (other / "matplotlibrc").write_text("font.size: 20\naxes.facecolor: red\nsvg.fonttype: path\n")
    for place, seed, zone in ((root, "1", "UTC"), (other, "2", "Asia/Tokyo")):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "TZ": zone, "PYTHONPATH": str(report.ROOT)}
        command = [sys.executable, "-m", "benchmarks.report", "--root", str(place)]
        subprocess.run(command, check=True, cwd=place, env=environment)
    written = [
        {
            path.relative_to(place): path.read_bytes()
            for path in place.rglob("*")
            if path.suffix in (".md", ".svg")
        }
        for place in (root, other)
    ]
    assert written[0] == written[1] and len(written[0]) == 2 + 2 * 2

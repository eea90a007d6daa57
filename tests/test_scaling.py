"""benchmarks.scaling on a CPU: a small run, and the page that is made of its results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import scaling, scaling_page


def test_a_small_run(tmp_path: Path) -> None:
    """All four curves, checked, and the tables of a page."""
    file = tmp_path / "folder" / "quick.json"
    assert scaling.main([str(file), "--quick"]) == 0
    results = json.loads(file.read_text())
    assert results["header"]["ceilings"]["fp32"]["bandwidth"] > 0
    rows = results["curves"]
    assert {row["curve"] for row in rows} == {"batch", "image_size", "depth", "ranks"}
    assert {(row["x"], row["variant"], row["impl"]) for row in rows if row["curve"] == "ranks"} == {
        *((ranks, "alone", impl) for ranks in (1, 2) for impl in scaling.IMPLS),
        *((2, "ddp", impl) for impl in scaling.IMPLS),
        (2, "syncbn", "resnet_fused"),
    }
    for row in rows:
        assert row["checked"] and row["p20_ms"] <= row["median_ms"] <= row["p80_ms"], row
        ranks = row["x"] if row["curve"] == "ranks" else 1
        assert row["images_per_s"] == pytest.approx(1e3 * 4 * ranks / row["median_ms"])
        assert (row["peak_mb"] is None) == (row["curve"] == "ranks")
        assert (row["ratio"] is None) == (row["impl"] == "resnet_fused")
    assert len(scaling_page.ranks_table(scaling_page.latest(file.parent)[1]).splitlines()) == 2 + 4


def test_what_was_not_checked_is_not_shown(tmp_path: Path) -> None:
    name = next(scaling_page.RESULTS.glob("*.json"))
    content = json.loads(name.read_text())
    before = scaling_page.tables()
    point = min(row["x"] for row in content["curves"] if row["curve"] == "batch")
    for row in content["curves"]:
        if (row["curve"], row["x"], row["impl"]) == ("batch", point, "resnet_fused"):
            row["checked"] = False
    (tmp_path / "a.json").write_text(json.dumps(content))
    after = scaling_page.tables(tmp_path)
    assert f"| batch {point} |" in before["curves"] and f"| batch {point} |" not in after["curves"]
    assert before["growth"] != after["growth"] and before["ranks"] == after["ranks"]


def test_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        scaling.main(["results.txt"])
    assert "name a file that ends in .json" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit):
        scaling.main(["results.json"])
    assert "without torchrun" in capsys.readouterr().err
    with pytest.raises(ValueError, match="has no results: run"):
        scaling_page.latest(tmp_path)
    (tmp_path / "other.json").write_text('{"header": {}, "rows": []}')
    with pytest.raises(ValueError, match="is no file of"):
        scaling_page.latest(tmp_path)

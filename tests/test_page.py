"""Generated tables and charts: where they go, and what counts as stale."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from benchmarks import docs_check, page
from benchmarks.page import Chart, Page, markdown, with_tables

TEXT = "before\n<!-- table: start -->\n<!-- table: end -->\nafter\n"


def test_a_markdown_table() -> None:
    frame = pd.DataFrame(
        [["a", "1,000 [9-11]", "64x64 4w"], ["b", "", "64x64 8w"]], columns=["name", "ms", "config"]
    )
    assert markdown(frame).splitlines() == [
        "| name | ms | config |",
        "| --- | ---: | --- |",
        "| a | 1,000 [9-11] | 64x64 4w |",
        "| b |  | 64x64 8w |",
    ]


def test_tables_go_between_their_markers() -> None:
    once = with_tables(TEXT, {"table": "new"})
    assert once == "before\n<!-- table: start -->\nnew\n<!-- table: end -->\nafter\n"
    assert with_tables(once, {"table": "new"}) == once
    with pytest.raises(ValueError, match="must hold the markers"):
        with_tables("no markers", {"table": "new"})


def test_what_is_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(page, "ROOT", tmp_path)
    monkeypatch.setattr(docs_check, "ROOT", tmp_path)
    text, picture = tmp_path / "page.md", tmp_path / "charts" / "chart.svg"
    text.write_text(TEXT)
    value = 1

    def chart() -> Chart:
        return Chart(picture, pd.DataFrame({"x": [value]}), lambda data: Figure())

    made = Page(text, "python -m it --write", lambda: {"table": str(value)}, lambda: [chart()])
    assert made.stale() == [text, picture]
    assert made.main([], None) == 0 and capsys.readouterr().out == "1\n" and text.read_text() == TEXT
    assert made.main(["--write"], None) == 0 and made.stale() == []
    drawn = picture.read_bytes()
    assert b"<dc:date>" not in drawn
    picture.unlink()
    made.write()
    assert picture.read_bytes() == drawn, "the same data, the same bytes"

    (tmp_path / "README.md").write_text("nothing")
    monkeypatch.setattr(docs_check, "PAGES", (made,))
    monkeypatch.setattr(docs_check, "readme_sentences", lambda: ["something"])
    assert list(docs_check.problems()) == ["README.md must say: something"]
    value = 2
    found = list(docs_check.problems())
    assert [line.partition(" ")[0] for line in found[:2]] == ["page.md", "charts/chart.svg"]
    assert all(line.endswith("is stale: run `python -m it --write`") for line in found[:2])
    text.write_text("no markers")
    assert "page.md: the page must hold the markers" in next(docs_check.problems())

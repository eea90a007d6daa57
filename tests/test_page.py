"""Generated tables and charts: where they go, and what counts as stale."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from benchmarks import docs_check, page
from benchmarks.page import Chart, Page

TEXT = "before\n<!-- table: start -->\n<!-- table: end -->\nafter\n"


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

    generated = Page(text, "python -m it --write", lambda: {"table": str(value)}, lambda: [chart()])
    assert generated.stale() == [text, picture]
    assert generated.main([], None) == 0 and capsys.readouterr().out == "1\n" and text.read_text() == TEXT
    assert generated.main(["--write"], None) == 0 and generated.stale() == []
    drawn = picture.read_bytes()
    assert b"<dc:date>" not in drawn
    picture.unlink()
    generated.write()
    assert picture.read_bytes() == drawn, "the same data, the same bytes"

    (tmp_path / "README.md").write_text("nothing")
    monkeypatch.setattr(docs_check, "PAGES", (generated,))
    monkeypatch.setattr(docs_check, "readme_sentences", lambda: ["something"])
    assert list(docs_check.problems()) == ["README.md must say: something"]
    value = 2
    page_problem, chart_problem, _ = docs_check.problems()
    assert page_problem == "page.md is stale: run `python -m it --write`"
    assert chart_problem == "charts/chart.svg is stale: run `python -m it --write`"
    text.write_text("no markers")
    assert "page.md: the page must hold the markers" in next(docs_check.problems())

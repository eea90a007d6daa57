"""README's figures are those of the newest results file: no number is typed by hand."""

from __future__ import annotations

import pytest

from benchmarks import report


def test_readme_shows_the_newest_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--check"]) == 0, capsys.readouterr().err


def test_a_changed_figure_is_noticed() -> None:
    readme = (report.ROOT / "README.md").read_text()
    assert report.with_table(readme, "other figures") != readme
    with pytest.raises(ValueError, match="must hold the markers"):
        report.with_table("no markers", "figures")

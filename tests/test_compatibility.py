"""docs/compatibility.md: every test of tests/compat has a row, made of its docstring and its last results."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import compatibility


def test_the_page_shows_every_test() -> None:
    assert compatibility.PAGE.stale() == []


def test_rows() -> None:
    assert compatibility.state({"passed": 1}) == "passed, 1 case"
    outcomes = {"passed": 3, "needs a CUDA device": 2, "could not import 'captum'": 1, "failed": 4}
    expected = "passed, 3 cases; on a GPU not yet run, 2 cases; could not import 'captum', 1; failed, 4"
    assert compatibility.state(outcomes) == expected


def test_a_test_without_a_feature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compatibility, "ROOT", tmp_path)
    path = tmp_path / "test_it.py"
    path.write_text('"""Things"""\n\ndef test_a():\n    """A thing.\n\n    More."""\n\ndef helper(): ...\n')
    assert compatibility.tests_of(path) == ("Things", {"test_it.py::test_a": "A thing"})
    path.write_text('"""Things"""\n\ndef test_a(): ...\n')
    with pytest.raises(ValueError, match="test_a has no docstring, which names its feature"):
        compatibility.tests_of(path)

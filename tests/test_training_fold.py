"""docs/training-fold.md: its tables are what its script prints, and its figures bear out what it says."""

from __future__ import annotations

import re
from itertools import zip_longest

import pytest
import torch

from benchmarks import training_fold
from benchmarks.page import with_tables


def figures(line: str) -> list[float]:
    return [float(x) for x in re.findall(r"\d+e-?\d+", line)]


@pytest.fixture(scope="module")
def tables() -> dict[str, str]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {name: make() for name, make in training_fold.TABLES.items()}
    finally:
        torch.set_num_threads(threads)


def test_the_page_shows_what_the_script_prints(tables: dict[str, str]) -> None:
    """Text to the letter; errors within a factor of 2, since products sum in another order on another processor.

    Those above 0.1 are of results without a correct digit, and may be anything.
    """
    page = training_fold.PAGE.read_text()
    assert with_tables(page, {"folded": tables["folded"]}) == page
    shown = page.partition("<!-- accuracy: start -->")[2].partition("<!-- accuracy: end -->")[0].strip()
    for ours, theirs in zip_longest(tables["accuracy"].splitlines(), shown.splitlines(), fillvalue=""):
        assert re.sub(r"\d+e-?\d+", "", ours) == re.sub(r"\d+e-?\d+", "", theirs)
        for now, then in zip(figures(ours), figures(theirs), strict=True):
            assert 0.4 <= now / then <= 2.5 or min(now, then) > 0.05


def test_folded_is_as_accurate_as_rounding_allows(tables: dict[str, str]) -> None:
    """The third of each three figures does not grow with the mean of the input."""
    rows = tables["accuracy"].splitlines()[2:]
    for row in rows:
        limit = 1e-6 if row.startswith("| fp32") else 1e-2
        assert max(figures(row)[2::3]) < limit


def test_missing_markers_are_an_error() -> None:
    with pytest.raises(ValueError, match="must hold the markers"):
        with_tables("no markers", {"folded": "table"})

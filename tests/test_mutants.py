"""The list of faults of tools.mutants fits the code, and its verdicts are what pytest's exit status says."""

from __future__ import annotations

import shlex
from collections import Counter

import pytest

from benchmarks.page import ROOT
from tools.mutants import verdict
from tools.mutants_list import MUTANTS, Mutant

EVERY = [mutant for mutants in MUTANTS.values() for mutant in mutants]


@pytest.mark.parametrize("mutant", EVERY, ids=lambda mutant: mutant.name)
def test_the_list_fits_the_code(mutant: Mutant) -> None:
    source = (ROOT / mutant.file).read_text()
    planted = mutant.planted_in(source)
    assert planted != source
    if mutant.file.endswith(".py"):
        compile(planted, mutant.file, "exec")
    files = [word for word in shlex.split(mutant.tests) if word.startswith("tests/")]
    assert files
    for file, _, test in (word.partition("::") for word in files):
        assert (ROOT / file).is_file(), file
        assert f"def {test}" in (ROOT / file).read_text(), test


def test_names_are_unique() -> None:
    assert max(Counter(mutant.name for mutant in EVERY).values()) == 1


@pytest.mark.parametrize("source", ["", "a = 1\na = 1\n"])
def test_text_that_is_not_there_once_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match=r"fault: x\.py has its text [02] times, not once"):
        Mutant("fault", "x.py", "a = 1", "a = 2", "tests/test_mutants.py").planted_in(source)


@pytest.mark.parametrize(
    ("status", "output", "outcome"),
    [
        (0, "3 passed in 0.1s", "survived"),
        (0, "3 skipped in 0.1s", "broken"),
        (1, "FAILED tests/test_a.py::test_b - assert", "killed"),
        (2, "ERROR tests/test_a.py\n1 error in 0.1s", "broken"),
        (4, "ERROR: not found: tests/test_a.py::test_b", "broken"),
        (5, "no tests ran in 0.1s", "broken"),
        (-11, "", "killed"),
    ],
)
def test_verdicts(status: int, output: str, outcome: str) -> None:
    assert verdict(status, output).outcome == outcome

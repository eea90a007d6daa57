"""docs/dependencies.md: what is read of pyproject.toml and of installed packages."""

from __future__ import annotations

import pytest

from tools import dependencies
from tools.dependencies import Requirement, licences, requirements

TEXT = """
[build-system]
requires = ["builder"]  # builds

[project]
name = "it"
# The core.
dependencies = ["core>=2"]

[project.optional-dependencies]
# Of both
# packages.
pair = ["one>=1", "two; python_version < '4'"]
all = [
  "it[pair]",
  # Above.
  "above",
  "beside[extra]==3",  # Beside.
  "builder",           # Again.
]
"""


def test_every_requirement_with_its_comment() -> None:
    """pyproject.toml's requirements: each with the comment beside it or above it, and its versions."""
    assert list(requirements(TEXT)) == [
        Requirement("builder", "to build", "any", "builds"),
        Requirement("core", "always", ">=2", "The core."),
        Requirement("one", "`pair`", ">=1", "Of both packages."),
        Requirement("two", "`pair`", "any, if python_version < '4'", "Of both packages."),
        Requirement("above", "`all`", "any", "Above."),
        Requirement("beside", "`all`", "==3", "Beside."),
        Requirement("builder", "`all`", "any", "Again."),
    ]
    with pytest.raises(ValueError, match="must say in a comment what above in `all` is for"):
        list(requirements(TEXT.replace("  # Above.\n", "")))


def test_licences_are_the_same_on_every_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package in another version than the pinned one, or not installed, keeps the licence that the page has."""
    written = licences({"pytest", "torch"})
    monkeypatch.setattr(dependencies, "licence_of", lambda name: f"another than {written[name]}")
    assert licences({"pytest"})["pytest"].startswith("another than ")

    class Newer:
        version = "9999.0"

    monkeypatch.setattr(dependencies, "distribution", lambda name: Newer)
    assert licences({"pytest"})["pytest"] == written["pytest"]

    def missing(name: str) -> None:
        raise dependencies.PackageNotFoundError(name)

    monkeypatch.setattr(dependencies, "distribution", missing)
    assert licences({"torch"})["torch"] == written["torch"]
    with pytest.raises(ValueError, match="the licence of no-such-package is not known: install"):
        licences({"no-such-package"})


def test_the_page_shows_what_pyproject_requires() -> None:
    """docs/dependencies.md: its table is what `python -m tools.dependencies --write` makes of pyproject.toml."""
    assert dependencies.PAGE.stale() == []

"""The tables of docs/compatibility.md: ``python -m benchmarks.compatibility [--write]``.

From docs/compatibility.json, which ``make compatibility`` writes: the outcomes of tests/compat. A test's feature is the
first line of its docstring, and a table's title that of its file.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.page import ROOT, Page, markdown

RESULTS = ROOT / "docs" / "compatibility.json"
TESTS = ROOT / "tests" / "compat"
NEEDS_GPU = "needs a CUDA device"


def tests_of(path: Path) -> tuple[str, dict[str, str]]:
    """A file's title, and {test: its feature}, by the docstrings.

    Raises:
        ValueError: one is missing.
    """
    tree = ast.parse(path.read_text())
    functions = [
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test")
    ]
    title = _first_line(tree)
    lines = [_first_line(function) for function in functions]
    if missing := [node.name for node, line in zip(functions, lines, strict=True) if not line]:
        raise ValueError(f"{path}: {missing[0]} has no docstring, which names its feature")
    names = [f"{path.relative_to(ROOT)}::{function.name}" for function in functions]
    return title, dict(zip(names, lines, strict=True))


def _first_line(node: ast.Module | ast.FunctionDef) -> str:
    return (ast.get_docstring(node) or "").partition("\n")[0].rstrip(".")


def state(outcomes: dict[str, int]) -> str:
    """What a row says of a test's outcomes: cases that passed, and which have not run and why."""
    parts = []
    if passed := outcomes.get("passed", 0):
        parts.append(f"passed, {passed} case{'s' * (passed > 1)}")
    for outcome, count in outcomes.items():
        if NEEDS_GPU in outcome:
            parts.append(f"on a GPU not yet run, {count} case{'s' * (count > 1)}")
        elif outcome != "passed":
            parts.append(f"{outcome}, {count}")
    return "; ".join(parts)


def tables() -> dict[str, str]:
    import pandas as pd

    results: dict[str, Any] = json.loads(RESULTS.read_text())
    found: dict[str, Any] = results["tests"]
    parts = []
    for path in sorted(TESTS.glob("test_*.py")):
        title, features = tests_of(path)
        rows = [
            (feature, state(found.pop(name, {"not in docs/compatibility.json": 1})))
            for name, feature in features.items()
        ]
        table = markdown(pd.DataFrame(rows, columns=["feature", "result"]))
        parts.append(f"## {title}\n\n{table}")
    if found:
        raise ValueError(f"{RESULTS} has {next(iter(found))}, which is no test: run make compatibility")
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return {"versions": f"Run with {versions}.", "features": "\n\n".join(parts)}


PAGE = Page(
    path=ROOT / "docs" / "compatibility.md",
    command="python -m benchmarks.compatibility --write",
    tables=tables,
)

if __name__ == "__main__":
    sys.exit(PAGE.main(sys.argv[1:], __doc__))

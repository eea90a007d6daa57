"""Records what passed for docs/compatibility.md: ``pytest tests/compat --compat-results docs/compatibility.json``."""

from __future__ import annotations

import json
import platform
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import outcome_of

_OPTION = "--compat-results"
#: What the results are of.
_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "onnxruntime",
    "torchao",
    "captum",
    "lightning",
    "accelerate",
    "transformers",
    "fastai",
)
_outcomes: dict[str, Counter[str]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(_OPTION, type=Path, metavar="FILE", help="write the outcomes of tests/compat to a file")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Counts outcomes by test, with the reason where it was skipped; of one process, or of all of pytest-xdist."""
    file, _, test = report.nodeid.partition("::")
    if not file.startswith("tests/compat/") or (report.when != "call" and report.passed):
        return
    _outcomes.setdefault(f"{file}::{test.partition('[')[0]}", Counter())[outcome_of(report)] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption(_OPTION, None)
    if path is None or hasattr(session.config, "workerinput"):
        return
    versions = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    results: dict[str, Any] = {name: dict(sorted(_outcomes[name].items())) for name in sorted(_outcomes)}
    path.write_text(json.dumps({"versions": versions, "tests": results}, indent=1) + "\n")

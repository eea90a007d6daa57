"""tools/packages.py: what the environments hold in which packages are checked."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from tools.packages import Interpreter, Venv


def test_an_environment_has_torch_alone() -> None:
    """An interpreter's torch, linked into a new environment: it and what it requires, nothing that is beside it."""
    found = Interpreter.at(Path(sys.executable))
    assert {"torch", "sympy", "typing_extensions.py"} <= found.links.keys()
    assert not {"resnet_fused", "pytest", "numpy"} & found.links.keys()
    assert all(Path(path).exists() for path in found.links.values())


def test_the_oldest_and_the_newest_torch() -> None:
    """Interpreters sorted by torch, then by Python: 2.9 is older than 2.13, Python 3.9 than 3.12."""
    some = Interpreter(Path(), "3.12.1", "2.13.0+cpu", {})
    ages = [replace(some, python="3.13.0", torch="2.9.1+cu130"), replace(some, python="3.9.1"), some]
    assert sorted(reversed(ages), key=lambda found: found.age) == ages
    assert str(some) == "Python 3.12.1, torch 2.13.0+cpu, without triton"


def test_what_an_uninstallation_may_not_leave(tmp_path: Path) -> None:
    """Files of an environment before and after: what Python compiles of other packages may differ, nothing else."""
    ours = ["bin/resnet-fused", "lib/resnet_fused/__pycache__/native.pyc", "lib/other/file.py"]
    others = ["lib/other/__pycache__/file.pyc", "temporary files/pip/log"]
    for name in [*ours, *others]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = Venv(tmp_path, Interpreter(Path(), "3.12.1", "2.13.0", {})).files()
    assert {name for name in found if (tmp_path / name).is_file()} == {*ours}
    assert "lib/resnet_fused/__pycache__" in found and "lib/other/__pycache__" not in found

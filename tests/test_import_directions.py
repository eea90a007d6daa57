"""The doors of the house: who may import whom, and what the front door may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "resnet_fused"

#: Room: rooms of this package that it may import from, beside itself. Everything may import _version.
DOORS = {
    "reference": set(),
    "accuracy": set(),
    "native": {"_C"},
    "backend": {"native", "ops"},
    "kernels": {"accuracy", "backend", "reference"},
    "ops": {"backend", "kernels", "native", "reference"},
    "functional": {"ops"},
    "modules": {"backend", "ops", "reference"},
    "models": {"backend", "modules", "ops", "reference"},
    "plan": {"backend", "kernels", "models", "ops", "reference"},
    "measure": {"accuracy"},
    "cli": {"", "accuracy", "backend", "measure", "models", "native", "plan", "reference"},
    "__main__": {"cli"},
    "cuda_graph": set(),
    "": {"backend", "cuda_graph", "functional", "models", "native", "ops", "reference"},
    "_version": set(),
}


def room_of(module: str) -> str:
    """resnet_fused.ops.bn_relu -> ops; resnet_fused -> the empty name of the front door."""
    return module.partition(".")[2].partition(".")[0]


def imports_of(path: Path) -> set[str]:
    """Full names of all modules and names that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_through_the_doors(path: Path) -> None:
    relative = path.relative_to(PACKAGE).with_suffix("").parts
    room = "" if relative == ("__init__",) else relative[0]
    rooms = {p.relative_to(PACKAGE).with_suffix("").parts[0] for p in FILES} | {"_C"}
    for name in imports_of(path):
        if name.split(".")[0] != "resnet_fused":
            assert room != "reference" or name.split(".")[0] in {"torch", *sys.stdlib_module_names}, (
                f"the reference imports only torch, not {name}"
            )
            continue
        target = room_of(name)
        target = target if target in rooms else ""  # a constructor or other name of the front door
        assert target in DOORS[room] | {room, "_version"}, f"{room} may not import {name}"


def test_front_door_loads_nothing_optional() -> None:
    code = (
        "import sys, {}; optional = ['sklearn', 'matplotlib', 'tqdm', 'PIL', 'triton', 'torchvision'];"
        "print([m for m in optional if m in sys.modules])"
    )
    loaded = [
        subprocess.check_output([sys.executable, "-c", code.format(module)], text=True)
        for module in ("resnet_fused", "torch")
    ]
    assert loaded[0] == loaded[1], "importing resnet_fused loads more than torch does"

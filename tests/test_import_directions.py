"""Which module of the package may import which, that no imports form a cycle, and what importing the package loads."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "resnet_fused"

#: Module or subpackage: what it may import, beside itself and _version; see docs/architecture.md.
LAYERS = {
    "_version": set(),
    "environment": set(),
    "layout": set(),
    "types": set(),
    "accuracy": set(),
    "native": {"_C", "environment"},
    "backend": {"environment", "native"},
    "weights": set(),
    "reference": {"layout", "types", "weights"},
    "kernels": {"accuracy", "backend", "layout", "types"},
    "ops": {"backend", "kernels", "layout", "native", "reference", "types"},
    "functional": {"ops", "types"},
    "modules": {"backend", "layout", "ops", "types"},
    "blocks": {"modules", "ops"},
    "models": {"blocks", "reference"},
    "fuse": {"blocks", "models", "modules"},
    "timm": {"fuse"},
    "explain": {"backend", "blocks", "fuse", "modules"},
    "plan": {"backend", "kernels", "models", "ops", "reference"},
    "measure": {"accuracy"},
    "cuda_graph": set(),
    "": {"backend", "cuda_graph", "explain", "functional", "fuse", "models", "native", "ops", "reference"},
    "cli": {
        "",
        "accuracy",
        "backend",
        "environment",
        "measure",
        "models",
        "native",
        "ops",
        "plan",
        "reference",
        "weights",
    },
    "__main__": {"cli"},
}
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {
    ".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__") for p in FILES
}


def imports_of(path: Path) -> set[str]:
    """Full names of all that a file imports, within functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_of(name: str) -> str | None:
    """The module of this package that an imported name is, or is defined in; None of other packages."""
    while name not in MODULES and "." in name:
        name = name.rpartition(".")[0]
    return name if name in MODULES else None


def layer_of(name: str) -> str:
    """resnet_fused.ops.bn_relu -> ops; a name that the package itself defines -> the empty name."""
    head = name.partition(".")[2].partition(".")[0]
    return head if head in LAYERS or head == "_C" else ""


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_layers(path: Path) -> None:
    relative = path.relative_to(PACKAGE).with_suffix("").parts
    layer = "" if relative == ("__init__",) else relative[0]
    for name in imports_of(path):
        if name.split(".")[0] == "resnet_fused":
            allowed = LAYERS[layer] | {layer, "_version"}
            assert layer_of(name) in allowed, f"{layer} may not import {name}"
        elif layer == "reference":
            assert name.split(".")[0] in {"torch", *sys.stdlib_module_names}, f"the reference imports {name}"


def test_no_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for path in FILES:
        if path.name == "__init__.py":  # which only collect names of the modules beside them
            continue
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        graph[name] = {m for i in imports_of(path) if (m := module_of(i)) is not None and m != name}
    tuple(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_are_written_out(path: Path) -> None:
    """None of this package's modules is imported by a name that the tests above don't see."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            assert "resnet_fused" not in ast.unparse(node), f"{path}:{node.lineno}"


def test_importing_the_package_loads_nothing_optional() -> None:
    """Nothing that importing torch does not load."""
    code = """if True:
        import sys, torch
        optional = ["sklearn", "matplotlib", "tqdm", "PIL", "triton", "torchvision"]
        before = [m for m in optional if m in sys.modules]
        import resnet_fused
        print([m for m in optional if m in sys.modules and m not in before])
    """
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"

"""Checks that docs/environment.md names every environment variable that the sources read: ``make docs`` runs it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "environment.md"
FOLDERS = ("resnet_fused", "csrc", "tests", "benchmarks", "tools", "examples", ".github", ".ci")
PYTHON = re.compile(
    r"""environ(?:\.get\(|\.setdefault\(|\[)\s*["']([A-Z][A-Z0-9_]+)["']|["' $](RESNET_FUSED_[A-Z_]*[A-Z])["'= ]"""
)
CPP = re.compile(r"""getenv\("([A-Z][A-Z0-9_]+)"\)""")
#: How variables are read in files of each kind.
READS = {".py": PYTHON, ".sh": PYTHON, ".cpp": CPP, ".h": CPP, ".cu": CPP, ".cuh": CPP}


def variables() -> set[str]:
    """The names of all variables that are read."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in READS]
    names: set[str] = set()
    for path in [*paths, ROOT / "setup.py", ROOT / "Makefile", ROOT / ".ci" / "run"]:
        for match in READS.get(path.suffix, PYTHON).finditer(path.read_text(encoding="utf-8")):
            names.update(name for name in match.groups() if name)
    return names


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    missing = sorted(name for name in variables() if f"`{name}`" not in page)
    if missing:
        sys.exit(f"{PAGE.relative_to(ROOT)} doesn't name {', '.join(missing)}")


if __name__ == "__main__":
    main()

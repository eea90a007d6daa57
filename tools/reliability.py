"""Records what the reliability checks tried, and makes the tables of docs/reliability.md of it.

    python -m tools.reliability [--write]

Each of ``make sanitize``, ``properties``, ``soak``, ``memory``, ``determinism``, ``faults``, ``packages`` and
``mutants`` is a check. It replaces its own part of docs/reliability.json where the environment variable
``RESNET_FUSED_RECORD`` names that file.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.page import ROOT, Page, markdown

RESULTS = ROOT / "docs" / "reliability.json"
#: {what was tried: {how it ended: cases}}
Outcomes = Mapping[str, Mapping[str, int]]


def record(check: str, outcomes: Outcomes, seconds: float, seed: int | None = None) -> None:
    """Writes what a check tried, in place of its last run.

    Args:
        check: its target in the Makefile.
        outcomes: for what it tried, how many cases ended how: "passed", "refused", "failed", a reason to skip.
        seconds: what it took.
        seed: of its random inputs, where it has any that are not the same every time.
    """
    name = os.environ.get("RESNET_FUSED_RECORD")
    if not name:
        return
    import torch

    path = Path(name)
    results: dict[str, Any] = json.loads(path.read_text())
    results["checks"][check] = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seconds": round(seconds),
        "seed": seed,
        "outcomes": {what: dict(ends) for what, ends in outcomes.items()},
    }
    path.write_text(json.dumps(results, indent=1) + "\n")


def tables() -> dict[str, str]:
    """What was tried, by check, and the faults that were found."""
    import pandas as pd

    results: dict[str, Any] = json.loads(RESULTS.read_text())
    parts = []
    for check, run in results["checks"].items():
        seed = "" if run["seed"] is None else f", seed {run['seed']}"
        heading = f"### `make {check}`\n\n{run['date']}, Python {run['python']}, torch {run['torch']}, "
        rows = [
            (what, ", ".join(f"{count:,} {end}" for end, count in ends.items()))
            for what, ends in run["outcomes"].items()
        ]
        table = markdown(pd.DataFrame(rows, columns=["tried", "cases"]))
        parts.append(f"{heading}{run['seconds'] / 60:.1f} minutes{seed}.\n\n{table}")
    faults = [(fault["fault"], f"`{fault['test']}`") for fault in results["faults"]]
    return {
        "checks": "\n\n".join(parts),
        "faults": markdown(pd.DataFrame(faults, columns=["fault", "test"])),
    }


PAGE = Page(
    path=ROOT / "docs" / "reliability.md",
    command="python -m tools.reliability --write",
    tables=tables,
)

if __name__ == "__main__":
    sys.exit(PAGE.main(sys.argv[1:], __doc__))

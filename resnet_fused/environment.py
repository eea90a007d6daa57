"""Environment variables that choose what runs. Each is read once, when the package is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

SCRIPT = "resnet-fused"  # see [project.scripts] in pyproject.toml


def _starts_command_line() -> bool:
    """Whether the command line is being started, as a script or with ``python -m``, and not a user's program."""
    if Path(sys.argv[0]).stem == SCRIPT:
        return True
    # While Python imports a package to find its __main__, sys.argv[0] is still "-m".
    return sys.argv[0] == "-m" and any(word.removeprefix("-m") == "resnet_fused" for word in sys.orig_argv)


def read(name: str, values: Sequence[str]) -> str:
    """The value of a variable; the first of ``values`` where it is not set.

    Raises:
        ValueError: it has another value. The command line ends with that line and status 2 instead, and does so here,
            since Python imports the package before any code of the command line's own.
    """
    value = os.environ.get(name, values[0])
    if value in values:
        return value
    message = f"{name} must be one of {', '.join(values)}, got {value!r}"
    if _starts_command_line():
        print(f"resnet_fused: error: {message}", file=sys.stderr, flush=True)
        raise SystemExit(2)
    raise ValueError(message)

"""Aligned columns of text, and printing it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TextIO


def columns(rows: Sequence[Sequence[str]], numbers: bool = False) -> list[str]:
    """One line per row. Columns are left-aligned; with ``numbers`` all but the first are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if numbers and place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def table(rows: Sequence[Sequence[str]]) -> str:
    """The same for a table of numbers whose first row is its head, with horizontal rules."""
    head, *body = columns(rows, numbers=True)
    rule = "-" * max(map(len, (head, *body)))
    return "\n".join([rule, head, rule, *body, rule])


def shown(form: str, *values: float | None) -> str:
    """The values in that format, or a dash where one is missing."""
    return "-" if None in values else form.format(*values)


def abbreviate(names: Sequence[str]) -> str:
    """How many classes there are, and the first of them."""
    return f"{len(names)} classes ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"


def say(text: str, file: TextIO | None = None) -> None:
    """Prints to stdout, or to that file.

    Output that cannot be written (to a terminal that was closed, say) doesn't end a run: all that follows is discarded.
    """
    file = file or sys.stdout
    try:
        print(text, file=file, flush=True)
    except OSError:
        # Below the file object: it still holds the text, and would fail again when the interpreter exits.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, file.fileno())
        os.close(nowhere)

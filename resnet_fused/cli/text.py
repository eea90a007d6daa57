"""Aligned columns of text."""

from __future__ import annotations

from collections.abc import Sequence


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

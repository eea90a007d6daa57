"""Tables that a script puts into a page of the documentation, each between its markers."""

from __future__ import annotations

from pathlib import Path


def with_tables(page: str, tables: dict[str, str]) -> str:
    """The page with each table between ``<!-- name: start -->`` and ``<!-- name: end -->``.

    Raises:
        ValueError: a marker is missing.
    """
    for name, table in tables.items():
        start, end = f"<!-- {name}: start -->", f"<!-- {name}: end -->"
        if start not in page or end not in page:
            raise ValueError(f"the page must hold the markers {start} and {end}")
        before, _, rest = page.partition(start)
        page = f"{before}{start}\n{table}\n{end}{rest.partition(end)[2]}"
    return page


def show(tables: dict[str, str], path: Path, write: bool) -> int:
    """Prints the tables, and writes them into the page where that is asked for; an exit code."""
    print("\n\n".join(tables.values()))
    if write:
        path.write_text(with_tables(path.read_text(), tables))
    return 0

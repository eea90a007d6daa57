"""Pages of the documentation whose tables and charts a script writes, from data that the page itself does not hold."""

from __future__ import annotations

import argparse
import hashlib
import io
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

ROOT = Path(__file__).parents[1]
#: A number, percentage, ratio or range of numbers.
_NUMBER = re.compile(r"[-+]?[\d.,]+(-[\d.,]+)?[%x]?\*?")
COLOURS = ("#0072b2", "#999999", "#e69f00", "#56b4e9", "#009e73", "#d55e00", "#cc79a7", "#4d4d4d")


def markdown(frame: pd.DataFrame) -> str:
    """A Markdown table of the columns, those of numbers right-aligned."""
    cells = [[str(cell) for cell in row] for row in frame.itertuples(index=False)]
    columns = zip(*cells, strict=True)
    is_number = [all(_NUMBER.fullmatch(cell.split(" ")[0] or "0") for cell in column) for column in columns]
    rules = ["---:" if right else "---" for right in is_number]
    return "\n".join(f"| {' | '.join(line)} |" for line in [list(frame.columns), rules, *cells])


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


@dataclass(frozen=True)
class Chart:
    """A chart of some data, as an SVG that names the data's hash.

    The bytes of an SVG differ between versions of matplotlib and its fonts, so that the hash is what is compared.
    """

    path: Path
    data: pd.DataFrame
    draw: Callable[[pd.DataFrame], Any]

    @property
    def digest(self) -> str:
        return f"data sha256 {hashlib.sha256(self.data.to_csv().encode()).hexdigest()}"

    def is_fresh(self) -> bool:
        return self.path.exists() and self.digest in self.path.read_text()

    def write(self) -> None:
        import matplotlib

        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            # The same ids for the same data, and letters as text.
            matplotlib.rcParams.update(
                {"svg.hashsalt": "resnet_fused", "svg.fonttype": "none", "font.size": 8}
            )
            file = io.StringIO()
            metadata = {"Date": None, "Creator": None, "Description": self.digest}
            self.draw(self.data).savefig(file, format="svg", metadata=metadata)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(file.getvalue())


@dataclass(frozen=True)
class Page:
    """A page and the command that writes its tables.

    Args:
        equal: whether the page with new tables says the same as the page that is there.
    """

    path: Path
    command: str
    tables: Callable[[], dict[str, str]]
    charts: Callable[[], list[Chart]] = list
    equal: Callable[[str, str], bool] = str.__eq__

    def stale(self) -> list[Path]:
        """Which files do not show the data."""
        text = self.path.read_text()
        paths = [] if self.equal(text, with_tables(text, self.tables())) else [self.path]
        return paths + [chart.path for chart in self.charts() if not chart.is_fresh()]

    def write(self) -> None:
        self.path.write_text(with_tables(self.path.read_text(), self.tables()))
        for chart in self.charts():
            if not chart.is_fresh():
                chart.write()

    def main(self, arguments: Sequence[str], description: str | None) -> int:
        """Prints the tables; with ``--write`` puts them into the page."""
        parser = argparse.ArgumentParser(prog=self.command.removesuffix(" --write"), description=description)
        parser.add_argument("--write", action="store_true", help=f"write {self.path.relative_to(ROOT)}")
        if parser.parse_args(arguments).write:
            self.write()
        else:
            sys.stdout.write("\n\n".join(self.tables().values()) + "\n")
        return 0

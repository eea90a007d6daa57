"""Makes the table of docs/dependencies.md: what pyproject.toml requires, why, and under which licences.

    python -m tools.dependencies [--write]

Licences are read from the packages that are installed in the versions of constraints.txt. In another version, or where
it isn't installed, a package keeps the licence that the page has, so that every machine makes the same page.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution

import tomllib

from benchmarks.page import ROOT, Page, markdown

PAGE_PATH = ROOT / "docs" / "dependencies.md"
COLUMNS = ("package", "needed", "versions", "licence", "what for")


@dataclass(frozen=True)
class Requirement:
    """One of pyproject.toml's.

    Args:
        needed: when it is, or the extra that it belongs to.
        reason: the comment beside it, or the one above.
    """

    name: str
    needed: str
    versions: str
    reason: str


def normalized(name: str) -> str:
    """As in package indexes, where Scikit_Learn is scikit-learn."""
    return re.sub(r"[-_.]+", "-", name).lower()


def comment_on(text: str, key: str, requirement: str) -> str:
    """The comment beside a requirement in the list of ``key``, or else the one above its line.

    Raises:
        ValueError: there is neither.
    """
    start = re.search(rf"^{re.escape(key)} = \[", text, re.MULTILINE)
    assert start is not None
    before, _, rest = text[start.start() :].partition(f'"{requirement}"')
    beside = rest.partition("\n")[0].partition("#")[2].strip()
    if beside:
        return beside
    lines = (text[: start.start()] + before).splitlines()[:-1] if before.strip() else []
    above = []
    while lines and lines[-1].lstrip().startswith("#"):
        above.append(lines.pop().lstrip(" #"))
    if not above:
        raise ValueError(f"pyproject.toml must say in a comment what {requirement} in `{key}` is for")
    return " ".join(reversed(above))


def requirements(text: str) -> Iterator[Requirement]:
    """All of a pyproject.toml's, but the extras that an extra repeats."""
    parsed = tomllib.loads(text)
    project = parsed["project"]
    lists = {"requires": ("to build", parsed["build-system"]["requires"])}
    lists |= {"dependencies": ("always", project["dependencies"])}
    lists |= {key: (f"`{key}`", value) for key, value in project["optional-dependencies"].items()}
    for key, (needed, entries) in lists.items():
        for entry in entries:
            specification, _, marker = entry.partition(";")
            match = re.fullmatch(r"([\w.-]+)(\[.*\])?(.*)", specification)
            assert match is not None
            if match[1] != project["name"]:
                versions = (match[3] or "any") + (f", if {marker.strip()}" if marker else "")
                yield Requirement(match[1], needed, versions, comment_on(text, key, entry))


def licence_of(name: str) -> str:
    """What an installed package's metadata say: an SPDX expression, if it has one; the names of files at the worst."""
    metadata = distribution(name).metadata
    classifiers = [text for text in metadata.get_all("Classifier", []) if text.startswith("License :: ")]
    return (
        ", ".join(metadata.get_all("License-Expression", []))
        or ", ".join(text.rpartition(" :: ")[2] for text in classifiers)
        or "".join(metadata.get_all("License", [])).strip().partition("\n")[0]
        or f"in its {', '.join(metadata.get_all('License-File', []))}"
    )


def licences(names: set[str]) -> dict[str, str]:
    """Of each package: what is installed says, in the version of constraints.txt, or else what the page says.

    Raises:
        ValueError: neither says any.
    """
    pins = re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    pinned = {normalized(name): version for name, version in pins}
    rows = re.findall(r"^\| ([\w.-]+) \|.*\| (.*) \| .* \|$", PAGE_PATH.read_text(), re.MULTILINE)
    found = dict(rows)
    for name in names:
        try:
            version = distribution(name).version.partition("+")[0]
        except PackageNotFoundError:
            version = None
        if version is not None and version == pinned.get(normalized(name)):
            found[name] = licence_of(name)
        if not found.get(name):
            raise ValueError(f"the licence of {name} is not known: install the version in constraints.txt")
    return found


def tables() -> dict[str, str]:
    import pandas as pd

    required = list(requirements((ROOT / "pyproject.toml").read_text(encoding="utf-8")))
    known = licences({entry.name for entry in required})
    rows = [(entry.name, entry.needed, entry.versions, known[entry.name], entry.reason) for entry in required]
    return {"dependencies": markdown(pd.DataFrame(rows, columns=COLUMNS))}


PAGE = Page(path=PAGE_PATH, command="python -m tools.dependencies --write", tables=tables)

if __name__ == "__main__":
    sys.exit(PAGE.main(sys.argv[1:], __doc__))

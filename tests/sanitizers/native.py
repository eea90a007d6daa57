"""Builds the CPU kernels and a program that calls them, without torch, and runs it under sanitizers."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
SOURCES = (
    *sorted((CSRC / "cpu").glob("*.cpp")),
    *sorted((CSRC / "cpu" / "conv").glob("*.cpp")),
    *sorted(HERE.glob("*.cpp")),
)
FLAGS = (
    "-std=c++17",
    "-g1",  # lines, for reports
    "-pthread",
    "-D_GLIBCXX_ASSERTIONS",
    # Compiled once: which clone runs is decided before a sanitizer has started.
    "-DRESNET_FUSED_CLONES=",
)
#: What each build adds. AddressSanitizer's takes three times as long to compile with optimization.
BUILDS = {
    "plain": ("-O1",),
    "address": (
        "-O0",
        "-fsanitize=address,alignment,bounds,shift,signed-integer-overflow,float-cast-overflow",
        "-fno-sanitize-recover=all",
    ),
    "thread": ("-O1", "-fsanitize=thread"),
}
#: Of the convolutions; which of them a machine has, the program says.
ISAS = ("baseline", "avx2", "avx512")


def run(*command: str, text: str) -> None:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)


class Harness:
    """The program in one of its builds.

    Args:
        build: a key of BUILDS.
        folder: where objects and programs go.
    """

    def __init__(self, build: str, folder: Path) -> None:
        self._flags = ("g++", *FLAGS, *BUILDS[build])
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(2) as pool:
            objects = pool.map(lambda source: self._compile(source, source.read_text(), source.stem), SOURCES)
            self._objects = dict(zip(SOURCES, objects, strict=True))
        self._link("harness", self._objects)

    def _compile(self, source: Path, text: str, name: str) -> Path:
        target = self._folder / f"{name}.o"
        includes = ("-iquote", str(source.parent), "-I", str(CSRC))
        # What reports call it comes with the text.
        text = f'# 1 "{source.name}"\n{text}'
        run(*self._flags, *includes, "-c", "-x", "c++", "-", "-o", str(target), text=text)
        return target

    def _link(self, name: str, objects: Mapping[Path, Path]) -> None:
        run(*self._flags, *map(str, objects.values()), "-o", str(self._folder / name), text="")

    def change(self, name: str, file: str, before: str, after: str) -> None:
        """Links a program with a mistake in a kernel; all but its file is compiled already.

        Args:
            name: of the program.
            file: below csrc.
            before: what it has once.
            after: the mistake that takes its place.
        """
        source = CSRC / file
        text = source.read_text()
        assert text.count(before) == 1, f"{file} has {before!r} {text.count(before)} times"
        changed = self._compile(source, text.replace(before, after), name)
        self._link(name, {**self._objects, source: changed})

    def __call__(
        self, *arguments: str, name: str = "harness", tool: tuple[str, ...] = (), **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs it.

        Args:
            arguments: see main.cpp.
            name: of the program that change() has linked.
            tool: a command that runs the program, valgrind say.
            environment: variables beside those of this process.
        """
        return subprocess.run(
            [*tool, str(self._folder / name), *arguments],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **environment},
        )

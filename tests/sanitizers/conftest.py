"""Builds of the program that calls the kernels, shared by tests."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.sanitizers.native import ISAS, Harness


class Builds:
    """Each build of the program, made when a test first asks for it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[str, Harness] = {}

    def __getitem__(self, build: str) -> Harness:
        if build not in self._made:
            self._made[build] = Harness(build, self._folder / build)
        return self._made[build]


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    return Builds(tmp_path_factory.mktemp("sanitizers"))


@pytest.fixture
def passes(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Runs a build's cases, with the convolutions of an instruction set: no difference, no report.

    Those of the first one run all cases; the others, which differ in convolutions alone, these.
    """

    def run(harness: Harness, isa: str, *tool: str) -> None:
        cases = () if isa == ISAS[0] else ("conv",)
        done = harness(*cases, tool=tool, RESNET_FUSED_CPU_ISA=isa)
        assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
        found = re.fullmatch(r"(\d+) cases, 0 failed, kernels of (\w+)\n", done.stdout)
        assert found is not None, done.stdout
        if found[2] != isa:
            pytest.skip(f"this machine has no {isa}")
        record_property("cases", int(found[1]))

    return run

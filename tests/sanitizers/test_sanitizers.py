"""The CPU kernels under AddressSanitizer, UBSan and LeakSanitizer, and mistakes that these have to report."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import NamedTuple

import pytest

from tests.sanitizers.conftest import Builds
from tests.sanitizers.native import ISAS, Harness

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the program is built with g++")


@pytest.mark.parametrize("isa", ISAS)
def test_nothing_is_reported(builds: Builds, isa: str, passes: Callable[..., None]) -> None:
    """Kernels, forward and backward, with one, two and three threads: the same bytes, and no report."""
    passes(builds["address"], isa)


@pytest.mark.parametrize(
    ("mistake", "report"),
    {
        "idle buffer": "use-after-poison",
        "end of a large buffer": "use-after-poison",
        "end of a small buffer": "use-after-poison",
        "end of scratch memory": "use-after-poison",
        "misaligned": "load of misaligned address",
        "leak": "LeakSanitizer: detected memory leaks",
    }.items(),
)
def test_mistakes_are_reported(builds: Builds, mistake: str, report: str) -> None:
    """Memory that is not in use, misaligned or lost: AddressSanitizer, UBSan and LeakSanitizer report it."""
    done = builds["address"]("--mistake", mistake)
    assert done.returncode != 0 and report in done.stderr, done.stderr


class Change(NamedTuple):
    """A mistake in a file of csrc: the cases that find it, and what the program says."""

    cases: str
    report: str
    file: str
    before: str
    after: str


COPY = "      for (int i = 0; i < count; i++) {\n        const S da = load(grad[i]);"
CHANGES = {
    "a kernel reads and writes an element beyond the last": Change(
        "masked_grad float32",
        "ERROR: AddressSanitizer",
        "cpu/masked_grad.cpp",
        COPY,
        COPY.replace("i < count", "i <= count"),
    ),
    "a kernel does not write the last element": Change(
        "masked_grad float32",
        "result 0 differs",
        "cpu/masked_grad.cpp",
        COPY,
        COPY.replace("i < count", "i < count - 1"),
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_mistakes_in_kernels_are_found(builds: Builds, change: Change) -> None:
    """Kernels with a mistake that leaves them running: an access beyond the end, an element not written."""
    assert_found(builds["address"], change)


def assert_found(harness: Harness, change: Change) -> None:
    harness.change("mistake", change.file, change.before, change.after)
    # A race that is not stopped may leave containers that no search comes to the end of.
    done = harness(change.cases, name="mistake", TSAN_OPTIONS="halt_on_error=1")
    assert done.returncode != 0 and change.report in done.stdout + done.stderr, done.stdout + done.stderr

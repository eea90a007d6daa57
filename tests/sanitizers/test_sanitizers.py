"""The CPU kernels under sanitizers, and mistakes that these have to report: one that reports nothing proves nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import NamedTuple

import pytest

from tests.sanitizers.conftest import Builds
from tests.sanitizers.native import ISAS

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the program is built with g++")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("build", ["address", "thread"])
def test_nothing_is_reported(builds: Builds, build: str, isa: str, passes: Callable[..., None]) -> None:
    """Kernels, forward and backward, with one, two and three threads: the same bytes, and no report."""
    passes(builds[build], isa)


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
    """A mistake in a file of csrc: the build that finds it, with which cases, and what it says."""

    build: str
    cases: str
    report: str
    file: str
    before: str
    after: str


RACE = "WARNING: ThreadSanitizer: data race"
COPY = "      for (int i = 0; i < count; i++) {\n        const S da = load(grad[i]);"
CHANGES = {
    "a kernel reads and writes an element beyond the last": Change(
        "address",
        "masked_grad float32",
        "ERROR: AddressSanitizer",
        "cpu/masked_grad.cpp",
        COPY,
        COPY.replace("i < count", "i <= count"),
    ),
    "a kernel does not write the last element": Change(
        "address",
        "masked_grad float32",
        "result 0 differs",
        "cpu/masked_grad.cpp",
        COPY,
        COPY.replace("i < count", "i < count - 1"),
    ),
    "two threads write the same pixels, with the same values": Change(
        "thread",
        "bn_relu_maxpool_backward float32",
        RACE,
        "cpu/bn_relu_maxpool.cpp",
        "body(units * task / tasks, units * (task + 1) / tasks)",
        "body(units * task / tasks, std::min(units, units * (task + 1) / tasks + 1))",
    ),
    "a buffer is given back without the lock": Change(
        "thread",
        "buffers",
        RACE,
        "cpu/large_buffers.cpp",
        "  const std::lock_guard<std::mutex> lock(all.mutex);\n  const auto entry",
        "  const auto entry",
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_mistakes_in_kernels_are_found(builds: Builds, change: Change) -> None:
    """Kernels with a mistake that leaves them running: an access beyond the end, a race, an element not written."""
    harness = builds[change.build]
    harness.change("mistake", change.file, change.before, change.after)
    done = harness(change.cases, name="mistake")
    assert done.returncode != 0 and change.report in done.stdout + done.stderr, done.stdout + done.stderr

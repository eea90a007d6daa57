"""The CPU kernels under ThreadSanitizer, and races that it has to report: a part of `make sanitize` alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.sanitizers.conftest import Builds
from tests.sanitizers.native import ISAS
from tests.sanitizers.test_sanitizers import Change, assert_found

RACE = "WARNING: ThreadSanitizer: data race"
CHANGES = {
    "two threads write the same pixels, with the same values": Change(
        "bn_relu_maxpool_backward float32",
        RACE,
        "cpu/bn_relu_maxpool.cpp",
        "body(units * task / tasks, units * (task + 1) / tasks)",
        "body(units * task / tasks, std::min(units, units * (task + 1) / tasks + 1))",
    ),
    "a buffer is given back without the lock": Change(
        "buffers",
        RACE,
        "cpu/large_buffers.cpp",
        "  const std::lock_guard<std::mutex> lock(all.mutex);\n  const auto entry",
        "  const auto entry",
    ),
}


@pytest.mark.parametrize("isa", ISAS)
def test_nothing_is_reported(builds: Builds, isa: str, passes: Callable[..., None]) -> None:
    """Kernels, forward and backward, with one, two and three threads: no race."""
    passes(builds["thread"], isa)


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_races_are_found(builds: Builds, change: Change) -> None:
    """Kernels and buffers with a race."""
    assert_found(builds["thread"], change)

"""The kernels in valgrind. pytest doesn't collect this file by itself: `make sanitize` names it."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest

from tests.sanitizers.conftest import Builds

MEMCHECK = ("valgrind", "--quiet", "--error-exitcode=1", "--max-stackframe=8000000")


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("isa", ["baseline", "avx2"])  # it doesn't know AVX-512
def test_no_result_depends_on_uninitialized_memory(
    builds: Builds, isa: str, passes: Callable[..., None]
) -> None:
    """Kernels in valgrind's memcheck, which follows what was never written through sums and copies."""
    passes(builds["plain"], isa, *MEMCHECK)

"""Operands at the edge of what fits: no elements, no channels, bytes and strides of the caller's, too little memory."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import resnet_fused.reference as reference
from tests.ops.test_opcheck import KERNELS, OPS, STEMS, arguments, as_tuple, channels_last, contiguous, copied

BOTH_LAYOUTS = pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)


def run(script: str) -> str:
    """What a script prints; a test fails where its process does not end as it should."""
    start = "import torch, resnet_fused\nfrom torch import empty, rand, zeros\nOPS = torch.ops.resnet_fused\n"
    command = [sys.executable, "-c", start + textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def of_reference(name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(
        getattr(reference, next(s for s in STEMS if name.startswith(s))), name
    )
    return found


def assert_equals_reference(name: str, args: tuple[Any, ...]) -> None:
    """In results, and in arguments that are written to."""
    ours, theirs = (
        as_tuple(op(*copies)) + tuple(x for x in copies if isinstance(x, Tensor))
        for op, copies in ((getattr(OPS, name), copied(args)), (of_reference(name), copied(args)))
    )
    for actual, expected in zip(ours, theirs, strict=True):
        assert actual.shape == expected.shape and actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "shape", [(0, 3, 5, 4), (2, 0, 5, 4), (2, 3, 0, 4), (2, 3, 5, 0), (0, 0, 0, 0), (1, 0, 1, 1)]
)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@BOTH_LAYOUTS
@pytest.mark.parametrize("name", KERNELS)
def test_without_elements(name: str, layout: Any, affine: bool, shape: tuple[int, ...]) -> None:
    """Results are empty, sums and statistics zero, whichever dimension has no size."""
    assert_equals_reference(name, arguments(name, layout, torch.float64, affine, shape))


def test_without_channels_in_a_process_of_its_own() -> None:
    """A division by zero channels ends a process."""
    printed = run("""
        for name in ("bn_relu", "bn_relu_maxpool"):
            print(*getattr(resnet_fused.functional, name)(empty(1, 0, 1, 1), empty(0), empty(0)).shape)
        print(*resnet_fused.functional.bn_add_relu(empty(1, 0, 1, 1), empty(1, 0, 1, 1), empty(0), empty(0)).shape)
    """)
    assert printed.split() == ["1", "0", "1", "1"] * 3


@BOTH_LAYOUTS
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 13), (3, 4), (6, 6)])
@pytest.mark.parametrize("name", ["bn_relu_maxpool_backward_reduce", "bn_relu_maxpool_backward"])
def test_pooling_indices_of_any_byte(name: str, size: tuple[int, int], layout: Any) -> None:
    """An index that names no pixel, because its window is cut off there or has no such element, has no gradient."""
    args = arguments(name, layout, torch.float64, True, (5, 11, *size))
    indices = args[1]
    for values in (torch.randint(0, 10, indices.shape), torch.randint(0, 256, indices.shape)):
        indices.copy_(values)
        assert_equals_reference(name, args)


def test_pooling_indices_outside_in_a_process_of_its_own() -> None:
    """Window element 0 of the first pixels lies before y: read, it may end a process."""
    printed = run("""
        y, grad, vector = rand(5, 31, 2, 13), rand(5, 31, 1, 7), rand(31)
        for _ in range(50):
            sums = OPS.bn_relu_maxpool_backward_reduce(grad, zeros(5, 31, 1, 7, dtype=torch.uint8), y, vector, vector)
        print(*(x.abs().max().item() for x in sums))
    """)
    assert printed.split() == ["0.0", "0.0"]


@BOTH_LAYOUTS
@pytest.mark.parametrize("name", KERNELS)
def test_vectors_that_are_not_contiguous(name: str, layout: Any) -> None:
    """Those of stacked ensembles are slices."""
    args = arguments(name, layout, torch.float64, True)
    sliced = tuple(
        torch.stack([x, x + 1], -1)[..., 0]
        if isinstance(x, Tensor) and x.dim() == 1 and name != "masked_grad"
        else x
        for x in args
    )
    ours, theirs = as_tuple(getattr(OPS, name)(*sliced)), as_tuple(getattr(OPS, name)(*args))
    for actual, expected in zip(ours, theirs, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2**40, 2**40), "more bytes than an address counts"),
        ((2**62, 2), "more bytes than an address counts"),
        ((-1, 1), "must not be negative"),
        ((0, -(2**62)), "must not be negative"),
    ],
)
def test_fresh_like_checks_sizes(sizes: tuple[int, int], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        OPS.fresh_like(torch.empty(1, 1, 1, 1), *sizes)


def test_failed_allocations_say_so() -> None:
    """What a caller that frees memory and tries again looks for: the word memory, and how much was asked for."""
    printed = run("""
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
        y, vector = rand(1, 8, 4, 4), rand(8)
        large = rand(1).expand(1 << 14, 8, 128, 128)
        for call in (
            lambda: OPS.fresh_like(y, 1 << 20, 1 << 12, 1, 1),
            lambda: OPS.bn_relu(large, vector, vector, None, None, None),
            lambda: OPS.batch_norm_stats(large, 0.0),
        ):
            try:
                call()
            except RuntimeError as error:
                print(str(error).splitlines()[0])
        print("still works", OPS.bn_relu(y, vector, vector, None, None, None).numel())
    """)
    *errors, last = printed.splitlines()
    assert last == "still works 128"
    for error, op, size in zip(
        errors, ("fresh_like", "bn_relu", "batch_norm_stats"), (34, 33, 33), strict=True
    ):
        assert error.startswith(f"{op}: out of memory: tried to allocate {1 << size} bytes")


def test_scratch_memory_that_is_missing() -> None:
    """A kernel's own buffers, here of three lines of an image for each thread, are allocated in its threads."""
    printed = run("""
        import resource
        width = 1 << 24
        y, vector = zeros(4, 1, 1, width, dtype=torch.float16), zeros(1)
        grad, indices = zeros(4, 1, 1, width // 2, dtype=torch.float16), zeros(4, 1, 1, width // 2, dtype=torch.uint8)
        torch.set_num_threads(2)
        zeros(1 << 20).add_(1)  # starts the threads
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        # The result fits into this, a buffer beside it does not.
        limit = mapped + y.numel() * 2 + 12 * width // 2
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            OPS.bn_relu_maxpool_backward(grad, indices, y, vector, vector, None, None, None)
        except MemoryError as error:
            print("MemoryError")
    """)
    assert printed.split() == ["MemoryError"]

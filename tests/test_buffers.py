"""Buffers of large results on the CPU: used again, never while someone looks at them, and given back."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from resnet_fused import native

pytestmark = pytest.mark.usefixtures("buffers")

OPS = torch.ops.resnet_fused
MB = 1 << 20

needs_extension = pytest.mark.skipif(not native.is_loaded, reason="the buffers are the extension's")
ABOVE = 33 * MB  # what the C library would map afresh each time


def taken(bytes_: int = ABOVE) -> Tensor:
    """A result of so many bytes, uninitialised, as ops make theirs."""
    like = torch.zeros(1, 1, 1, 1 << 18)  # 1 MiB
    out: Tensor = OPS.fresh_like(like, n=bytes_ // MB)
    assert out.numel() * 4 == bytes_
    return out


@pytest.fixture
def no_buffers() -> Iterator[None]:
    """None stand by when the test starts, and none are left behind."""
    gc.collect()
    native.release_buffers()
    yield
    native.release_buffers()


@needs_extension
@pytest.mark.usefixtures("no_buffers")
def test_large_results_use_memory_again() -> None:
    x = torch.randn(33, 64, 64, 64)  # 33 MiB
    zeros, ones = torch.zeros(64), torch.ones(64)
    first: Tensor = OPS.bn_relu(x, zeros, ones, None, None, None)
    address, expected = first.data_ptr(), first.clone()
    while_it_lives: Tensor = OPS.bn_relu(x, zeros, ones, None, None, None)
    assert while_it_lives.data_ptr() != address
    del while_it_lives
    view = first[3, 1:2, ::2]
    values = view.clone()
    del first
    for _ in range(3):
        other = OPS.bn_relu(-x, zeros, ones, None, None, None)
        assert other.data_ptr() != address
        assert torch.equal(view, values)
        del other
    del view
    # The latest that died is taken first.
    again: Tensor = OPS.bn_relu(x, zeros, ones, None, None, None)
    assert again.data_ptr() == address
    assert torch.equal(again, expected)


@needs_extension
@pytest.mark.usefixtures("no_buffers")
def test_saved_for_backward_keeps_its_memory() -> None:
    """A buffer that only a graph knows is not given to others."""
    leaf = torch.ones(1, requires_grad=True)
    buffer = taken().fill_(2.0)
    address = buffer.data_ptr()
    loss = (leaf * buffer).sum()
    del buffer
    assert taken().fill_(5.0).data_ptr() != address
    loss.backward()
    assert leaf.grad is not None and leaf.grad.item() == 2.0 * ABOVE / 4
    del loss
    assert taken().data_ptr() == address


@needs_extension
@pytest.mark.usefixtures("no_buffers")
def test_release_buffers() -> None:
    assert native.release_buffers() == 0
    first, second = taken(), taken(40 * MB)
    assert native.release_buffers() == 0  # both are in use
    del first
    assert native.release_buffers() == 33 * MB
    assert native.release_buffers() == 0
    second.fill_(1.0)
    assert second.sum() == second.numel()
    third = taken()
    del second, third
    assert native.release_buffers() == (40 + 33) * MB
    small, large = taken(4 * MB), taken(5 * MB)
    del small, large
    assert native.release_buffers() == 5 * MB


@needs_extension
@pytest.mark.usefixtures("no_buffers")
def test_parts_of_buffers_are_used_again() -> None:
    """A smaller result takes a part of one, a larger one those that lie side by side, and no byte is in two."""
    whole = taken(60 * MB)
    start = whole.data_ptr()
    del whole
    parts = [taken(20 * MB).fill_(mark) for mark in range(3)]
    assert [part.data_ptr() - start for part in parts] == [0, 20 * MB, 40 * MB]
    parts.clear()
    assert taken(60 * MB).data_ptr() == start
    assert native.release_buffers() == 60 * MB
    parts = [taken(20 * MB).fill_(mark) for mark in range(3)]
    parts[1] = parts[0]
    larger = taken(33 * MB).fill_(7.0)  # there are 20 MB between two that are in use
    assert all(bool((part == mark).all()) for part, mark in zip(parts, (0, 0, 2), strict=True))
    assert bool((larger == 7.0).all())


@needs_extension
@pytest.mark.usefixtures("no_buffers")
def test_buffers_can_be_switched_off() -> None:
    """No memory is used again then; what was taken before is given back."""
    before = taken()
    assert native.use_buffers(False)
    try:
        assert not native.use_buffers(False)
        address = taken().data_ptr()
        assert address != before.data_ptr()
        del before
        assert native.release_buffers() == ABOVE
        x, weight = torch.randn(2, 64, 96, 96), torch.randn(64, 64, 3, 3)
        x, weight = (t.to(memory_format=torch.channels_last) for t in (x, weight))
        empty = [None] * 4
        off = OPS.conv3x3_forward(x, *empty, weight, 1e-5, True)
        assert native.release_buffers() == 0
    finally:
        native.use_buffers(True)
    on = OPS.conv3x3_forward(x, *empty, weight, 1e-5, True)
    assert all(map(torch.equal, on, off))


@needs_extension
@pytest.mark.usefixtures("no_buffers")
def test_buffers_that_nobody_takes_are_unmapped() -> None:
    both = taken(40 * MB), taken()
    del both
    for _ in range(2040):
        taken()
    assert native.release_buffers() == (40 + 33) * MB
    both = taken(40 * MB), taken()
    del both
    for _ in range(2060):
        taken()
    assert native.release_buffers() == 33 * MB


@needs_extension
@pytest.mark.usefixtures("no_buffers")
def test_no_more_is_idle_than_was_in_use() -> None:
    """However many sizes come by, as images of many sizes make them."""
    for size in range(34, 120, 2):
        pair = taken(size * MB), taken((size + 2) * MB)
        del pair
    assert native.release_buffers() <= (118 + 120) * MB
    living = taken(100 * MB)
    for size in range(34, 74, 2):
        taken(size * MB)
    assert native.release_buffers() <= 72 * MB
    del living


def run_alone(code: str, **variables: str) -> str:
    """What a Python of its own prints, with environment variables beside those of this process."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    ).stdout


@needs_extension
def test_idle_buffers_are_given_up_before_memory_runs_out() -> None:
    """Within a limit of the address space that one more buffer fits into only where no idle one is left."""
    printed = run_alone("""
        import resource
        import torch
        from resnet_fused import native
        x = torch.zeros(1, 1, 1, 1 << 18)
        held = [torch.ops.resnet_fused.fresh_like(x, n=size) for size in (200, 300)]  # 500 side by side
        del held
        with open("/proc/self/statm") as f:
            used = int(f.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20), -1))
        torch.ops.resnet_fused.fresh_like(x, n=550).data_ptr()
        print(native.release_buffers() >> 20)
    """)
    assert printed.split() == ["550"]


@needs_extension
def test_memory_that_runs_out() -> None:
    """A native convolution within limits of the address space up to what it needs: the op's out-of-memory error"""
    code = """
        import resource
        import torch
        from resnet_fused import native
        torch.set_num_threads(2)
        sizes = (4, 128, 56, 56)
        x, g = (torch.randn(sizes).to(memory_format=torch.channels_last) for _ in range(2))
        nothing = [None] * 8
        ends = set()
        for extra in range(0, 40):
            native.release_buffers()
            with open("/proc/self/statm") as f:
                used = int(f.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (extra << 19), -1))
            try:
                torch.ops.resnet_fused.conv3x3_wgrad(g, *nothing, x, *nothing[:4])
                ends.add("done")
            except RuntimeError as error:
                ends.add(str(error).partition(": tried")[0].splitlines()[0])
            resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
        torch.ops.resnet_fused.conv3x3_wgrad(g, *nothing, x, *nothing[:4])
        print(*sorted(ends), sep="|")
    """
    # All but small blocks are mapped: none is taken from free memory of the heap, of which there is some by chance.
    printed = run_alone(code, MALLOC_MMAP_THRESHOLD_=str(1 << 16))
    assert printed.strip().split("|") == ["conv3x3_wgrad: out of memory", "done"]


@needs_extension
def test_a_forked_child_gives_idle_buffers_back() -> None:
    """Pages that it went on sharing would be copied whenever its parent writes to them."""
    printed = run_alone("""
        import os
        import torch
        from resnet_fused import native
        torch.set_num_threads(1)  # GNU OpenMP's threads are not forked
        x = torch.zeros(1, 1, 1, 1 << 18)
        living, idle = (torch.ops.resnet_fused.fresh_like(x, n=size).fill_(1) for size in (40, 33))
        del idle
        child = os.fork()
        if child == 0:
            in_use = living.sum().item() == living.numel()
            os._exit(0 if native.release_buffers() == 0 and in_use else 1)
        print(os.waitpid(child, 0)[1], native.release_buffers() >> 20)
    """)
    assert printed.split() == ["0", "33"]


@needs_extension
def test_a_forked_child_can_take_buffers() -> None:
    """While another thread takes and gives back: the child has a copy of the mutex."""
    printed = run_alone("""
        import os, threading, warnings
        import torch
        import resnet_fused
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        x = torch.zeros(1, 1, 1, 1 << 18)
        take = lambda: torch.ops.resnet_fused.fresh_like(x, n=34).numel()
        stop = threading.Event()
        def work():
            while not stop.is_set():
                take()
        threads = [threading.Thread(target=work) for _ in range(4)]
        [t.start() for t in threads]
        ended = 0
        for _ in range(150):
            child = os.fork()
            if child == 0:
                import signal
                signal.alarm(10)
                take()
                os._exit(0)
            ended += os.waitpid(child, 0)[1] == 0
        stop.set()
        [t.join() for t in threads]
        print(ended)
    """)
    assert printed.split() == ["150"]


@needs_extension
@pytest.mark.usefixtures("no_buffers")
def test_threads_do_not_share_buffers() -> None:
    """Each writes its mark, looks whether it is still there, and drops the memory while others take theirs."""
    problems: list[str] = []
    living: set[int] = set()
    lock, start = threading.Lock(), threading.Barrier(8)

    def work(mark: int) -> None:
        start.wait()
        for turn in range(60):
            held = [taken(ABOVE + MB * 2 * (turn % 2)) for _ in range(1 + (mark + turn) % 2)]
            own = {x.data_ptr() for x in held}
            with lock:
                if own & living or len(own) < len(held):
                    problems.append(f"thread {mark}, turn {turn}: {own & living}")
                living.update(own)
            places = [x.view(-1)[:: 1 << 20] for x in held]
            for place in places:
                place.fill_(mark + turn / 100)
            time.sleep(0.0005)
            for place in places:
                if bool((place != torch.tensor(mark + turn / 100)).any()):
                    problems.append(f"thread {mark}, turn {turn}: overwritten")
            with lock:
                living.difference_update(own)
            del held, place, places

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    gc.collect()
    # 720 were taken; more than 16 never lived at once.
    assert 33 * MB <= native.release_buffers() <= 16 * 35 * MB
    assert native.release_buffers() == 0

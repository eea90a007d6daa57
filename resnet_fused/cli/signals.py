"""Ctrl-C, SIGTERM and SIGHUP as a request that the training loop handles between two steps."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType


class Stopped(Exception):
    """Training ended early, after its checkpoint was written.

    Attributes:
        signal: the number of the signal that asked for it, 0 where --max-steps did.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by signal {signum}" if signum else "stopped by --max-steps")
        self.signal = signum


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """The first of `SIGNALS`, as a handler that remembers it.

    Another signal, more than a second later, interrupts at once: the user does not want to wait for the step.
    (A launcher and a terminal may both deliver the same Ctrl-C, hence the second.)
    """

    def __init__(self) -> None:
        self.signal = 0
        self._since = 0.0

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.signal and time.monotonic() - self._since > 1:
            raise KeyboardInterrupt
        if not self.signal:
            self.signal = signum
            self._since = time.monotonic()


def _handled() -> Iterator[signal.Signals]:
    """The signals, but not SIGHUP where nohup has it ignored."""
    for signum in SIGNALS:
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
            yield signum


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Handles the signals while the context lasts; only the main thread can."""
    request = StopRequest()
    is_main = threading.current_thread() is threading.main_thread()
    previous = {signum: signal.signal(signum, request) for signum in _handled() if is_main}
    try:
        yield request
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def detach_worker(worker: int) -> None:
    """`worker_init_fn` of a DataLoader: takes the worker out of the program's process group.

    A terminal sends Ctrl-C, and torchrun sends SIGTERM, to the whole group; a worker that dies of it would make the
    step that is still to be finished fail. Workers cannot ignore the signals: at exit multiprocessing sends SIGTERM to
    those that are left and waits for them.
    """
    os.setpgrp()
    for signum in _handled():
        signal.signal(signum, signal.SIG_DFL)  # instead of the handler that came with the fork

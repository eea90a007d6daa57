"""Processes of the command line that can be killed, without the seconds that each would take to import torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

#: Forks a process for each line. It has imported everything and computed nothing, so that a fork is safe.
SERVER = """
import json
import os
import signal
import sys
from resnet_fused.cli import train
from resnet_fused.cli.main import main
import matplotlib.backends.backend_agg, numpy, sklearn.datasets, tqdm

def kill_at(replacements, after):
    replace, count = os.replace, iter(range(1, replacements + 1))

    def counted(*paths):
        last = next(count) == replacements
        if after or not last:
            replace(*paths)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = counted

for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if not pid:
        output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if job["replacements"]:
            kill_at(job["replacements"], job["after"])
        code = main(job["arguments"])
        sys.stdout.flush()
        os._exit(code)
    print(pid, flush=True)
    sys.stdin.readline()  # until then it stays, as a zombie at least, so that no other process gets its number
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Process:
    """A process of the command line that has been started; killed at the end of the context, if it hasn't ended.

    Attributes:
        pid: its number.
        output: the file with what it prints.
    """

    def __init__(self, server: subprocess.Popen[str], output: Path) -> None:
        self._server = server
        self.output = output
        self.pid = int(self._answer())
        self._code: int | None = None

    def kill(self) -> int:
        """Sends SIGKILL; returns as `wait`."""
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def wait(self) -> int:
        """Its exit code; the signal that it died of, negated."""
        if self._code is None:
            assert self._server.stdin is not None
            self._server.stdin.write("\n")
            self._server.stdin.flush()
            self._code = int(self._answer())
        return self._code

    def _answer(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self._code is None:
            self.kill()


class Server:
    """Starts one process after another."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self._server = server

    def start(
        self, arguments: Sequence[object], output: Path, replacements: int = 0, after: bool = False
    ) -> Process:
        """Starts `python -m resnet_fused ARGUMENTS`.

        Args:
            arguments: of the command line.
            output: a file for stdout and stderr.
            replacements: the process kills itself when it renames a file for the that many-th time; 0: it does not.
            after: kills itself after the renaming, not before.
        """
        job = {
            "arguments": [str(argument) for argument in arguments],
            "output": str(output),
            "replacements": replacements,
            "after": after,
        }
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return Process(self._server, output)


@contextmanager
def start_server() -> Iterator[Server]:
    """A `Server`, which ends with the context."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    with process:
        yield Server(process)

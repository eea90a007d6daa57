"""The folder of a run: its lock, what it holds, and what a run that was killed has left there.

    .lock           which process trains here, or did last; locked while it lives
    config.json     settings and versions of the latest start
    last.pt         where the run stands, at the end of an epoch or where it was stopped
    best.pt         last.pt of the epoch with the highest held-out accuracy
    metrics.jsonl   one line per epoch of last.pt
    curves.png      its curves
    tensorboard/    with --tensorboard

With --impl compare the checkpoints and metrics of each model are in a folder of its name, and beside them are
compare.json and compare.png.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch

from resnet_fused.cli import checkpoint
from resnet_fused.cli.errors import UserError
from resnet_fused.cli.files import CannotWrite, copy_atomically, make_folder, remove_temporaries, write_text
from resnet_fused.cli.metrics import Progress
from resnet_fused.cli.settings import Invocation, Settings
from resnet_fused.cli.text import say

LEARNERS = {"fused": ("fused",), "reference": ("reference",), "compare": ("fused", "reference")}
LOCK = ".lock"
CHECKPOINTS = ("last.pt", "best.pt")
FILES = (*CHECKPOINTS, "config.json", "metrics.jsonl", "curves.png", "compare.json", "compare.png")
#: What a file system says that has no locks, such as NFS or Lustre mounted without them.
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that a learner goes on from.

    Attributes:
        written: identifies the file that was read, as a later one of the same name is another.
    """

    path: Path
    state: dict[str, Any]
    written: tuple[int, int]

    @classmethod
    def read(cls, path: Path) -> Resumed:
        """As `checkpoint.load`."""
        written = _written(path)
        return cls(path, checkpoint.load(path), written)

    def check_is_latest(self) -> None:
        """Checks that the file is still the one that was read: until the folder was locked, a run may have gone on.

        Raises:
            UserError: it is not.
        """
        if _written(self.path) != self.written:
            raise UserError(
                f"another run has just written {self.path}: start again, to go on from what it did",
                everywhere=False,
            )


def _written(path: Path) -> tuple[int, int]:
    """When the file of this name was written, and its size; zeros where there is none."""
    if not path.is_file():
        return 0, 0
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def last_checkpoint(out: Path, impl: str | None) -> Path:
    """What a run in `out` is resumed from: a file where it can be."""
    compared = impl if impl in LEARNERS["compare"] else "fused"
    candidates = (out / "last.pt", out / str(compared) / "last.pt")
    return next((candidate for candidate in candidates if candidate.is_file()), candidates[0])


def read_checkpoints(invocation: Invocation, impl: str | None) -> tuple[Invocation, dict[str, Resumed]]:
    """The checkpoints to resume from, by implementation, and where the run's files go.

    Raises:
        UserError: there is none, it cannot be read, or two that belong together stand at different steps.
    """
    path = invocation.resume
    assert path is not None
    if path.is_dir():
        path = last_checkpoint(path, impl)
    found = Resumed.read(path)
    was = found.state["settings"]["impl"]
    out = path.parent.parent if was == "compare" else path.parent
    if impl == "compare" and was != "compare":
        raise UserError(
            f"{path} is of a run with --impl {was}, which --impl compare cannot go on with: start afresh"
        )
    if was != "compare" or impl not in (None, "compare"):
        out, resumed = path.parent, {impl or was: found}
    else:
        resumed = {name: Resumed.read(out / name / path.name) for name in LEARNERS["compare"]}
        progress = {name: one.state["progress"] for name, one in resumed.items()}
        steps = {name: (one["epoch"], one["step"]) for name, one in progress.items()}
        if len(set(steps.values())) > 1:
            raise UserError(
                f"the two checkpoints in {out} stand at different steps ({steps}): start afresh with "
                "--overwrite, or go on with one of them by --impl fused or --impl reference"
            )
    return replace(invocation, resume=path, out=invocation.out or out), resumed


@contextlib.contextmanager
def claim(invocation: Invocation, impl: str) -> Iterator[None]:
    """Makes the run's folder and keeps other runs out of it while the context lasts.

    Temporary files in it are removed: no other process writes there, so that they are of runs that were killed.

    Raises:
        UserError: it cannot be written, another run is in it, or it holds a run that this one would replace.
    """
    out, *inner = folders = _folders(invocation.folder)
    with contextlib.ExitStack() as locks:
        # All that exist: a run that compares may go on with one of its models, in that model's folder.
        for folder in [out, *(one for one in inner if impl == "compare" or one.is_dir())]:
            make_folder(folder)
            lock = locks.enter_context(open(folder / LOCK, "a+", encoding="utf-8"))
            if _lock(lock, folder):
                remove_temporaries(folder, FILES)
        held = [path for folder in folders for name in CHECKPOINTS if (path := folder / name).exists()]
        if held and not _goes_on(invocation) and not invocation.overwrite:
            raise UserError(
                f"{out} already holds a run ({held[0].name}): "
                "add --resume or --overwrite, or choose another --out"
            )
        yield


def _lock(file: TextIO, folder: Path) -> bool:
    """Locks the file and writes this process into it; returns whether the file system has locks.

    The kernel releases a lock of this kind when the process ends, however it ends; workers that the process has forked
    do not hold it; on NFS it keeps out runs on other machines. It ends with any file object of `.lock` that the process
    closes, so that nothing else may open that file.

    Raises:
        UserError: another process has locked it, or it cannot be written.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(
                f"{holder} trains into {folder}: wait until it ends, or choose another --out"
            ) from error
        if error.errno not in WITHOUT_LOCKS:
            raise
        say(f"resnet_fused: the file system of {folder} has no locks: start no other run into it", sys.stderr)
        return False
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    except OSError as error:
        raise CannotWrite(
            f"--out {folder} cannot be written ({error.strerror}): choose another folder"
        ) from error
    return True


def begin(invocation: Invocation, settings: Settings, processes: int) -> None:
    """Writes `config.json`; removes the files of a run that is replaced.

    Raises:
        UserError: it cannot be written.
    """
    out = invocation.folder
    if not _goes_on(invocation):
        for folder in _folders(out):
            for name in FILES:
                (folder / name).unlink(missing_ok=True)
    versions = {"torch": torch.__version__, "python": platform.python_version(), "processes": processes}
    config = {"settings": vars(settings), "versions": versions}
    write_text(out / "config.json", json.dumps(config, indent=2) + "\n")


def restore_best(best: Path, resumed: Resumed, progress: Progress) -> None:
    """Makes `best.pt` the one of the run that goes on.

    The kill of a run may have come after `last.pt` of its best epoch was written, and before `best.pt` was. A run that
    is resumed into another folder takes its best checkpoint along.

    Raises:
        UserError: it cannot be written.
    """
    accuracies = [record["val_accuracy"] for record in progress.history]
    stands_at_best = (
        accuracies and not progress.step and accuracies.index(progress.best) + 1 == progress.epoch
    )
    source = resumed.path if stands_at_best else resumed.path.with_name("best.pt")
    if source.is_file() and not (best.exists() and source.samefile(best)):
        copy_atomically(source, best)


def _goes_on(invocation: Invocation) -> bool:
    """Whether it resumes the run that its folder holds."""
    resume = invocation.resume
    return resume is not None and resume.parent.resolve() in map(Path.resolve, _folders(invocation.folder))


def _folders(out: Path) -> list[Path]:
    """Where a run with that `--out` may have files."""
    return [out, *(out / name for name in LEARNERS["compare"])]

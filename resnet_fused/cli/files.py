"""Files that are replaced as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import IO

from resnet_fused.cli.errors import UserError

Write = Callable[[IO[bytes]], object]


class CannotWrite(UserError):
    """A file that cannot be written: the disk is full, say."""


def write_atomically(path: Path, write: Write) -> None:
    """As `write_all_atomically`, one file."""
    write_all_atomically({path: write})


def write_all_atomically(files: Mapping[Path, Write]) -> None:
    """Calls functions on temporary files beside those, flushes them to disk, and renames them when all are written.

    A reader, or a crash at any moment, finds the old file or the new one. Files that are written together are all old
    or all new, but for a crash between two renames.

    Raises:
        CannotWrite: a file cannot be written; the old ones are untouched.
    """
    temporaries = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in files}
    path = next(iter(files))
    try:
        for path, write in files.items():
            with open(temporaries[path], "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    # torch.save reports a full disk as RuntimeError.
    except (OSError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CannotWrite(
            f"cannot write {path} ({reason}): free some space or choose another place"
        ) from error
    finally:
        for temporary in temporaries.values():
            with contextlib.suppress(OSError):
                temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """`write_atomically` for text."""
    write_atomically(path, lambda file: file.write(text.encode()))


def copy_atomically(source: Path, path: Path) -> None:
    """`write_atomically` with the bytes of another file."""
    with open(source, "rb") as opened:
        write_atomically(path, lambda file: shutil.copyfileobj(opened, file))


def remove_temporaries(folder: Path, names: Collection[str]) -> None:
    """Removes what a process that was killed while it wrote files of these names has left; no other may be at it."""
    for path in folder.glob(".*.tmp"):
        match = re.fullmatch(r"\.(.+)\.\d+\.tmp", path.name)
        if match is not None and match[1] in names:
            path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Makes a folder and checks that files can be written there.

    Raises:
        UserError: they cannot.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(
            f"--out {path} cannot be written ({error.strerror}): choose another folder"
        ) from error


def check_file(option: str, file: Path) -> None:
    """Checks that a file can be written, before what takes long.

    Raises:
        UserError: it cannot.
    """
    if file.is_dir() or not os.access(file.parent, os.W_OK | os.X_OK):
        raise UserError(f"{option} {file} cannot be written: name a file in an existing folder")

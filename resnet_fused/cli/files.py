"""Files that are replaced as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from resnet_fused.cli.errors import UserError


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Calls `write` on a temporary file beside `path`, flushes it to disk, and renames it to `path`.

    A reader, or a crash at any moment, finds the old file or the new one.

    Raises:
        UserError: the file cannot be written; the old one is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    # torch.save reports a full disk as RuntimeError.
    except (OSError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot write {path} ({reason}): free some space or choose another place") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """`write_atomically` for text."""
    write_atomically(path, lambda file: file.write(text.encode()))


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

"""Files that are whole or not there."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from resnet_fused.cli.errors import UserError


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Calls `write` on a temporary file beside `path`, forces it to disk, and renames it to `path`.

    A reader, or a crash at any moment, finds the old file or the new one.

    Raises:
        UserError: the file cannot be written; the old one is untouched.
    """
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another --out") from error
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    # torch.save reports a full disk as RuntimeError.
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot write {path} ({_first_line(error)}): free some space or choose another --out"
        ) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """`write_atomically` for text."""
    write_atomically(path, lambda file: file.write(text.encode()))


def share(source: Path, target: Path) -> None:
    """Makes `target` the same file as `source`, atomically; a copy where the file system has no links.

    Safe because both are only ever replaced, never written in place.
    """
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp") as folder:
        link = Path(folder, target.name)
        try:
            os.link(source, link)
        except OSError:
            shutil.copyfile(source, link)
        os.replace(link, target)


def make_folder(path: Path) -> None:
    """Makes a folder and sees that files can be written there.

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


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself durable, where the file system lets a folder be opened."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

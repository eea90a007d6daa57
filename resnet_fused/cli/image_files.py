"""The images in a folder, and those of a folder with one folder a class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from resnet_fused.cli.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


def class_names(part: Path, least: int = 2) -> list[str]:
    """The folders in a folder, which are its classes, sorted.

    Raises:
        UserError: they cannot be read, or are fewer than ``least``.
    """
    try:
        names = sorted(
            entry.name for entry in part.iterdir() if entry.is_dir() and not entry.name.startswith(".")
        )
    except OSError as error:
        raise UserError(f"cannot read {part}: {error.strerror}") from error
    if not names:
        raise UserError(
            f"{part} holds no class folders: put the images of each class into a folder of its own"
        )
    if len(names) < least:
        raise UserError(f"{part} holds one class ({names[0]}): at least two are needed")
    return names


def class_files(part: Path, classes: Sequence[str]) -> list[tuple[str, int]]:
    """The images of each class, with its place among the classes.

    Raises:
        UserError: a class has none.
    """
    files: list[tuple[str, int]] = []
    for label, name in enumerate(classes):
        files += [(path, label) for path in image_files(part / name)]
    return files


def image_files(root: str | Path) -> list[str]:
    """The images in a folder and in those below it, sorted.

    Raises:
        UserError: there are none.
        OSError: a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error  # which os.walk would ignore, and with it a class or a part of one

    paths = sorted(
        os.path.join(folder, file)
        for folder, _, inside in os.walk(root, onerror=fail, followlinks=True)
        for file in inside
        if file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith(".")
    )
    if not paths:
        raise UserError(f"{root} holds no images: {', '.join(IMAGE_SUFFIXES)} are read")
    return paths

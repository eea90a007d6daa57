"""Measurements as files: the tables that the package ships, and a cache on disk that processes share.

A file whose header does not fit, or that is damaged, is ignored with one warning and never an error: then everything is
measured again.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import glob
import hashlib
import json
import os
import re
import stat
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from resnet_fused._version import __version__
from resnet_fused.kernels.autotune.tunable import Timing, Timings, TuningKey, sorted_timings
from resnet_fused.kernels.launch import Config

KERNELS = Path(__file__).parents[1]
SHIPPED_TABLES = KERNELS / "tuned"
LOCK_SECONDS = 5.0  # another process holds the lock for milliseconds, unless it was stopped
_loaded: dict[Path, dict[TuningKey, Timings]] = {}
_warned: set[str] = set()


def forget_loaded_files() -> None:
    """Files are read again when they are needed, and warned about again."""
    _loaded.clear()
    _warned.clear()
    device_name.cache_clear()


@functools.cache
def device_name(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


def load(device: torch.device, key: TuningKey, configs: Sequence[Config]) -> Timings | None:
    """From the table that is shipped for the device, else from the cache on disk."""
    expected = header(device)
    model = _model(expected["device"])
    for path, fits in (
        (SHIPPED_TABLES / f"{model}.json", lambda actual: _model(str(actual["device"])) == model),
        (cache_path(expected), lambda actual: actual == expected),
    ):
        if path not in _loaded:
            _loaded[path] = read_table(path, fits)
        timings = _loaded[path].get(key, ())
        outdated = [t.config for t in timings if t.config is not None and t.config not in configs]
        if outdated:
            why = f"{outdated[0]} for {key}, which is not a configuration of the kernel any more"
            warn_once(str(path), f"{path} has {why}: delete the file")
        elif timings:
            return timings
    return None


def _model(device_name: str) -> str:
    """h100 for "NVIDIA H100 80GB HBM3"; the whole name where no word of it looks like a model's."""
    model = re.search(r"\b[a-z]+\d+s?", device_name.lower())
    return model[0] if model else _file_name(device_name.lower())


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text)


@functools.cache
def _source_hash() -> str:
    """Of all Python files of the kernels."""
    digest = hashlib.sha256()
    for path in sorted(KERNELS.rglob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def header(device: torch.device) -> dict[str, str]:
    """All that a measurement depends on beside its tuning key."""
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "device": device_name(device.index),
        "capability": f"{major}.{minor}",
        "torch": str(torch.__version__),
        "triton": str(triton.__version__),
        "resnet_fused": __version__,
        "source": _source_hash(),
    }


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "resnet_fused")


def cache_path(header: Mapping[str, str]) -> Path:
    return cache_folder() / (_file_name("-".join(header.values())) + ".json")


def store(device: torch.device, key: TuningKey, timings: Timings) -> None:
    """Adds to the cache on disk; safe with other processes that do the same."""
    expected = header(device)
    path = cache_path(expected)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
                left.unlink()  # of a process that was killed: others would have the lock
            _loaded[path] = read_table(path, lambda actual: actual == expected) | {key: timings}
            write_table(path, expected, _loaded[path])
    except OSError as error:
        failed = f"measurements are not stored in {path.parent}: {error}"
        warn_once(str(path.parent), f"{failed}; set XDG_CACHE_HOME to a folder that can be written")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keeps other processes from storing to the file while the context lasts.

    Raises:
        OSError: they don't end, or the folder cannot be written.
    """
    lock = path.with_suffix(".lock")
    # Once it took too long, it may again: measurements of other kernels don't wait.
    deadline = time.monotonic() + (0 if str(path.parent) in _warned else LOCK_SECONDS)
    with open(lock, "ab", opener=_open_regular) as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"another process holds {lock}") from error
                time.sleep(LOCK_SECONDS / 100)
        yield


def _open_regular(path: str, flags: int) -> int:
    """An opener of regular files: of others a FIFO, for one, blocks until another process opens it.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is no regular file")
    return descriptor


def write_table(path: Path, header: Mapping[str, str], table: Mapping[TuningKey, Timings]) -> None:
    """Replaces the file atomically; one tuning key a line."""
    lines = [json.dumps(key._asdict() | {"timings": timings_to_json(table[key])}) for key in sorted(table)]
    text = f'{{"header": {json.dumps(header)},\n"entries": [\n' + ",\n".join(lines) + "\n]}\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_table(path: Path, fits: Callable[[dict[str, Any]], bool]) -> dict[TuningKey, Timings]:
    """The entries of a file whose header ``fits``; none, and a warning, where it is damaged or does not fit."""
    try:
        with open(path, "rb", opener=_open_regular) as file:
            content = json.loads(file.read())
        if not fits(content["header"]):
            raise ValueError("it was written by another version or for another device")
        return {
            TuningKey(row["kernel"], tuple(row["sizes"]), row["dtype"]): timings_from_json(row["timings"])
            for row in content["entries"]
        }
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        warn_once(str(path), f"{path} is ignored: {error!r}; delete it")
        return {}


def timings_to_json(timings: Timings) -> list[dict[str, Any]]:
    return [
        {"config": "vendor" if config is None else config._asdict()}
        | ({"ms": ms} if rejection is None else {"rejection": rejection})
        for config, ms, rejection in timings
    ]


def timings_from_json(rows: list[dict[str, Any]]) -> Timings:
    return sorted_timings(
        Timing(
            None if row["config"] == "vendor" else Config(**row["config"]),
            None if "rejection" in row else row["ms"],
            row.get("rejection"),
        )
        for row in rows
    )


def warn_once(subject: str, text: str) -> None:
    if subject not in _warned:
        _warned.add(subject)
        warnings.warn(text, stacklevel=4)

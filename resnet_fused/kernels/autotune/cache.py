"""Measurements as files: the tables that the package ships, and a cache on disk that processes share.

A file whose header does not fit, or that is damaged, is ignored with one warning and never an error: then everything is
measured again.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from resnet_fused._version import __version__
from resnet_fused.kernels.autotune.tunable import (
    Timing,
    Timings,
    TuningKey,
    fastest,
    is_outdated,
    sorted_timings,
)
from resnet_fused.kernels.launch import Config

KERNELS = Path(__file__).parents[1]
SHIPPED_TABLES = KERNELS / "tuned"
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


def load(
    device: torch.device, key: TuningKey, configs: Sequence[Config], vendor_allowed: bool
) -> Timings | None:
    """From the table that is shipped for the device, else from the cache on disk."""
    expected = header(device)
    model = _model(expected["device"])
    for path, fits in (
        (SHIPPED_TABLES / f"{model}.json", lambda actual: _model(str(actual.get("device"))) == model),
        (cache_path(expected), lambda actual: actual == expected),
    ):
        if path not in _loaded:
            _loaded[path] = read_table(path, fits)
        timings = _loaded[path].get(key, ())
        best = fastest(timings, vendor_allowed)
        if best is not None and is_outdated(best.config, configs):
            outdated = (
                f"{path} has {best.config} for {key}, which is not a configuration of the kernel any more"
            )
            warn_once(str(path), f"{outdated}: delete the file")
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
        with open(path.with_suffix(".lock"), "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _loaded[path] = read_table(path, lambda actual: actual == expected) | {key: timings}
            write_table(path, expected, _loaded[path])
    except OSError as error:
        failed = f"measurements are not stored in {path.parent}: {error}"
        warn_once(str(path.parent), f"{failed}; set XDG_CACHE_HOME to a folder that can be written")


def write_table(path: Path, header: Mapping[str, str], table: Mapping[TuningKey, Timings]) -> None:
    """Replaces the file atomically; one tuning key a line."""
    lines = [json.dumps(key._asdict() | {"timings": timings_to_json(table[key])}) for key in sorted(table)]
    text = f'{{"header": {json.dumps(header)},\n"entries": [\n' + ",\n".join(lines) + "\n]}\n"
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def read_table(path: Path, fits: Callable[[dict[str, Any]], bool]) -> dict[TuningKey, Timings]:
    """The entries of a file whose header ``fits``; none, and a warning, where it is damaged or does not fit."""
    try:
        content = json.loads(path.read_bytes())
        _check(isinstance(content, dict) and isinstance(content.get("header"), dict), "it has no header")
        _check(fits(content["header"]), "it was written by another version or for another device")
        _check(isinstance(content.get("entries"), list), "it has no entries")
        return dict(map(_entry_from_json, content["entries"]))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        warn_once(str(path), f"{path} is ignored: {error}; delete it")
        return {}


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def timings_to_json(timings: Timings) -> list[dict[str, Any]]:
    return [
        {"config": "vendor" if config is None else config.as_dict()}
        | ({"ms": ms} if rejection is None else {"rejection": rejection})
        for config, ms, rejection in timings
    ]


def timings_from_json(rows: Any) -> Timings:
    _check(isinstance(rows, list) and bool(rows), "an entry has no timings")
    return sorted_timings(map(_timing_from_json, rows))


def _entry_from_json(row: Any) -> tuple[TuningKey, Timings]:
    fields = {*TuningKey._fields, "timings"}
    _check(isinstance(row, dict) and row.keys() == fields, "an entry has other fields")
    kernel, sizes, dtype = (row[field] for field in TuningKey._fields)
    _check(isinstance(kernel, str) and isinstance(dtype, str), "a kernel or dtype is not a string")
    _check(isinstance(sizes, list) and all(type(size) is int for size in sizes), "sizes are not integers")
    return TuningKey(kernel, tuple(sizes), dtype), timings_from_json(row["timings"])


def _timing_from_json(row: Any) -> Timing:
    _check(isinstance(row, dict) and len(row) == 2 and "config" in row, "a timing has other fields")
    config, ms, rejection = row["config"], row.get("ms"), row.get("rejection")
    if rejection is None:
        _check(type(ms) in (int, float) and 0 <= ms < 1e9, "a time is not a number of milliseconds")
        ms = float(ms)
    else:
        _check(
            isinstance(rejection, str) and config != "vendor", "a rejection is not a configuration's reason"
        )
    if config == "vendor":
        return Timing(None, ms)
    _check(isinstance(config, dict) and config.keys() == Config().as_dict().keys(), "not a configuration")
    _check(all(type(value) is int and value > 0 for value in config.values()), "not a configuration")
    return Timing(Config(**config), ms, rejection)


def warn_once(subject: str, text: str) -> None:
    if subject not in _warned:
        _warned.add(subject)
        warnings.warn(text, stacklevel=4)

"""What a checkpoint must hold, beyond being a whole file: else it fails long after it was read, or silently.

The learner that it is loaded into checks the rest: shapes, and what depends on the run's settings.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from resnet_fused.cli.metrics import RECORD_KEYS, Progress
from resnet_fused.cli.options import check_saved
from resnet_fused.cli.settings import SMALLEST_IMAGE
from resnet_fused.reference.resnet import ARCHITECTURES

SETTINGS = {"arch", "data", "epochs", "image_size", "impl", "seed"}  # that have to be there
SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
LARGEST_INT = 2**62

Check = Callable[[Any], bool]


def check_contents(state: Mapping[str, Any]) -> None:
    """Checks all parts of a checkpoint.

    Args:
        state: with all of `checkpoint.KEYS`.

    Raises:
        ValueError: a part is not what `train` writes; its message names the part.
    """
    _check("arch", state["arch"], lambda x: isinstance(x, str) and x in ARCHITECTURES)
    _check("classes", state["classes"], _are_names)
    _check("steps_per_epoch", state["steps_per_epoch"], lambda x: _is_count(x) and x > 0)
    for key in {"mean", "std"} & state.keys():
        _check(key, state[key], _are_channels)
    _check("std", state.get("std", [1.0]), lambda std: all(x > 0 for x in std))
    _check_settings(state)
    for key in {"model", "trained"} & state.keys():
        _check_weights(key, state[key])
    _check("n_averaged", state.get("n_averaged", 0), _is_count)
    _check_optimizer(state["optimizer"])
    _check_scaler(state["scaler"])
    _check_progress(state["progress"], state["steps_per_epoch"], state["settings"]["epochs"])
    _check("random", state["random"], lambda x: isinstance(x, dict) and x.keys() == {"cpu", "cuda"})
    _check("random: cpu", state["random"]["cpu"], lambda x: _is_bytes(x) and x.shape == _CPU_RANDOM_SHAPE)
    _check("random: cuda", state["random"]["cuda"], lambda x: isinstance(x, list) and all(map(_is_bytes, x)))


_CPU_RANDOM_SHAPE = torch.Generator().get_state().shape


def _check_settings(state: Mapping[str, Any]) -> None:
    settings = state["settings"]
    _check("settings", settings, _has_text_keys)
    _check_keys("settings", SETTINGS, SETTINGS & settings.keys())
    check_saved(settings)
    _check("settings: arch", settings["arch"], lambda x: x == state["arch"])
    _check("settings: image_size", settings["image_size"], lambda x: x >= SMALLEST_IMAGE)


def _check_weights(key: str, weights: Any) -> None:
    _check(key, weights, lambda x: _has_text_keys(x) and len(x) > 0)
    for name, value in weights.items():
        _check(f"{key}: {name}", value, lambda x: _is_tensor(x, torch.float32, torch.int64))
        if not value.isfinite().all():
            raise ValueError(f"{key}: {name} is not finite")


def _check_optimizer(optimizer: Any) -> None:
    _check("optimizer", optimizer, lambda x: isinstance(x, dict))
    _check_keys("optimizer", {"state", "param_groups"}, optimizer.keys())
    groups, state = optimizer["param_groups"], optimizer["state"]
    _check("optimizer: param_groups", groups, lambda x: isinstance(x, list))
    for group in groups:
        _check("optimizer: param_groups", group, _has_text_keys)
        _check("optimizer: param_groups", group.get("params"), lambda x: isinstance(x, list))
    indices = [index for group in groups for index in group["params"]]
    _check("optimizer: param_groups", indices, lambda x: all(map(_is_count, x)) and x == [*range(len(x))])
    # Empty where gradients have overflowed in every step so far.
    _check("optimizer: state", state, lambda x: isinstance(x, dict))
    _check_keys("optimizer: state", set(indices) if state else set(), state.keys())
    for index, values in state.items():
        _check(f"optimizer: state: {index}", values, _has_text_keys)
        for name, value in values.items():
            _check(
                f"optimizer: state: {index}: {name}",
                value,
                lambda x: x is None or _is_tensor(x, torch.float32),
            )


def _check_scaler(scaler: Any) -> None:
    _check("scaler", scaler, lambda x: isinstance(x, dict))
    if scaler:  # empty where the run is not in fp16
        _check_keys("scaler", SCALER, scaler.keys())
        for name in ("scale", "growth_factor", "backoff_factor"):
            _check(f"scaler: {name}", scaler[name], lambda x: _is_number(x) and 0 < x < math.inf)
        for name in ("growth_interval", "_growth_tracker"):
            _check(f"scaler: {name}", scaler[name], _is_count)


def _check_progress(progress: Any, steps_per_epoch: int, epochs: int) -> None:
    _check("progress", progress, lambda x: isinstance(x, dict))
    _check_keys("progress", {field.name for field in fields(Progress)}, progress.keys())
    for name in ("epoch", "step", "correct", "images"):
        _check(f"progress: {name}", progress[name], _is_count)
    for name in ("loss", "seconds", "best"):
        _check(f"progress: {name}", progress[name], lambda x: _is_number(x) and math.isfinite(x))
    for name in ("losses", "step_seconds"):
        _check(f"progress: {name}", progress[name], lambda x: _is_tensor(x, torch.float64) and x.ndim == 1)
    epoch, step, history = (progress[name] for name in ("epoch", "step", "history"))
    _check("progress: epoch", epoch, lambda x: x <= epochs)
    _check("progress: step", step, lambda x: x <= steps_per_epoch)
    _check("progress: images", progress["images"], lambda x: bool(x) == bool(step))
    _check("progress: correct", progress["correct"], lambda x: x <= progress["images"])
    _check("progress: history", history, lambda x: isinstance(x, list) and len(x) == epoch)
    for record in history:
        _check("progress: history", record, lambda x: isinstance(x, dict) and x.keys() == RECORD_KEYS)
        for name, value in record.items():
            _check(f"progress: history: {name}", value, _is_number)
    before = history[-1]["step"] if history else 0
    _check("number of progress: losses", len(progress["losses"]), lambda x: x == before + step)
    best = max((record["val_accuracy"] for record in history), default=-1.0)
    _check("progress: best", progress["best"], lambda x: x == best)


def _check(name: str, value: Any, is_valid: Check) -> None:
    if not is_valid(value):
        raise ValueError(f"{name} is {reprlib.repr(value)}")


def _check_keys(name: str, expected: set[Any], actual: Any) -> None:
    if expected != actual:
        lacks, has = expected - actual, actual - expected
        words = [f"{verb} {reprlib.repr(keys)}" for verb, keys in (("lacks", lacks), ("has", has)) if keys]
        raise ValueError(f"{name} {' and '.join(words)}")


def _has_text_keys(x: Any) -> bool:
    return isinstance(x, dict) and all(isinstance(key, str) for key in x)


def _are_names(x: Any) -> bool:
    return isinstance(x, list) and all(isinstance(name, str) for name in x) and 0 < len({*x}) == len(x)


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def _is_count(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and 0 <= x <= LARGEST_INT


def _are_channels(x: Any) -> bool:
    return isinstance(x, list) and len(x) == 3 and all(_is_number(v) and math.isfinite(v) for v in x)


def _is_tensor(x: Any, *dtypes: torch.dtype) -> bool:
    if not isinstance(x, Tensor) or x.dtype not in dtypes:
        return False
    return x.layout == torch.strided and x.device.type == "cpu"


def _is_bytes(x: Any) -> bool:
    return _is_tensor(x, torch.uint8) and x.ndim == 1

"""Checkpoints: plain dictionaries that load with `weights_only=True`, the model under `model`.

With --ema that is the average, which was evaluated and is what others will want to load. The weights that training
goes on with are then under `trained`, and the number of steps in the average under `n_averaged`.
"""

from __future__ import annotations

import functools
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from resnet_fused.cli.checkpoint_contents import check_contents
from resnet_fused.cli.errors import UserError
from resnet_fused.cli.files import write_all_atomically

FORMAT = "resnet_fused training 2"
KEYS = {
    "format",
    "model",
    "optimizer",
    "scaler",
    "progress",
    "random",
    "settings",
    "arch",
    "classes",
    "steps_per_epoch",
}

#: What torch.load raises for a file that is damaged, or something else; beside OSError.
UNREADABLE = (
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    KeyError,
)


def save(states: Mapping[Path, dict[str, Any]]) -> None:
    """Writes checkpoints that belong together atomically.

    Args:
        states: for each path `KEYS` except `format`, and more: tensors, numbers, strings, and lists and dictionaries
            of them. A file there is replaced only by a whole new one.

    Raises:
        UserError: a file cannot be written.
    """
    write_all_atomically({path: functools.partial(_write, state) for path, state in states.items()})


def _write(state: dict[str, Any], file: IO[bytes]) -> None:
    torch.save({"format": FORMAT, **state}, file)


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint that `save` wrote.

    Raises:
        UserError: there is no file, it is damaged, or it holds something else.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: give the path of a last.pt or best.pt")
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.save compresses nothing, and whatever else is taken for compressed fails in many ways.
            compressed = (member.filename for member in archive.infolist() if member.compress_type)
            damaged = next(compressed, None) or archive.testzip()  # torch.load does not compare checksums
        if damaged:
            raise UserError(f"the checkpoint {path} is damaged (in {damaged}): use another, such as best.pt")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from error
    except UNREADABLE as error:
        reason = (str(error).splitlines() or [""])[0].rstrip(".")
        raise UserError(
            f"{path} is no checkpoint, or a damaged one ({reason}): use another, such as best.pt"
        ) from error
    missing = sorted(KEYS - state.keys() if isinstance(state, dict) else KEYS)
    if missing:
        raise UserError(
            f"{path} is not a checkpoint of `python -m resnet_fused train`: it lacks {', '.join(missing)}. "
            "Give a last.pt or best.pt that it wrote"
        )
    if not isinstance(state["format"], str) or state["format"] != FORMAT:
        raise UserError(
            f"{path} has the format {state['format']!r}; this version reads {FORMAT!r}: start afresh"
        )
    try:
        check_contents(state)
    except ValueError as error:
        raise UserError(
            f"{path} holds what `train` does not write ({error}): use another checkpoint, such as best.pt"
        ) from error
    return state


def random_state() -> dict[str, Any]:
    """The state of PyTorch's random generators: nothing else in training draws from a global generator."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def set_random_state(state: dict[str, Any]) -> None:
    """Restores what `random_state` returned; a GPU's only where there are as many GPUs as there were."""
    torch.set_rng_state(state["cpu"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])

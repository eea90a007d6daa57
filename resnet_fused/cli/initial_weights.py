"""`train --weights`: what a run starts from instead of random weights."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resnet_fused import reference, weights
from resnet_fused.cli import checkpoint
from resnet_fused.cli.errors import UserError
from resnet_fused.cli.settings import Settings

HEAD = ("fc.weight", "fc.bias")


@dataclass(frozen=True)
class InitialWeights:
    """Weights that are known to fit.

    Attributes:
        state: of a model in full, or without its head, which then starts anew.
        description: in words.
    """

    state: dict[str, Tensor]
    description: str

    def load_into(self, model: nn.Module) -> None:
        """Copies them to a model of the architecture; a head that starts anew stays as it is."""
        model.load_state_dict(model.state_dict() | self.state)


def read_initial_weights(settings: Settings, classes: int, progress: bool) -> InitialWeights | None:
    """The weights of `--weights`; None where a run starts from random ones.

    Args:
        settings: of a run that is not resumed.
        classes: of its data.
        progress: shows the progress of a download.

    Raises:
        UserError: they cannot be downloaded or read, do not fit the architecture, or have another number of
            classes without `--finetune`.
    """
    name = settings.weights
    if name is None:
        return None
    source = weights.find(settings.arch, name)
    state = read_weights(source, name, progress)
    had = state["fc.bias"].numel() if isinstance(state.get("fc.bias"), Tensor) else classes
    new_head = had != classes
    if new_head:
        state = {key: value for key, value in state.items() if key not in HEAD}
    unfit = why_unfit(state, settings.arch, classes, new_head)
    if unfit is not None:
        raise UserError(
            f"--weights {name} are not those of a {settings.arch} ({unfit}): give the --arch that they are of"
        )
    if new_head and not settings.finetune:
        raise UserError(
            f"--weights {name} tell {had} classes apart, and --data has {classes}: add --finetune to start with a "
            "new head"
        )
    file = f" ({os.path.basename(source.url)})" if source.url is not None else ""
    head = (
        f"a new head for {classes} classes instead of {had}"
        if new_head
        else f"the head for {classes} classes"
    )
    trained = "only the head is trained" if settings.freeze_backbone else "all of it is trained"
    return InitialWeights(state, f"{name}{file}, with {head}; {trained}")


def read_weights(source: weights.Source, name: str, progress: bool) -> dict[str, Tensor]:
    """The state_dict that `--weights` names.

    Args:
        source: where it is.
        name: the option's value, for messages.
        progress: shows the progress of a download.

    Raises:
        UserError: it cannot be downloaded or read.
    """
    try:
        return weights.read(source, progress)
    except FileNotFoundError as error:
        raise UserError(f"--weights {name}: no such file") from error
    except (OSError, ValueError) as error:
        raise UserError(f"--weights {name} cannot be loaded: {error}") from error
    except checkpoint.UNREADABLE as error:
        # torch.load's own words are paragraphs, which advise to run what code a file holds.
        why = "it is damaged, or torch.save did not write it, or it holds more than tensors and plain values"
        if source.path is None:
            why = f"{str(error).splitlines()[0]}: delete {source.cached}, if it is there, and try again"
        raise UserError(f"--weights {name} cannot be loaded: {why}") from error


def why_unfit(state: dict[str, Tensor], arch: str, classes: int, new_head: bool = False) -> str | None:
    """Why weights don't fit a model of that many classes, or do so but for a new head; None where they fit."""
    with torch.device("meta"):
        model: nn.Module = getattr(reference, arch)(num_classes=classes)
    head = {key: value for key, value in model.state_dict().items() if new_head and key in HEAD}
    try:
        model.load_state_dict(state | head, assign=True)
    except RuntimeError as error:
        return " ".join(str(error).split()).partition("ResNet: ")[2][:120]
    return None

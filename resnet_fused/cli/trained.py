"""The model that `eval`, `predict` and `export` use: of a checkpoint of `train`, or of pretrained weights."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import resnet_fused
from resnet_fused import weights
from resnet_fused.cli import checkpoint
from resnet_fused.cli.data import HeldOutOrder
from resnet_fused.cli.distributed import World, from_environment, pick_device
from resnet_fused.cli.errors import UserError
from resnet_fused.cli.initial_weights import read_weights, why_unfit
from resnet_fused.cli.normalization import Normalize, normalization
from resnet_fused.cli.precision import PRECISIONS, check_precision
from resnet_fused.cli.settings import BY_DATA, SMALLEST_IMAGE, Settings
from resnet_fused.cli.signals import detach_worker

FOR_FOLDERS = 1  # of the pairs in BY_DATA


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode, on the CPU, and what it has to be given.

    Attributes:
        model: with float32 parameters.
        arch: the name of its constructor.
        origin: where the weights are from, in words.
        classes: the names of its outputs; their indices as strings where names are not known.
        named: whether they are names.
        published: whether the weights are published ones, of ImageNet's classes.
        image_size: of the square images that it was evaluated on in training.
        mean, std: of a channel, for pixels between 0 and 1.
        whole: whether images are seen whole; else their middle, as `data.Folder` has it.
        settings: those of its training; empty where they are not known.
    """

    model: nn.Module
    arch: str
    origin: str
    classes: list[str]
    named: bool
    published: bool
    image_size: int
    mean: Sequence[float]
    std: Sequence[float]
    whole: bool
    settings: Mapping[str, Any]

    def classifier(self, device: torch.device, precision: str) -> Callable[[Tensor], Tensor]:
        """Moves the model to the device; computes logits in float32 of uint8 [N, S, S, 3], as training does."""
        layout = torch.channels_last
        model = self.model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
        normalize = Normalize(self.mean, self.std, device, layout)

        def logits(pixels: Tensor) -> Tensor:
            with PRECISIONS[precision].autocast(device.type):
                out: Tensor = model(normalize(pixels))
            return out.float()

        return logits

    def device_and_precision(self, given: Mapping[str, Any]) -> tuple[torch.device, str]:
        """Those that the options name; else the precision is that of its training.

        Raises:
            UserError: there is no such device, or it cannot compute in that precision.
        """
        device = pick_device(given.get("device", Settings.device), World())
        precision: str = given.get("precision", self.settings.get("precision", Settings.precision))
        check_precision(precision, device)
        return device, precision


def open_trained(given: Mapping[str, Any]) -> Trained:
    """The model that the options name.

    Args:
        given: `checkpoint`, a path; or `weights` and `arch`; and perhaps `image_size`.

    Raises:
        UserError: it cannot be read, or the options do not fit together.
    """
    if from_environment().size > 1:
        raise UserError("a trained model is used by one process: start it without torchrun")
    size = given.get("image_size")
    if size is not None and size < SMALLEST_IMAGE:
        raise UserError(f"--image-size {size} is too small: use at least {SMALLEST_IMAGE}")
    path = given.get("checkpoint")
    if "weights" in given:
        if path is not None:
            raise UserError(f"give a checkpoint ({path}) or --weights, not both")
        if "arch" not in given:
            raise UserError("--weights needs the --arch that they are of")
        return _of_weights(given["arch"], given["weights"], size)
    if path is None:
        raise UserError(
            "give a checkpoint that train wrote, such as runs/train/best.pt, or --weights and --arch"
        )
    if "arch" in given:
        raise UserError("--arch belongs to --weights: a checkpoint has its own")
    return _of_checkpoint(path, size)


def _of_checkpoint(path: Path, size: int | None) -> Trained:
    if path.is_dir():
        candidates = [path / name for name in ("best.pt", "last.pt")]
        path = next((candidate for candidate in candidates if candidate.is_file()), candidates[0])
    state = checkpoint.load(path)
    arch, classes, settings = state["arch"], state["classes"], state["settings"]
    model = _model(arch, len(classes), state["model"], str(path), "use another checkpoint")
    # Checkpoints of before these were saved: both are functions of the data.
    mean, std = normalization(settings["data"])
    return Trained(
        model,
        arch,
        str(path),
        classes,
        named=True,
        published=False,
        image_size=size or settings["image_size"],
        mean=state.get("mean", mean),
        std=state.get("std", std),
        whole=settings["data"] == "digits",
        settings=settings,
    )


def _of_weights(arch: str, name: str, size: int | None) -> Trained:
    try:
        source = weights.find(arch, name)
    except ValueError as error:
        raise UserError(f"--weights: {error}") from error
    with contextlib.redirect_stdout(sys.stderr):  # torch.hub says there what it downloads
        state = read_weights(source, name, progress=sys.stderr.isatty())
    bias = state.get("fc.bias")
    count = bias.numel() if isinstance(bias, Tensor) else weights.CLASSES
    origin = f"--weights {name}"
    model = _model(arch, count, state, origin, "give the --arch that they are of")
    published = source.url is not None
    names = _imagenet_names(arch) if published else None
    mean, std = normalization("a folder")
    return Trained(
        model,
        arch,
        origin,
        names or [str(index) for index in range(count)],
        named=names is not None,
        published=published,
        image_size=size or BY_DATA["image_size"][FOR_FOLDERS],
        mean=mean,
        std=std,
        whole=False,
        settings={},
    )


def _model(arch: str, classes: int, state: dict[str, Tensor], origin: str, advice: str) -> nn.Module:
    unfit = why_unfit(state, arch, classes)
    if unfit is not None:
        raise UserError(f"{origin} does not fit a {arch} ({unfit}): {advice}")
    model: nn.Module = resnet_fused.get_model(arch, num_classes=classes)
    model.load_state_dict(state)
    return model.eval()


def _imagenet_names(arch: str) -> list[str] | None:
    """ImageNet's classes in words; None where torchvision, which has them, is not installed or does not load."""
    try:
        from torchvision.models import get_model_weights
    # RuntimeError: torchvision without the extension that fits this torch.
    except (ImportError, RuntimeError):
        return None
    names: list[str] = next(iter(get_model_weights(arch))).meta["categories"]
    return names


def make_loader(
    dataset: Any, collate: Any, batch_size: int, workers: int, device: torch.device
) -> DataLoader[Any]:
    """The images of a dataset of `data`, once and in its order."""
    return DataLoader[Any](
        dataset,
        batch_sampler=HeldOutOrder(len(dataset), batch_size, World()),
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=detach_worker,
    )

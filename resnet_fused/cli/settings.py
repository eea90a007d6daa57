"""Everything that decides a run: the options and their defaults."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from resnet_fused.cli.distributed import World
from resnet_fused.cli.errors import UserError
from resnet_fused.weights import find

IMPLEMENTATIONS = ("fused", "reference", "compare")
OPTIMIZERS = ("sgd", "adamw", "rmsprop")
SCHEDULES = ("cosine", "step", "constant")
AUGMENTATIONS = ("none", "standard", "trivial", "rand")
PRECISION_CHOICES = ("fp32", "bf16", "fp16")
SMALLEST_IMAGE = 16

# Option: (for the digits, for a folder). None on the command line and in `Settings` stands for these.
BY_DATA: dict[str, tuple[Any, Any]] = {
    "epochs": (25, 90),
    "image_size": (32, 224),
    "workers": (0, min(4, os.cpu_count() or 1)),
}

# Option: its default for each of `OPTIMIZERS`, as `BY_DATA`. Those of AdamW are PyTorch's.
BY_OPTIMIZER: dict[str, tuple[float, float, float]] = {
    "lr": (0.02, 1e-3, 1e-3),
    "weight_decay": (5e-4, 1e-2, 5e-4),
}

# Options that say how a run starts: a run that is resumed has them already.
AT_THE_START = ("weights", "finetune", "freeze_backbone")


@dataclass(frozen=True)
class Settings:
    """The options of `train`, named as on the command line."""

    arch: str = "resnet18"
    data: str = "digits"
    impl: str = "fused"
    precision: str = "fp32"
    epochs: int = 0
    batch_size: int = 64
    image_size: int = 0
    accumulate: int = 1
    optimizer: str = "sgd"
    lr: float = BY_OPTIMIZER["lr"][0]
    momentum: float = 0.9
    weight_decay: float = BY_OPTIMIZER["weight_decay"][0]
    clip_grad: float = 0.0
    schedule: str = "cosine"
    warmup: float = 0.1
    step_size: int = 30
    gamma: float = 0.1
    label_smoothing: float = 0.0
    augment: str = "standard"
    mixup: float = 0.0
    cutmix: float = 0.0
    ema: float = 0.0
    seed: int = 0
    workers: int = -1
    device: str = "auto"
    channels_last: bool = True
    cuda_graph: bool = False
    compile: bool = False
    tensorboard: bool = False
    weights: str | None = None
    finetune: bool = False
    freeze_backbone: bool = False


@dataclass(frozen=True)
class Invocation:
    """The options that are about this start of the program, not about the run: no checkpoint has them."""

    DEFAULT_OUT: ClassVar[Path] = Path("runs/train")

    out: Path | None = None
    resume: Path | None = None
    overwrite: bool = False
    max_steps: int | None = None

    @property
    def folder(self) -> Path:
        """Where the run's files go."""
        return self.out or self.DEFAULT_OUT


def make_settings(given: dict[str, Any], saved: dict[str, Any]) -> Settings:
    """Settings from the options given on the command line, else those of the checkpoint, else the defaults.

    Raises:
        UserError: options that cannot be, alone or together.
    """
    arch = given.get("arch", saved.get("arch", Settings.arch))
    if "weights" in given:
        given = {**given, "weights": _from_anywhere(arch, given["weights"])}
    for name in (*AT_THE_START, "optimizer") if saved else ():
        was = saved.get(name, getattr(Settings, name))
        if given.get(name, was) != was:
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{option} says how a run starts: leave it out with --resume, or start another run"
            )
    known = {field.name for field in fields(Settings)}
    chosen = {name: value for name, value in (saved | given).items() if name in known}
    data = chosen.get("data", Settings.data)
    for name, (for_digits, for_folder) in BY_DATA.items():
        chosen.setdefault(name, for_digits if data == "digits" else for_folder)
    optimizer = OPTIMIZERS.index(chosen.get("optimizer", Settings.optimizer))
    for name, by_optimizer in BY_OPTIMIZER.items():
        chosen.setdefault(name, by_optimizer[optimizer])
    if data != "digits":
        chosen["data"] = os.path.abspath(data)  # the command that goes on may be run elsewhere
    settings = replace(Settings(), **chosen)
    if settings.batch_size < 2:
        raise UserError(f"--batch-size {settings.batch_size}: batch norm needs at least 2 images")
    if settings.image_size < SMALLEST_IMAGE:
        raise UserError(f"--image-size {settings.image_size} is too small: use at least {SMALLEST_IMAGE}")
    for name in AT_THE_START:
        if getattr(settings, name) and settings.weights is None:
            raise UserError(f"--{name.replace('_', '-')} needs --weights to start from")
    if settings.cuda_graph:
        reason = _why_not_captured(settings)
        if reason is not None:
            raise UserError(f"--cuda-graph {reason}: leave one of them out")
    return settings


def _why_not_captured(settings: Settings) -> str | None:
    """What of the settings a captured step cannot have, on any device."""
    if settings.accumulate > 1:
        return "steps the optimizer after every batch, and --accumulate does not"
    if settings.compile:
        return "launches the model's kernels as they are, and --compile makes others"
    if settings.optimizer == "rmsprop":
        return "captures no --optimizer rmsprop, which PyTorch has not fused"
    if settings.clip_grad and settings.precision == "fp16":
        return "has fp16's gradients unscaled within the optimizer, where --clip-grad cannot see them"
    return None


def _from_anywhere(arch: str, weights: str) -> str:
    """A name of weights as it is, and a path as an absolute one: the run may be resumed from another folder."""
    try:
        path = find(arch, weights).path
    except ValueError as error:
        raise UserError(f"--weights: {error}") from error
    return weights if path is None else os.path.abspath(path)


def command_to_resume(out: Path, world: World) -> str:
    """The command that goes on with the run in `out`; everything else is in its checkpoint."""
    start = "python" if world.size == 1 else f"torchrun --nproc-per-node {world.local_size}"
    if world.size > world.local_size:
        start += f" --nnodes {world.size // world.local_size}"
    return f"{start} -m resnet_fused train --out {shlex.quote(str(out))} --resume"

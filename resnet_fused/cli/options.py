"""The options of all commands."""

from __future__ import annotations

import argparse
import contextlib
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from resnet_fused.cli.config import parse_value
from resnet_fused.cli.errors import UserError
from resnet_fused.cli.settings import (
    AUGMENTATIONS,
    BY_DATA,
    BY_OPTIMIZER,
    IMPLEMENTATIONS,
    OPTIMIZERS,
    PRECISION_CHOICES,
    SCHEDULES,
    Invocation,
    Settings,
)
from resnet_fused.reference.resnet import ARCHITECTURES

EXPORT_FORMATS = ("onnx", "torchscript", "exported-program", "state_dict")


class Parser(argparse.ArgumentParser):
    """Raises instead of printing its usage and leaving."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse.

        Raises:
            UserError: always.
        """
        raise UserError(f"{message}; see {self.prog} --help")


def _number(kind: Callable[[str], Any], is_valid: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    """An option's type: a number that is ``is_valid``, or an error that says what is wanted."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if is_valid(value):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")

    return parse


_count = _number(int, lambda value: value >= 1, "a whole number above 0")
_whole = _number(int, lambda value: value >= 0, "a whole number, 0 or more")
_positive = _number(float, lambda value: 0 < value < float("inf"), "a number above 0")
_not_negative = _number(float, lambda value: 0 <= value < float("inf"), "a number, 0 or more")
_above_0_to_1 = _number(float, lambda value: 0 < value <= 1, "a number above 0, up to 1")
_fraction = _number(float, lambda value: 0 <= value < 1, "a number from 0 to below 1")


def add_info_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "what a training step would launch on a GPU, computed without one"
    ).add_argument
    add("--plan", metavar="ARCH", help="of this model: passes over activations, and small kernels")
    add("--batch", type=_count, metavar="N", help="images per step (256)")
    add("--image-size", type=_count, metavar="PIXELS", help="of square images (224)")
    add("--precision", metavar="P", help="bf16, fp16, tf32 or fp32 (bf16)")


def _add_common_options(add: Callable[..., Any], arch: str) -> None:
    add("--arch", choices=ARCHITECTURES, metavar="NAME", help=f"one of {', '.join(ARCHITECTURES)} ({arch})")
    add("--precision", choices=PRECISION_CHOICES, help="autocast dtype; fp16 scales its gradients (fp32)")
    add("--device", help="auto, cpu, cuda or cuda:N (auto)")


def add_train_options(parser: argparse.ArgumentParser) -> None:
    default = {name: "{} for the digits, {} for a folder".format(*values) for name, values in BY_DATA.items()}
    rates = {
        name: "; ".join(f"{x:g} with {o}" for o, x in zip(OPTIMIZERS, values, strict=True))
        for name, values in BY_OPTIMIZER.items()
    }
    switch = argparse.BooleanOptionalAction

    add = parser.add_argument_group("what").add_argument
    _add_common_options(add, Settings.arch)
    add(
        "--impl",
        choices=IMPLEMENTATIONS,
        help="fused, reference (eager PyTorch), or both side by side (fused)",
    )
    help_data = "'digits', or a folder with train/ and val/, each with a folder per class (digits)"
    add("--data", metavar="DATA", help=help_data)
    add("--image-size", type=_count, metavar="PIXELS", help=f"of square images ({default['image_size']})")
    add("--channels-last", action=switch, help="memory layout of images and weights (channels_last)")
    help_graph = (
        "replay steps as a CUDA graph, on one GPU: for batches that take longer to launch than to run (no)"
    )
    add("--cuda-graph", action=switch, help=help_graph)
    add("--compile", action=switch, help="the model with torch.compile, not with --cuda-graph (no)")

    add = parser.add_argument_group("from what").add_argument
    help_weights = (
        "pretrained weights: DEFAULT, IMAGENET1K_V1 or IMAGENET1K_V2, which are downloaded once; or a file of "
        "torch.save, such as a best.pt (random weights). Images of a folder are normalized as for ImageNet"
    )
    add("--weights", metavar="NAME|PATH", help=help_weights)
    help_finetune = "start with a new head where --weights have another number of classes than the data"
    add("--finetune", action="store_true", help=help_finetune)
    help_freeze = "train the head alone: the rest of the weights and the running statistics stay as they are"
    add("--freeze-backbone", action="store_true", help=help_freeze)

    add = parser.add_argument_group("how").add_argument
    add("--epochs", type=_count, metavar="N", help=f"({default['epochs']})")
    add("--batch-size", type=_count, metavar="N", help=f"images per step and process ({Settings.batch_size})")
    help_accumulate = (
        f"batches for each step of the optimizer; a run stops between those ({Settings.accumulate})"
    )
    add("--accumulate", type=_count, metavar="N", help=help_accumulate)
    add("--optimizer", choices=OPTIMIZERS, help=f"({Settings.optimizer})")
    add("--lr", type=_positive, metavar="RATE", help=f"highest learning rate ({rates['lr']})")
    add("--momentum", type=_fraction, metavar="M", help=f"in AdamW beta1 ({Settings.momentum})")
    help_decay = f"not for norms and biases; decoupled in AdamW alone ({rates['weight_decay']})"
    add("--weight-decay", type=_not_negative, metavar="D", help=help_decay)
    help_clip = "largest norm of all gradients together; 0 clips none (0)"
    add("--clip-grad", type=_not_negative, metavar="NORM", help=help_clip)
    help_schedule = f"of the learning rate, after a warm-up; cosine ends at 0 ({Settings.schedule})"
    add("--schedule", choices=SCHEDULES, help=help_schedule)
    add(
        "--warmup",
        type=_fraction,
        metavar="PART",
        help=f"part of the steps that warms up ({Settings.warmup})",
    )
    help_size = f"of --schedule step: epochs between reductions ({Settings.step_size})"
    add("--step-size", type=_count, metavar="EPOCHS", help=help_size)
    help_gamma = f"of --schedule step: factor of each reduction ({Settings.gamma})"
    add("--gamma", type=_above_0_to_1, metavar="G", help=help_gamma)
    help_smoothing = f"of the training loss ({Settings.label_smoothing:g})"
    add("--label-smoothing", type=_fraction, metavar="X", help=help_smoothing)
    help_augment = (
        "of training images: standard is crop and flip, or for the digits small moves; trivial and rand follow it "
        f"with torchvision's TrivialAugmentWide and RandAugment ({Settings.augment})"
    )
    add("--augment", choices=AUGMENTATIONS, help=help_augment)
    help_mixup = "parameter of MixUp's Beta distribution; with --cutmix one of them for each batch; 0: no (0)"
    add("--mixup", type=_not_negative, metavar="A", help=help_mixup)
    add("--cutmix", type=_not_negative, metavar="A", help="of CutMix's (0)")
    help_ema = "evaluate and save as the model the moving average of the weights, with this decay; 0: no (0)"
    add("--ema", type=_fraction, metavar="DECAY", help=help_ema)
    add("--seed", type=_whole, metavar="N", help=f"of weights, order and augmentation ({Settings.seed})")
    add("--workers", type=_whole, metavar="N", help=f"processes that load images ({default['workers']})")
    help_steps = "stop after this many steps in all, saved, as if interrupted"
    add("--max-steps", type=_count, metavar="N", help=help_steps)

    add = parser.add_argument_group("where").add_argument
    help_config = "options in YAML, such as 'epochs: 90'; the command line overrides them"
    add("--config", type=Path, metavar="FILE", help=help_config)
    help_out = f"for checkpoints, metrics and curves ({Invocation.DEFAULT_OUT})"
    add("--out", type=Path, metavar="FOLDER", help=help_out)
    help_board = "also write scalars for TensorBoard, to OUT/tensorboard (no)"
    add("--tensorboard", action=switch, help=help_board)
    help_resume = "go on from a checkpoint (OUT/last.pt); auto: if there is one, else start"
    add("--resume", type=Path, nargs="?", const=None, metavar="PATH", help=help_resume)
    add("--overwrite", action="store_true", help="replace the run that --out holds")


def check_saved(settings: Mapping[str, Any]) -> None:
    """Checks the settings in a checkpoint; those that are none of this version's options are not looked at.

    Raises:
        ValueError: the command line would not take a value.
    """
    parser = Parser()
    add_train_options(parser)
    options = {action.dest: action for action in parser._actions}
    for name in {field.name for field in fields(Settings)} & settings.keys():
        value = settings[name]
        if value is None and getattr(Settings, name) is None:
            continue
        try:
            is_valid = parse_value(options[name], value) == value
        except (ValueError, argparse.ArgumentTypeError):
            is_valid = False
        if not is_valid:
            raise ValueError(f"settings: {name} is {reprlib.repr(value)}")


def _add_weights_options(add: Callable[..., Any]) -> None:
    help_weights = (
        "instead of a checkpoint: DEFAULT, IMAGENET1K_V1 or IMAGENET1K_V2, or a state_dict of torch.save"
    )
    add("--weights", metavar="NAME|PATH", help=help_weights)
    add("--arch", choices=ARCHITECTURES, metavar="NAME", help="of --weights: resnet18, resnet50, ...")
    help_size = "of square images (that of the training, 224 for --weights)"
    add("--image-size", type=_count, metavar="PIXELS", help=help_size)


def _add_inference_options(add: Callable[..., Any]) -> None:
    add(
        "--precision",
        choices=PRECISION_CHOICES,
        help="autocast dtype (that of the training, fp32 for --weights)",
    )
    add("--device", help="auto, cpu, cuda or cuda:N (auto)")
    add("--batch-size", type=_count, metavar="N", help="images at a time")
    add("--workers", type=_whole, metavar="N", help="processes that load images")


_HELP_CHECKPOINT = "a best.pt or last.pt of train, or its folder"


def add_eval_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", type=Path, nargs="?", default=None, metavar="CHECKPOINT", help=_HELP_CHECKPOINT)
    _add_weights_options(add)
    help_data = "'digits', or a folder with val/, with a folder per class (that of the training)"
    add("--data", metavar="DATA", help=help_data)
    help_split = "folder in DATA; '.' for DATA itself (val)"
    add("--split", metavar="NAME", help=help_split)
    _add_inference_options(add)
    add("--json", type=Path, metavar="FILE", help="for the results")


def add_predict_options(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} [options] (CHECKPOINT | --weights NAME --arch NAME) IMAGE_OR_FOLDER ..."
    add = parser.add_argument
    help_paths = f"{_HELP_CHECKPOINT}, unless --weights is given; then images, and folders of images"
    add("paths", nargs="+", metavar="PATH", help=help_paths)
    _add_weights_options(add)
    add("--top", type=_count, metavar="K", help="classes of each image (5)")
    _add_inference_options(add)
    add("--json", type=Path, metavar="FILE", help="for the results")
    add("--csv", type=Path, metavar="FILE", help="for the results, one class a line")


def add_export_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", type=Path, nargs="?", default=None, metavar="CHECKPOINT", help=_HELP_CHECKPOINT)
    _add_weights_options(add)
    add("--format", required=True, choices=EXPORT_FORMATS, help="of the file")
    add("--out", required=True, type=Path, metavar="FILE", help="replaced where it is there")


def add_bench_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_common_options(add, "resnet50")
    add("--batch", type=_count, metavar="N", help="images per step (16 on a CPU, 64 on a GPU)")
    add("--image-size", type=_count, metavar="PIXELS", help="of square images (224)")
    add("--seconds", type=_positive, metavar="S", help="of timing, which is but a part; 3 to 50 rounds (30)")
    help_compile = "leave torch.compile out, which takes a minute"
    add("--no-compile", dest="compile", action="store_false", help=help_compile)
    add("--out", type=Path, metavar="FOLDER", help="for bench.json and bench.png (runs/bench)")
    add("--json", type=Path, metavar="FILE", help="for the results, instead of bench.json in OUT")

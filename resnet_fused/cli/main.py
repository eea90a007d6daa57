"""Commands, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from resnet_fused._version import __version__
from resnet_fused.cli.config import read_config
from resnet_fused.cli.distributed import from_environment
from resnet_fused.cli.errors import UserError
from resnet_fused.cli.options import (
    Parser,
    add_bench_options,
    add_eval_options,
    add_export_options,
    add_info_options,
    add_predict_options,
    add_train_options,
)
from resnet_fused.cli.settings import Invocation
from resnet_fused.cli.signals import Stopped
from resnet_fused.cli.text import say
from resnet_fused.environment import SCRIPT


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the arguments, without the program's name; those of the process by default.

    Returns:
        The exit code: 0, 2 for a user's mistake (one line on stderr), 130, 143 or 129 after Ctrl-C, SIGTERM or SIGHUP.
    """
    try:
        arguments = vars(make_parser().parse_args(argv))
        command, subparser = arguments.pop("command"), arguments.pop("parser")
        if "config" in arguments:
            arguments = read_config(arguments.pop("config"), subparser) | arguments
        command(arguments)
    except UserError as error:
        if error.everywhere and not from_environment().main:
            return 2
        say_error(str(error))
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        say_error(f"{error.filename}: {error.strerror}")  # such as of a folder whose server is gone
        return 2
    except Stopped as stopped:
        return 128 + stopped.signal if stopped.signal else 0
    except KeyboardInterrupt:
        say("resnet_fused: interrupted at once; the last checkpoint is as it was", sys.stderr)
        return 128 + signal.SIGINT
    return 0


def say_error(text: str) -> None:
    """On one line."""
    say(f"resnet_fused: error: {' '.join(text.split())}", sys.stderr)


def program() -> str:
    """How the command line was started, as far as usage and messages name it."""
    return SCRIPT if Path(sys.argv[0]).stem == SCRIPT else "python -m resnet_fused"


def make_parser() -> Parser:
    """The parser of all commands; each sets `command` to the function that runs it, and `parser` to its own."""
    parser = Parser(prog=program(), description="ResNets that train fused.")
    parser.add_argument("--version", action="version", version=f"resnet_fused {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[dict[str, Any]], None], help: str, description: str = ""
    ) -> argparse.ArgumentParser:
        # An option that is not given stays away: a checkpoint that is resumed may have it.
        subparser = commands.add_parser(
            name, help=help, description=description, argument_default=argparse.SUPPRESS
        )
        subparser.set_defaults(command=run, parser=subparser)
        return subparser

    add_info_options(command("info", _info, "versions, devices, and which implementation runs each op"))
    add_train_options(
        command(
            "train",
            _train,
            "train a model, or two side by side",
            "Trains on images. With --resume, options that are not given come from the checkpoint.",
        )
    )
    add_eval_options(
        command(
            "eval",
            _eval,
            "loss and accuracy of a trained model",
            "Evaluates on the held-out images, as training does at the end of an epoch. Data, image size, precision "
            "and batch size that are not given are those of the training. Classes are matched by name.",
        )
    )
    add_predict_options(
        command(
            "predict",
            _predict,
            "the most probable classes of images",
            "Images are seen as in the evaluation of train. Those that cannot be read are named on stderr; the exit "
            "code is then 2.",
        )
    )
    add_export_options(
        command(
            "export",
            _export,
            "a trained model as ONNX, TorchScript, exported program or state_dict",
            "Writes a model that needs no resnet_fused, for any batch size, after its output was compared with the "
            "model's on random images. Class names, image size and normalization are in the file's metadata.",
        )
    )
    add_bench_options(
        command(
            "bench",
            _bench,
            "how fast this machine trains, and in how much memory, beside eager PyTorch",
            "Trains on random images, fused and in eager and compiled PyTorch, with the same weights: checks losses "
            "and gradients against float64, times steps in turns, and measures the peak memory of each in a process "
            "of its own. Takes about three minutes on two cores, of which torch.compile takes one.",
        )
    )
    return parser


def _eval(arguments: dict[str, Any]) -> None:
    from resnet_fused.cli.evaluate import evaluate

    evaluate(arguments)


def _predict(arguments: dict[str, Any]) -> None:
    from resnet_fused.cli.predict import predict

    predict(arguments)


def _export(arguments: dict[str, Any]) -> None:
    from resnet_fused.cli.export import export

    export(arguments)


def _bench(arguments: dict[str, Any]) -> None:
    from resnet_fused.cli.bench import bench

    bench(arguments)


def _train(arguments: dict[str, Any]) -> None:
    from resnet_fused.cli.run_folder import last_checkpoint
    from resnet_fused.cli.train import train

    names = {field.name for field in fields(Invocation)}
    own = {name: arguments.pop(name) for name in names if name in arguments}
    folder = own.get("out", Invocation.DEFAULT_OUT)
    if own.get("resume") == Path("auto"):
        own["resume"] = folder if last_checkpoint(folder, None).is_file() else None
    elif "resume" in own and own["resume"] is None:
        own["resume"] = folder
    train(arguments, Invocation(**own))


def _info(arguments: dict[str, Any]) -> None:
    from resnet_fused.cli.info import info, plan

    if "plan" in arguments:
        plan(arguments.pop("plan"), **arguments)
    elif arguments:
        name = next(iter(arguments)).replace("_", "-")
        raise UserError(f"--{name} belongs to --plan: add --plan resnet50, say")
    else:
        info()

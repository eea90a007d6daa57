"""`train --config FILE`: options in YAML."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from resnet_fused.cli.errors import UserError, require

NOT_IN_A_FILE = ("help", "config")


def read_config(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The options in a file, as the parser would return them.

    Args:
        path: of a mapping from the names of options, with - or _, to their values: true or false for switches.
        parser: of the command that has the options.

    Raises:
        UserError: the file cannot be read, an option is unknown or given twice, or a value is not valid.
    """
    yaml = require("yaml")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"--config {path} must be a mapping of options to values, such as 'epochs: 90'")
    options = parser._option_string_actions
    given: dict[str, Any] = {}
    for key, value in content.items():
        name = f"--{key}".replace("_", "-")
        action = options.get(name)
        # The first string of an option is its name; --no-NAME is another.
        if action is None or action.option_strings[0] != name or action.dest in NOT_IN_A_FILE:
            raise UserError(f"{path}: {key}: there is no such option; see {parser.prog} --help")
        if action.dest in given:
            raise UserError(f"{path}: {key} is given twice")
        try:
            given[action.dest] = parse_value(action, value)
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise UserError(f"{path}: {key}: {error}") from error
    return given


def parse_value(action: argparse.Action, value: Any) -> Any:
    """A value that is not from the command line, as the option's parser would return it.

    Raises:
        ValueError, argparse.ArgumentTypeError: it is not valid.
    """
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"{value!r} is not true or false")
        return value
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise ValueError(f"{value!r} is not a number or a text")
    text = str(value)  # YAML takes 1e-3 for a text: the option's own type decides
    parsed = action.type(text) if callable(action.type) else text
    if action.choices is not None and parsed not in action.choices:
        raise ValueError(f"{text!r} is not one of {', '.join(action.choices)}")
    return parsed

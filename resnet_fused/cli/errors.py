"""The exception for a user's mistake, and the import of optional packages."""

import importlib
from typing import Any

_DISTRIBUTION = {"sklearn": "scikit-learn", "PIL": "Pillow", "yaml": "PyYAML"}


class UserError(Exception):
    """A mistake that the user can put right.

    The message is one line that names what was wrong and what to do. `main` prints it and returns 2; nothing
    else catches it.

    Attributes:
        everywhere: under torchrun, whether every process runs into it, so that one message is enough.
    """

    def __init__(self, message: str, everywhere: bool = True) -> None:
        super().__init__(message)
        self.everywhere = everywhere


def require(module: str, extra: str = "train") -> Any:
    """Imports an optional package that the command line needs and the library does not.

    Args:
        module: its name.
        extra: of this package, with which it is installed.

    Raises:
        UserError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        name = _DISTRIBUTION.get(package, package)
        raise UserError(f"{name} is not installed: run pip install 'resnet_fused[{extra}]'") from error

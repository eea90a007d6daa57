"""Loads the C++/CUDA extension, or says why it can't be loaded.

Loading registers the kernels for the ops of resnet_fused.ops under the CPU and CUDA dispatch keys. Without
them the same ops run their PyTorch reference.
"""

from __future__ import annotations

import json
import re
import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import TypedDict

import torch

from resnet_fused import environment

_FOLDER = Path(__file__).parent
#: What a CUDA build needs and a torch without CUDA, or for another CUDA, doesn't have.
_CUDA_LIBRARY = re.compile(r"lib(cudart|c10_cuda|torch_cuda)\.so\S*")


class _Build(TypedDict):
    """What setup.py wrote about the build: what it left out with the reason, and whether that was asked for."""

    extension: bool
    missing: str | None
    asked: bool


def _read_build() -> _Build:
    try:
        build: _Build = json.loads((_FOLDER / "_build.json").read_text())
    except FileNotFoundError:  # never built, or only _C was copied here
        return {"extension": True, "missing": None, "asked": False}
    return build


def _installed_elsewhere() -> Path | None:
    """Another copy of this package that has the extension, and that this one hides."""
    spec = find_spec("resnet_fused._C")  # another source folder's, installed with pip install -e
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    folders = (Path(entry, "resnet_fused") for entry in sys.path)
    return next((folder.resolve() for folder in folders if next(folder.glob("_C.*.so"), None)), None)


def _why_not_built() -> str:
    """The reason why there is no extension in this folder."""
    is_checkout = (_FOLDER.parent / "setup.py").is_file()
    if is_checkout and (installed := _installed_elsewhere()) is not None:
        return (
            f"Python imports the source folder {_FOLDER}, which has no extension, instead of the installed package in "
            f"{installed}: start Python from another folder, or build here with `pip install -e .`"
        )
    if not _build["extension"]:
        return f"resnet_fused was {_build['missing']}"
    if is_checkout:
        return f"the extension isn't built in {_FOLDER}: run `pip install -e .` in {_FOLDER.parent}"
    return f"there is no resnet_fused._C in {_FOLDER}: install resnet_fused again"


def _why_not_loaded(error: ImportError) -> str:
    """The reason why the extension doesn't load."""
    library = _CUDA_LIBRARY.search(str(error))
    if library is None:
        return f"resnet_fused._C doesn't load here: {error}"
    cuda = torch.version.cuda
    return (
        f"resnet_fused._C was built for CUDA and needs {library[0].rstrip(':')}, but torch {torch.__version__} is "
        f"{f'for CUDA {cuda}' if cuda else 'a build without CUDA'}: "
        "build for this torch with `pip install --no-build-isolation --force-reinstall --no-deps .`"
    )


# Which the extension reads when it is first needed: a value that it does not know would limit nothing.
environment.read("RESNET_FUSED_CPU_ISA", ("avx512", "avx2", "baseline"))
_build = _read_build()
#: Why the extension is missing; None when it is loaded.
missing_reason: str | None = None
#: Whether it is missing because the installation asked for that.
missing_on_request = False
#: Whether the CUDA kernels are loaded.
has_cuda = False

# Only beside this file: one that belongs to other sources may compute something else.
if PathFinder.find_spec("resnet_fused._C", [str(_FOLDER)]) is None:
    missing_reason = _why_not_built()
    missing_on_request = not _build["extension"] and _build["asked"]
else:
    try:
        from resnet_fused import _C
    except ImportError as error:
        missing_reason = _why_not_loaded(error)
    else:
        has_cuda = _C.built_with_cuda()

is_loaded = missing_reason is None
#: Why there are no CUDA kernels; None when they are loaded.
missing_cuda_reason: str | None = missing_reason
if is_loaded and not has_cuda:
    missing_cuda_reason = f"resnet_fused was {_build['missing'] or 'built without CUDA'}"


def summary() -> str:
    """What the extension has, in one line."""
    if missing_reason is not None:
        return f"no kernels: {missing_reason}"
    return (
        "CPU and CUDA kernels"
        if has_cuda
        else f"CPU kernels only, {_build['missing'] or 'built without CUDA'}"
    )


def cpu_isa() -> str:
    """The instruction set of the CPU convolutions: avx512, avx2 or baseline; RESNET_FUSED_CPU_ISA limits it."""
    isa: str = _C.cpu_isa() if is_loaded else "baseline"
    return isa


def release_buffers() -> int:
    """Gives memory back to the system that large results on the CPU have used and others could use again.

    Returns:
        how many bytes.
    """
    return _C.release_buffers() if is_loaded else 0


def use_buffers(enabled: bool) -> bool:
    """Whether results of more than 4 MiB on the CPU use memory again, which PyTorch's profiler doesn't see.

    Args:
        enabled: else PyTorch allocates them.

    Returns:
        whether they did before.
    """
    return _C.use_buffers(enabled) if is_loaded else False

"""Pretrained weights: what torchvision publishes, by its names, and files of the user's."""

from __future__ import annotations

import enum
import http.client
import os
import re
import urllib.error
import urllib.parse
import zipfile
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

#: A name, a path, or a member of one of torchvision's enums.
Weights: TypeAlias = str | os.PathLike[str] | enum.Enum

URL = "https://download.pytorch.org/models/"
CLASSES = 1000  # ImageNet's: all that are published have them


class Published(NamedTuple):
    """The weights that torchvision publishes for an architecture."""

    enum: str  # torchvision's class
    files: dict[str, str]  # by name, the default last; each file name ends in the first digits of its SHA-256


PUBLISHED = {
    "resnet18": Published("ResNet18_Weights", {"IMAGENET1K_V1": "resnet18-f37072fd.pth"}),
    "resnet34": Published("ResNet34_Weights", {"IMAGENET1K_V1": "resnet34-b627a593.pth"}),
    "resnet50": Published(
        "ResNet50_Weights",
        {"IMAGENET1K_V1": "resnet50-0676ba61.pth", "IMAGENET1K_V2": "resnet50-11ad3fa6.pth"},
    ),
    "resnet101": Published(
        "ResNet101_Weights",
        {"IMAGENET1K_V1": "resnet101-63fe2227.pth", "IMAGENET1K_V2": "resnet101-cd907fc2.pth"},
    ),
    "resnet152": Published(
        "ResNet152_Weights",
        {"IMAGENET1K_V1": "resnet152-394f9c45.pth", "IMAGENET1K_V2": "resnet152-f82ba261.pth"},
    ),
    "resnext50_32x4d": Published(
        "ResNeXt50_32X4D_Weights",
        {"IMAGENET1K_V1": "resnext50_32x4d-7cdf4587.pth", "IMAGENET1K_V2": "resnext50_32x4d-1a0047aa.pth"},
    ),
    "resnext101_32x8d": Published(
        "ResNeXt101_32X8D_Weights",
        {"IMAGENET1K_V1": "resnext101_32x8d-8ba56ff5.pth", "IMAGENET1K_V2": "resnext101_32x8d-110c445d.pth"},
    ),
    "resnext101_64x4d": Published(
        "ResNeXt101_64X4D_Weights", {"IMAGENET1K_V1": "resnext101_64x4d-173b62eb.pth"}
    ),
    "wide_resnet50_2": Published(
        "Wide_ResNet50_2_Weights",
        {"IMAGENET1K_V1": "wide_resnet50_2-95faca4d.pth", "IMAGENET1K_V2": "wide_resnet50_2-9ba9bcbe.pth"},
    ),
    "wide_resnet101_2": Published(
        "Wide_ResNet101_2_Weights",
        {"IMAGENET1K_V1": "wide_resnet101_2-32ee1156.pth", "IMAGENET1K_V2": "wide_resnet101_2-d733dc28.pth"},
    ),
}


class Source(NamedTuple):
    """Where weights are read from; one of the two is None."""

    url: str | None = None
    path: str | None = None

    @property
    def cached(self) -> str:
        """The file in torch.hub's folder that a URL is downloaded to."""
        name = os.path.basename(urllib.parse.urlparse(self.url or "").path)
        return os.path.join(torch.hub.get_dir(), "checkpoints", name)


def names(arch: str) -> list[str]:
    """The names of the weights that torchvision publishes for an architecture; "DEFAULT" is the last.

    Args:
        arch: the name of a constructor.

    Raises:
        ValueError: there is no such constructor.
    """
    if arch not in PUBLISHED:
        raise ValueError(f"Unknown model {arch!r}: choose one of {', '.join(PUBLISHED)}")
    return list(PUBLISHED[arch].files)


def find(arch: str, weights: object) -> Source:
    """Where the weights are that a constructor is given.

    Args:
        arch: the name of the constructor.
        weights: a name, a path, or a member of torchvision's enum.

    Raises:
        ValueError: a string is neither one of the names nor a path.
        TypeError: a member of another model's enum, or another type.
    """
    published = PUBLISHED[arch]
    if isinstance(weights, os.PathLike):
        return Source(path=os.fspath(weights))
    if isinstance(weights, enum.Enum):
        if type(weights).__name__ != published.enum:
            raise TypeError(
                f"Invalid weights for {arch}: expected a member of {published.enum}, got one of "
                f"{type(weights).__name__}"
            )
        return Source(url=weights.url)  # type: ignore[attr-defined]
    if not isinstance(weights, str):
        raise TypeError(
            f"Invalid weights for {arch}: expected a name, a path, or a member of {published.enum}, "
            f"got {type(weights).__name__}"
        )
    name = weights.removeprefix(f"{published.enum}.")
    file = published.files.get(list(published.files)[-1] if name == "DEFAULT" else name)
    if file is not None:
        return Source(url=URL + file)
    # A path that is misspelt is an error of the file; all else is meant to be a name.
    if os.path.exists(weights) or os.path.dirname(weights) or re.search(r"\.(pth?|ckpt|tar|bin)$", weights):
        return Source(path=weights)
    raise ValueError(
        f"{arch} has no weights {weights!r}: use DEFAULT, {', '.join(published.files)} or the path of a file"
    )


def read(source: Source, progress: bool = True) -> dict[str, Tensor]:
    """The state_dict of some weights, on the CPU.

    Args:
        source: what ``find`` returned. What a URL names is downloaded once, to torch.hub's folder, and its hash
            is checked. A file holds a state_dict, or a checkpoint with one as "state_dict" or "model"; the
            prefixes of DistributedDataParallel and torch.compile are removed from its keys.
        progress: shows the progress of a download.

    Raises:
        ConnectionError: the weights cannot be downloaded.
        RuntimeError: what was downloaded has another hash.
        ValueError: the file holds no state_dict.
        OSError: the file cannot be read.
        pickle.UnpicklingError: the file holds more than tensors and plain Python values.
    """
    if source.path is not None:
        return _read_file(source.path)
    assert source.url is not None
    try:
        state: dict[str, Tensor] = torch.hub.load_state_dict_from_url(
            source.url, map_location="cpu", progress=progress, check_hash=True, weights_only=True
        )
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise ConnectionError(
            f"cannot download {source.url} ({error}): download it elsewhere and save it as {source.cached}"
        ) from error
    return state


def _read_file(path: str) -> dict[str, Tensor]:
    if path.endswith(".safetensors"):
        raise ValueError(
            f"{path} was not written by torch.save: use safetensors.torch.load_file and load_state_dict"
        )
    # Files of torch before 1.6 cannot be mapped into memory.
    state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if isinstance(state, dict):
        state = next(
            (state[key] for key in ("state_dict", "model") if isinstance(state.get(key), dict)), state
        )
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise ValueError(f"{path} holds no state_dict but a {type(state).__name__}")
    # Each of the two may wrap the other.
    for prefix in ("module.", "_orig_mod.", "module."):
        consume_prefix_in_state_dict_if_present(state, prefix)
    return state

"""timm's ResNets under names of their own: ``import resnet_fused.timm``, then ``timm.create_model("resnet50_fused")``.

Each is what ``resnet_fused.fuse`` makes of the model without ``_fused``, with its arguments and pretrained weights:
``timm.create_model("resnet50_fused.a1_in1k", pretrained=True)``. ``NAMES`` has all of them: the ResNets, ResNeXts and
wide ResNets in which every block runs fused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import timm
from torch import nn

from resnet_fused.fuse import fuse

_PLAIN = [
    name
    for name in timm.list_models(module="resnet")
    if re.fullmatch(r"(wide_)?resnex?t\d+[a-z]?(_\d+(x\d+d)?)?", name)
]
NAMES = tuple(f"{name}_fused" for name in _PLAIN)
#: Where timm looks for pretrained weights.
default_cfgs = {f"{name}_fused": timm.models.resnet.default_cfgs[name] for name in _PLAIN}


def _register(name: str) -> None:
    plain: Callable[..., nn.Module] = timm.model_entrypoint(name)

    def fused(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return fuse(plain(pretrained=pretrained, **kwargs))

    fused.__name__ = fused.__qualname__ = f"{name}_fused"
    fused.__doc__ = f"timm's {name}, fused."
    timm.models.register_model(fused)


for _name in _PLAIN:
    _register(_name)

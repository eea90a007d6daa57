"""The ten ResNets with torchvision's names, arguments, initialisation and state_dict, and fused blocks.

Only ``forward`` differs from resnet_fused.reference. On channels_last input a block is one op (ops.residual_block).
On contiguous input, or where a convolution was changed so that the op could not stand for it, convolutions are called
as the modules they are, with fused ops around them. A block with another norm layer, a hook on one, ... runs unfused
PyTorch. ``explain(model, x)`` says which and why.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from resnet_fused import reference
from resnet_fused.blocks import FusedBasicBlock, FusedBottleneck, FusedStem
from resnet_fused.reference.resnet import BlockKind, constructors


class BasicBlock(FusedBasicBlock, reference.BasicBlock):
    """Two 3x3 convs and a shortcut, fused."""

    _plain = reference.BasicBlock


class Bottleneck(FusedBottleneck, reference.Bottleneck):
    """1x1, 3x3 and 1x1 convs and a shortcut, fused, the last folded with its batch norm."""

    _plain = reference.Bottleneck


class ResNet(FusedStem, reference.ResNet):
    """torchvision's ResNet with fused blocks and a fused stem."""

    _plain = reference.ResNet

    def _stem(self, x: Tensor) -> Tensor:
        y = self._fused_stem(x)
        return super()._stem(x) if y is None else y


BLOCKS: dict[BlockKind, type[reference.BasicBlock | reference.Bottleneck]] = {
    "basic": BasicBlock,
    "bottleneck": Bottleneck,
}

_CONSTRUCTORS = constructors(ResNet, BLOCKS, __name__)
(
    resnet18, resnet34, resnet50, resnet101, resnet152, resnext50_32x4d, resnext101_32x8d, resnext101_64x4d,
    wide_resnet50_2, wide_resnet101_2,
) = _CONSTRUCTORS.values()  # fmt: skip


def list_models() -> list[str]:
    """The names of the ten constructors, sorted."""
    return sorted(_CONSTRUCTORS)


def get_model(name: str, **kwargs: Any) -> ResNet:
    """The model that the constructor of a name makes.

    Args:
        name: one of ``list_models()``.
        kwargs: arguments of the constructor: weights, progress, num_classes and so on.

    Raises:
        ValueError: there is no constructor of that name; and what the constructor raises.
    """
    if name not in _CONSTRUCTORS:
        raise ValueError(f"Unknown model {name!r}: choose one of {', '.join(list_models())}")
    return _CONSTRUCTORS[name](**kwargs)

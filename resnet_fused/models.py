"""The ten ResNets with torchvision's names, arguments, initialisation and state_dict, and fused blocks.

Only ``forward`` differs from resnet_fused.reference. On channels_last input a block is one op (ops.residual_block).
On contiguous input, or where a convolution was changed so that the op could not stand for it, convolutions are called
as the modules they are, with fused ops around them. A block with another norm layer, a hook on one, ... runs unfused
PyTorch. ``explain(model, x)`` says which and why.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused import ops, reference
from resnet_fused.backend import why_plain as why_backend_plain
from resnet_fused.modules import (
    Names,
    batch_norm_of,
    one_op,
    runs_by_images,
    why_faster_plain,
    why_module_plain,
    why_no_pool,
    why_not_one_op,
    why_plain,
)
from resnet_fused.reference.resnet import BlockKind, constructors


def _plain_copy(module: nn.Module) -> nn.Module:
    """The same modules, parameters and buffers, with the forward of resnet_fused.reference."""
    plain = {BasicBlock: reference.BasicBlock, Bottleneck: reference.Bottleneck, ResNet: reference.ResNet}
    kind = plain.get(type(module))
    if kind is None and not isinstance(module, nn.Sequential):
        return module
    copied: nn.Module = object.__new__(kind or type(module))
    copied.__dict__ = dict(module.__dict__)
    copied._modules = {name: child and _plain_copy(child) for name, child in module._modules.items()}
    return copied


class _Block(nn.Module):
    """The fused forward of the reference's block that follows it among the bases of a class."""

    # Private: a subclass may use any name for modules of its own.
    _convs: Names
    _bns: Names

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor
        if why_faster_plain(x, self, self._convs, self._bns) or why_plain(x, self, self._bns):
            out = super().forward(x)
            return out
        operands = one_op(x, self, self._convs, self._bns)
        if not isinstance(operands, str):
            return ops.residual_block(x, *operands)
        *chain, (conv, bn) = (
            (getattr(self, c), getattr(self, n)) for c, n in zip(self._convs, self._bns, strict=True)
        )
        a = x
        for inner_conv, inner_bn in chain:
            a = ops.bn_relu(inner_conv(a), batch_norm_of(inner_bn))
        return _end_of_block(self, conv(a), bn, x)

    def __prepare_scriptable__(self) -> nn.Module:
        return _plain_copy(self)


class BasicBlock(_Block, reference.BasicBlock):
    """Two 3x3 convs and a shortcut, fused."""

    _convs = ("conv1", "conv2")
    _bns = ("bn1", "bn2")


class Bottleneck(_Block, reference.Bottleneck):
    """1x1, 3x3 and 1x1 convs and a shortcut, fused, the last folded with its batch norm."""

    _convs = ("conv1", "conv2", "conv3")
    _bns = ("bn1", "bn2", "bn3")


def _end_of_block(block: Any, y: Tensor, bn: nn.Module, x: Tensor) -> Tensor:
    """relu(bn(y) + shortcut), where the shortcut is the block's input or the downsampled one."""
    downsample = block.downsample
    if downsample is None:
        if x.shape == y.shape:
            return ops.bn_add_relu(y, x.to(y.dtype), batch_norm_of(bn))
        skip = x
    else:
        assert isinstance(downsample, nn.Sequential)
        skip = downsample[0](x)
        if skip.shape == y.shape:
            return ops.bn_bn_add_relu(y, skip.to(y.dtype), batch_norm_of(bn), batch_norm_of(downsample[1]))
        skip = downsample[1](skip)
    out: Tensor = bn(y)
    out += skip  # broadcast, or refused
    activated: Tensor = block.relu(out)
    return activated


class ResNet(reference.ResNet):
    """torchvision's ResNet with fused blocks and a fused stem."""

    def _stem(self, x: Tensor) -> Tensor:
        if why_plain(x, self, ("bn1",)):
            return super()._stem(x)
        if why_no_pool(self.maxpool) is None:

            def pooled_stem(x: Tensor) -> Tensor:
                return ops.bn_relu_maxpool(self.conv1(x), batch_norm_of(self.bn1))

            if not runs_by_images(x, self.conv1, self.bn1):
                return pooled_stem(x)
            down, right = self.conv1.stride
            outputs = x[:, 0].numel() * self.conv1.out_channels // (down * right)
            return ops.by_images(pooled_stem, x, outputs)
        y = self.conv1(x)
        pooled: Tensor = self.maxpool(ops.bn_relu(y, batch_norm_of(self.bn1)))
        return pooled

    def __prepare_scriptable__(self) -> nn.Module:
        return _plain_copy(self)


def explain(model: nn.Module, x: Tensor | None = None) -> dict[str, str]:
    """Which blocks of a model, and whether its stem, do not run fused, and why.

    Args:
        model: any model. Residual blocks that are not of this package are listed too: they run in plain PyTorch.
        x: an input of the model, (N, 3, H, W) as it is or will be trained with, on the model's device. The model runs
            on it once, under no_grad, in its mode; its buffers are put back as they were. None: only what modules and
            device tell is taken into account, not layout, dtype and shape of the input.

    Returns:
        {name of the block, "" for the stem or for a model without blocks: reason}; empty when all is fused.
    """
    parts = {name: part for name, part in model.named_modules() if _is_block_or_stem(part)}
    if not parts:
        return {"": f"{type(model).__name__} has no residual blocks of resnet_fused: plain PyTorch runs"}
    device = next((p.device.type for p in model.parameters()), "cpu")
    inputs = {} if x is None else _inputs_of(model, list(parts.values()), x)
    reasons = {}
    for name, part in parts.items():
        if x is not None and part not in inputs:
            reasons[name] = "does not run on this input"
        elif reason := _why_not(part, inputs.get(part), device):
            reasons[name] = reason
    return reasons


_BLOCK_NAMES = ("BasicBlock", "Bottleneck")


def _is_block_or_stem(module: nn.Module) -> bool:
    # torchvision's and timm's blocks have the names too.
    return isinstance(module, (BasicBlock, Bottleneck, ResNet)) or type(module).__name__ in _BLOCK_NAMES


def _why_not(part: nn.Module, x: Tensor | None, device: str) -> str | None:
    """Why a block or stem does not run fused, or not as one op; of what its modules tell where ``x`` is None."""
    if reason := why_backend_plain(device):
        return reason
    if isinstance(part, ResNet):
        reason = _why_plain(part, ("bn1",), x, device)
        if reason is None and (problem := why_no_pool(part.maxpool)):
            reason = f"maxpool {problem}: bn1 and relu are fused without it"
        return reason
    if not isinstance(part, (BasicBlock, Bottleneck)):
        return f"is a {type(part).__module__}.{type(part).__name__}, not a resnet_fused.{type(part).__name__}"
    if reason := _why_plain(part, part._bns, x, device):
        return reason
    if x is not None and (reason := why_faster_plain(x, part, part._convs, part._bns)):
        return reason
    if x is None:
        apart = why_not_one_op(part, part._convs, part._bns)
    else:
        operands = one_op(x, part, part._convs, part._bns)
        apart = operands if isinstance(operands, str) else None
    return apart and f"{apart}: fused ops around the convolutions instead of one for the block"


def _why_plain(part: nn.Module, bns: Names, x: Tensor | None, device: str) -> str | None:
    return why_module_plain(part, bns, device) if x is None else why_plain(x, part, bns)


def _inputs_of(model: nn.Module, parts: list[nn.Module], x: Tensor) -> dict[nn.Module, Tensor]:
    """What some modules of a model are called with when it runs on ``x``."""
    inputs: dict[nn.Module, Tensor] = {}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    hooks = [
        part.register_forward_pre_hook(lambda part, args: inputs.update({part: args[0]})) for part in parts
    ]
    with torch.no_grad():
        try:
            model(x)
        finally:
            for hook in hooks:
                hook.remove()
            for buffer, before in buffers.items():
                buffer.copy_(before)
    return inputs


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

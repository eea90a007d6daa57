"""The fused forward of residual blocks and stems, as bases that precede a plain class among the bases of another one.

The plain class is ``reference``'s, torchvision's or timm's. Its own forward runs wherever the fused one cannot: under a
transform, with a hook on a norm, on another device, ... (``modules.why_plain``).
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from resnet_fused import ops
from resnet_fused.modules import (
    Parts,
    batch_norm_of,
    is_bn_relu,
    is_plain_sequential,
    one_op,
    runs_by_images,
    shortcut_input,
    why_faster_plain,
    why_no_pool,
    why_plain,
)


class FusedPart(nn.Module):
    """A block or a stem."""

    # Private: a subclass may use any name for modules of its own.
    _parts: ClassVar[Parts]
    _plain: ClassVar[type[nn.Module]]

    def __prepare_scriptable__(self) -> nn.Module:
        return plain_copy(self)


class FusedBlock(FusedPart):
    """A basic or a bottleneck block: one op on channels_last input, else fused ops around the convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        parts = self._parts
        out: Tensor
        if why_faster_plain(x, self, parts) or why_plain(x, self, parts):
            out = super().forward(x)
            return out
        skip = shortcut_input(self, x)
        operands = one_op(x, skip, self, parts)
        if not isinstance(operands, str):
            return ops.residual_block(x, *operands)
        *chain, (conv, bn) = (
            (getattr(self, c), getattr(self, n)) for c, n in zip(parts.convs, parts.bns, strict=True)
        )
        a = x
        for inner_conv, inner_bn in chain:
            a = ops.bn_relu(inner_conv(a), batch_norm_of(inner_bn))
        return _end_of_block(self, conv(a), bn, skip)


class FusedBasicBlock(FusedBlock):
    """Two 3x3 convolutions, with torchvision's names."""

    _parts = Parts(("conv1", "conv2"), ("bn1", "bn2"), ("relu", "relu"))


class FusedBottleneck(FusedBlock):
    """1x1, 3x3 and 1x1 convolutions, with torchvision's names."""

    _parts = Parts(("conv1", "conv2", "conv3"), ("bn1", "bn2", "bn3"), ("relu", "relu", "relu"))


def _end_of_block(block: Any, y: Tensor, bn: nn.Module, skip: Tensor) -> Tensor:
    """relu(bn(y) + shortcut), where the shortcut is ``skip`` or what its convolution and norm make of it."""
    downsample = block.downsample
    if downsample is None:
        if skip.shape == y.shape:
            return ops.bn_add_relu(y, skip.to(y.dtype), batch_norm_of(bn))
    else:
        skip = downsample[-2](skip)
        if skip.shape == y.shape:
            return ops.bn_bn_add_relu(y, skip.to(y.dtype), batch_norm_of(bn), batch_norm_of(downsample[-1]))
        skip = downsample[-1](skip)
    out: Tensor = bn(y)
    out += skip  # broadcast, or refused
    activated: Tensor = block.get_submodule(block._parts.relus[-1])(out)
    return activated


class FusedStem(FusedPart):
    """Convolution, batch norm, ReLU and max-pool before the first stage, with torchvision's names."""

    _parts = Parts(("conv1",), ("bn1",), ("relu",))

    def _fused_stem(self, x: Tensor) -> Tensor | None:
        """The input of the first stage; None where the plain forward has to run."""
        if why_plain(x, self, self._parts):
            return None
        conv1, bn1, maxpool = (self.get_submodule(name) for name in ("conv1", "bn1", "maxpool"))
        if why_no_pool(maxpool) is None:

            def pooled_stem(x: Tensor) -> Tensor:
                return ops.bn_relu_maxpool(_first_convs(conv1, x), batch_norm_of(bn1))

            if not runs_by_images(x, conv1, bn1):
                return pooled_stem(x)
            assert isinstance(conv1, nn.Conv2d)
            down, right = conv1.stride
            outputs = x[:, 0].numel() * conv1.out_channels // (down * right)
            return ops.by_images(pooled_stem, (x,), outputs)
        pooled: Tensor = maxpool(ops.bn_relu(_first_convs(conv1, x), batch_norm_of(bn1)))
        return pooled


def _first_convs(conv1: nn.Module, x: Tensor) -> Tensor:
    """A stem's convolution; of a deep stem several, with fused norms and ReLUs between them."""
    modules = [*conv1] if is_plain_sequential(conv1) else [conv1]  # type: ignore[misc]
    while modules:
        if is_bn_relu(modules[:2]):
            x = ops.bn_relu(x, batch_norm_of(modules[0]))
            del modules[:2]
        else:
            x = modules.pop(0)(x)
    return x


def plain_copy(module: nn.Module) -> nn.Module:
    """The same modules, parameters and buffers, with the plain forward."""
    kind = plain_class(module)
    if kind is None and not isinstance(module, nn.Sequential):
        return module
    copied: nn.Module = object.__new__(kind or type(module))
    copied.__dict__ = dict(module.__dict__)
    copied._modules = {name: child and plain_copy(child) for name, child in module._modules.items()}
    return copied


def plain_class(module: nn.Module) -> type[nn.Module] | None:
    """The class whose forward a fused part replaces; None where its class is derived from one that replaces it."""
    kind: type[nn.Module] | None = vars(type(module)).get("_plain")
    return kind

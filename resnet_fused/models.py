"""The ten ResNets with torchvision's names, arguments, initialisation and state_dict, and fused blocks.

Only ``forward`` differs from resnet_fused.reference. On channels_last input a block is one op (ops.residual_block).
On contiguous input, or where a convolution was changed so that the op could not stand for it, convolutions are called
as the modules they are, with fused ops around them. A block with another norm layer, a hook on one, ... runs the plain
composition. ``explain(model)`` says which and why.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from resnet_fused import ops, reference
from resnet_fused.backend import why_not_fused
from resnet_fused.ops import ConvNorm, Norm
from resnet_fused.reference.layout import dense, is_channels_last
from resnet_fused.reference.resnet import BlockKind, build

_FUSED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _changed(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> str | None:
    """What about a module keeps an op from standing in for it; None when it is as it was made."""
    if type(module) not in kinds:
        return f"is a {type(module).__name__}"
    if "forward" in module.__dict__:
        return "has a forward of its own"
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return "has hooks" if any(hooks) else None


def _why_changed(owner: nn.Module, norms: tuple[str, ...]) -> str | None:
    """Why a block or stem runs its plain composition, as far as its modules tell; None when it is fused."""
    for name in norms:
        if problem := _changed(owner.get_submodule(name), (nn.BatchNorm2d, nn.SyncBatchNorm)):
            return f"{name} {problem}"
    if problem := _changed(owner.get_submodule("relu"), (nn.ReLU,)):
        return f"relu {problem}"
    downsample = getattr(owner, "downsample", None)
    if downsample is None:
        return None
    if problem := _changed(downsample, (nn.Sequential,)):
        return f"downsample {problem}"
    if len(downsample) != 2:
        return f"downsample has {len(downsample)} modules, not a conv and a norm"
    if problem := _changed(downsample[1], (nn.BatchNorm2d, nn.SyncBatchNorm)):
        return f"downsample.1 {problem}"
    return None


def _runs_fused(x: Tensor, owner: nn.Module, norms: tuple[str, ...]) -> bool:
    return (
        isinstance(x, Tensor)  # not a torch.fx.Proxy
        and x.dtype in _FUSED_DTYPES
        and not torch.jit.is_tracing()
        and (torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active())
        and not nn_module._has_any_global_hook()
        and why_not_fused(x.device.type) is None
        and _why_changed(owner, norms) is None
    )


def _norm(bn: nn.Module) -> Norm:
    """The mode of a batch norm module."""
    assert isinstance(bn, (nn.BatchNorm2d, nn.SyncBatchNorm))
    momentum = 0.0 if bn.momentum is None else bn.momentum
    counter = bn.num_batches_tracked if bn.training and bn.track_running_stats else None
    if counter is not None and bn.momentum is None:
        momentum = 1.0 / (float(counter) + 1.0)
    training = bn.training or (bn.running_mean is None and bn.running_var is None)
    tracked = not bn.training or bn.track_running_stats
    group = _sync_group(bn) if bn.training else None
    running_mean, running_var = (bn.running_mean, bn.running_var) if tracked else (None, None)
    return Norm(running_mean, running_var, bn.weight, bn.bias, training, momentum, bn.eps, group, counter)


def _sync_group(bn: nn.Module) -> dist.ProcessGroup | None:
    """The processes a SyncBatchNorm shares its statistics with; None when it stands alone."""
    if not isinstance(bn, nn.SyncBatchNorm) or not (dist.is_available() and dist.is_initialized()):
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def _bn_relu(y: Tensor, bn: nn.Module) -> Tensor:
    return ops.bn_relu(y, _norm(bn))


def _why_not_whole(block: nn.Module, convs: tuple[str, ...]) -> str | None:
    """Why a block runs as several fused ops, as far as its modules tell; None when it is one op."""
    if getattr(block, "downsample", None) is not None:
        convs = (*convs, "downsample.0")
    for name in convs:
        conv = block.get_submodule(name)
        if problem := _changed(conv, (nn.Conv2d,)):
            return f"{name} {problem}"
        assert isinstance(conv, nn.Conv2d)
        if conv.bias is not None:
            return f"{name} has a bias"
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return f"{name} has padding {conv.padding}, mode {conv.padding_mode}"
    return None


def _conv_norm(conv: nn.Module, bn: nn.Module) -> ConvNorm:
    assert isinstance(conv, nn.Conv2d) and not isinstance(conv.padding, str)
    stride, padding, dilation = ((down, right) for down, right in (conv.stride, conv.padding, conv.dilation))
    return ConvNorm(conv.weight, _norm(bn), stride, padding, dilation, conv.groups)


def _fits_whole(x: Tensor, block: nn.Module, convs: tuple[str, ...]) -> bool:
    """Whether ``x`` is in the layout that the op for a whole block takes, and shapes and dtypes fit together."""
    if x.dim() != 4 or not is_channels_last(dense(x)) or _why_not_whole(block, convs) is not None:
        return False
    parts = [block.get_submodule(name) for name in convs]
    downsample = getattr(block, "downsample", None)
    shortcut = [] if downsample is None else [downsample[0]]
    mixed = ops.autocast_dtype(x.device.type) is not None
    if not mixed and any(conv.weight.dtype != x.dtype for conv in (*parts, *shortcut)):
        return False
    if min(x.shape[1], *(conv.weight.shape[0] for conv in (*parts, *shortcut))) == 1:
        return False  # an activation of one channel lies in memory as a contiguous one
    shape = ops.convolved_shape(x.shape, parts)
    return shape is not None and shape == ops.convolved_shape(x.shape, shortcut)


def _whole(x: Tensor, block: BasicBlock | Bottleneck) -> Tensor:
    """The block as one op."""
    pairs = zip(block.convs, block.norms, strict=True)
    parts = [_conv_norm(getattr(block, conv), getattr(block, bn)) for conv, bn in pairs]
    downsample = block.downsample
    if downsample is not None:
        assert isinstance(downsample, nn.Sequential)
    return ops.residual_block(x, parts, None if downsample is None else _conv_norm(*downsample))


def _end_of_block(y: Tensor, bn: nn.Module, x: Tensor, downsample: nn.Module | None) -> Tensor:
    """relu(bn(y) + identity), where identity is the block's input or the downsampled one."""
    norm = _norm(bn)
    if downsample is None:
        return ops.bn_add_relu(y, x.to(y.dtype), norm)
    assert isinstance(downsample, nn.Sequential)
    skip = downsample[0](x)
    return ops.bn_bn_add_relu(y, skip.to(y.dtype), norm, _norm(downsample[1]))


class BasicBlock(reference.BasicBlock):
    """Two 3x3 convs and a shortcut, fused."""

    convs = ("conv1", "conv2")
    norms = ("bn1", "bn2")

    def forward(self, x: Tensor) -> Tensor:
        if not _runs_fused(x, self, self.norms):
            return super().forward(x)
        if _fits_whole(x, self, self.convs):
            return _whole(x, self)
        a = _bn_relu(self.conv1(x), self.bn1)
        return _end_of_block(self.conv2(a), self.bn2, x, self.downsample)


class Bottleneck(reference.Bottleneck):
    """1x1, 3x3 and 1x1 convs and a shortcut, fused, the last folded with its batch norm."""

    convs = ("conv1", "conv2", "conv3")
    norms = ("bn1", "bn2", "bn3")

    def forward(self, x: Tensor) -> Tensor:
        if not _runs_fused(x, self, self.norms):
            return super().forward(x)
        if _fits_whole(x, self, self.convs):
            return _whole(x, self)
        a = _bn_relu(self.conv1(x), self.bn1)
        a = _bn_relu(self.conv2(a), self.bn2)
        return _end_of_block(self.conv3(a), self.bn3, x, self.downsample)


class ResNet(reference.ResNet):
    """torchvision's ResNet with fused blocks and a fused stem."""

    norms = ("bn1",)

    def _stem(self, x: Tensor) -> Tensor:
        if not _runs_fused(x, self, self.norms):
            return super()._stem(x)
        y = self.conv1(x)
        if _is_stem_pool(self.maxpool):
            return ops.bn_relu_maxpool(y, _norm(self.bn1))
        pooled: Tensor = self.maxpool(_bn_relu(y, self.bn1))
        return pooled


def _is_stem_pool(pool: nn.Module) -> bool:
    if _changed(pool, (nn.MaxPool2d,)) is not None:
        return False
    assert isinstance(pool, nn.MaxPool2d)
    expected = {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1}
    same = all(getattr(pool, name) in (value, (value, value)) for name, value in expected.items())
    return same and not pool.ceil_mode and not pool.return_indices


def explain(model: nn.Module) -> dict[str, str]:
    """Which parts of a model do not run fused, and why.

    Returns:
        {name of the block, "" for the stem: reason}; empty when everything is fused.
    """
    device = next((p.device.type for p in model.parameters()), "cpu")
    reasons = {}
    for name, part in model.named_modules():
        if not isinstance(part, (BasicBlock, Bottleneck, ResNet)):
            continue
        reason = why_not_fused(device) or _why_changed(part, part.norms)
        if reason is None and not isinstance(part, ResNet):
            apart = _why_not_whole(part, part.convs)
            reason = apart and f"{apart}: fused ops around the convolutions instead of one for the block"
        if reason is not None:
            reasons[name] = reason
    return reasons


BLOCKS: dict[BlockKind, type[reference.BasicBlock | reference.Bottleneck]] = {
    "basic": BasicBlock,
    "bottleneck": Bottleneck,
}


def resnet18(*, weights: None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-18. Arguments: those of ResNet after ``layers``. weights must be None; progress is ignored."""
    return build("resnet18", ResNet, BLOCKS, weights, kwargs)


def resnet34(*, weights: None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-34. Arguments: those of ResNet after ``layers``. weights must be None; progress is ignored."""
    return build("resnet34", ResNet, BLOCKS, weights, kwargs)


def resnet50(*, weights: None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-50. Arguments: those of ResNet after ``layers``. weights must be None; progress is ignored."""
    return build("resnet50", ResNet, BLOCKS, weights, kwargs)


def resnet101(*, weights: None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-101. Arguments: those of ResNet after ``layers``. weights must be None; progress is ignored."""
    return build("resnet101", ResNet, BLOCKS, weights, kwargs)


def resnet152(*, weights: None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-152. Arguments: those of ResNet after ``layers``. weights must be None; progress is ignored."""
    return build("resnet152", ResNet, BLOCKS, weights, kwargs)


def resnext50_32x4d(*, weights: None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-50, 32 groups of 4. Arguments as for resnet50, without groups and width_per_group."""
    return build("resnext50_32x4d", ResNet, BLOCKS, weights, kwargs)


def resnext101_32x8d(*, weights: None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-101, 32 groups of 8. Arguments as for resnet101, without groups and width_per_group."""
    return build("resnext101_32x8d", ResNet, BLOCKS, weights, kwargs)


def resnext101_64x4d(*, weights: None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNeXt-101, 64 groups of 4. Arguments as for resnet101, without groups and width_per_group."""
    return build("resnext101_64x4d", ResNet, BLOCKS, weights, kwargs)


def wide_resnet50_2(*, weights: None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-50 with twice the inner channels. Arguments as for resnet50, without width_per_group."""
    return build("wide_resnet50_2", ResNet, BLOCKS, weights, kwargs)


def wide_resnet101_2(*, weights: None = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """ResNet-101 with twice the inner channels. Arguments as for resnet101, without width_per_group."""
    return build("wide_resnet101_2", ResNet, BLOCKS, weights, kwargs)

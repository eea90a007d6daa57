"""Modules as operands: what ops need of convolutions and batch norms, and whether ops may stand in for the modules.

``why_plain`` says why a block or stem runs unfused PyTorch, ``one_op`` why another block runs as fused ops around its
convolutions. Every forward asks: an answer takes a few microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from resnet_fused import ops
from resnet_fused.backend import choice, why_not_fused
from resnet_fused.layout import dense, is_channels_last
from resnet_fused.ops.cpu_rules import is_faster, is_measured
from resnet_fused.ops.transforms import CALL, METHODS, why_not_here
from resnet_fused.types import BatchNorm, ConvBN

_FUSED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


class Parts(NamedTuple):
    """Names of the modules of a block or stem, in the order in which they run; not the shortcut's.

    relus: after each batch norm, a block's last one after the sum. identities: must be None or nn.Identity.
    """

    convs: tuple[str, ...]
    bns: tuple[str, ...]
    relus: tuple[str, ...]
    identities: tuple[str, ...] = ()


def is_frozen_norm(bn: nn.Module) -> bool:
    """Whether a norm is torchvision.ops.FrozenBatchNorm2d: running statistics, and no parameters."""
    kind = type(bn)
    return kind.__name__ == "FrozenBatchNorm2d" and kind.__module__ == "torchvision.ops.misc"


def _changed(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> str | None:
    """What about a module keeps an op from standing in for it; None when it is as it was made."""
    kind = type(module)
    return f"is a {kind.__name__}" if kind not in kinds else _overridden(module, METHODS[kind])


def _overridden(module: nn.Module, methods: tuple[str, ...]) -> str | None:
    """Which of the methods that run when a module is called it has itself; or that it has hooks."""
    for name in methods:
        if name in module.__dict__:
            return f"has a {name} of its own"
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return "has hooks" if any(hooks) else None


def _changed_bn(bn: nn.Module) -> str | None:
    """What about a batch norm requires unfused PyTorch."""
    if is_frozen_norm(bn):
        return _overridden(bn, CALL)
    if problem := _changed(bn, _NORMS):
        return problem
    assert isinstance(bn, _NORMS)
    # What F.batch_norm makes of that depends on the version of torch.
    return f"has eps {bn.eps}" if bn.eps <= 0 else None


def _why_changed(owner: nn.Module, parts: Parts) -> str | None:
    """Why a block or stem runs unfused PyTorch, as far as its modules tell."""
    for name in parts.bns:
        if problem := _changed_bn(owner.get_submodule(name)):
            return f"{name} {problem}"
    for name in dict.fromkeys(parts.relus):
        if problem := _changed(owner.get_submodule(name), (nn.ReLU,)):
            return f"{name} {problem}"
    for name in parts.identities:
        module = getattr(owner, name)
        if module is not None and (problem := _changed(module, (nn.Identity,))):
            return f"{name} {problem}"
    downsample = getattr(owner, "downsample", None)
    if downsample is None:
        return None
    if problem := _changed(downsample, (nn.Sequential,)):
        return f"downsample {problem}"
    if len(downsample) < 2:
        return f"downsample has {len(downsample)} modules, not a conv and a norm"
    if problem := _changed_bn(downsample[-1]):
        return f"downsample.{len(downsample) - 1} {problem}"
    return None


def is_bn_relu(modules: Sequence[nn.Module]) -> bool:
    """Whether these are a batch norm and a ReLU that an op can stand in for."""
    if len(modules) != 2:
        return False
    bn, relu = modules
    return _changed_bn(bn) is None and _changed(relu, (nn.ReLU,)) is None


def is_plain_sequential(module: nn.Module) -> bool:
    return _changed(module, (nn.Sequential,)) is None


def why_plain(x: Any, owner: nn.Module, parts: Parts) -> str | None:
    """Why a block or stem runs unfused PyTorch on ``x``; None when it runs fused."""
    # A torch.fx.Proxy; a DTensor or another tensor that knows only PyTorch's ops.
    if not isinstance(x, Tensor) or hasattr(type(x), "__tensor_flatten__"):
        return f"the input is a {type(x).__name__}"
    if x.dtype not in _FUSED_DTYPES:
        return f"the input is {x.dtype}"
    if x.dim() != 4 or x.numel() == 0:
        return f"the input has the shape {tuple(x.shape)}"
    return why_module_plain(owner, parts, x.device.type)


def why_module_plain(owner: nn.Module, parts: Parts, device_type: str) -> str | None:
    """Why a block or stem runs unfused PyTorch, whatever its input."""
    return why_not_fused(device_type) or why_not_here() or _why_changed(owner, parts)


def why_no_pool(pool: nn.Module) -> str | None:
    """Why the stem's max-pool is not fused; None when it is."""
    if problem := _changed(pool, (nn.MaxPool2d,)):
        return problem
    assert isinstance(pool, nn.MaxPool2d)
    for name, value in {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1}.items():
        if getattr(pool, name) not in (value, (value, value)):
            return f"has {name} {getattr(pool, name)}"
    return "has another mode" if pool.ceil_mode or pool.return_indices else None


def kind_of_block(kind: str, downsample: bool, precision: str) -> str:
    """The name under which ops.cpu_rules has a block: of kind basic, bottleneck or grouped, in fp32 or bf16."""
    return f"{kind}_downsample_{precision}" if downsample else f"{kind}_{precision}"


_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def why_faster_plain(x: Any, block: Any, parts: Parts) -> str | None:
    """Why a block trains faster as PyTorch's operators: few images on a CPU (ops.cpu_rules); None if it doesn't."""
    if torch.compiler.is_compiling() or choice() != "auto":
        return None
    if type(x) is not Tensor or x.device.type != "cpu" or x.dim() != 4:
        return None
    conv = getattr(block, parts.convs[0])
    # nn.SyncBatchNorm alone refuses a CPU.
    if type(conv) is not nn.Conv2d or any(type(getattr(block, bn)) is not nn.BatchNorm2d for bn in parts.bns):
        return None
    if not (
        block.bn1.training or (torch.is_grad_enabled() and (x.requires_grad or conv.weight.requires_grad))
    ):
        return None
    precision = _PRECISIONS.get(ops.autocast_dtype("cpu") or x.dtype)
    if precision is None:
        return None
    kind = "basic" if len(parts.convs) == 2 else "bottleneck"
    if getattr(block.conv2, "groups", 1) > 1:
        kind = "grouped"
    name = kind_of_block(kind, block.downsample is not None, precision)
    if not is_measured("blocks", name) or is_faster("blocks", name, x.shape, conv.out_channels):
        return None
    return f"PyTorch's operators are faster on a CPU for {len(x)} images of {x.shape[2]}x{x.shape[3]}"


def runs_by_images(x: Tensor, conv: nn.Module, bn: nn.Module) -> bool:
    """Whether a convolution and what follows it may run on a few images of ``x`` at a time: nothing sees the batch."""
    return (
        not (torch.compiler.is_compiling() or torch.is_grad_enabled() or _uses_batch(bn))
        and type(x) is Tensor
        and x.device.type == "cpu"
        and _changed(conv, (nn.Conv2d,)) is None
    )


def _uses_batch(bn: nn.Module) -> bool:
    """Whether a norm normalizes with the statistics of the batch."""
    return bn.training and not is_frozen_norm(bn)


def batch_norm_of(bn: Any) -> BatchNorm:
    """The operands and the mode of a batch norm module."""
    if is_frozen_norm(bn):
        return BatchNorm(bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)
    momentum = 0.0 if bn.momentum is None else bn.momentum
    batches = bn.num_batches_tracked if bn.training and bn.track_running_stats else None
    if batches is not None and bn.momentum is None:
        momentum = 1.0 / (float(batches) + 1.0)
    training = bn.training or (bn.running_mean is None and bn.running_var is None)
    tracked = not bn.training or bn.track_running_stats
    group = _sync_group(bn) if bn.training else None
    running_mean, running_var = (bn.running_mean, bn.running_var) if tracked else (None, None)
    affine = bn.weight, bn.bias
    return BatchNorm(running_mean, running_var, *affine, training, momentum, bn.eps, group, batches)


def _sync_group(bn: nn.Module) -> dist.ProcessGroup | None:
    """The processes a SyncBatchNorm shares its statistics with; None when it stands alone."""
    if not isinstance(bn, nn.SyncBatchNorm) or not (dist.is_available() and dist.is_initialized()):
        return None
    group = bn.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def _pair(value: Any) -> tuple[int, int]:
    """A stride, padding or dilation as F.conv2d takes it: a number, or a sequence of one or two."""
    if isinstance(value, int):
        return value, value
    return (value[0], value[-1])


def _is_convolution(conv: ConvBN) -> bool:
    """Whether F.conv2d takes the geometry."""
    return min(*conv.stride, *conv.dilation, conv.groups) > 0 and min(conv.padding) >= 0


def _changed_conv(conv: nn.Module) -> str | None:
    """What about a convolution keeps the op for a whole block from standing in for it."""
    if problem := _changed(conv, (nn.Conv2d,)):
        return problem
    assert isinstance(conv, nn.Conv2d)
    if conv.bias is not None:
        return "has a bias"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"has padding {conv.padding}, mode {conv.padding_mode}"
    return None


def _conv_bn(conv: nn.Module, bn: nn.Module) -> ConvBN:
    assert isinstance(conv, nn.Conv2d)
    geometry = _pair(conv.stride), _pair(conv.padding), _pair(conv.dilation)
    return ConvBN(conv.weight, batch_norm_of(bn), *geometry, conv.groups)


def _conv_bns(block: nn.Module, parts: Parts) -> list[tuple[str, Any, str, Any]]:
    """Names and modules of the convolutions and their batch norms, the shortcut's last."""
    conv_bns = [
        (c, getattr(block, c), n, getattr(block, n)) for c, n in zip(parts.convs, parts.bns, strict=True)
    ]
    downsample = getattr(block, "downsample", None)
    if downsample is not None:
        count = len(downsample)
        conv, bn = f"downsample.{count - 2}", f"downsample.{count - 1}"
        conv_bns.append((conv, downsample[-2], bn, downsample[-1]))
    return conv_bns


def shortcut_input(block: nn.Module, x: Tensor) -> Tensor:
    """The input of the shortcut's convolution: ``x``, or what the modules before it make of ``x``."""
    downsample = getattr(block, "downsample", None)
    if downsample is not None:
        for module in [*downsample][:-2]:
            x = module(x)
    return x


def why_not_one_op(block: nn.Module, parts: Parts) -> str | None:
    """Why a block runs as several fused ops, as far as its modules tell; None when it is one op."""
    owners: dict[int, str] = {}
    for name, conv, bn_name, bn in _conv_bns(block, parts):
        if problem := _changed_conv(conv):
            return f"{name} {problem}"
        # torch.compile has one input for what is shared, and would write to it once where eager does so twice.
        for shared in (conv.weight, bn, bn.weight, bn.bias):
            owner = name if shared is conv.weight else bn_name
            if shared is not None and (other := owners.setdefault(id(shared), owner)) != owner:
                return f"{owner} shares a parameter or itself with {other}"
    return None


class BlockOperands(NamedTuple):
    """The operands of ops.residual_block beside the input."""

    convs: list[ConvBN]
    downsample: ConvBN | None
    skip: Tensor | None


def one_op(x: Tensor, skip: Tensor, block: nn.Module, parts: Parts) -> BlockOperands | str:
    """The operands of ops.residual_block, or why a block runs as several fused ops on ``x``.

    Args:
        skip: ``shortcut_input``.
    """
    if problem := why_not_one_op(block, parts):
        return problem
    if not (is_channels_last(dense(x)) and is_channels_last(dense(skip))):
        return "the input is contiguous: use x.to(memory_format=torch.channels_last)"
    convs = [_conv_bn(conv, bn) for _, conv, _, bn in _conv_bns(block, parts)]
    mixed = ops.autocast_dtype(x.device.type) is not None
    if not mixed and any(t.dtype != x.dtype for t in (skip, *(conv.weight for conv in convs))):
        return f"the input is {x.dtype} and a convolution's weight is not"
    if min(x.shape[1], *(conv.weight.shape[0] for conv in convs)) == 1:
        return "an activation has one channel"  # it lies in memory as a contiguous one
    if not all(_is_convolution(conv) for conv in convs):
        return "a convolution has a stride, padding or dilation that is refused"
    downsample = convs.pop() if len(convs) > len(parts.convs) else None
    shape = ops.convolved_shape(x.shape, convs)
    if shape is None or shape != ops.convolved_shape(skip.shape, [] if downsample is None else [downsample]):
        return f"the convolutions do not fit each other or an input of shape {tuple(x.shape)}"
    return BlockOperands(convs, downsample, None if skip is x else skip)

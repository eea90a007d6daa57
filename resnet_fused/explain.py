"""``explain``: what of a model does not run fused, and why."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from resnet_fused.backend import why_plain as why_backend_plain
from resnet_fused.blocks import FusedPart, FusedStem
from resnet_fused.fuse import fused_class_of
from resnet_fused.modules import (
    one_op,
    shortcut_input,
    why_faster_plain,
    why_module_plain,
    why_no_pool,
    why_not_one_op,
    why_plain,
)


def explain(model: nn.Module, x: Any = None) -> dict[str, str]:
    """Which blocks and stems of a model do not run fused, and why.

    Args:
        model: any model. Residual blocks that are not fused are listed too: they run in plain PyTorch.
        x: an input of the model, such as images (N, 3, H, W), as it is or will be trained with, on the model's device.
            The model runs on it once, under no_grad, in its mode; its buffers are put back as they were. None: only
            what modules and device tell is taken into account, not layout, dtype and shape of the input.

    Returns:
        {name of the block, or of the model of a stem ("" is ``model`` itself, also where it has no blocks): reason};
        empty when all is fused.
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


def _is_block_or_stem(module: nn.Module) -> bool:
    # Blocks of other libraries have these names too.
    named = type(module).__name__ in ("BasicBlock", "Bottleneck")
    return named or isinstance(module, FusedPart) or fused_class_of(module) is not None


def _why_not(part: nn.Module, x: Tensor | None, device: str) -> str | None:
    """Why a block or stem does not run fused, or not as one op; of what its modules tell where ``x`` is None."""
    if reason := why_backend_plain(device):
        return reason
    if not isinstance(part, FusedPart):
        return _why_not_converted(part)
    if "forward" in vars(part):
        return "has a forward of its own"
    parts = part._parts
    if reason := why_module_plain(part, parts, device) if x is None else why_plain(x, part, parts):
        return reason
    if isinstance(part, FusedStem):
        problem = why_no_pool(part.get_submodule("maxpool"))
        return problem and f"maxpool {problem}: bn1 and relu are fused without it"
    if x is not None and (reason := why_faster_plain(x, part, parts)):
        return reason
    if x is None:
        apart = why_not_one_op(part, parts)
    else:
        with torch.no_grad():
            operands = one_op(x, shortcut_input(part, x), part, parts)
        apart = operands if isinstance(operands, str) else None
    return apart and f"{apart}: fused ops around the convolutions instead of one for the block"


def _why_not_converted(part: nn.Module) -> str:
    kind = fused_class_of(part)
    name = f"{type(part).__module__}.{type(part).__name__}"
    if kind is None:
        return f"is a {name}, which resnet_fused.fuse doesn't know"
    return kind if isinstance(kind, str) else f"is a {name}: resnet_fused.fuse(model) makes it fused"


def _inputs_of(model: nn.Module, parts: list[nn.Module], x: Any) -> dict[nn.Module, Tensor]:
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

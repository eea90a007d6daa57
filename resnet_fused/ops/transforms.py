"""Transforms of PyTorch that fused ops do not support: models and functions then run unfused PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

#: The methods that run when a module is called.
CALL = ("_wrapped_call_impl", "_call_impl", "forward")
#: The same, by its type, with those that its forward calls.
METHODS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: (*CALL, "_conv_forward"),
    nn.BatchNorm2d: (*CALL, "_check_input_dim"),
    nn.SyncBatchNorm: (*CALL, "_check_input_dim", "_check_non_zero_input_channels"),
    nn.ReLU: CALL,
    nn.MaxPool2d: CALL,
    nn.Sequential: CALL,
    nn.Identity: CALL,
}
#: What plain modules call, as it was when this module was imported: {(owner, name): function}.
_ORIGINALS: dict[tuple[Any, str], Any] = {
    **{(kind, name): getattr(kind, name) for kind in METHODS for name in ("__call__", *METHODS[kind])},
    **{(F, name): getattr(F, name) for name in ("conv2d", "batch_norm", "relu", "max_pool2d")},
}


def transforms_are_active() -> bool:
    """Whether tensors may be batched or dual: torch.func (vmap, grad, jvp, ...), is_grads_batched, forward-mode AD."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def why_not_here() -> str | None:
    """Why a call must run unfused PyTorch, whatever the module and its input; None if nothing requires it."""
    if transforms_are_active():
        return "torch.func transforms and forward-mode AD take plain PyTorch"
    if torch.jit.is_tracing():
        return "torch.jit.trace takes plain PyTorch"
    if torch.compiler.is_exporting():
        return "torch.export takes plain PyTorch"
    if nn_module._has_any_global_hook():
        return "hooks for all modules are registered"
    # That of torch.set_default_device and `with torch.device` only changes where tensors are made.
    if torch._C._len_torch_function_stack() and not all(
        isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack()
    ):
        return "a TorchFunctionMode is active, which may replace functions"
    for (owner, name), original in _ORIGINALS.items():
        if getattr(owner, name) is not original:
            return f"{owner.__name__}.{name} was replaced"
    return None


# torch.compile asks once, while it traces, and takes the answer as a constant (torch._dynamo.assume_constant_result,
# which would load the compiler here).
transforms_are_active._dynamo_marked_constant = True  # type: ignore[attr-defined]
why_not_here._dynamo_marked_constant = True  # type: ignore[attr-defined]

"""What `--optimizer` and `--schedule` stand for."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, LRScheduler, SequentialLR

from resnet_fused.cli.settings import Settings


def make_optimizer(model: nn.Module, settings: Settings, captured: bool) -> Optimizer:
    """The optimizer of `--optimizer`, without weight decay for norms and biases.

    Args:
        model: whose parameters that require gradients are optimized.
        settings: `momentum` is AdamW's beta1; weight decay is decoupled from the gradient in AdamW alone.
        captured: whether its steps are to be captured in a CUDA graph.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1]
    vectors = [p for p in trained if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    # GradScaler's steps can be captured of a fused optimizer only; None leaves the choice to PyTorch.
    fused = True if captured else None
    if settings.optimizer == "adamw":
        betas = (settings.momentum, 0.999)
        return AdamW(groups, lr=settings.lr, betas=betas, fused=fused, capturable=captured)
    if settings.optimizer == "rmsprop":
        return RMSprop(groups, lr=settings.lr, momentum=settings.momentum)
    return SGD(groups, lr=settings.lr, momentum=settings.momentum, fused=fused)


def load_optimizer(optimizer: Optimizer, state: dict[str, object]) -> None:
    """Loads what is remembered of the gradients; the hyperparameters stay those that the optimizer was made with.

    Raises:
        ValueError, KeyError: the state is of other parameters, or of another optimizer.
    """
    saved = state["param_groups"]
    assert isinstance(saved, list)
    own = [{key: x for key, x in group.items() if key != "params"} for group in optimizer.param_groups]
    groups = [{**mine, "params": theirs["params"]} for mine, theirs in zip(own, saved, strict=True)]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
    # PyTorch would run into these at the next step.
    for parameter, values in optimizer.state.items():
        lacks = [name for name in _remembered(optimizer) if values.get(name) is None]
        if lacks:
            raise ValueError(f"the optimizer's state lacks {', '.join(lacks)}")
        for name, value in values.items():
            expected = torch.Size() if name == "step" else parameter.shape
            if value is not None and value.shape != expected:
                raise ValueError(f"{name} of the optimizer has the shape {[*value.shape]}, not {[*expected]}")


def _remembered(optimizer: Optimizer) -> Sequence[str]:
    """What the optimizer cannot do without, of each parameter that has been in a step."""
    if isinstance(optimizer, AdamW):
        return "step", "exp_avg", "exp_avg_sq"
    if isinstance(optimizer, RMSprop):
        with_momentum = optimizer.param_groups[0]["momentum"] > 0
        return "step", "square_avg", *(["momentum_buffer"] if with_momentum else [])
    return ()  # SGD starts its momentum at the next gradient


def make_schedule(optimizer: Optimizer, settings: Settings, steps: int) -> SequentialLR:
    """Linear warm-up over the first `warmup` of the steps, then the schedule of `--schedule`.

    Args:
        optimizer: whose learning rates it sets.
        settings: `step_size` counts epochs from the start of the run, those of the warm-up too.
        steps: of the whole run.
    """
    for group in optimizer.param_groups:  # another schedule may have been there
        group.pop("initial_lr", None)
        group["lr"] = settings.lr
    warm = max(1, round(settings.warmup * steps))
    linear = LinearLR(optimizer, start_factor=1 / warm, total_iters=warm - 1)
    after: LRScheduler
    if settings.schedule == "cosine":
        after = CosineAnnealingLR(optimizer, T_max=max(1, steps - warm))
    else:
        period: float = math.inf
        if settings.schedule == "step":
            period = settings.step_size * (steps // settings.epochs)
        after = LambdaLR(optimizer, lambda step: settings.gamma ** ((warm + step) // period))
    return SequentialLR(optimizer, [linear, after], milestones=[warm])


def clip_gradients(optimizer: Optimizer, norm: float) -> None:
    """Scales the gradients of all parameters together to at most that norm."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, norm)

"""One training step through an op: by resnet_fused.functional, by eager PyTorch, and in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import resnet_fused
from resnet_fused import types
from resnet_fused.layout import statistics_dtype
from tests.accuracy import Case

#: Gradients of the second activation, of ops that have one.
OTHERS = {"bn_add_relu": "dresidual", "bn_bn_add_relu": "dskip"}
STEMS = ("bn_relu", "bn_add_relu", "bn_bn_add_relu", "bn_relu_maxpool")
EPS = 1e-5
MOMENTUM = 0.1


@dataclass
class BatchNorm:
    """What F.batch_norm takes beside its input; ``frozen`` is eval mode."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    frozen: bool


@dataclass
class Step:
    """An op, its inputs, and the gradient of its output. ``other`` is the residual or the skip."""

    stem: str
    y: Tensor
    norm: BatchNorm
    other: Tensor
    skip_norm: BatchNorm
    grad: Tensor


Op = Callable[[str, Tensor, BatchNorm, Tensor, BatchNorm], Tensor]


def make_step(
    stem: str, case: Case, frozen: bool = False, skip_frozen: bool | None = None, affine: bool = True
) -> Step:
    """A step on the input of a case, with a gradient that is zero wherever rounding decides where it goes."""

    def norm(x: Tensor, weight: Tensor, bias: Tensor, frozen: bool) -> BatchNorm:
        var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
        running_mean = (mean + 0.1 * var.sqrt() * torch.randn_like(mean)).to(weight.dtype)
        running_var = (var + 0.1 * torch.rand_like(var)).to(weight.dtype)
        if not affine:
            return BatchNorm(None, None, running_mean, running_var, frozen)
        return BatchNorm(weight, bias, running_mean, running_var, frozen)

    step = Step(
        stem,
        case.y,
        norm(case.y, case.weight, case.bias, frozen),
        case.skip if stem == "bn_bn_add_relu" else case.residual,
        norm(case.skip, case.skip_weight, case.skip_bias, frozen if skip_frozen is None else skip_frozen),
        case.grad,
    )
    certain = _gradient_is_certain(step)
    grad = case.grad[:, :, : certain.shape[2], : certain.shape[3]]
    return replace(step, grad=torch.where(certain, grad, torch.zeros_like(grad)))


def plain(stem: str, y: Tensor, norm: BatchNorm, other: Tensor, skip_norm: BatchNorm) -> Tensor:
    """The op by F.batch_norm, relu, add and max_pool2d."""

    def batch_norm(x: Tensor, n: BatchNorm) -> Tensor:
        return F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, not n.frozen, MOMENTUM, EPS)

    z = batch_norm(y, norm)
    if stem == "bn_add_relu":
        z = z + other
    if stem == "bn_bn_add_relu":
        z = z + batch_norm(other, skip_norm)
    return F.max_pool2d(F.relu(z), 3, stride=2, padding=1) if stem == "bn_relu_maxpool" else F.relu(z)


def functional(stem: str, y: Tensor, norm: BatchNorm, other: Tensor, skip_norm: BatchNorm) -> Tensor:
    """The op by resnet_fused.functional."""

    def arguments(n: BatchNorm) -> types.BatchNorm:
        return types.BatchNorm(n.running_mean, n.running_var, n.weight, n.bias, not n.frozen, MOMENTUM, EPS)

    if stem == "bn_bn_add_relu":
        return resnet_fused.functional.bn_bn_add_relu(y, other, arguments(norm), arguments(skip_norm))
    op = getattr(resnet_fused.functional, stem)
    return op(y, *([other] if stem == "bn_add_relu" else []), *arguments(norm)[:7])


def autograd_step(op: Op, step: Step) -> dict[str, Tensor]:
    """Output, gradients by autograd, and running statistics, of ``plain`` or ``functional``."""
    found: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {"dy": step.y.detach().requires_grad_()}
    if step.stem in OTHERS:
        inputs[OTHERS[step.stem]] = step.other.detach().requires_grad_()

    def fresh(norm: BatchNorm, prefix: str) -> BatchNorm:
        mean, var = norm.running_mean.clone(), norm.running_var.clone()
        vectors: list[Tensor | None] = [norm.weight, norm.bias]
        if prefix == "" or step.stem == "bn_bn_add_relu":
            found[f"{prefix}running_mean"], found[f"{prefix}running_var"] = mean, var
            for i, name in enumerate(("weight", "bias")):
                if (vector := vectors[i]) is not None:
                    vectors[i] = inputs[f"d{prefix}{name}"] = vector.detach().requires_grad_()
        return BatchNorm(*vectors, mean, var, norm.frozen)

    norms = fresh(step.norm, ""), fresh(step.skip_norm, "skip_")
    out = op(step.stem, inputs["dy"], norms[0], inputs.get(OTHERS.get(step.stem, ""), step.other), norms[1])
    found["out"] = out.detach()
    gradients = torch.autograd.grad(out, list(inputs.values()), step.grad)
    return found | dict(zip(inputs, gradients, strict=True))


def eager_step(step: Step) -> dict[str, Tensor]:
    return autograd_step(plain, step)


def exact_step(step: Step) -> dict[str, Tensor]:
    """Eager's in float64."""
    return eager_step(in_float64(step))


def in_float64(step: Step) -> Step:
    def wide(value: Any) -> Any:
        if isinstance(value, BatchNorm):
            return replace(value, **{f.name: wide(getattr(value, f.name)) for f in fields(value)})
        return value.double() if isinstance(value, Tensor) else value

    return replace(step, **{f.name: wide(getattr(step, f.name)) for f in fields(step)})


def _gradient_is_certain(step: Step) -> Tensor:
    """Where the output's gradient goes the same way however z is rounded: bool, the shape of the output.

    ReLU and max-pooling are not differentiable where z is zero or two z of a window are equal, and one element
    on the other side costs more than all rounding together: no rule about rounding can hold there. Exact ties
    between equal inputs stay in; the first of them is the maximum.
    """
    eps = torch.finfo(statistics_dtype(step.y.dtype)).eps
    exact = in_float64(step)

    def batch_norm(x: Tensor, norm: BatchNorm) -> tuple[Tensor, Tensor]:
        """z, and the size of what it is made of, which is what rounding errors are relative to."""
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        if norm.frozen:
            mean, var = norm.running_mean.view(1, -1, 1, 1), norm.running_var.view(1, -1, 1, 1)
        one, zero = torch.ones_like(mean), torch.zeros_like(mean)
        weight = one if norm.weight is None else norm.weight.view(1, -1, 1, 1)
        bias = zero if norm.bias is None else norm.bias.view(1, -1, 1, 1)
        scale = weight * torch.rsqrt(var + EPS)
        return (x - mean) * scale + bias, (x.abs() + mean.abs()) * scale.abs() + bias.abs()

    z, size = batch_norm(exact.y, exact.norm)
    if step.stem == "bn_add_relu":
        z, size = z + exact.other, size + exact.other.abs()
    if step.stem == "bn_bn_add_relu":
        skip_z, skip_size = batch_norm(exact.other, exact.skip_norm)
        z, size = z + skip_z, size + skip_size
    margin = 32 * eps * size  # far beyond the few roundings that lead to z
    if step.stem != "bn_relu_maxpool":
        return z.abs() > margin
    n, c, h, w = z.shape
    out_h, out_w = (h + 1) // 2, (w + 1) // 2

    def windows(x: Tensor, padding: float) -> Tensor:
        padded = F.pad(x, (1, 1, 1, 1), value=padding)
        return F.unfold(padded, 3, stride=2).view(n, c, 9, out_h, out_w)

    taps, margins = windows(z, -torch.inf), windows(margin, 0.0).amax(2)
    largest = taps.amax(2)
    second = torch.where(taps < largest.unsqueeze(2), taps, -torch.inf).amax(2)
    return (largest.abs() > margins) & ((largest - second > margins) | (largest < 0))

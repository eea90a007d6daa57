"""Calls of resnet_fused.functional: what hypothesis draws of them, and how they run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from resnet_fused import functional
from resnet_fused.types import BatchNorm
from tests.properties.agreement import batch_norm_rounded, moves_by, rounded
from tests.properties.strategies import (
    DTYPES,
    GRAD_MODES,
    Fault,
    Placement,
    activation_shapes,
    grad_modes,
    placements,
    rarely,
    seeds,
)

OPS = ("bn_relu", "bn_add_relu", "bn_bn_add_relu", "bn_relu_maxpool")
VECTORS = ("running_mean", "running_var", "weight", "bias")
Operands = dict[str, Tensor]


class Norm(NamedTuple):
    """A batch norm: which of its tensors there are, and its mode.

    narrow: whether its tensors have the activations' dtype where that has 16 bits.
    """

    training: bool = True
    tracked: bool = True
    weight: bool = True
    bias: bool = True
    momentum: float = 0.1
    eps: float = 1e-5
    narrow: bool = False

    @property
    def vectors(self) -> tuple[str, ...]:
        given = self.tracked, self.tracked, self.weight, self.bias
        return tuple(name for name, has in zip(VECTORS, given, strict=True) if has)


norms = st.builds(
    Norm,
    st.booleans(),
    rarely.map(lambda rare: not rare),
    st.integers(0, 3).map(bool),
    st.integers(0, 3).map(bool),
    st.sampled_from((0.1, 0.1, 0.0, 1.0, 0.3)),
    st.sampled_from((1e-5, 1e-5, 1e-3, 1.0)),
    rarely,
)


class Call(NamedTuple):
    """A call of one of OPS, and of its backward.

    requires_grad: of y, partner, and of the weights and biases of both norms. constant: whether two channels have no
    variance.
    """

    op: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    y: Placement
    partner: Placement
    grad: Placement
    norm: Norm
    partner_norm: Norm
    requires_grad: frozenset[str]
    grad_mode: str
    autocast: bool
    constant: bool
    faults: tuple[Fault, ...]
    seed: int

    @property
    def norms(self) -> dict[str, Norm]:
        """By the prefix of their tensors' names."""
        return {"": self.norm} | ({"skip_": self.partner_norm} if self.op == "bn_bn_add_relu" else {})

    @property
    def has_partner(self) -> bool:
        return self.op in ("bn_add_relu", "bn_bn_add_relu")


_LEAVES = ("y", "partner", "weight", "bias", "skip_weight", "skip_bias")


def calls(
    elements: int,
    faults: st.SearchStrategy[tuple[Fault, ...]],
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    empty: bool = True,
) -> st.SearchStrategy[Call]:
    return st.builds(
        Call,
        st.sampled_from(OPS),
        activation_shapes(elements, empty=empty),
        st.sampled_from(dtypes),
        placements(),
        placements(),
        placements(),
        norms,
        norms,
        st.frozensets(st.sampled_from(_LEAVES)) | st.just(frozenset(_LEAVES)),
        grad_modes,
        rarely,
        rarely,
        faults,
        seeds,
    )


def operands_of(call: Call) -> Operands:
    """Activations at their places, vectors in the dtype of statistics; some are not finite."""
    torch.manual_seed(call.seed)
    channels = call.shape[1]
    wide = torch.float64 if call.dtype == torch.float64 else torch.float32
    found: Operands = {}
    activations = {"y": call.y} | ({"partner": call.partner} if call.has_partner else {})
    for name in activations:
        spread, mean = 0.5 + torch.rand(channels, 1, 1), torch.randn(channels, 1, 1)
        found[name] = (torch.randn(call.shape) * spread + mean).to(call.dtype)
        if call.constant and found[name].numel():
            found[name][:, ::5] = found[name].flatten()[0]
    for prefix, norm in call.norms.items():
        values = {
            "running_mean": torch.randn(channels),
            "running_var": 0.5 + torch.rand(channels),
            "weight": torch.randn(channels) * (torch.rand(channels) > 0.1),
            "bias": torch.randn(channels),
        }
        dtype = call.dtype if norm.narrow else wide
        found |= {prefix + name: values[name].to(dtype) for name in norm.vectors}
    for fault in call.faults:
        if fault.operand in found:
            fault.put_into(found[fault.operand])
    return found | {name: placement.place(found[name]) for name, placement in activations.items()}


class Run:
    """One forward pass of a call by fused ops, by eager PyTorch, or in Monte Carlo arithmetic; then its backward."""

    def __init__(self, call: Call, operands: Mapping[str, Tensor], compute: Callable[..., Tensor]) -> None:
        self.leaves, self.buffers = {}, {}
        for name, value in operands.items():
            if "running" in name:
                self.buffers[name] = value.clone()
            else:
                self.leaves[name] = value.detach().requires_grad_(name in call.requires_grad)
        with GRAD_MODES[call.grad_mode](), torch.autocast("cpu", torch.bfloat16, enabled=call.autocast):
            self.out = compute(call, self.leaves | self.buffers)

    def results(self, grad: Tensor) -> dict[str, Tensor]:
        """The output, gradients from that w.r.t. the output, and running statistics."""
        found = {"output": self.out.detach()} | self.buffers
        if self.out.requires_grad:
            self.out.backward(grad.to(self.out.dtype))
        for name, leaf in self.leaves.items():
            if leaf.grad is not None:
                found[f"{name} gradient"] = leaf.grad
        return found


def _bn(norm: Norm, tensors: Mapping[str, Tensor], prefix: str = "") -> BatchNorm:
    vectors = (tensors.get(prefix + name) for name in VECTORS)
    return BatchNorm(*vectors, norm.training, norm.momentum, norm.eps)


def fused(call: Call, tensors: Mapping[str, Tensor]) -> Tensor:
    op = getattr(functional, call.op)
    bn = _bn(call.norm, tensors)
    out: Tensor
    if call.op == "bn_bn_add_relu":
        out = op(tensors["y"], tensors["partner"], bn, _bn(call.partner_norm, tensors, "skip_"))
    elif call.op == "bn_add_relu":
        out = op(tensors["y"], tensors["partner"], *bn[:7])
    else:
        out = op(tensors["y"], *bn[:7])
    return out


def preactivation(call: Call, tensors: Mapping[str, Tensor], batch_norm: Callable[..., Tensor]) -> Tensor:
    """The input of the ReLU."""
    z = batch_norm(tensors["y"], *_bn(call.norm, tensors)[:7])
    if not call.has_partner:
        return z
    partner = tensors["partner"]
    if call.op == "bn_bn_add_relu":
        partner = batch_norm(partner, *_bn(call.partner_norm, tensors, "skip_")[:7])
    return z + partner


def activated(call: Call, z: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(z), 3, 2, 1) if call.op == "bn_relu_maxpool" else F.relu(z)


def eager(call: Call, tensors: Mapping[str, Tensor]) -> Tensor:
    return activated(call, preactivation(call, tensors, F.batch_norm))


class Rounding:
    """The call in Monte Carlo arithmetic."""

    def __init__(self, call: Call) -> None:
        wide = torch.float64 if call.dtype == torch.float64 else torch.float32
        self.eps, self.wide_eps = moves_by(call.dtype), moves_by(wide)

    def batch_norm(self, *args: Any) -> Tensor:
        return rounded(batch_norm_rounded(*args, eps=self.wide_eps), self.eps)

    def __call__(self, call: Call, tensors: Mapping[str, Tensor]) -> Tensor:
        z = preactivation(call, tensors, self.batch_norm)
        return rounded(activated(call, rounded(z, self.eps)), self.eps)


def widened(operands: Mapping[str, Tensor]) -> Operands:
    return {name: value.double() for name, value in operands.items()}


def in_layout(operands: Mapping[str, Tensor], placement: Placement) -> Operands:
    """The same values, activations contiguous or channels_last.

    Eager PyTorch gets these, since torch 2.13 returns wrong gradients of F.batch_norm for other strides: it permutes
    them where input and gradient are 1 pixel wide and have different strides in that dimension.
    """
    return {name: placement.place(value) if value.dim() == 4 else value for name, value in operands.items()}

"""For ops that go through a batch in chunks: memory, and the gradient before a ReLU whose mask was saved."""

from __future__ import annotations

from resnet_fused import layout
from resnet_fused.ops.registry import register_op
from resnet_fused.reference import masked_grad as reference

#: out = dz, or out + dz, and sum += dz by channel, with dz = grad where the mask has a bit and 0 elsewhere.
masked_grad = register_op(
    "masked_grad(Tensor grad, Tensor mask, Tensor(a!) out, bool accumulate, Tensor(b!)? sum) -> ()",
    reference.masked_grad,
    lambda *_: None,
)
#: torch.empty_like, or of other sizes; a large one on the CPU from a buffer cache.
fresh_like = register_op(
    "fresh_like(Tensor x, SymInt? n=None, SymInt? c=None, SymInt? h=None, SymInt? w=None) -> Tensor",
    layout.fresh_like,
    layout.fresh_like,
)

"""Residual blocks beside plain PyTorch's, for whatever hypothesis draws."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from resnet_fused import models, reference
from tests.properties.block_cases import Block, blocks, prepare, put_faults, randomize
from tests.properties.module_checks import assert_as_accurate, assert_propagates
from tests.properties.strategies import WIDE, faults, place_with


def pair_of(block: Block) -> tuple[nn.Module, nn.Module, Tensor]:
    """The fused block, the plain one, and an input at its place."""
    torch.manual_seed(block.mode.seed)
    plain, fused = block.make(reference), block.make(models)
    randomize(plain, block.mode)
    x = torch.randn(block.shape)
    x = x.abs() if block.mode.far else x
    put_faults(block.faults, plain, x)
    fused.load_state_dict(plain.state_dict())
    for module in (fused, plain):
        prepare(module, block.mode)
    return fused, plain, place_with(block.faults, block.x, x.to(block.mode.dtype))


@given(blocks(8_000, st.just(())))
def test_blocks_are_as_accurate_as_eager(block: Block) -> None:
    """Blocks of drawn sizes, strides, groups, dtypes, norms, modes and frozen parts: as accurate as eager PyTorch"""
    assert_as_accurate(*pair_of(block), block.grad, block.mode, block.norms.frozen, block.kernels)


_CONVS, _NORMS = ("conv1", "conv2", "conv3", "downsample.0"), ("bn1", "bn2", "bn3", "downsample.1")
#: Not weights of norms: see docs/api.md.
_operands = (
    st.sampled_from(("input", "input", "gradient"))
    | st.sampled_from([f"{conv}.weight" for conv in _CONVS])
    | st.sampled_from([f"{bn}.{name}" for bn in _NORMS for name in ("bias", "running_mean", "running_var")])
)


@given(blocks(4_000, faults(_operands), WIDE))
def test_blocks_propagate_what_is_not_finite(block: Block) -> None:
    """Infinite and NaN pixels, weights, statistics and gradients of blocks: results are finite where eager's are"""
    assert_propagates(*pair_of(block), block.grad, block.mode, block.faults, block.kernels)

"""Checks an installation: it has the kernels that it must have, and training steps agree with plain PyTorch.

    python check_wheel.py [cpu | cuda | none]

With kernels blocks must run fused, with none they must not. Run it outside the clone, in an environment with the
package and torch alone.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor, nn

import resnet_fused
from resnet_fused import native

#: Relative difference of two gradients, far below that of a wrong kernel: how accurate kernels are is for the tests to
#: measure. A ReLU whose input rounds to 0 may be on in one and off in the other. That moves the gradient of one of 64
#: channels by up to 1 / sqrt(16 * 56 * 56 pixels) and so the whole by 6e-4; of 3 million, a few do.
LARGEST_ERROR = 1e-2


def train_one_step(block: nn.Module, x: Tensor) -> list[Tensor]:
    """The gradients of a step of SGD, with which the parameters are updated."""
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    block(x).square().mean().backward()
    optimizer.step()
    return [parameter.grad for parameter in block.parameters() if parameter.grad is not None]


def check(fused: nn.Module, plain: nn.Module, channels: int, kernels: str) -> None:
    """One kind of block. A whole model would not do: what one ReLU changes, all blocks before it multiply."""
    plain.load_state_dict(fused.state_dict())
    # On a CPU blocks of fewer or smaller images may run as PyTorch's operators, where these were measured to be faster.
    x = torch.randn(16, channels, 56, 56).to(memory_format=torch.channels_last)
    unfused = resnet_fused.explain(fused, x)
    if bool(unfused) != (kernels == "none"):
        sys.exit(f"not fused: {unfused or 'nothing'}, with {kernels} kernels")
    for ours, theirs in zip(train_one_step(fused, x), train_one_step(plain, x), strict=True):
        error = float((ours - theirs).norm() / theirs.norm())
        if not error < LARGEST_ERROR:
            sys.exit(f"a gradient of shape {tuple(ours.shape)} differs from plain PyTorch's by {error:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Checks the installed resnet_fused.")
    parser.add_argument("kernels", choices=("cpu", "cuda", "none"), help="the kernels that it must have")
    wanted = parser.parse_args().kernels
    if wanted != ("none" if not native.is_loaded else "cuda" if native.has_cuda else "cpu"):
        sys.exit(f"expected {wanted} kernels, but it has {native.summary()}")

    torch.manual_seed(0)
    check(resnet_fused.BasicBlock(64, 64), resnet_fused.reference.BasicBlock(64, 64), 64, wanted)
    check(resnet_fused.Bottleneck(256, 64), resnet_fused.reference.Bottleneck(256, 64), 256, wanted)
    print(f"resnet_fused {resnet_fused.__version__} with torch {torch.__version__}: {native.summary()}")


if __name__ == "__main__":
    main()

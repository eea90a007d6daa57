"""Checks an installed wheel: the extension loads, and one training step runs fused and agrees with plain PyTorch.

    python check_wheel.py [cpu | cuda]

Run it outside the clone, in an environment with the wheel and torch alone.
"""

from __future__ import annotations

import argparse
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused
from resnet_fused import native

#: Relative error of a gradient, far below that of a wrong kernel: how accurate kernels are is for the tests to measure.
LARGEST_ERROR = 1e-3


def train_one_step(model: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    """The gradients of a step of SGD, with which the parameters are updated."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def main() -> None:
    parser = argparse.ArgumentParser(description="Checks the installed wheel of resnet_fused.")
    parser.add_argument("kernels", choices=("cpu", "cuda"), help="the kernels that the wheel must have")
    arguments = parser.parse_args()
    if native.missing_reason is not None:
        sys.exit(native.missing_reason)
    if native.has_cuda != (arguments.kernels == "cuda"):
        sys.exit(f"expected {arguments.kernels} kernels, but the wheel has {native.summary()}")

    torch.manual_seed(0)
    fused = resnet_fused.resnet18(num_classes=10)
    fused = fused.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    plain = resnet_fused.reference.resnet18(num_classes=10)
    plain.load_state_dict(fused.state_dict())
    images = torch.randn(8, 3, 64, 64).to(memory_format=torch.channels_last)
    labels = torch.arange(8)
    if reasons := resnet_fused.explain(fused, images):
        sys.exit(f"not fused: {reasons}")
    for ours, theirs in zip(
        train_one_step(fused, images, labels), train_one_step(plain, images, labels), strict=True
    ):
        error = float((ours - theirs).norm() / theirs.norm())
        if not error < LARGEST_ERROR:
            sys.exit(f"a gradient of shape {tuple(ours.shape)} differs from plain PyTorch's by {error:.1e}")
    print(f"resnet_fused {resnet_fused.__version__} with torch {torch.__version__}: {native.summary()}")


if __name__ == "__main__":
    main()

"""What the tests of the CPU's native convolutions share: random operands, instruction sets."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from resnet_fused import native
from resnet_fused.layout import pack_mask
from resnet_fused.types import Gradient
from tests.accuracy import shift_from_zero

#: Of the gradient w.r.t. the convolution's output: what it is computed from.
GRADIENTS = ("plain", "masked", "bn", "bn_running", "masked_bn", "masked_bn_running")


#: Heights and widths of images.
SIDES = range(1, 21)


def widths_for(height: int) -> list[int]:
    """A fifth of SIDES, for each height another; of another seed a third: three seeds in succession have them all."""
    seed = int(os.environ["RESNET_FUSED_TEST_SEED"])
    return [width for width in SIDES if (width + height + seed) % (3 if seed else 5) == 0]


def random_activation(sizes: Sequence[int]) -> Tensor:
    x = torch.randn(*sizes) + torch.randn(sizes[1], 1, 1)
    return torch.empty_like(x, memory_format=torch.channels_last).copy_(x)


def random_bn(channels: int) -> list[Tensor]:
    return [torch.randn(channels), torch.rand(channels) + 0.5, torch.randn(channels), torch.randn(channels)]


def random_normed(sizes: Sequence[int]) -> list[Tensor]:
    """An activation and its batch norm, whose output is nowhere so near to zero that rounding decides about a ReLU."""
    x = random_activation(sizes)
    mean, invstd, weight, bias = random_bn(sizes[1])
    vector = (1, -1, 1, 1)
    normed = (x - mean.view(vector)) * (invstd * weight).view(vector) + bias.view(vector)
    return [x, mean, invstd, weight, bias + shift_from_zero(normed)]


def random_mask(like: Tensor) -> Tensor:
    return pack_mask(torch.rand(like.shape) < 0.6, like)


def random_gradient(sizes: Sequence[int], gradient: str) -> Gradient:
    """One of GRADIENTS."""
    channels = sizes[1]
    g = random_activation(sizes)
    dy = Gradient(g, random_mask(g) if "masked" in gradient else None)
    if "bn" in gradient:
        dy = Gradient(g, dy.mask, *random_normed(sizes))
        if "running" not in gradient:
            dy = dy._replace(sum_dz=torch.randn(channels), sum_dz_xhat=torch.randn(channels))
    return dy


def run_with(isa: str, tests: str) -> None:
    """Some of the tests of a file with another instruction set, in a process of their own: the choice is made once."""
    if "RESNET_FUSED_CPU_ISA" in os.environ:
        pytest.skip("runs in processes of this test")
    if isa == "avx2" and native.cpu_isa() == "baseline":
        pytest.skip("the processor has no AVX2")
    chosen = "test_strategies or test_operands or (test_every_size and (7 or 14))"
    options = ["-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, tests, "-k", chosen]
    environment = os.environ | {"RESNET_FUSED_CPU_ISA": isa}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout

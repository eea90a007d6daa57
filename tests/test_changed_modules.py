"""Options of modules that blocks and stems can't fuse, or that differ between rows and columns, or between norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fused
from tests.compat.small_models import (
    assert_close,
    both_modes,
    every_case,
    gradients_and_buffers,
    images,
    leaf,
    small_pair,
    tiny_block_pair,
)
from tests.model_pairs import assert_equal, results


def _bias(block: Any) -> None:
    for conv in (block.conv2, block.downsample[0]):
        conv.bias = nn.Parameter(torch.linspace(-1, 1, conv.out_channels, dtype=torch.float64))


def _padding_mode(block: Any) -> None:
    old = block.conv2
    options = {"padding": 1, "padding_mode": "circular", "bias": False, "dtype": torch.float64}
    block.conv2 = nn.Conv2d(old.in_channels, old.out_channels, 3, old.stride, **options)
    block.conv2.weight = old.weight


def _stride(block: Any) -> None:
    conv = block.conv1 if block.conv1.stride != (1, 1) else block.conv2
    conv.stride = block.downsample[0].stride = (2, 1)


def _stride_of_columns(block: Any) -> None:
    conv = block.conv1 if block.conv1.stride != (1, 1) else block.conv2
    conv.stride = block.downsample[0].stride = (1, 3)


def _dilation(block: Any) -> None:
    block.conv2.dilation = block.conv2.padding = (2, 1)


def _groups(block: Any) -> None:
    last = block.conv3 if hasattr(block, "conv3") else block.conv2
    for conv in (last, block.downsample[0]):
        conv.groups = 2
        conv.weight = nn.Parameter(conv.weight.detach()[:, ::2].clone(memory_format=torch.preserve_format))


def _eps(block: Any) -> None:
    block.downsample[1].eps = 0.5


def _statistics(block: Any) -> None:
    """Buffers stay, and are used in evaluation alone."""
    block.bn1.track_running_stats = block.downsample[1].track_running_stats = False


CHANGES = (_bias, _padding_mode, _stride, _stride_of_columns, _dilation, _groups, _eps, _statistics)


@every_case
@both_modes
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_options_of_a_block(
    kind: str, layout: torch.memory_format, training: bool, change: Callable[[Any], None]
) -> None:
    """A convolution's bias, padding_mode, groups, uneven stride and dilation; a norm's eps and statistics of its own"""
    fused, eager, _ = tiny_block_pair(kind, layout, training)
    x = torch.randn(3, 6, 7, 5, dtype=torch.float64).to(memory_format=layout)
    found = []
    for block in (fused, eager):
        change(block)
        block.train(training)
        with torch.no_grad():
            before = block(x)
        inputs = leaf(x)
        out = block(inputs)
        out.sin().sum().backward()
        found.append([before, out, inputs.grad, gradients_and_buffers(block)])
        # Derivatives of gradients take another way.
        inputs = leaf(x)
        grad = torch.autograd.grad(block(inputs).sin().sum(), inputs, create_graph=True)[0]
        found[-1].append(torch.autograd.grad(grad.square().sum(), [inputs, block.conv2.weight]))
    assert_close(*found)


@every_case
@both_modes
@pytest.mark.parametrize(
    "options",
    [{"momentum": None}, {"momentum": 0.3}, {"eps": 0.01}, {"track_running_stats": False}, {"affine": False}],
    ids=str,
)
def test_modes_of_norms(
    kind: str, layout: torch.memory_format, training: bool, options: dict[str, Any]
) -> None:
    """momentum, eps, track_running_stats and affine of all norms, over three batches"""
    fused, eager, x = tiny_block_pair(kind, layout, training, **options)
    found: list[list[Any]] = [[], []]
    for scale in (1, 2, 4):  # the cumulative average differs from the third batch on
        for block, results_of in ((fused, found[0]), (eager, found[1])):
            inputs = leaf(scale * x)
            out = block(inputs)
            out.sin().sum().backward()
            results_of += [out, inputs.grad]
    assert_close(
        *([*each, gradients_and_buffers(block)] for each, block in zip(found, (fused, eager), strict=True))
    )


@every_case
@pytest.mark.parametrize("name", ["bn1", "downsample.1"])
@pytest.mark.parametrize("hook", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_on_norms(kind: str, layout: torch.memory_format, name: str, hook: str) -> None:
    """Backward hooks and backward pre-hooks on norms, which see and change gradients"""
    fused, eager, x = tiny_block_pair(kind, layout)
    found = []
    for block in (fused, eager):
        block.relu = nn.ReLU()  # PyTorch refuses a change in place of what such a hook returns
        seen: list[Tensor] = []

        def halve(_: nn.Module, *gradients: Any, seen: list[Tensor] = seen) -> tuple[Tensor, ...]:
            seen += [g.clone() for each in gradients for g in each]
            return tuple(0.5 * g for g in gradients[0])

        getattr(block.get_submodule(name), hook)(halve)
        inputs = leaf(x)
        block(inputs).sin().sum().backward()
        assert seen
        found.append([seen, inputs.grad, gradients_and_buffers(block)])
    assert_close(*found)
    assert resnet_fused.explain(fused) == {"": f"{name} has hooks"}


@every_case
@pytest.mark.parametrize(
    ("options", "reason"),
    [({"ceil_mode": True}, "has another mode"), ({"dilation": 2}, "has dilation 2")],
    ids=["ceil_mode", "dilation"],
)
def test_options_of_the_pool(
    kind: str, layout: torch.memory_format, options: dict[str, Any], reason: str
) -> None:
    """The stem's max-pool with ceil_mode, or dilation"""
    fused, eager = small_pair(kind, layout)
    for model in (fused, eager):
        model.maxpool = nn.MaxPool2d(3, 2, 1, **options)
    assert resnet_fused.explain(fused) == {"": f"maxpool {reason}: bn1 and relu are fused without it"}
    x = images(layout)
    assert_equal(results(fused, x), results(eager, x))

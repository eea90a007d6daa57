"""ResNets of a stem and two blocks, small enough to be tried with everything PyTorch has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fused
from resnet_fused import reference
from tests.model_pairs import KINDS, make_model, randomize_norm

every_kind = pytest.mark.parametrize("kind", KINDS)
#: Blocks run as one op in channels_last and as several otherwise.
every_case = pytest.mark.parametrize(
    ("kind", "layout"),
    [("basic", torch.channels_last), ("bottleneck", torch.channels_last), ("basic", torch.contiguous_format)],
    ids=["basic-nhwc", "bottleneck-nhwc", "basic-nchw"],
)
NHWC = torch.channels_last


def small_model(library: Any, kind: str, **options: Any) -> nn.Module:
    """A ResNet of two stages: a block with a downsample convolution, after one without (of a basic model)."""
    with torch.device("meta"):
        made = make_model(library, kind, layers=[1, 1, 1, 1], **options)
        made.layer3 = made.layer4 = nn.Identity()
        made.fc = nn.Linear(128 * getattr(library, KINDS[kind]).expansion, 7)
    made.to_empty(device="cpu")
    for module in made.modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.Linear)):
            module.reset_parameters()
        randomize_norm(module)
    return made


def small_pair(
    kind: str, layout: torch.memory_format, training: bool = True, **options: Any
) -> tuple[nn.Module, nn.Module]:
    """A fused model and its reference, in float64, where rounding decides no ReLU."""
    fused, eager = (small_model(library, kind, **options) for library in (resnet_fused, reference))
    fused.load_state_dict(eager.state_dict())
    fused, eager = (m.double().train(training).to(memory_format=layout) for m in (fused, eager))
    return fused, eager


def images(layout: torch.memory_format, count: int = 3) -> Tensor:
    """For small_pair."""
    return torch.randn(count, 3, 32, 32, dtype=torch.float64).to(memory_format=layout)


def tiny_block_pair(
    kind: str,
    layout: torch.memory_format,
    training: bool = True,
    downsample: bool = True,
    **norm_options: Any,
) -> tuple[nn.Module, nn.Module, Tensor]:
    """A fused block of a few channels, its reference, and an input, in float64."""

    def norm(channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels, **norm_options)

    blocks = []
    outputs = 4 * getattr(reference, KINDS[kind]).expansion
    inputs = 6 if downsample else outputs
    for library in (resnet_fused, reference):
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), norm(outputs))
        stride, last = (2, shortcut) if downsample else (1, None)
        block = getattr(library, KINDS[kind])(inputs, 4, stride, last, norm_layer=norm)
        blocks.append(block.double().train(training).to(memory_format=layout))
    fused, eager = blocks
    eager.apply(randomize_norm)
    fused.load_state_dict(eager.state_dict())
    x = torch.randn(3, inputs, 4, 4, dtype=torch.float64).to(memory_format=layout)
    return fused, eager, x


both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
with_and_without = pytest.mark.parametrize("downsample", [False, True], ids=["identity", "downsample"])


def every_block(test: Callable[..., None]) -> Callable[..., None]:
    """Tiny blocks of all kinds, layouts, modes, and shortcuts."""
    return every_case(both_modes(with_and_without(test)))


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone(memory_format=torch.preserve_format).requires_grad_()


def train_only(model: nn.Module, part: str) -> None:
    """Freezes the parameters whose names do not start with ``part``."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(part))


def assert_close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def assert_same(of: Callable[[nn.Module, Tensor], Any], block: tuple[Any, ...], **norms: Any) -> None:
    """Compares what ``of`` computes with a block and its reference."""
    fused, eager, x = tiny_block_pair(*block, **norms)
    assert_close(of(fused, x), of(eager, x))


def gradients_and_buffers(model: nn.Module) -> dict[str, Tensor]:
    found = {f"{name} gradient": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: b.double() for name, b in model.named_buffers()}

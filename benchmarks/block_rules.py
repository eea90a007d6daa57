"""How many images a residual block needs to train faster fused than as PyTorch's operators; see cpu_rules.

Below, the host time of a block's ops is longer than what fusion saves. From 16 images of 224x224 on (64 in bf16) they
run fused whatever is measured: there the memory that they save counts.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import nn

from resnet_fused import models, modules, reference
from resnet_fused.cli.precision import PRECISIONS
from resnet_fused.measure import EAGER, OURS, Case, Comparison, Provider, quantiles

#: Channels within a block (without groups), and the height and width of its input: in ImageNet's stages and in those of
#: 32x32 images.
SHAPES = {64: (56, 8), 128: (56, 28, 8, 4), 256: (28, 14, 4, 2), 512: (14, 7, 2, 1)}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 256)
#: The ratio of eager's time to ours from which blocks run fused: it takes less memory.
TIE = 0.98
KINDS = {
    "basic": (reference.BasicBlock, models.BasicBlock),
    "bottleneck": (reference.Bottleneck, models.Bottleneck),
    "grouped": (reference.Bottleneck, models.Bottleneck),
}
#: Of a grouped bottleneck, as in ResNeXt.
GROUPS: dict[str, Any] = {"groups": 32, "base_width": 4}
NAMES = [
    modules.kind_of_block(kind, downsample, precision)
    for kind, downsample, precision in itertools.product(KINDS, (False, True), ("fp32", "bf16"))
]


def largest(size: int, precision: str) -> int:
    """Batch size from which blocks run fused whatever is measured, by the size of the input."""
    if size in (8, 4, 2, 1):
        return 512
    return 16 if precision == "fp32" else 64


def cases() -> Iterator[tuple[str, bool, str, int, int, int]]:
    """(kind, whether it downsamples, precision, channels, size of the input, batch)."""
    for kind, downsample, precision in itertools.product(KINDS, (False, True), ("fp32", "bf16")):
        for channels, sizes in SHAPES.items():
            # The first block of a stage halves the size, but for the first stage.
            larger = [size for size in sizes if size * 2 not in sizes or channels == 64]
            for size in larger if downsample else sizes:
                for batch in BATCHES:
                    if batch < largest(size, precision) and (batch > 1 or size > 2):
                        yield kind, downsample, precision, channels, size, batch


def _blocks(kind: str, downsample: bool, channels: int) -> tuple[int, list[nn.Module]]:
    """Channels of the input, and the block as PyTorch's operators and fused, in training."""
    expansion = 1 if kind == "basic" else 4
    groups = GROUPS if kind == "grouped" else {}
    outputs, stride = channels * expansion, 1
    inputs = outputs
    if downsample:
        stride = 1 if channels == 64 else 2
        inputs = 64 if channels == 64 else outputs // 2
    blocks = []
    for cls in KINDS[kind]:
        shortcut = None
        if downsample:
            shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        block: Any = cls(inputs, channels, stride, shortcut, **groups)
        blocks.append(block.to(memory_format=torch.channels_last))
    blocks[1].load_state_dict(blocks[0].state_dict())
    return inputs, blocks


def measure(rounds: int, kinds: Sequence[str] = tuple(KINDS)) -> list[dict[str, Any]]:
    """One row for each case of ``kinds``: milliseconds, and the ratio of eager's to ours."""
    rows, todo = [], [case for case in cases() if case[0] in kinds]
    for i, (kind, downsample, precision, channels, size, batch) in enumerate(todo, 1):
        name = modules.kind_of_block(kind, downsample, precision)
        print(
            f"{i} of {len(todo)}: {name}, {channels} channels, {size}x{size}, batch {batch}", file=sys.stderr
        )
        inputs, blocks = _blocks(kind, downsample, channels)
        first: Any = blocks[0].conv1
        inner = first.out_channels
        dtype, autocast = PRECISIONS[precision].dtype, PRECISIONS[precision].autocast
        x = (
            torch.randn(batch, inputs, size, size)
            .to(dtype, memory_format=torch.channels_last)
            .requires_grad_()
        )

        def run(block: nn.Module, x: torch.Tensor = x, autocast: Any = autocast) -> None:
            with autocast("cpu"):
                out = block(x)
            torch.autograd.grad(out, [x, *block.parameters()], torch.ones_like(out))

        providers = [
            Provider(who, lambda block=block: run(block))  # type: ignore[misc]
            for who, block in zip((EAGER, OURS), blocks, strict=True)
        ]
        case = Case("block", name, "train", precision, batch, f"{batch}x{inputs}x{size}x{size}")
        comparison = Comparison(case, providers, torch.device("cpu"))
        with mock.patch("resnet_fused.blocks.why_faster_plain", lambda *_: None):
            comparison.warm_up()
            for _ in comparison.rounds(3 * rounds):
                pass
        ours, eager = comparison.ours, comparison[EAGER]
        rows.append(
            {
                "name": name, "channels": inner, "size": size, "batch": batch,
                "ours_ms": statistics.median(ours.times), "vendor_ms": statistics.median(eager.times),
                "vendor / ours": quantiles(comparison.ratios(ours, eager))["median"],
            }
        )  # fmt: skip
    return rows


def limited(rules: dict[str, dict[str, dict[str, int]]]) -> dict[str, dict[str, dict[str, int]]]:
    """Rules with no batch size above ``largest``."""
    return {
        name: {
            c: {
                size: min(batch, largest(int(size), name.rpartition("_")[2])) for size, batch in sizes.items()
            }
            for c, sizes in table.items()
        }
        for name, table in rules.items()
    }

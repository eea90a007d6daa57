"""Blocks that PyTorch's operators train faster, a few images on a CPU, run those; by what was measured (cpu_rules)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fused
from benchmarks import block_rules
from resnet_fused import modules
from resnet_fused.ops import cpu_rules
from tests.model_pairs import nodes, pair

FUSED = "_ResidualBlockBackward"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], list[tuple[str, int]]]:
    """Sets whether fused blocks count as faster, and returns what is asked: kinds and channels."""
    names: list[tuple[str, int]] = []

    def rule(faster: bool) -> list[tuple[str, int]]:
        def is_faster(kind: str, name: str, shape: tuple[int, ...], channels: int) -> bool:
            assert kind == "blocks" and len(shape) == 4
            names.append((name, channels))
            return faster

        monkeypatch.setattr(modules, "is_measured", lambda *_: True)
        monkeypatch.setattr(modules, "is_faster", is_faster)
        return names

    return rule


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_plain_where_it_is_faster(kind: str, asked: Callable[[bool], list[tuple[str, int]]]) -> None:
    fused, eager = (model.to(memory_format=torch.channels_last) for model in pair(kind))
    x = images()
    asked(True)
    assert FUSED in nodes(fused(x))
    names = asked(False)
    names.clear()
    for block in (fused.layer2[0], eager.layer2[0]):
        torch.manual_seed(0)
        block.train()
    h = torch.randn(2, block.conv1.in_channels, 16, 16).to(memory_format=torch.channels_last)
    ours, theirs = fused.layer2[0](h), eager.layer2[0](h)
    assert FUSED not in nodes(ours)
    assert torch.equal(ours, theirs)
    assert names == [(f"{kind}_downsample_fp32", 128)]
    reason = "PyTorch's operators are faster on a CPU for 2 images of 16x16"
    assert resnet_fused.explain(fused, x)["layer1.0"] == reason
    with torch.autocast("cpu", torch.bfloat16):
        fused.layer1(fused._stem(x))
    assert names[-1] == (f"{kind}_bf16", 64)


def test_fused_where_nothing_else_is_asked_for(asked: Callable[[bool], list[tuple[str, int]]]) -> None:
    names = asked(False)
    model, _ = pair("basic")
    model.to(memory_format=torch.channels_last)
    with resnet_fused.backend("vendor"):
        assert FUSED in nodes(model(images()))
    model.eval()
    with torch.no_grad():  # batch norms are folded into the weights
        assert resnet_fused.explain(model, images()) == {}
    assert FUSED in nodes(model.double()(images().double()))
    assert not names


def test_synchronized_batch_norms_run_fused(asked: Callable[[bool], list[tuple[str, int]]]) -> None:
    """PyTorch's refuse a CPU."""
    asked(False)
    block: Any = nn.SyncBatchNorm.convert_sync_batchnorm(resnet_fused.BasicBlock(64, 64))
    x = torch.randn(2, 64, 8, 8).to(memory_format=torch.channels_last)
    assert FUSED in nodes(block.to(memory_format=torch.channels_last)(x))


def test_frozen_batch_norms_count_as_training(asked: Callable[[bool], list[tuple[str, int]]]) -> None:
    asked(False)
    model, _ = pair("basic")
    model.to(memory_format=torch.channels_last).eval()
    assert FUSED not in nodes(model(images()))


def test_measured_rules_are_complete() -> None:
    kinds = {
        modules.kind_of_block(kind, downsample, precision)
        for kind, downsample, precision in itertools.product(
            ("basic", "bottleneck", "grouped"), (False, True), ("fp32", "bf16")
        )
    }
    for name in kinds:
        (table,) = cpu_rules.tables("avx512", "blocks", name)
        assert table.keys() == ({128, 256, 512, 1024} if "grouped" in name else {64, 128, 256, 512})
        precision = name.rpartition("_")[2]
        assert all(
            0 < n <= block_rules.largest(size, precision)
            for sizes in table.values()
            for size, n in sizes.items()
        )


def test_subclassed_and_changed_blocks(asked: Callable[[bool], list[tuple[str, int]]]) -> None:
    asked(False)
    block = resnet_fused.BasicBlock(64, 64).to(memory_format=torch.channels_last)
    block.conv1 = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, bias=False))
    x = torch.randn(2, 64, 8, 8).to(memory_format=torch.channels_last)
    assert torch.isfinite(block(x)).all()

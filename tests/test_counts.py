"""What a step launches, makes and saves is what benchmarks/counts.json says; registers: tests/kernels."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from benchmarks import counts
from resnet_fused import models, native
from resnet_fused.ops.dispatch import IMPLEMENTATIONS

needs_extension = pytest.mark.skipif(not native.is_loaded, reason="without the extension ops run unfused")


def test_launches() -> None:
    changed = counts.differences(counts.read()["launches"], counts.launch_counts())
    assert not changed, "\n".join([*changed, counts.ADVICE])


@needs_extension
def test_memory() -> None:
    changed = counts.differences(counts.read()["memory"], counts.memory_counts())
    assert not changed, "\n".join([*changed, counts.ADVICE])


def test_differences() -> None:
    table = counts.read()
    now = copy.deepcopy(table)
    assert counts.differences(table, now) == []
    step = now["launches"]["resnet50 bf16"]
    step["all"] += 2
    step["by kernel"]["slow"] = 1
    now["memory"]["resnet18 fused"]["saved bytes fp32"] = 5
    before = table["memory"]["resnet18 fused"]["saved bytes fp32"]
    assert counts.differences(table, now) == [
        f"launches, resnet50 bf16, all: {step['all'] - 2} in the table, {step['all']} now (worse)",
        f"memory, resnet18 fused, saved bytes fp32: {before} in the table, 5 now (better)",
        "launches, resnet50 bf16, by kernel, slow: nothing in the table, 1 now",
    ]


@needs_extension
def test_one_activation_more_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.resnet18().to(memory_format=torch.channels_last)
    saved, large = counts.saved_bytes(model, torch.float32), counts.large_tensors(model)
    plain = model.layer1.forward
    monkeypatch.setattr(model.layer1, "forward", lambda x: plain(x) * torch.full((), 2.0, requires_grad=True))
    activation = 4 * counts.BATCH * 64 * (counts.SIZE // 4) ** 2
    # The product's operand was saved before, by the layer after it; now both are, and the factor.
    assert counts.saved_bytes(model, torch.float32) == saved + activation + 4
    assert counts.large_tensors(model) == (large[0] + 1, large[1] + 2)


@needs_extension
def test_one_tensor_more_inside_an_op_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.resnet50().to(memory_format=torch.channels_last)
    large = counts.large_tensors(model)
    implementations, calls = IMPLEMENTATIONS["conv1x1_bn_add_relu"], 0
    plain = implementations.composed
    assert plain is not None

    def wasteful(a: list[Tensor], *rest: Tensor) -> tuple[Tensor, ...]:
        nonlocal calls
        calls += 1
        results: tuple[Tensor, ...] = plain([a[0].clone(), *a[1:]], *rest)
        return results

    monkeypatch.setitem(IMPLEMENTATIONS, "conv1x1_bn_add_relu", implementations._replace(composed=wasteful))
    assert counts.large_tensors(model) == (large[0] + calls, large[1]) and calls > 0

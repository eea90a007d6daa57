"""What a step launches, makes and keeps is what benchmarks/counts.json says; registers: tests/kernels."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from benchmarks import counts
from resnet_fused import models, native
from resnet_fused.ops.registry import COMPOSITIONS

needs_extension = pytest.mark.skipif(not native.is_loaded, reason="without the extension ops run unfused")


def test_launches() -> None:
    changed = counts.differences(counts.read()["launches"], counts.launch_counts())
    assert not changed, "\n".join([*changed, counts.ADVICE])


@needs_extension
def test_memory() -> None:
    changed = counts.differences(counts.read()["memory"], counts.memory_counts())
    assert not changed, "\n".join([*changed, counts.ADVICE])


def test_differences_are_told() -> None:
    table = counts.read()
    now = copy.deepcopy(table)
    assert counts.differences(table, now) == []
    step = now["launches"]["resnet50 bf16"]
    step["all"] += 2
    step["by kernel"]["slow"] = 1
    before = now["memory"]["resnet18 fused"]["kept bytes fp32"]
    now["memory"]["resnet18 fused"]["kept bytes fp32"] = 5
    del now["resources"]["sm_90"]["conv"]["registers"]
    told = counts.differences(table, now)
    assert len(told) == 4
    assert told[0].endswith(f"resnet50 bf16, all: {step['all'] - 2} in the table, {step['all']} now (worse)")
    assert f"memory, resnet18 fused, kept bytes fp32: {before} in the table, 5 now (better)" in told
    assert told[-1] == "launches, resnet50 bf16, by kernel, slow: nothing in the table, 1 now"
    assert any(line.endswith("nothing now") and "sm_90, conv, registers" in line for line in told)


@needs_extension
def test_a_tensor_more_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that keeps and makes one activation more than before."""
    model = models.resnet18().to(memory_format=torch.channels_last)
    kept, large = counts.kept_bytes(model, torch.float32), counts.large_tensors(model)
    layer = model.layer1
    plain = layer.forward

    def doubled(x: Tensor) -> Tensor:
        return plain(x) * torch.full((), 2.0, requires_grad=True)

    monkeypatch.setattr(layer, "forward", doubled)
    bytes_of_it = 4 * counts.BATCH * 64 * (counts.SIZE // 4) ** 2
    # What is multiplied was kept before, by the layer behind it; now both are, and the factor.
    assert counts.kept_bytes(model, torch.float32) == kept + bytes_of_it + 4
    more = counts.large_tensors(model)
    assert more == (large[0] + 1, large[1] + 2), more


@needs_extension
def test_a_tensor_more_inside_an_op_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.resnet50().to(memory_format=torch.channels_last)
    large = counts.large_tensors(model)
    plain, calls = COMPOSITIONS["folded_add_relu"], 0

    def wasteful(y: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        nonlocal calls
        calls += 1
        found: tuple[Tensor, ...] = plain(y.clone(), *rest)
        return found

    monkeypatch.setitem(COMPOSITIONS, "folded_add_relu", wasteful)
    assert counts.large_tensors(model) == (large[0] + calls, large[1]) and calls > 0


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert counts.main(["--wirte"]) == 2 and "usage" in capsys.readouterr().err

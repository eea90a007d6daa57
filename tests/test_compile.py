"""torch.compile and torch.export see the fused ops as single nodes and give the eager result."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused


def train_step(model: nn.Module, x: Tensor, labels: Tensor) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(x), labels).backward()
    optimizer.step()
    return [*(p.detach() for p in model.parameters()), *model.buffers()]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_fullgraph_trains_a_step(backend: str) -> None:
    torch.manual_seed(0)
    model = resnet_fused.resnet18(num_classes=7).to(memory_format=torch.channels_last)
    copied = copy.deepcopy(model)
    x = torch.randn(4, 3, 64, 64).to(memory_format=torch.channels_last)
    labels = torch.arange(4)
    expected = train_step(model, x, labels)
    torch._dynamo.reset()
    compiled = torch.compile(copied, fullgraph=True, backend=backend)
    found = train_step(compiled, x, labels)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_export_keeps_the_fused_ops() -> None:
    model = resnet_fused.resnet18(num_classes=7).eval()
    x = torch.randn(2, 3, 64, 64)
    program = torch.export.export(model, (x,))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"resnet_fused.bn_relu.default", "resnet_fused.bn_add_relu.default"} <= called
    torch.testing.assert_close(program.module()(x), model(x))

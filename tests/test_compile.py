"""torch.compile sees fused ops as single nodes; exports are of unfused PyTorch. Both give the eager result."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

import resnet_fused
from tests.model_pairs import KINDS, block_pair, make_model, pair

#: Of eval_model: the stem's, two of each of five blocks, three downsample convolutions.
CONVOLUTIONS = 14
LAYOUTS = [torch.contiguous_format, torch.channels_last]
both_layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])


def train_step(model: nn.Module, x: Tensor, labels: Tensor) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(x), labels).backward()
    optimizer.step()
    return [*(p.detach() for p in model.parameters()), *model.buffers()]


def block_classifier() -> nn.Module:
    block, _ = block_pair("bottleneck", torch.channels_last)
    return nn.Sequential(block.float(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize(
    ("backend", "make", "shape"),
    [
        ("aot_eager", lambda: make_model(resnet_fused, "basic", layers=[1, 1, 1, 1]), (4, 3, 64, 64)),
        ("inductor", block_classifier, (4, 64, 8, 8)),
    ],
    ids=["aot_eager", "inductor"],
)
def test_fullgraph_trains_a_step(backend: str, make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    """In float64, where rounding flips no ReLU."""
    model = make().to(torch.float64, memory_format=torch.channels_last)
    copied = copy.deepcopy(model)
    x = torch.randn(shape, dtype=torch.float64).to(memory_format=torch.channels_last)
    labels = torch.arange(4)
    expected = train_step(model, x, labels)
    torch._dynamo.reset()
    compiled = torch.compile(copied, fullgraph=True, backend=backend)
    found = train_step(compiled, x, labels)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.fixture
def compilations() -> list[int]:
    """How often the backend ``counting`` was called, as its only element."""
    torch._dynamo.reset()
    return [0]


def counting(compilations: list[int]) -> Any:
    def compile_graph(graph: Any, inputs: Any) -> Any:
        compilations[0] += 1
        return aot_eager(graph, inputs)

    return compile_graph


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("basic", torch.channels_last),
        ("bottleneck", torch.channels_last),
        ("bottleneck", torch.contiguous_format),
    ],
    ids=["basic-nhwc", "bottleneck-nhwc", "bottleneck-nchw"],
)
def test_a_dynamic_batch_is_one_compilation(
    kind: str, layout: torch.memory_format, compilations: list[int]
) -> None:
    """Up to 15 images: from 16 on PyTorch chooses another kernel for a 1x1 convolution on a CPU, which is a guard."""
    fused, eager = (m.float() for m in block_pair(kind, layout))
    compiled = torch.compile(fused, backend=counting(compilations), fullgraph=True)
    for batch in (4, 2, 5, 15):
        x = torch.randn(batch, 64, 14, 14).to(memory_format=layout)
        if batch == 4:
            torch._dynamo.mark_dynamic(x, 0, min=2, max=15)
        out = compiled(x)
        out.sum().backward()
        torch.testing.assert_close(out, eager(x), rtol=1e-4, atol=1e-4)
    assert compilations == [1]


def test_dynamic_shapes_compile_no_more_often_than_eager(compilations: list[int]) -> None:
    counts = []
    for block in (m.float() for m in block_pair("bottleneck", torch.channels_last)):
        torch._dynamo.reset()
        compilations[0] = 0
        compiled = torch.compile(block, backend=counting(compilations), fullgraph=True, dynamic=True)
        for size in ((2, 64, 14, 14), (5, 64, 16, 20), (32, 64, 14, 14)):
            compiled(torch.randn(size).to(memory_format=torch.channels_last)).sum().backward()
        counts.append(compilations[0])
    assert counts[0] <= counts[1]


def eval_model(layout: torch.memory_format) -> tuple[nn.Module, Tensor]:
    model, _ = pair("basic")
    return model.eval().to(memory_format=layout), torch.randn(4, 3, 64, 64).to(memory_format=layout)


@both_layouts
def test_export_is_of_aten_ops(layout: torch.memory_format) -> None:
    """With every convolution before its batch norm, as quantization looks for them, and for any batch."""
    model, x = eval_model(layout)
    program = torch.export.export(
        model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=256)},)
    )
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not any("resnet_fused" in target for target in called)
    pairs = itertools.pairwise(called)
    assert sum("conv2d" in a and "batch_norm" in b for a, b in pairs) == CONVOLUTIONS
    for batch in (1, 4, 7):
        images = torch.randn(batch, 3, 64, 64).to(memory_format=layout)
        torch.testing.assert_close(program.module()(images), model(images), rtol=1e-4, atol=1e-4)
    assert resnet_fused.explain(model, x.to(memory_format=torch.channels_last)) == {}


def test_aot_inductor(tmp_path: Path) -> None:
    fused, _ = block_pair("basic", torch.channels_last, training=False)
    fused, x = fused.float(), torch.randn(4, 64, 8, 8).to(memory_format=torch.channels_last)
    program = torch.export.export(
        fused, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},)
    )
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "block.pt2"))
    images = torch.randn(9, 64, 8, 8).to(memory_format=torch.channels_last)
    found = torch._inductor.aoti_load_package(package)(images)
    torch.testing.assert_close(found, fused(images), rtol=1e-4, atol=1e-4)


@both_layouts
@pytest.mark.parametrize("dynamo", [True, False], ids=["export", "trace"])
def test_onnx(dynamo: bool, layout: torch.memory_format, tmp_path: Path) -> None:
    import onnx

    model, x = eval_model(layout)
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=dynamo, verbose=False)
    loaded = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(loaded)
    assert {node.domain for node in loaded.graph.node} <= {"", "ai.onnx"}
    assert sum(node.op_type == "Conv" for node in loaded.graph.node) == CONVOLUTIONS


@both_layouts
@pytest.mark.parametrize("way", [torch.jit.script, torch.jit.trace], ids=["script", "trace"])
@pytest.mark.parametrize("arch", KINDS)
def test_torchscript(arch: str, way: Any, layout: torch.memory_format) -> None:
    """Of unfused PyTorch, with the model's own parameters; the model itself stays fused."""
    model, _ = pair(arch)
    model.double().eval().to(memory_format=layout)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64).to(memory_format=layout)
    scripted = way(model, *([] if way is torch.jit.script else [x]))
    torch.testing.assert_close(scripted(x), model(x), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        model.fc.bias += 1
    torch.testing.assert_close(scripted(x), model(x), rtol=1e-4, atol=1e-4)
    assert resnet_fused.explain(model, x.to(memory_format=torch.channels_last)) == {}
    assert type(model.layer1[0]).__module__ == "resnet_fused.models"


def test_a_block_alone_can_be_scripted() -> None:
    block, _ = block_pair("bottleneck", torch.channels_last, training=False)
    x = torch.randn(2, 64, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(torch.jit.script(block)(x), block(x))

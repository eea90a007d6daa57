"""torch.compile sees fused ops as single nodes; exports and graphs are of unfused PyTorch. All give eager's result."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import resnet_fused
import tests.torchvision_ops  # noqa: F401  # before torchvision
from tests.compat.small_models import NHWC, every_case, every_kind, images, small_pair, tiny_block_pair
from tests.model_pairs import KINDS, assert_equal, block_pair, make_model, nodes, pair, results

#: Of eval_model: the stem's, two of each of five blocks, three downsample convolutions.
CONVOLUTIONS = 14
LAYOUTS = [torch.contiguous_format, torch.channels_last]
both_layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])


def train_step(model: nn.Module, x: Tensor, labels: Tensor) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(x), labels).backward()
    optimizer.step()
    return [*(p.detach() for p in model.parameters()), *model.buffers()]


def test_fullgraph_trains_a_step() -> None:
    """torch.compile(fullgraph=True) in training

    In float64, where rounding flips no ReLU.
    """
    block, _ = block_pair("bottleneck", torch.channels_last)
    model = nn.Sequential(block, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    copied = copy.deepcopy(model)
    x = torch.randn(4, 64, 8, 8, dtype=torch.float64).to(memory_format=torch.channels_last)
    labels = torch.arange(4)
    expected = train_step(model, x, labels)
    torch._dynamo.reset()
    compiled = torch.compile(copied, fullgraph=True)
    found = train_step(compiled, x, labels)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "layout", "backend"),
    [
        ("basic", torch.channels_last, "inductor"),
        ("bottleneck", torch.channels_last, "aot_eager"),
        ("basic", torch.contiguous_format, "aot_eager"),
    ],
    ids=["basic-nhwc-inductor", "bottleneck-nhwc-aot_eager", "basic-nchw-aot_eager"],
)
def test_fullgraph_in_evaluation(kind: str, layout: torch.memory_format, backend: str) -> None:
    """torch.compile(fullgraph=True) in evaluation, with and without gradients"""
    fused, eager, x = tiny_block_pair(kind, layout, training=False)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), eager(x), rtol=1e-9, atol=1e-9)
    gradients = [
        torch.autograd.grad(model(x).sin().sum(), list(block.parameters()))
        for model, block in ((compiled, fused), (eager, eager))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("kind", "training"), [("basic", True), ("bottleneck", False)])
def test_no_recompilation_for_another_batch(kind: str, training: bool) -> None:
    """torch.compile(dynamic=True) of a model, in training and evaluation: one graph for all batch sizes"""
    fused, eager = small_pair(kind, NHWC, training)
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True, dynamic=True)
    sizes = (4, 2, 5, 9, 33)
    for size in sizes:
        x, found = images(NHWC, size), []
        for model in (fused, eager):
            run = compiled if model is fused else eager
            model.zero_grad()
            recompiles = torch._dynamo.config.patch(error_on_recompile=size != sizes[0])
            with recompiles, torch.set_grad_enabled(training):
                out = run(x)
            if training:
                out.sin().sum().backward()
            gradients = {f"{n} gradient": p.grad for n, p in model.named_parameters() if p.grad is not None}
            found.append({"output": out.detach()} | gradients)
        assert_equal(*found)


def test_compiled_autograd() -> None:
    """Compiled autograd"""
    fused, eager, x = tiny_block_pair("basic", NHWC)
    torch._dynamo.reset()
    found = []
    for block in (fused, eager):
        compile_backward = block is fused
        inputs = x.clone(memory_format=torch.preserve_format).requires_grad_()
        loss = block(inputs).sin().sum()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager"), compile_backward):
            loss.backward()
        found.append([inputs.grad, *(p.grad for p in block.parameters())])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


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
    """torch.compile with mark_dynamic

    Up to 15 images: from 16 on PyTorch chooses another kernel for a 1x1 convolution on a CPU, which is a guard."""
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
    """torch.compile(dynamic=True): other image sizes"""
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
    """torch.export in evaluation, with a dynamic batch

    With every convolution before its batch norm, as quantization looks for them.
    """
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


@every_case
@pytest.mark.parametrize("strict", [True, False])
def test_export_of_training(kind: str, layout: torch.memory_format, strict: bool) -> None:
    """torch.export in training: of the forward, whose module trains"""
    fused, eager = small_pair(kind, layout)
    x = images(layout)
    program = torch.export.export(fused, (x,), strict=strict)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not any("resnet_fused" in target for target in called)
    found = [results(model, x) for model in (program.module(), eager)]
    assert_equal(*found)
    assert "_BnReluMaxpoolBackward" in nodes(fused(x))


def test_aot_inductor(tmp_path: Path) -> None:
    """AOTInductor: a package with a dynamic batch"""
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
@every_kind
def test_onnx(kind: str, dynamo: bool, layout: torch.memory_format, tmp_path: Path) -> None:
    """ONNX, run by ONNX Runtime, with a dynamic batch"""
    import onnx
    import onnxruntime

    model, eager = (m.float() for m in small_pair(kind, layout, training=False))
    x = images(layout).float()
    options: dict[str, Any] = {"dynamic_axes": {"x": {0: "batch"}}, "input_names": ["x"]}
    if dynamo:
        options = {"dynamic_shapes": ({0: torch.export.Dim("batch", min=1, max=64)},)}
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=dynamo, verbose=False, **options)
    loaded = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(loaded)
    assert {node.domain for node in loaded.graph.node} <= {"", "ai.onnx"}
    convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert sum(node.op_type == "Conv" for node in loaded.graph.node) == convolutions
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for size in (3, 1, 5):
        x = images(layout, size).float()
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), eager(x), rtol=1e-4, atol=1e-4)


@both_layouts
@pytest.mark.parametrize("way", [torch.jit.script, torch.jit.trace], ids=["script", "trace"])
@pytest.mark.parametrize("arch", KINDS)
def test_torchscript(arch: str, way: Any, layout: torch.memory_format) -> None:
    """torch.jit.script, torch.jit.trace

    Of unfused PyTorch, with the model's own parameters; the model itself stays fused.
    """
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
    """torch.jit.script of a block"""
    block, _ = block_pair("bottleneck", torch.channels_last, training=False)
    x = torch.randn(2, 64, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(torch.jit.script(block)(x), block(x))


# Graphs of torch.fx, and what is made of them


@every_case
def test_symbolic_trace(kind: str, layout: torch.memory_format) -> None:
    """torch.fx.symbolic_trace, in training and evaluation"""
    for training in (True, False):
        fused, eager = small_pair(kind, layout, training)
        x = images(layout)
        traced = torch.fx.symbolic_trace(fused)
        norms = [
            n for n in traced.graph.nodes if isinstance(modules_of(traced).get(n.target), nn.BatchNorm2d)
        ]
        assert len(norms) == sum(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
        assert_equal(results(traced, x), results(eager, x))


def modules_of(traced: torch.fx.GraphModule) -> dict[Any, nn.Module]:
    return dict(traced.named_modules())


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_node_names_are_torchvisions(arch: str) -> None:
    """torchvision's get_graph_node_names, with torchvision's names"""
    import torchvision
    from torchvision.models.feature_extraction import get_graph_node_names

    with torch.device("meta"):
        fused, theirs = (getattr(library, arch)() for library in (resnet_fused, torchvision.models))
    assert get_graph_node_names(fused) == get_graph_node_names(theirs)


@every_case
def test_feature_extractor(kind: str, layout: torch.memory_format) -> None:
    """torchvision's create_feature_extractor"""
    from torchvision.models.feature_extraction import create_feature_extractor

    x, found = images(layout), []
    for model in small_pair(kind, layout):
        wanted = ["maxpool", "layer1.0.bn1", "layer1.0.add", "layer2.0.relu", "layer2"]
        features = create_feature_extractor(model, wanted)(x)
        assert list(features) == wanted
        sum(f.sin().sum() for f in features.values()).backward()
        gradients = {f"{name} gradient": p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({name: f.detach() for name, f in features.items()} | gradients)
    assert_equal(*found)


@every_kind
@pytest.mark.parametrize("training", [False, True], ids=["after training", "aware training"])
def test_fx_quantization(kind: str, training: bool) -> None:
    """Quantization in FX graph mode: prepare_fx, prepare_qat_fx, convert_fx"""
    from torch.ao.quantization import get_default_qat_qconfig_mapping, get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx

    x, found = images(NHWC).float(), []
    for model in (m.float() for m in small_pair(kind, NHWC, training)):
        prepare, mapping = prepare_fx, get_default_qconfig_mapping("x86")
        if training:
            prepare, mapping = prepare_qat_fx, get_default_qat_qconfig_mapping("x86")
        prepared = prepare(model, mapping, (x,))
        out = prepared(x)
        if training:
            out.sin().sum().backward()
        quantized = convert_fx(prepared.eval())
        assert sum("quantized" in type(m).__module__ for m in quantized.modules()) > 4
        found.append((out.detach(), quantized(x).detach()))
    # The same modules in the same graph.
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@every_kind
def test_pt2e_quantization(kind: str) -> None:
    """Quantization of an export: torchao's prepare_pt2e, convert_pt2e"""
    pytest.importorskip("torchao")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config

    fused, eager, x = tiny_block_pair(kind, NHWC, training=False)
    x, found = x.float(), []
    for block in (fused.float(), eager.float()):
        quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
        prepared = prepare_pt2e(torch.export.export(block, (x,)).module(), quantizer)
        prepared(x)
        converted = convert_pt2e(prepared)
        called = [str(n.target) for n in converted.graph.nodes if n.op == "call_function"]
        assert sum("dequantize_per_channel" in target for target in called) == len(
            [m for m in block.modules() if isinstance(m, nn.Conv2d)]
        )
        assert not any("batch_norm" in target or "resnet_fused" in target for target in called)
        found.append(converted(x))
    assert torch.equal(*found)


@every_kind
def test_eager_quantization_fuses_modules(kind: str) -> None:
    """torch.ao.quantization.fuse_modules"""
    x, found = images(NHWC), []
    for model in small_pair(kind, NHWC, training=False):
        lists = [
            ["conv1", "bn1", "relu"],
            ["layer2.0.conv1", "layer2.0.bn1"],
            ["layer1.0.conv2", "layer1.0.bn2"],
        ]
        fused = torch.ao.quantization.fuse_modules(model, lists)
        assert isinstance(fused.bn1, nn.Identity)
        found.append(results(fused, x))
    assert_equal(*found)


@every_kind
def test_fake_tensors(kind: str) -> None:
    """FakeTensorMode: shapes of a training step and an evaluation without data"""
    with FakeTensorMode():
        model = make_model(resnet_fused, kind, layers=[1, 1, 1, 1])
        x = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
        out = model(x)
        out.sum().backward()
        assert "_ResidualBlockBackward" in nodes(out) and out.shape == (2, 7)
        assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
        with torch.no_grad():
            assert model.eval()(x).shape == (2, 7)


@every_case
def test_flop_counter(kind: str, layout: torch.memory_format) -> None:
    """FlopCounterMode counts what it counts in eager PyTorch"""
    x, counts = images(layout), []
    for model in small_pair(kind, layout):
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        counts.append(counter.get_flop_counts()["Global"])
    assert counts[0] == counts[1] and sum(counts[1].values()) > 0

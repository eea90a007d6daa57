"""Whatever a module would have called is called: tools replace methods, of an instance or of a class, and functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resnet_fused
from tests.model_pairs import KINDS, assert_equal, block_pair, pair, results

METHODS = [
    (nn.Conv2d, "forward"),
    (nn.Conv2d, "_conv_forward"),
    (nn.Conv2d, "_call_impl"),
    (nn.BatchNorm2d, "forward"),
    (nn.BatchNorm2d, "_check_input_dim"),
    (nn.ReLU, "forward"),
    (nn.MaxPool2d, "forward"),
    (nn.Sequential, "forward"),
]
OWNERS = [
    *METHODS,
    (nn.Module, "__call__"),
    (nn.Module, "_call_impl"),
    (nn.modules.batchnorm._BatchNorm, "forward"),
    (F, "conv2d"),
    (F, "batch_norm"),
    (F, "relu"),
    (F, "max_pool2d"),
]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
both_layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])


def counting(original: Callable[..., Any], calls: list[str], name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return original(*args, **kwargs)

    return call


def name_of(case: tuple[Any, str]) -> str:
    return f"{case[0].__name__}.{case[1]}"


@both_layouts
@pytest.mark.parametrize("case", METHODS, ids=name_of)
@pytest.mark.parametrize("arch", KINDS)
def test_of_an_instance(arch: str, case: tuple[Any, str], layout: torch.memory_format) -> None:
    """As LoRA and re-scaling tools do. Every call that eager makes is made, in its order."""
    cls, name = case
    calls: list[list[str]] = []
    x = torch.randn(2, 3, 32, 32).to(memory_format=layout)
    for model in (m.eval().to(memory_format=layout) for m in pair(arch)):
        calls.append([])
        for path, module in model.named_modules():
            if isinstance(module, cls):
                setattr(module, name, counting(getattr(module, name), calls[-1], path))
        model(x)
    assert calls[0] == calls[1] != []


@both_layouts
@pytest.mark.parametrize("case", OWNERS, ids=name_of)
def test_of_a_class(
    case: tuple[Any, str], layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As weight standardisation and tracing tools do."""
    owner, name = case
    calls: list[str] = []
    models = [m.eval().to(memory_format=layout) for m in pair("basic")]
    x = torch.randn(2, 3, 32, 32).to(memory_format=layout)
    monkeypatch.setattr(owner, name, counting(getattr(owner, name), calls, name))
    counts = []
    for model in models:
        calls.clear()
        model(x)
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0
    explained = resnet_fused.explain(models[0])
    assert len(explained) == 6 and all("was replaced" in reason for reason in explained.values())
    monkeypatch.undo()
    assert resnet_fused.explain(models[0]) == {}


@both_layouts
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_a_rescaled_convolution(kind: str, layout: torch.memory_format) -> None:
    """The values too, in training, with the rest of the block still fused."""
    found = []
    x = torch.randn(3, 64, 8, 8, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    for block in block_pair(kind, layout):
        plain = block.conv2._conv_forward
        block.conv2._conv_forward = lambda x, w, b, plain=plain: plain(x, w * 0.5, b)
        out = block(x)
        found.append({"output": out.detach(), "grad": torch.autograd.grad(out.sin().sum(), x)[0]})
    assert_equal(*found)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@both_layouts
@pytest.mark.parametrize("shared", ["bn2", "downsample.1", "conv2.weight", "bn2.weight"])
def test_what_two_places_share(shared: str, layout: torch.memory_format, compiled: bool) -> None:
    """Statistics are updated twice, gradients are added up; torch.compile has one input for both."""
    found = []
    x = torch.randn(3, 64, 8, 8, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    for block in block_pair("basic", layout):
        if shared == "bn2":
            block.bn2 = block.bn1
        elif shared == "downsample.1":
            block.downsample[1] = block.bn2
        elif shared == "conv2.weight":
            block.conv2.weight = block.conv1.weight
        else:
            block.bn2.weight = block.bn1.weight
        torch._dynamo.reset()
        out = (torch.compile(block, backend="aot_eager") if compiled else block)(x)
        leaves = [x, *block.parameters()]
        found.append(dict(enumerate(torch.autograd.grad(out.sin().sum(), leaves))))
        found[-1] |= {name: b.double() for name, b in block.named_buffers()}
    assert_equal(*({str(k): v for k, v in each.items()} for each in found))


def test_global_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [m.double() for m in pair("basic")]
    calls: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: calls.append(type(m).__name__))
    try:
        x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
        by_fused, by_eager = results(models[0], x), results(models[1], x)
    finally:
        handle.remove()
    assert_equal(by_fused, by_eager)
    assert calls[: len(calls) // 2] == calls[len(calls) // 2 :] != []

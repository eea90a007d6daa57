"""explain says which blocks do not run fused, of any model and for an input."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import resnet_fused
from resnet_fused import reference
from tests.model_pairs import KINDS, nodes, pair

CONTIGUOUS = "the input is contiguous: use x.to(memory_format=torch.channels_last)"
AROUND = "fused ops around the convolutions instead of one for the block"


def images(layout: torch.memory_format, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, dtype=dtype).to(memory_format=layout)


def test_models_of_others() -> None:
    assert resnet_fused.explain(nn.Linear(2, 2)) == {
        "": "Linear has no residual blocks of resnet_fused: plain PyTorch runs"
    }
    explained = resnet_fused.explain(reference.resnet18())
    assert len(explained) == 9
    assert explained["layer1.0"] == (
        "is a resnet_fused.reference.resnet.BasicBlock: resnet_fused.fuse(model) makes it fused"
    )

    class Bottleneck(nn.Identity):
        pass

    assert resnet_fused.explain(Bottleneck()) == {
        "": "is a tests.test_explain.Bottleneck, which resnet_fused.fuse doesn't know"
    }
    mixed = nn.Sequential(resnet_fused.BasicBlock(3, 3), reference.BasicBlock(3, 3))
    assert list(resnet_fused.explain(mixed)) == ["1"]


@pytest.mark.parametrize("arch", KINDS)
def test_of_a_contiguous_input(arch: str) -> None:
    model, _ = pair(arch)
    blocks = [
        n for n, m in model.named_modules() if isinstance(m, (reference.BasicBlock, reference.Bottleneck))
    ]
    assert resnet_fused.explain(model) == {}
    assert resnet_fused.explain(model, images(torch.channels_last)) == {}
    x = images(torch.contiguous_format)
    assert resnet_fused.explain(model, x) == dict.fromkeys(blocks, f"{CONTIGUOUS}: {AROUND}")
    assert "_ResidualBlockBackward" not in nodes(model(x))


def test_of_another_dtype() -> None:
    model = resnet_fused.resnet18().to(memory_format=torch.channels_last)
    x = images(torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        assert resnet_fused.explain(model, x) == {}
    block = resnet_fused.BasicBlock(64, 64).to(memory_format=torch.channels_last)
    block.conv1 = nn.Conv2d(64, 64, 3, padding=1, bias=False, dtype=torch.bfloat16)
    x = torch.randn(2, 64, 8, 8).to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError):  # as eager
        resnet_fused.explain(block, x)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_leaves_the_model_as_it_was(training: bool) -> None:
    model = resnet_fused.resnet18().train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert resnet_fused.explain(model, images(torch.channels_last)) == {}
    assert model.training == training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(RuntimeError):
        resnet_fused.explain(model, torch.randn(2, 4, 64, 64))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_of_a_stem_without_its_pool() -> None:
    model = resnet_fused.resnet18()
    model.maxpool = nn.Identity()
    assert resnet_fused.explain(model) == {"": "maxpool is a Identity: bn1 and relu are fused without it"}


def test_of_blocks_that_do_not_run() -> None:
    model = nn.Sequential(resnet_fused.BasicBlock(64, 64))
    model.extra = resnet_fused.BasicBlock(64, 64)
    model.forward = lambda x: model[0](x)  # type: ignore[method-assign]
    x = torch.randn(2, 64, 8, 8).to(memory_format=torch.channels_last)
    assert resnet_fused.explain(model, x) == {"extra": "does not run on this input"}


def test_under_the_reference_backend() -> None:
    with resnet_fused.backend("reference"):
        explained = resnet_fused.explain(resnet_fused.resnet18())
    assert len(explained) == 9 and set(explained.values()) == {"forced by the backend setting"}

"""Fused models give the reference's answers: equal in float64, otherwise within the accuracy rule."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused
from resnet_fused import reference
from tests.accuracy import Results, assert_accurate
from tests.model_pairs import assert_equal, by_kind, draw_away_from_kinks, make_model, nodes, pair, results

FUSED_NODES = {"_ResidualBlockBackward", "_BnReluMaxpoolBackward"}


def grouped_and_dilated(library: Any) -> nn.Module:
    options = {"groups": 32, "width_per_group": 4, "replace_stride_with_dilation": [False, True, True]}
    made: nn.Module = library.ResNet(library.Bottleneck, [1, 1, 1, 1], num_classes=10, **options)
    return made


#: What ``pair`` takes, and the shape of the images.
ACCURACY_CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "resnet18": ("resnet18", (4, 3, 64, 64)),
    "resnet50": ("resnet50", (2, 3, 65, 49)),
    "grouped and dilated": (grouped_and_dilated, (3, 3, 33, 47)),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ACCURACY_CASES)
def test_accuracy(name: str, training: bool) -> None:
    """The accuracy rule, asked of each kind of result."""
    arch, shape = ACCURACY_CASES[name]

    def draw() -> tuple[Results, Results, Results]:
        fused, eager = pair(arch)
        if not training:
            adopt_statistics(eager, torch.randint(-2, 3, shape).float())
        x = draw_away_from_kinks(eager.train(training), shape).to(memory_format=torch.channels_last)
        fused.load_state_dict(eager.state_dict())
        exact = copy.deepcopy(eager).double()
        models = [m.train(training).to(memory_format=torch.channels_last) for m in (fused, eager, exact)]
        found = [by_kind(results(m, x.to(m.fc.weight.dtype))) for m in models]
        last.append((fused, x))
        return found[0], found[1], found[2]

    last: list[tuple[nn.Module, Tensor]] = []
    assert_accurate(draw)
    model, x = last[-1]
    assert not FUSED_NODES.difference(nodes(model(x))), "the model did not run fused"


def adopt_statistics(model: nn.Module, x: Tensor) -> None:
    """Makes the batch's statistics the running ones, as training does in time."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    for norm in norms:
        norm.momentum = 0.1


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("arch", ["basic", "bottleneck", grouped_and_dilated])
def test_float64_equals_reference(arch: Any, training: bool, layout: torch.memory_format) -> None:
    fused, eager = (m.double().train(training).to(memory_format=layout) for m in pair(arch))
    x = torch.randn(4, 3, 65, 47, dtype=torch.float64).to(memory_format=layout)
    assert_equal(results(fused, x), results(eager, x))


def test_frozen_batch_norm_takes_gradients_in_training() -> None:
    """Eval-mode batch norms inside a training model, as in detection fine-tuning."""
    fused, eager = (m.double().train() for m in pair("basic"))
    for model in (fused, eager):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        model.layer1.requires_grad_(False)
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    found = []
    for model in (fused, eager):
        F.cross_entropy(model(x), torch.arange(4)).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_equal(*found)


def test_one_frozen_of_two_batch_norms_in_a_downsample_block() -> None:
    fused, eager = (m.double().train() for m in pair("bottleneck"))
    for model in (fused, eager):
        model.layer2[0].downsample[1].eval()
        model.layer3[0].bn3.eval()
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    assert_equal(results(fused, x), results(eager, x))


MODES: dict[str, dict[str, Any]] = {
    "momentum None": {"momentum": None},
    "momentum 0.3": {"momentum": 0.3},
    "not affine": {"affine": False},
    "no running statistics": {"track_running_stats": False},
    "eps": {"eps": 1e-2},
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kwargs", MODES.values(), ids=MODES.keys())
def test_batch_norm_modes(kwargs: dict[str, Any], training: bool) -> None:
    def norm_layer(channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels, **kwargs)

    models = []
    for library in (resnet_fused, reference):
        torch.manual_seed(3)
        models.append(make_model(library, "basic", norm_layer=norm_layer).double().train(training))
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    for _ in range(3):  # the cumulative average differs from the third batch on
        by_fused, by_eager = (results(model, x) for model in models)
    assert_equal(by_fused, by_eager)
    for (name, ours), theirs in zip(models[0].named_buffers(), models[1].buffers(), strict=True):
        if "num_batches" in name:
            assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast(dtype: torch.dtype) -> None:
    """All gradients as one vector: deep in an untrained net a single one is noise in eight bits of mantissa."""

    def draw() -> tuple[Results, Results, Results]:
        fused, eager = pair(lambda library: library.ResNet(library.BasicBlock, [1, 1, 1, 1], num_classes=7))
        x = draw_away_from_kinks(eager, (4, 3, 32, 32)).to(memory_format=torch.channels_last)
        fused.load_state_dict(eager.state_dict())
        exact = results(copy.deepcopy(eager).double(), x.double())
        with torch.autocast("cpu", dtype=dtype):
            by_fused, by_eager = (results(m.to(memory_format=torch.channels_last), x) for m in (fused, eager))
        assert by_fused["output"].dtype == by_eager["output"].dtype == dtype
        return joined(by_fused), joined(by_eager), joined(exact)

    def joined(found: dict[str, Tensor]) -> Results:
        whole = torch.cat([found[name].flatten() for name in found if name.endswith("gradient")])
        return {name: x for name, x in found.items() if not name.endswith("gradient")} | {"gradients": whole}

    assert_accurate(draw)


def test_forced_reference_gives_the_same_answers() -> None:
    model, _ = pair("basic")
    model.double()
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    by_native = results(copy.deepcopy(model), x)
    with resnet_fused.backend("reference"):
        by_reference = results(copy.deepcopy(model), x)
    assert_equal(by_native, by_reference)

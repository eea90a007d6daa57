"""The ten fused models: torchvision's names and shapes, and the reference's answers within the accuracy rule."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused
from resnet_fused import reference
from tests.accuracy import assert_as_accurate, element_error, relative_error
from tests.model_pairs import assert_equal, by_kind, nodes, pair, results

TORCHVISION: dict[str, Any] = json.loads((Path(__file__).parent / "torchvision_resnets.json").read_text())


FUSED_NODES = {"_ResidualBlockBackward", "_BnReluMaxpoolBackward"}


@pytest.mark.parametrize("arch", TORCHVISION)
def test_torchvision_names_and_shapes(arch: str) -> None:
    with torch.device("meta"):
        model = getattr(resnet_fused, arch)()
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == TORCHVISION[arch]["state_dict"]
    assert list(shapes) == list(TORCHVISION[arch]["state_dict"])
    assert sum(p.numel() for p in model.parameters()) == TORCHVISION[arch]["parameters"]


def test_same_seed_same_weights() -> None:
    models = []
    for library in (resnet_fused, reference):
        torch.manual_seed(7)
        models.append(library.resnet18(zero_init_residual=True).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[1])


DRAWS = 6


ACCURACY_CASES = [
    ("resnet18", {}),
    ("resnet50", {}),
    ("resnext50_32x4d", {}),
    ("wide_resnet50_2", {}),
    ("resnet50", {"replace_stride_with_dilation": [False, True, True]}),
]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(4, 3, 64, 64), (2, 3, 65, 49)], ids=["64x64", "65x49"])
@pytest.mark.parametrize(
    ("arch", "kwargs"), ACCURACY_CASES, ids=["resnet18", "resnet50", "resnext50", "wide50", "dilated50"]
)
def test_accuracy(arch: str, kwargs: dict[str, Any], shape: tuple[int, ...], training: bool) -> None:
    """The accuracy rule, asked of the smallest errors in a few draws of each kind of result.

    One ReLU or one maximum of the pooling that rounding decides the other way moves a gradient by orders of magnitude
    in a single draw, for eager as for fused: the smallest error is that of a draw without one.
    """
    tolerance = 4 * torch.finfo(torch.float32).eps
    smallest: dict[str, tuple[float, float]] = {}
    for _ in range(DRAWS):
        fused, eager = pair(arch, num_classes=10, **kwargs)
        x = torch.randn(shape).to(memory_format=torch.channels_last)
        if not training:
            adopt_statistics(eager, x)
            fused.load_state_dict(eager.state_dict())
        found = []
        for model in (fused, eager, copy.deepcopy(eager).double()):
            model.train(training).to(memory_format=torch.channels_last)
            found.append(by_kind(results(model, x.to(next(model.parameters()).dtype))))
        for kind, exact in found[2].items():
            for measure in (relative_error, element_error):
                name = f"{measure.__name__} of {kind}"
                errors = measure(found[0][kind], exact), measure(found[1][kind], exact)
                before = smallest.get(name, errors)
                smallest[name] = min(before[0], errors[0]), min(before[1], errors[1])
        misses = {n: (e, by_eager) for n, (e, by_eager) in smallest.items() if e > 1.5 * by_eager + tolerance}
        if not misses:
            break
    assert not misses, "fused and eager errors"
    assert not FUSED_NODES.difference(nodes(fused(x))), "the model did not run fused"


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
@pytest.mark.parametrize("arch", ["resnet18", "resnext50_32x4d"])
def test_float64_equals_reference(arch: str, training: bool, layout: torch.memory_format) -> None:
    fused, eager = (m.double().train(training).to(memory_format=layout) for m in pair(arch, num_classes=7))
    x = torch.randn(4, 3, 65, 47, dtype=torch.float64).to(memory_format=layout)
    by_fused, by_eager = results(fused, x), results(eager, x)
    assert_equal(by_fused, by_eager)


def test_frozen_batch_norm_takes_gradients_in_training() -> None:
    """Eval-mode batch norms inside a training model, as in detection fine-tuning."""
    fused, eager = (m.double().train() for m in pair("resnet18", num_classes=7))
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
    fused, eager = (m.double().train() for m in pair("resnet50", num_classes=7))
    for model in (fused, eager):
        model.layer2[0].downsample[1].eval()
        model.layer3[0].bn3.eval()
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    by_fused, by_eager = results(fused, x), results(eager, x)
    assert_equal(by_fused, by_eager)


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
        models.append(library.resnet18(num_classes=7, norm_layer=norm_layer).double().train(training))
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    for _ in range(3):  # the cumulative average differs from the third batch on
        by_fused, by_eager = (results(model, x) for model in models)
    assert_equal(by_fused, by_eager)
    for (name, ours), theirs in zip(models[0].named_buffers(), models[1].buffers(), strict=True):
        if "num_batches" in name:
            assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    fused, eager = (m.to(memory_format=torch.channels_last) for m in pair("resnet18", num_classes=7))
    x = torch.randn(4, 3, 64, 64).to(memory_format=torch.channels_last)
    exact = results(copy.deepcopy(eager).double(), x.double())
    with torch.autocast("cpu", dtype=dtype):
        by_fused, by_eager = results(fused, x), results(eager, x)
    assert by_fused["output"].dtype == by_eager["output"].dtype == dtype
    for name in ("output", "bn1.running_mean", "layer1.0.bn1.running_var"):
        assert_as_accurate(name, by_fused[name], by_eager[name], exact[name])
    # Deep gradients of an untrained net are noise in 8 bits of mantissa; as a whole the fused one may not be worse.
    whole = [
        torch.cat([g[k].double().flatten() for k in g if k.endswith("gradient")])
        for g in (by_fused, by_eager, exact)
    ]
    assert (
        relative_error(whole[0], whole[2])
        <= 1.5 * relative_error(whole[1], whole[2]) + 4 * torch.finfo(dtype).eps
    )


def test_forced_reference_gives_the_same_answers() -> None:
    model, _ = pair("resnet18", num_classes=7)
    model.double()
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    by_native = results(copy.deepcopy(model), x)
    with resnet_fused.backend("reference"):
        by_reference = results(copy.deepcopy(model), x)
    assert_equal(by_native, by_reference)

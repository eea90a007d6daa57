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
from tests.model_pairs import assert_equal, draw_away_from_kinks, make_model, nodes, pair, results

FUSED_NODES = {"_ResidualBlockBackward", "_BnReluMaxpoolBackward"}


GROUPED_AND_DILATED = {
    "layers": [1, 1, 1, 1],
    "groups": 32,
    "width_per_group": 4,
    "replace_stride_with_dilation": [False, True, True],
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("kind", "options"), [("basic", {}), ("bottleneck", {}), ("bottleneck", GROUPED_AND_DILATED)], ids=str
)
def test_float64_equals_reference(
    kind: str, options: dict[str, Any], training: bool, layout: torch.memory_format
) -> None:
    fused, eager = (m.double().train(training).to(memory_format=layout) for m in pair(kind, **options))
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


MODES: dict[str, tuple[dict[str, Any], bool]] = {
    "momentum None": ({"momentum": None}, True),
    "momentum 0.3": ({"momentum": 0.3}, True),
    **{
        f"{name} {mode}": (kwargs, mode == "train")
        for mode in ("train", "eval")
        for name, kwargs in (
            ("not affine", {"affine": False}),
            ("no running statistics", {"track_running_stats": False}),
            ("eps", {"eps": 1e-2}),
        )
    },
}


@pytest.mark.parametrize(("kwargs", "training"), MODES.values(), ids=MODES.keys())
def test_batch_norm_modes(kwargs: dict[str, Any], training: bool) -> None:
    def norm_layer(channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels, **kwargs)

    models = []
    for library in (resnet_fused, reference):
        torch.manual_seed(3)
        models.append(make_model(library, "basic", norm_layer=norm_layer).double().train(training))
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    for _ in range(3 if training else 1):  # the cumulative average differs from the third batch on
        by_fused, by_eager = (results(model, x) for model in models)
    assert_equal(by_fused, by_eager)
    for (name, ours), theirs in zip(models[0].named_buffers(), models[1].buffers(), strict=True):
        if "num_batches" in name:
            assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("basic", torch.bfloat16), ("basic", torch.float16), ("bottleneck", torch.float32)],
    ids=str,
)
def test_accuracy(kind: str, dtype: torch.dtype) -> None:
    """In 16 bits under autocast. All gradients as one vector: a single one is noise in eight bits of mantissa."""

    def draw() -> tuple[Results, Results, Results]:
        fused, eager = pair(kind, layers=[1, 1, 1, 1])
        x = draw_away_from_kinks(eager, (4, 3, 32, 32)).to(memory_format=torch.channels_last)
        fused.load_state_dict(eager.state_dict())
        exact = results(copy.deepcopy(eager).double(), x.double())
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            by_fused, by_eager = (results(m.to(memory_format=torch.channels_last), x) for m in (fused, eager))
            assert {*nodes(copy.deepcopy(fused)(x))} >= FUSED_NODES, "the model did not run fused"
        assert by_fused["output"].dtype == by_eager["output"].dtype == dtype
        return joined(by_fused), joined(by_eager), joined(exact)

    def joined(values: dict[str, Tensor]) -> Results:
        whole = torch.cat([values[name].flatten() for name in values if name.endswith("gradient")])
        return {name: x for name, x in values.items() if not name.endswith("gradient")} | {"gradients": whole}

    assert_accurate(draw)

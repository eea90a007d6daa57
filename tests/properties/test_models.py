"""Small ResNets that ``fuse`` converted beside what they were, for whatever hypothesis draws."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.properties.model_cases import Model, models
from tests.properties.module_checks import assert_as_accurate, assert_propagates
from tests.properties.strategies import CONTIGUOUS, faults

_PLACES = (
    "input",
    "conv1.weight",
    "layer1.0.conv2.weight",
    "bn1.running_mean",
    "layer1.0.bn2.running_var",
    "fc.weight",
)


@given(models(st.just(()) | faults(st.sampled_from(_PLACES))))
def test_models_agree_with_eager(model: Model) -> None:
    """Small fused ResNets of drawn sizes, dtypes and modes: as accurate as eager PyTorch, and finite where it is"""
    pair = model.make()
    if not model.faults:
        assert_as_accurate(*pair, CONTIGUOUS, model.mode, model.norms.frozen)
    elif model.mode.dtype.itemsize >= 4 and not model.mode.autocast:
        pooled = "" if pair[1].bn1.training else "bn1"
        assert_propagates(*pair, CONTIGUOUS, model.mode, model.faults, pooled=pooled)

"""Small ResNets that ``fuse`` converted beside what they were, for whatever hypothesis draws."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from tests.properties.model_cases import Model, models
from tests.properties.module_checks import assert_as_accurate, assert_propagates
from tests.properties.strategies import CONTIGUOUS, Fault, faults

_PLACES = ("input", "layer1.0.conv2.weight", "layer1.0.bn2.running_var", "fc.weight")


def _nan_before_maxpool(drawn: tuple[Fault, ...]) -> tuple[Fault, ...]:
    """Only NaN as a pixel: whether a maximum is infinite or NaN decides which pixel has its gradient."""
    return tuple(fault._replace(value=math.nan) if fault.operand == "input" else fault for fault in drawn)


@given(models(st.just(()) | faults(st.sampled_from(_PLACES)).map(_nan_before_maxpool)))
def test_models_agree_with_eager(model: Model) -> None:
    """Small fused ResNets of drawn sizes, dtypes and modes: as accurate as eager PyTorch, and finite where it is"""
    pair = model.make()
    if not model.faults:
        assert_as_accurate(*pair, CONTIGUOUS, model.mode, model.norms.frozen)
    elif model.mode.dtype.itemsize >= 4 and not model.mode.autocast:
        pooled = "" if pair[1].bn1.training else "bn1"
        assert_propagates(*pair, CONTIGUOUS, model.mode, model.faults, pooled=pooled)

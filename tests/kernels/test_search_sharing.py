"""The two gradients of a convolution are chosen together: the vendor's implementations share dy. On a simulated GPU."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import resnet_fused
from resnet_fused.kernels.autotune import search
from resnet_fused.kernels.autotune.search import choose_sharing
from resnet_fused.kernels.autotune.tunable import Tunable, TuningKey
from resnet_fused.kernels.launch import Config
from resnet_fused.ops import conv_bn, dispatch
from resnet_fused.reference import conv_bn as reference
from resnet_fused.types import Activation, ConvGeometry, Gradient, make_bn_coeffs, make_dy_coeffs
from tests.kernels.simulated_gpu import CONFIGS, DEVICE, FIRST, SECOND, VENDOR, SimulatedGPU, forget_all
from tests.ops.operands import BOTH, STRIDED, Maker

#: Milliseconds of wgrad by Triton and by the vendor, the same of dgrad, and of dy; and what is chosen.
CHOICES = {
    "triton": ((1.0, 2.0, 1.0, 2.0, 0.0), (SECOND, SECOND)),
    "triton, since dy takes long": ((2.0, 1.0, 2.0, 1.0, 2.5), (SECOND, SECOND)),
    "vendor": ((3.0, 1.0, 3.0, 1.0, 2.0), (None, None)),
    "vendor, since dy is computed once": ((2.0, 1.0, 2.0, 1.0, 1.5), (None, None)),
    "vendor for one pays for the other": ((5.0, 1.0, 2.0, 1.9, 1.0), (None, None)),
    "wgrad": ((5.0, 1.0, 1.0, 2.0, 1.0), (None, SECOND)),
    "dgrad": ((1.0, 2.0, 5.0, 1.0, 1.0), (SECOND, None)),
    "not even for one": ((2.0, 1.5, 1.0, 2.0, 1.0), (SECOND, SECOND)),
    "as fast": ((2.0, 1.0, 2.0, 1.0, 2.0), (None, None)),
}


def gradients(
    sim: SimulatedGPU, wgrad: float, vendor_wgrad: float, dgrad: float, vendor_dgrad: float, dy: float
) -> list[Tunable]:
    """Tunables of wgrad, dgrad and dy."""
    tunables = []
    times = ("wgrad", wgrad, vendor_wgrad), ("dgrad", dgrad, vendor_dgrad), ("dy", 0.0, dy)
    for kernel, by_triton, by_vendor in times:
        sim.times |= {(kernel, config): by_triton + (config != SECOND) for config in CONFIGS}
        sim.times[kernel, VENDOR] = by_vendor

        def run(what: Any, kernel: str = kernel) -> list[Tensor]:
            return sim.result((kernel, what))

        key, configs = TuningKey(kernel, (1, 2), "bf16"), [] if kernel == "dy" else CONFIGS
        tunable = sim.tunable(key, run=run, configs=configs)
        tunables.append(tunable._replace(vendor=functools.partial(run, VENDOR)))
    return tunables


@pytest.mark.parametrize("name", CHOICES)
def test_the_sum_decides(sim: SimulatedGPU, name: str) -> None:
    times, chosen = CHOICES[name]
    *both, dy = gradients(sim, *times)
    for _ in range(2):
        assert choose_sharing(both, dy, DEVICE) == [*chosen]
        before = sim.measured.copy()
        assert choose_sharing(both, dy, DEVICE) == [*chosen]
        assert sim.measured == before
        search.forget_measurements()
        sim.times = dict.fromkeys(sim.times, 1.0)  # the second time they come from disk


def test_dy_is_part_of_a_single_gradient(sim: SimulatedGPU) -> None:
    wgrad, _, dy = gradients(sim, 2.0, 1.0, 0.0, 0.0, 1.5)
    assert choose_sharing([wgrad], dy, DEVICE) == [SECOND]
    forget_all()
    wgrad, _, dy = gradients(sim, 2.0, 1.0, 0.0, 0.0, 0.5)
    assert choose_sharing([wgrad], dy, DEVICE) == [None]
    assert choose_sharing([], dy, DEVICE) == []


def test_rejected_configurations_are_not_chosen_together(sim: SimulatedGPU) -> None:
    *both, dy = gradients(sim, 2.0, 9.0, 2.0, 9.0, 9.0)
    sim.results["wgrad", SECOND] = lambda results: [results[0] * 2]
    assert choose_sharing(both, dy, DEVICE) == [FIRST, SECOND]
    sim.results |= dict.fromkeys(itertools.product(["dgrad"], CONFIGS), sim.results["wgrad", SECOND])
    forget_all()
    with pytest.warns(UserWarning, match="every configuration"):
        assert choose_sharing(both, dy, DEVICE) == [FIRST, None]
    with resnet_fused.backend("triton"):
        assert choose_sharing(both, dy, DEVICE) == [FIRST, None]
    with resnet_fused.backend("vendor"):
        assert choose_sharing(both, dy, DEVICE) == [None, None]


def test_gradients_that_can_not_be_measured(sim: SimulatedGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    *both, dy = gradients(sim, *CHOICES["vendor"][0])
    without_kernel = [both[0]._replace(configs=[]), both[1]]
    assert choose_sharing(both, dy, torch.device("meta")) == [FIRST, FIRST]
    assert choose_sharing(without_kernel, dy, torch.device("meta")) == [None, FIRST]
    with resnet_fused.backend("triton"):
        assert choose_sharing(both, dy, DEVICE) == [FIRST, FIRST]
        assert choose_sharing(without_kernel, dy, DEVICE) == [None, FIRST]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose_sharing(both, dy, DEVICE) == [None, None]
    assert not sim.measured


def test_where_only_the_vendor_exists_dy_is_free_for_the_other(sim: SimulatedGPU) -> None:
    wgrad, dgrad, dy = gradients(sim, 2.0, 1.0, 2.0, 1.9, 9.0)
    assert choose_sharing([wgrad, dgrad], dy, DEVICE) == [SECOND, SECOND]
    assert choose_sharing([wgrad._replace(configs=[]), dgrad], dy, DEVICE) == [None, None]


class ConvBackward:
    """The op conv_backward, its launchers replaced by the reference, on a GPU where ``chosen`` is the fastest."""

    def __init__(self, patch: pytest.MonkeyPatch, chosen: list[Config | None]) -> None:
        self.calls: Counter[str] = Counter()
        m = Maker(torch.float32)
        a = Activation(*m.a())._replace(shift=None)
        dy, weight = Gradient(*m.dy(STRIDED, 3, False)), m.weight(12, 8, 3)
        shortcut = None, None, (1, 1)
        self.arguments = [*dy], [*a], weight, *STRIDED, *shortcut, BOTH
        self.expected = reference.conv_backward(dy, a, weight, ConvGeometry(*STRIDED), *shortcut, BOTH)

        def wgrad(dy: Gradient, a: Activation, weight: Tensor, geometry: ConvGeometry, config: Config) -> Any:
            self.calls["wgrad"] += 1
            return reference.wgrad(dy, a, weight, geometry)

        def dgrad(dy: Gradient, weight: Tensor, geometry: ConvGeometry, a: Activation, *rest: Any) -> Any:
            self.calls["dgrad"] += 1
            return reference.dgrad(dy, weight, geometry, a, *rest[:-1])

        def materialize_gradient(dy: Gradient, plain: Any = conv_bn.materialize_gradient) -> Tensor:
            self.calls["dy"] += 1
            value: Tensor = plain(dy)
            return value

        # Without Triton's interpreter no kernel can be launched: coefficients are computed by PyTorch.
        coefficients = SimpleNamespace(
            with_bn_coeffs=lambda a: a,
            with_dy_coeffs=lambda dy: dy,
            bn_coeffs_of=make_bn_coeffs,
            dy_coeffs_of=make_dy_coeffs,
        )
        kernels = {
            name: dispatch.TritonKernel(launcher, lambda *_: CONFIGS)
            for name, launcher in (("wgrad", wgrad), ("dgrad", dgrad))
        }
        patch.setattr(search, "choose_sharing", lambda *_: chosen)
        patch.setattr(dispatch, "_triton_kernels", lambda: kernels)
        patch.setattr(dispatch, "_known", {})
        patch.setattr(conv_bn, "coefficient_kernels", lambda: coefficients)
        patch.setattr(conv_bn, "runs_triton", lambda *_: True)
        patch.setattr(conv_bn, "materialize_gradient", materialize_gradient)


@pytest.mark.parametrize(
    ("chosen", "calls"),
    [
        ([None, None], {"dy": 1}),
        ([None, FIRST], {"dy": 1, "dgrad": 1}),
        ([FIRST, None], {"dy": 1, "wgrad": 1}),
        ([FIRST, FIRST], {"wgrad": 1, "dgrad": 1}),
    ],
    ids=["vendor", "vendor wgrad", "vendor dgrad", "triton"],
)
def test_dy_is_computed_once(
    monkeypatch: pytest.MonkeyPatch, chosen: list[Config | None], calls: dict[str, int]
) -> None:
    op = ConvBackward(monkeypatch, chosen)
    for result, exact in zip(conv_bn.conv_backward(*op.arguments), op.expected, strict=True):
        torch.testing.assert_close(result, exact, rtol=1e-4, atol=1e-4)
    assert op.calls == calls

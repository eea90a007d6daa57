"""The two gradients of a convolution are chosen together: what the vendor needs for both is made once."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import resnet_fused
from resnet_fused.kernels.autotune import search
from resnet_fused.kernels.autotune.search import Tunable, TuningKey, choose_sharing
from resnet_fused.kernels.launch import Config
from resnet_fused.ops import passes
from resnet_fused.reference import passes as reference
from resnet_fused.types import Activation, ConvGeometry, Gradient, make_bn_coeffs, make_dy_coeffs
from tests.kernels.invented_gpu import CANDIDATES, FIRST, GPU, SECOND, VENDOR, Bench, cache_file
from tests.ops.test_passes import BOTH, Maker

#: Milliseconds: of Triton's and the vendor's gradient of the weight, of the input's, and of dy; and what is chosen.
CHOICES = {
    "triton": ((1.0, 2.0, 1.0, 2.0, 0.0), (SECOND, SECOND)),
    "triton, for dy takes long": ((2.0, 1.0, 2.0, 1.0, 2.5), (SECOND, SECOND)),
    "vendor": ((3.0, 1.0, 3.0, 1.0, 2.0), (None, None)),
    "vendor, for dy is made once": ((2.0, 1.0, 2.0, 1.0, 1.5), (None, None)),
    "vendor in one makes it worth in the other": ((5.0, 1.0, 2.0, 1.9, 1.0), (None, None)),
    "weight": ((5.0, 1.0, 1.0, 2.0, 1.0), (None, SECOND)),
    "input": ((1.0, 2.0, 5.0, 1.0, 1.0), (SECOND, None)),
    "not even for one": ((2.0, 1.5, 1.0, 2.0, 1.0), (SECOND, SECOND)),
    "as fast": ((2.0, 1.0, 2.0, 1.0, 2.0), (None, None)),
}


def works(
    bench: Bench, wgrad: float, vendor_w: float, dgrad: float, vendor_d: float, dy: float
) -> list[Tunable]:
    """Those of the two gradients and that of dy."""
    made = []
    for kernel, triton, vendor in (("wgrad", wgrad, vendor_w), ("dgrad", dgrad, vendor_d), ("dy", 0.0, dy)):
        bench.times |= {(kernel, config): triton + (config != SECOND) for config in CANDIDATES}
        bench.times[kernel, VENDOR] = vendor

        def run(what: Any, kernel: str = kernel) -> list[Tensor]:
            return bench.result((kernel, what))

        work = bench.work(
            TuningKey(kernel, (1, 2), "bf16"), run=run, candidates=[] if kernel == "dy" else CANDIDATES
        )
        made.append(work._replace(vendor=functools.partial(run, VENDOR)))
    return made


@pytest.mark.parametrize("name", CHOICES)
def test_the_sum_decides(bench: Bench, name: str) -> None:
    times, chosen = CHOICES[name]
    *both, dy = works(bench, *times)
    for _ in range(2):
        assert choose_sharing(both, dy, GPU) == [*chosen]
        before = bench.measured.copy()
        assert choose_sharing(both, dy, GPU) == [*chosen]
        assert bench.measured == before
        search.clear_cache()
        bench.times = dict.fromkeys(bench.times, 1.0)


def test_of_one_gradient_dy_is_a_part(bench: Bench) -> None:
    weight, _, dy = works(bench, 2.0, 1.0, 0.0, 0.0, 1.5)
    assert choose_sharing([weight], dy, GPU) == [SECOND]
    search.clear_cache()
    cache_file().unlink()
    weight, _, dy = works(bench, 2.0, 1.0, 0.0, 0.0, 0.5)
    assert choose_sharing([weight], dy, GPU) == [None]
    assert choose_sharing([], dy, GPU) == []


def test_what_is_refused_is_not_chosen_together(bench: Bench) -> None:
    *both, dy = works(bench, 2.0, 9.0, 2.0, 9.0, 9.0)
    bench.results["wgrad", SECOND] = lambda results: [results[0] * 2]
    assert choose_sharing(both, dy, GPU) == [FIRST, SECOND]
    bench.results |= dict.fromkeys(itertools.product(["dgrad"], CANDIDATES), bench.results["wgrad", SECOND])
    search.clear_cache()
    cache_file().unlink()
    with pytest.warns(UserWarning, match="no configuration"):
        assert choose_sharing(both, dy, GPU) == [FIRST, None]
    with resnet_fused.backend("triton"):
        assert choose_sharing(both, dy, GPU) == [FIRST, None]
    with resnet_fused.backend("vendor"):
        assert choose_sharing(both, dy, GPU) == [None, None]


def test_nothing_is_timed_where_it_can_not_be(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    *both, dy = works(bench, *CHOICES["vendor"][0])
    assert choose_sharing(both, dy, torch.device("meta")) == [FIRST, FIRST]
    one = both[0]._replace(candidates=[])
    assert choose_sharing([one, both[1]], dy, torch.device("meta")) == [None, FIRST]
    with resnet_fused.backend("triton"):
        assert choose_sharing(both, dy, GPU) == [FIRST, FIRST]
        assert choose_sharing([one, both[1]], dy, GPU) == [None, FIRST]
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert choose_sharing(both, dy, GPU) == [None, None]
    assert not bench.measured


def test_what_only_the_vendor_does_makes_dy_free_for_the_other(bench: Bench) -> None:
    weight, image, dy = works(bench, 2.0, 1.0, 2.0, 1.9, 9.0)
    assert choose_sharing([weight, image], dy, GPU) == [SECOND, SECOND]
    assert choose_sharing([weight._replace(candidates=[]), image], dy, GPU) == [None, None]


class Op:
    """conv_backward with the launchers replaced by the reference, on a CPU that is taken for the invented GPU."""

    def __init__(self, bench: Bench, patch: pytest.MonkeyPatch, times: dict[str, float]) -> None:
        self.calls: Counter[str] = Counter()
        m = Maker(torch.float32)
        window = ConvGeometry((2, 2), (1, 1))
        source = Activation(*m.source())._replace(shift=None)
        dy, conv = Gradient(*m.gradient(window, 3, False)), m.conv(12, 8, 3)
        self.arguments = [*dy], [*source], conv, *window, None, None, (1, 1), BOTH
        geometry = [*window]

        def wgrad(
            dy: Gradient, source: Activation, conv: Tensor, window: ConvGeometry, config: Config
        ) -> Any:
            self.calls["wgrad"] += 1
            return reference.wgrad([*dy], [*source], conv, *geometry)

        def dgrad(dy: Gradient, conv: Tensor, window: ConvGeometry, below: Activation, *rest: Any) -> Any:
            self.calls["dgrad"] += 1
            return reference.dgrad([*dy], conv, *geometry, [*below], None, None, [1, 1])

        def measure(run: Callable[[], Any], device: torch.device, repetitions: int = 1) -> float:
            before = self.calls.copy()
            run()
            kernel = next((k for k in ("wgrad", "dgrad") if self.calls[k] > before[k]), None)
            return times[kernel or run.__name__]  # type: ignore[attr-defined]

        def gradient_of(dy: Gradient, plain: Any = passes.gradient_of) -> Tensor:
            self.calls["dy"] += 1
            made: Tensor = plain(dy)
            return made

        # On a machine without Triton's interpreter nothing is launched: terms and slopes are the reference's.
        reductions = SimpleNamespace(
            with_bn_coeffs=lambda source: source,
            with_dy_coeffs=lambda dy: dy,
            bn_coeffs_of=make_bn_coeffs,
            dy_coeffs_of=make_dy_coeffs,
        )
        homes = {
            "reductions": reductions,
            "wgrad": SimpleNamespace(configs=lambda *_: CANDIDATES, wgrad=wgrad),
            "dgrad": SimpleNamespace(configs=lambda *_: CANDIDATES, dgrad=dgrad),
            "tuning": SimpleNamespace(
                TuningKey=TuningKey,
                Tunable=Tunable,
                choose_sharing=lambda works, shared, device: choose_sharing(works, shared, GPU),
            ),
        }
        plain = passes.kernels
        patch.setattr(passes, "kernels", lambda family: homes.get(family) or plain(family))
        patch.setattr(passes, "runs_triton", lambda *_: True)
        patch.setattr(passes, "gradient_of", gradient_of)
        patch.setattr(passes, "_known", {})
        patch.setattr(search, "measure", measure)

    def run(self) -> tuple[Tensor, ...]:
        self.calls.clear()
        found: tuple[Tensor, ...] = passes.conv_backward(*self.arguments)
        return found


@pytest.mark.parametrize(
    ("wgrad", "dgrad", "calls"),
    [
        (9.0, 9.0, {"dy": 1}),
        (9.0, 0.1, {"dy": 1, "dgrad": 1}),
        (0.1, 9.0, {"dy": 1, "wgrad": 1}),
        (1.4, 1.4, {"wgrad": 1, "dgrad": 1}),
    ],
    ids=["vendor", "vendor wgrad", "vendor dgrad", "triton"],
)
def test_dy_is_made_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, wgrad: float, dgrad: float, calls: dict[str, int]
) -> None:
    times = {"wgrad": wgrad, "dgrad": dgrad, "vendor_weight": 1.0, "vendor_input": 1.0, "make": 1.0}
    op = Op(bench, monkeypatch, times)
    expected = reference.conv_backward(*op.arguments)
    for results in (op.run(), op.run()):
        for found, exact in zip(results, expected, strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
    assert op.calls == calls

"""How many images a weight gradient needs to be faster by implicit GEMM than by oneDNN; see cpu_rules.

Of the 1x1 and the strided 3x3 convolutions of ResNets, each between two batch norms. Both gradients are timed: oneDNN
computes them chunk by chunk where that is faster, and that w.r.t. the input is oneDNN's in any case.
"""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

import resnet_fused
from resnet_fused.accuracy import relative_error
from resnet_fused.measure import EAGER, OURS, SEEDS, Case, Comparison, Provider, inaccuracy, quantiles
from resnet_fused.ops import conv_wgrad
from resnet_fused.ops.conv_bn import conv_backward
from resnet_fused.types import Activation, Gradient

NAMES = ("wgrad_1x1", "wgrad_3x3")
BATCHES = (1, 2, 4, 8, 16, 64)
#: Channels within a bottleneck, which has four times as many outside, and height and width there.
POINTWISE = {64: (56, 8), 128: (28, 4), 256: (14, 2), 512: (7, 1)}
#: Channels of a convolution of stride 2, and height and width of its output.
STRIDED = {128: (28, 4), 256: (14, 2), 512: (7, 1)}
#: Elements of the largest activation: beyond, the ratio doesn't change any more.
MOST_ELEMENTS = 16 * 56 * 56 * 256
VENDOR = "vendor"

Run = Callable[[], Any]


class Convolution(NamedTuple):
    name: str
    inputs: int
    outputs: int
    kernel: int
    stride: int
    size: int  # of the output
    batch: int

    @property
    def channels(self) -> int:
        return round((self.inputs * self.outputs) ** 0.5)

    @property
    def elements(self) -> int:
        pixels = self.batch * self.size**2
        return pixels * max(self.inputs * self.stride**2, self.outputs)


def cases() -> Iterator[Convolution]:
    for channels, sizes in POINTWISE.items():
        for size in sizes:
            for batch in BATCHES:
                yield Convolution("wgrad_1x1", channels, 4 * channels, 1, 1, size, batch)
                yield Convolution("wgrad_1x1", 4 * channels, channels, 1, 1, size, batch)
    for channels, sizes in STRIDED.items():
        for size in sizes:
            for batch in BATCHES:
                yield Convolution("wgrad_3x3", channels, channels, 3, 2, size, batch)


def providers(case: Convolution, dtype: torch.dtype = torch.float32) -> dict[str, Run]:
    """Both gradients of a convolution of relu(bn(x)), on the same random operands."""

    def activation(channels: int, size: int) -> Tensor:
        x = torch.empty(case.batch, channels, size, size, dtype=dtype, memory_format=torch.channels_last)
        return x.normal_()

    x, dy = activation(case.inputs, case.size * case.stride), activation(case.outputs, case.size)
    weight = torch.randn(case.outputs, case.inputs, case.kernel, case.kernel) / case.inputs**0.5
    weight = weight.to(dtype, memory_format=torch.channels_last)
    bn = [(torch.rand(case.inputs) + offset).to(dtype) for offset in (-0.5, 0.5, 0.5, -0.5)]
    a, gradient = Activation(x, *bn), Gradient(dy)
    normed = torch.ops.aten.native_batch_norm(x, bn[2], bn[3], *bn[:2], False, 0.1, 0.0)[0].relu_()
    padding = case.kernel // 2
    geometry = [case.stride] * 2, [padding] * 2, [1, 1]

    def by(backend: str) -> Run:
        def run() -> Any:
            with resnet_fused.backend(backend), mock.patch.object(conv_wgrad, "is_faster", lambda *_: True):
                return conv_backward(
                    [*gradient], [*a], weight, *geometry, 1, None, None, [1, 1], [True, True]
                )

        return run

    def eager() -> Any:
        rest = *geometry, False, [0, 0], 1, [True, True, False]
        return torch.ops.aten.convolution_backward(dy, normed, weight, None, *rest)

    return {OURS: by("auto"), VENDOR: by("vendor"), EAGER: eager}


def check(what: str, runs_in: Callable[[torch.dtype], dict[str, list[Run]]]) -> None:
    """Raises AssertionError where ours break the accuracy rule, with the vendor's for eager's results.

    Args:
        runs_in: what each provider runs, by its name, on random operands of a dtype.
    """
    errors: dict[str, list[list[float]]] = {OURS: [], VENDOR: []}
    for seed in SEEDS:
        results = {}
        for dtype in (torch.float64, torch.float32):
            torch.manual_seed(seed)
            runs = runs_in(dtype)
            for who in errors:
                results[dtype, who] = [t for run in runs[who] for t in _tensors(run())]
        exact = results[torch.float64, VENDOR]
        for who in errors:
            pairs = zip(results[torch.float32, who], exact, strict=True)
            errors[who].append([relative_error(x, truth) for x, truth in pairs])
    problem = inaccuracy(errors[OURS], errors[VENDOR], torch.finfo(torch.float32).eps)
    assert not problem, f"{what}: {problem}"


def _runs_in(case: Convolution, dtype: torch.dtype) -> dict[str, list[Run]]:
    return {who: [run] for who, run in providers(case, dtype).items()}


def _tensors(results: Any) -> list[Tensor]:
    return [t for t in results if isinstance(t, Tensor) and t.numel()]


def measure(rounds: int) -> list[dict[str, Any]]:
    """One row for each case: milliseconds, and ratios of the others' to ours."""
    rows, todo = [], [case for case in cases() if case.elements <= MOST_ELEMENTS]
    for i, case in enumerate(todo, 1):
        print(f"{i} of {len(todo)}: {case}", file=sys.stderr)
        if case.batch == 2 and case.size <= 14:
            check(str(case), functools.partial(_runs_in, case))
        shape = f"{case.batch}x{case.inputs}x{case.size}x{case.size}"
        comparison = Comparison(
            Case("op", case.name, "train", "fp32", case.batch, shape),
            [Provider(who, run) for who, run in providers(case).items()],
            torch.device("cpu"),
        )
        comparison.warm_up()
        for _ in comparison.rounds(rounds):
            pass
        medians = {p.name: statistics.median(p.times) for p in comparison.providers}
        flops = 4 * case.kernel**2 * case.inputs * case.outputs * case.batch * case.size**2
        row = {"channels": case.channels, "size": case.size, "batch": case.batch, "name": case.name}
        row |= {"inputs": case.inputs, "ours_ms": medians[OURS], "vendor_ms": medians[VENDOR]}
        row |= {"gflops": flops / medians[OURS] / 1e6}
        for who in (VENDOR, EAGER):
            row[f"{who} / ours"] = quantiles(comparison.ratios(comparison.ours, comparison[who]))["median"]
        rows.append(row)
    return rows

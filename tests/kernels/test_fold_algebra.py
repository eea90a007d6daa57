"""The algebra of a folded convolution by the accuracy rule, in Triton's interpreter: Triton, PyTorch and float64."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fused.kernels.fold_algebra import fold_gradients, fold_statistics, rectified_mean
from resnet_fused.kernels.launch import Launch, observe_launches
from resnet_fused.reference import folded_conv_bn as reference
from resnet_fused.types import BatchStats, InputCovariance
from tests.accuracy import assert_accurate

pytestmark = pytest.mark.interpreter
PIXELS, EPS = 500, 1e-5
SHAPES = [(64, 16), (33, 7), (5, 3), (128, 64), (70, 130)]
STATISTICS = ("mean_y", "true_mean", "var", "invstd")
GRADIENTS = ("dweight", "dgamma", "scaled", "matrix", "vector")
Named = dict[str, Tensor]


class Sums:
    """What is known of one convolution after the sums over the pixels.

    Args:
        n, k: outputs and inputs.
        level: |mean| / std of its input, and of dz, so that all sums cancel.
        constant: whether an input channel is constant, and an output depends on it alone.
    """

    def __init__(
        self, n: int, k: int, dtype: torch.dtype, level: float = 0.1, constant: bool = False
    ) -> None:
        c = torch.randn(PIXELS, k, dtype=torch.float64)
        dz = torch.randn(PIXELS, n, dtype=torch.float64) + level
        self.weight = (torch.randn(n, k) / k**0.5).to(dtype)
        if constant:
            c[:, 1] = 0
            self.weight[2] = 0
            self.weight[2, 1] = 1
        c += level * torch.randn(k)
        self.gamma = torch.randn(n)
        self.gamma[0] = 0
        self.mean, self.covariance = c.mean(0).float(), torch.cov(c.t(), correction=0).float()
        if constant:
            self.covariance[1, :] = self.covariance[:, 1] = 0
        self.shift = level * torch.randn(k)
        self.sum_dz, self.q = dz.sum(0).float(), (dz.t() @ c).float()

    def statistics(self, implementation: Any, dtype: torch.dtype | None = None) -> Named:
        """mean_y, true_mean, var and invstd by ``implementation``, in ``dtype`` where that is given."""
        operands = self.weight, self.mean, self.covariance, self.shift
        if dtype is not None:
            operands = tuple(x.to(dtype) for x in operands)  # type: ignore[assignment]
        return dict(zip(STATISTICS, implementation(*operands, EPS), strict=True))

    def gradients(
        self,
        implementation: Any,
        dtype: torch.dtype | None = None,
        affine: bool = True,
        running: bool = False,
    ) -> Named:
        stats = self.statistics(reference.fold_statistics, torch.float32)

        def cast(*tensors: Tensor) -> list[Tensor]:
            return [x if dtype is None else x.to(dtype) for x in tensors]

        (weight,), gamma = cast(self.weight), cast(self.gamma)[0] if affine else None
        fold = InputCovariance() if running else InputCovariance(None, *cast(self.mean, self.covariance))
        operands = weight, gamma, BatchStats(*cast(stats["mean_y"], stats["invstd"])), fold
        gradients = implementation(*operands, *cast(self.sum_dz, self.q), PIXELS)
        named = dict(zip(GRADIENTS, gradients, strict=True))
        return {name: x for name, x in named.items() if x is not None and x.numel()}


def check_statistics(*arguments: Any, **options: Any) -> None:
    def draw() -> tuple[Named, Named, Named]:
        sums = Sums(*arguments, **options)
        eager, exact = (sums.statistics(reference.fold_statistics, t) for t in (torch.float32, torch.float64))
        return sums.statistics(fold_statistics), eager, exact

    assert_accurate(draw)


def check_gradients(*arguments: Any, affine: bool = True, running: bool = False, **options: Any) -> None:
    """The vector is computed from the scaled weight as it is rounded, so its eps is that of the weight's dtype."""

    def draw(names: set[str]) -> tuple[Named, Named, Named]:
        sums = Sums(*arguments, **options)
        compute = functools.partial(sums.gradients, affine=affine, running=running)
        eager, exact = (compute(reference.fold_gradients, t) for t in (torch.float32, torch.float64))
        rounded = {n: x.to(sums.weight.dtype) for n, x in eager.items() if n in ("scaled", "matrix")}
        found = compute(fold_gradients), eager | rounded, exact
        fused, eager, exact = ({n: x for n, x in each.items() if n in names} for each in found)
        return fused, eager, exact

    assert_accurate(lambda: draw({*GRADIENTS} - {"vector"}))
    if not running:
        assert_accurate(lambda: draw({"vector"}), Sums(*arguments, **options).weight.dtype)


def test_vector_cancels_the_rounded_scaled_weight() -> None:
    """Over all pixels dz scaled + vector sums to zero where c does."""
    sums = Sums(64, 16, torch.float16)
    sums.mean = torch.zeros_like(sums.mean)
    gradients = sums.gradients(fold_gradients)
    total = sums.sum_dz.double() @ gradients["scaled"].double()
    torch.testing.assert_close(PIXELS * gradients["vector"].double(), -total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("n", "k", "dtype"),
    [*((*shape, torch.float32) for shape in SHAPES), *((*shape, torch.float16) for shape in SHAPES[:2])],
    ids=str,
)
def test_accuracy(n: int, k: int, dtype: torch.dtype) -> None:
    check_statistics(n, k, dtype)
    check_gradients(n, k, dtype)


@pytest.mark.parametrize(
    ("n", "k", "affine", "running"), [(33, 7, False, False), (128, 64, True, True), (33, 7, False, True)]
)
def test_optional_operands(n: int, k: int, affine: bool, running: bool) -> None:
    check_gradients(n, k, torch.float32, affine=affine, running=running)


def test_sums_that_cancel() -> None:
    check_statistics(33, 7, torch.float32, level=30.0)
    check_gradients(33, 7, torch.float32, level=30.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_constant_channel(dtype: torch.dtype) -> None:
    check_statistics(33, 7, dtype, constant=True)
    check_gradients(33, 7, dtype, constant=True)
    stats = Sums(33, 7, dtype, constant=True).statistics(fold_statistics)
    assert stats["var"][2] == 0
    torch.testing.assert_close(stats["invstd"][2], torch.tensor(EPS).rsqrt())


def test_variance_is_not_negative_and_nan_stays() -> None:
    sums = Sums(5, 3, torch.float32)
    sums.covariance = -1e-3 * torch.eye(3)
    stats = sums.statistics(fold_statistics)
    assert (stats["var"] == 0).all() and (stats["invstd"] > 300).all()
    sums.covariance[1, 1] = torch.nan
    stats = sums.statistics(fold_statistics)
    assert stats["var"].isnan().all() and stats["invstd"].isnan().all()


def test_rectified_mean() -> None:
    def draw() -> tuple[Named, Named, Named]:
        weight, bias = torch.randn(200), torch.randn(200)
        weight[:3], bias[:3] = 0.0, torch.tensor([-1.0, 0.0, 2.0])
        bias[3:6] = torch.tensor([-torch.inf, torch.inf, torch.nan])
        eager = reference.rectified_mean(weight, bias)
        exact = reference.rectified_mean(weight.double(), bias.double())
        assert eager is not None and exact is not None
        return {"mean": rectified_mean(weight, bias)}, {"mean": eager}, {"mean": exact}

    assert_accurate(draw)


def launched(n: int, k: int, dtype: torch.dtype, running: bool) -> list[Launch]:
    """The launches of a step, on meta tensors."""

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    weight, per_output = empty(n, k, dtype=dtype), empty(n)
    mean, covariance = (None, None) if running else (empty(k), empty(k, k))
    launches: list[Launch] = []
    with observe_launches(launches.append):
        if mean is not None and covariance is not None:
            fold_statistics(weight, mean, covariance, None, EPS)
        stats, fold = BatchStats(per_output, per_output), InputCovariance(None, mean, covariance)
        fold_gradients(weight, None, stats, fold, per_output, empty(n, k), PIXELS)
    return launches


def test_launches() -> None:
    launches = launched(2048, 512, torch.bfloat16, running=False)
    names = ["fold_statistics", "merge_statistics", "fold_dweight", "fold_matrix"]
    assert [launch.name for launch in launches] == names
    gemms = [launch for launch in launches if launch.flops]
    assert all(math.prod(launch.grid) >= 64 for launch in gemms)
    assert [launch.flops // (2 * 2048 * 512 * 512) for launch in gemms] == [1, 1, 1]
    without_merge = launched(256, 128, torch.bfloat16, running=False)
    assert [launch.name for launch in without_merge] == names[:1] + names[2:]
    assert [launch.name for launch in launched(64, 16, torch.float16, running=True)] == ["fold_dweight"]

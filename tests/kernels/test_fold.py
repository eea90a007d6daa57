"""The algebra of a folded convolution in Triton's interpreter, against the same in float64 and in PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from resnet_fused.ops._branch import Fold, Stage, folded_gradients, settle_folded
from torch import Tensor

from resnet_fused.kernels.fold_algebra import fold_gradients, fold_statistics, rectified_mean
from resnet_fused.kernels.launch import Launch, observe_launches
from resnet_fused.ops.bn_stats import BatchStats
from resnet_fused.reference import folded as reference
from tests.accuracy import assert_as_accurate, in_some_draw

pytestmark = pytest.mark.interpreter
PIXELS, EPS = 500, 1e-5
SHAPES = [(40, 270), (64, 16), (33, 7), (5, 3), (128, 64), (70, 130)]
STAGE = Stage((1, 1), (1, 1), (0, 0), (1, 1), 1, EPS, None, None, folded=True)


class TuningKey:
    """What the sums over the pixels of one convolution have found, from pixels that were there.

    ``level``: |mean| / std of its input; of dz as well, so that all sums cancel. ``deaf``: an input channel without
    variance, and an output that sees nothing else.
    """

    def __init__(self, n: int, k: int, dtype: torch.dtype, level: float = 0.1, deaf: bool = False) -> None:
        c = torch.randn(PIXELS, k, dtype=torch.float64)
        dz = torch.randn(PIXELS, n, dtype=torch.float64) + level
        self.weight = (torch.randn(n, k) / k**0.5).to(dtype)
        if deaf:
            c[:, 1] = 0
            self.weight[2] = 0
            self.weight[2, 1] = 1
        c += level * torch.randn(k)
        self.gamma = torch.randn(n)
        self.gamma[0] = 0
        self.mean, self.covariance = c.mean(0).float(), torch.cov(c.t(), correction=0).float()
        self.shift = level * torch.randn(k)
        self.sum_dz, self.product = dz.sum(0).float(), (dz.t() @ c).float()


def expected(problem: TuningKey, dtype: torch.dtype) -> list[Tensor]:
    """mean_y, true_mean, var, invstd by PyTorch in ``dtype``."""
    wide, mean, covariance = (
        x.to(dtype) for x in (problem.weight.flatten(1), problem.mean, problem.covariance)
    )
    measured, _ = settle_folded(wide, mean, covariance, PIXELS, problem.shift.to(dtype), STAGE)
    return [measured.used.mean, *measured.running, measured.used.invstd]


def expected_gradients(
    problem: TuningKey, affine: bool, frozen: bool, dtype: torch.dtype
) -> list[Tensor | None]:
    """dweight, dgamma, scaled, matrix, vector by PyTorch in ``dtype``."""
    mean_y, _, _, invstd = (x.to(dtype) for x in expected(problem, torch.float32))
    fold = Fold(None, None if frozen else problem.mean.to(dtype), problem.covariance.to(dtype))
    gradients = folded_gradients(
        problem.weight.to(dtype),
        problem.gamma.to(dtype) if affine else None,
        BatchStats(mean_y, invstd),
        fold,
        STAGE,
        problem.sum_dz.to(dtype),
        problem.product.to(dtype),
        PIXELS,
    )
    factor = invstd * problem.gamma if affine else invstd
    scaled = factor[:, None] * problem.weight.to(dtype)
    return [gradients.weight, gradients.gamma, scaled, gradients.matrix, gradients.vector]


def found_gradients(problem: TuningKey, affine: bool = True, frozen: bool = False) -> list[Tensor | None]:
    mean_y, _, _, invstd = expected(problem, torch.float32)
    return list(
        fold_gradients(
            problem.weight,
            problem.gamma if affine else None,
            mean_y,
            invstd,
            None if frozen else problem.mean,
            None if frozen else problem.covariance,
            problem.sum_dz,
            problem.product,
            PIXELS,
        )
    )


def check_statistics(problem: TuningKey) -> list[Tensor]:
    found = fold_statistics(problem.weight, problem.mean, problem.covariance, problem.shift, EPS)
    wants = zip(expected(problem, torch.float32), expected(problem, torch.float64), strict=True)
    for name, got, (eager, exact) in zip(("mean", "true mean", "var", "invstd"), found, wants, strict=True):
        assert_as_accurate(name, got, eager, exact)
    return list(found)


def check_gradients(problem: TuningKey, affine: bool = True, frozen: bool = False) -> list[Tensor | None]:
    found = found_gradients(problem, affine, frozen)
    eagers = expected_gradients(problem, affine, frozen, torch.float32)
    exacts = expected_gradients(problem, affine, frozen, torch.float64)
    for name, got, eager, exact in zip(
        ("dweight", "dgamma", "scaled", "matrix", "vector"), found, eagers, exacts, strict=True
    ):
        if got is None:
            assert frozen and eager is None, name
        else:
            assert eager is not None and exact is not None, name
            rounded = problem.weight.dtype if name in ("scaled", "matrix") else torch.float32
            assert_as_accurate(name, got, eager.to(rounded), exact)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("n, k", SHAPES)
@in_some_draw
def test_statistics(n: int, k: int, dtype: torch.dtype) -> None:
    check_statistics(TuningKey(n, k, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("n, k", SHAPES)
@in_some_draw
def test_gradients(n: int, k: int, dtype: torch.dtype) -> None:
    check_gradients(TuningKey(n, k, dtype))


@pytest.mark.parametrize("affine, frozen", [(False, False), (True, True), (False, True)])
@pytest.mark.parametrize("n, k", [(33, 7), (128, 64)])
@in_some_draw
def test_what_may_be_missing(n: int, k: int, affine: bool, frozen: bool) -> None:
    check_gradients(TuningKey(n, k, torch.float32), affine, frozen)


def test_sums_that_cancel() -> None:
    problem = TuningKey(70, 130, torch.float32, level=30.0)
    check_statistics(problem)
    check_gradients(problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_constant_channel(dtype: torch.dtype) -> None:
    problem = TuningKey(33, 7, dtype, deaf=True)
    problem.covariance[1, :] = problem.covariance[:, 1] = 0
    *_, var, invstd = check_statistics(problem)
    assert var[2] == 0
    torch.testing.assert_close(invstd[2], torch.tensor(EPS).rsqrt())
    check_gradients(problem)


def test_variance_is_not_negative() -> None:
    problem = TuningKey(5, 3, torch.float32)
    problem.covariance = -1e-3 * torch.eye(3)
    *_, var, invstd = check_statistics(problem)
    assert (var == 0).all() and (invstd > 300).all()


def test_nan_stays() -> None:
    problem = TuningKey(5, 3, torch.float32)
    problem.covariance[1, 1] = torch.nan
    *_, var, invstd = fold_statistics(problem.weight, problem.mean, problem.covariance, None, EPS)
    assert var.isnan().all() and invstd.isnan().all()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_weight_of_a_convolution(memory_format: torch.memory_format) -> None:
    problem = TuningKey(33, 7, torch.float32)
    flat = [*check_statistics(problem), *found_gradients(problem)]
    problem.weight = problem.weight[:, :, None, None].contiguous(memory_format=memory_format)
    found = [*check_statistics(problem), *found_gradients(problem)]
    for got, want in zip(found, flat, strict=True):
        assert got is not None and want is not None and torch.equal(got, want)


def test_rectified_mean() -> None:
    weight, bias = torch.randn(200), torch.randn(200)
    weight[:3], bias[:3] = 0.0, torch.tensor([-1.0, 0.0, 2.0])
    exact = reference.rectified_mean(weight.double(), bias.double())
    eager = reference.rectified_mean(weight, bias)
    assert exact is not None and eager is not None
    assert_as_accurate("mean", rectified_mean(weight, bias), eager, exact)


def launched(n: int, k: int, dtype: torch.dtype, frozen: bool) -> list[Launch]:
    """The launches of a step, on tensors without data."""

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    weight, per_output = empty(n, k, dtype=dtype), empty(n)
    mean, covariance = (None, None) if frozen else (empty(k), empty(k, k))
    launches: list[Launch] = []
    with observe_launches(launches.append):
        if mean is not None and covariance is not None:
            fold_statistics(weight, mean, covariance, None, EPS)
        fold_gradients(
            weight, None, per_output, per_output, mean, covariance, per_output, empty(n, k), PIXELS
        )
    return launches


def test_launches() -> None:
    launches = launched(2048, 512, torch.bfloat16, frozen=False)
    names = ["fold_statistics", "merge_statistics", "fold_dweight", "fold_matrix"]
    assert [each.name for each in launches] == names
    products = [each for each in launches if each.flops]
    assert all(math.prod(each.grid) >= 64 for each in products)
    assert [each.flops // (2 * 2048 * 512 * 512) for each in products] == [1, 1, 1]
    assert [each.name for each in launched(256, 128, torch.bfloat16, frozen=False)] == names[:1] + names[2:]
    assert [each.name for each in launched(64, 16, torch.float16, frozen=True)] == ["fold_dweight"]

"""The algebra of a folded 1x1 convolution and its batch norm: what remains once the sums over the pixels are known.

One launch forward and two backward take the place of some forty small ones. The formulas are those of ops._branch,
with W (N, K) the weight and S the covariance of its input. Sums in which large terms cancel (the variances, dgamma,
the vector) are float64: they are short, and read once; S enters products of float32's accuracy on tensor cores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_fused.kernels.autotune.heuristics import tile
from resnet_fused.kernels.launch import Config, cdiv, launch

#: Channels from which the columns of W S are split over programs: fewer take at most 8 steps.
SPLIT_FROM = 256


@triton.jit
def _tile(matrix, rows, columns, ROWS, COLUMNS):
    """Some rows and columns of a matrix, float32; zeros outside."""
    inside = (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]
    return tl.load(matrix + rows[:, None] * COLUMNS + columns[None, :], inside, other=0.0).to(tl.float32)


@triton.jit
def _scale(gamma, rate, rows, inside):
    """invstd * gamma of some outputs, ``rate`` their invstd."""
    if gamma is not None:
        rate *= tl.load(gamma + rows, inside, 0.0)
    return rate


@triton.jit
def _covariance_product(
    weight, covariance, rows, columns, OUTPUTS, CHANNELS, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr
):
    """W S at some outputs and channels."""
    acc = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for first in range(0, CHANNELS, BLOCK_K):
        between = first + tl.arange(0, BLOCK_K)
        w = _tile(weight, rows, between, OUTPUTS, CHANNELS)
        s = _tile(covariance, between, columns, CHANNELS, CHANNELS)
        acc = tl.dot(w, s, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _store_statistics(total, square, moved, mean_y, true_mean, var, invstd, EPS, rows, inside):
    # Selected by what is below zero: a NaN stays one.
    variance = tl.where(square < 0, 0.0, square).to(tl.float32)
    tl.store(mean_y + rows, total.to(tl.float32), inside)
    tl.store(true_mean + rows, (total + moved).to(tl.float32), inside)
    tl.store(var + rows, variance, inside)
    tl.store(invstd + rows, tl.rsqrt(variance + EPS), inside)


@triton.jit
def fold_statistics_kernel(
    weight,
    mean,
    covariance,
    shift,
    parts,
    mean_y,
    true_mean,
    var,
    invstd,
    EPS,
    OUTPUTS,
    CHANNELS,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Columns of S are split over programs where ``parts``, (3, splits, OUTPUTS) float64, take what they have found."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_M,), tl.float64)
    square = tl.zeros((BLOCK_M,), tl.float64)
    moved = tl.zeros((BLOCK_M,), tl.float64)
    for start in range(tl.program_id(1) * BLOCK_N, CHANNELS, tl.num_programs(1) * BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        acc = _covariance_product(weight, covariance, rows, columns, OUTPUTS, CHANNELS, PRECISION, BLOCK_K)
        w = _tile(weight, rows, columns, OUTPUTS, CHANNELS).to(tl.float64)
        m = tl.load(mean + columns, columns < CHANNELS, 0.0).to(tl.float64)
        total += tl.sum(w * m[None, :], 1)
        square += tl.sum(w * acc.to(tl.float64), 1)
        if shift is not None:
            moved += tl.sum(w * tl.load(shift + columns, columns < CHANNELS, 0.0).to(tl.float64)[None, :], 1)
    inside = rows < OUTPUTS
    if parts is None:
        _store_statistics(total, square, moved, mean_y, true_mean, var, invstd, EPS, rows, inside)
    else:
        place = parts + tl.program_id(1) * OUTPUTS + rows
        size = tl.num_programs(1) * OUTPUTS
        tl.store(place, total, inside)
        tl.store(place + size, square, inside)
        tl.store(place + 2 * size, moved, inside)


@triton.jit
def merge_statistics_kernel(
    parts, mean_y, true_mean, var, invstd, EPS, SPLITS, OUTPUTS, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    split = tl.arange(0, AT_ONCE)
    inside = (split < SPLITS)[:, None] & (rows < OUTPUTS)[None, :]
    place = parts + split[:, None] * OUTPUTS + rows[None, :]
    size = SPLITS * OUTPUTS
    total = tl.sum(tl.load(place, inside, other=0.0), 0)
    square = tl.sum(tl.load(place + size, inside, other=0.0), 0)
    moved = tl.sum(tl.load(place + 2 * size, inside, other=0.0), 0)
    _store_statistics(total, square, moved, mean_y, true_mean, var, invstd, EPS, rows, rows < OUTPUTS)


@triton.jit
def fold_dweight_kernel(
    weight,
    gamma,
    mean_y,
    invstd,
    mean,
    covariance,
    sum_dz,
    product,
    dweight,
    dgamma,
    scaled,
    OUTPUTS,
    CHANNELS,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Tiles of one row of tiles follow each other: they read the same outputs.
    tiles_n = tl.cdiv(CHANNELS, BLOCK_N)
    tile_m, tile_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = rows < OUTPUTS
    # All tiles of a row of tiles find its dgamma, rather than wait for a launch that does.
    along = tl.zeros((BLOCK_M, BLOCK_K), tl.float64)
    for first in range(0, CHANNELS, BLOCK_K):
        between = first + tl.arange(0, BLOCK_K)
        w = _tile(weight, rows, between, OUTPUTS, CHANNELS)
        q = _tile(product, rows, between, OUTPUTS, CHANNELS)
        along += w.to(tl.float64) * q.to(tl.float64)
    level = tl.load(sum_dz + rows, row_inside, 0.0)
    centre = tl.load(mean_y + rows, row_inside, 0.0)
    rate = tl.load(invstd + rows, row_inside, 0.0)
    centred = tl.sum(along, 1) - level.to(tl.float64) * centre.to(tl.float64)
    slope = (centred * rate.to(tl.float64)).to(tl.float32)
    tl.store(dgamma + rows, slope, row_inside & (tile_n == 0))
    value = _tile(product, rows, columns, OUTPUTS, CHANNELS)
    if covariance is not None:
        acc = _covariance_product(weight, covariance, rows, columns, OUTPUTS, CHANNELS, PRECISION, BLOCK_K)
        m = tl.load(mean + columns, columns < CHANNELS, 0.0)
        value = value - level[:, None] * m[None, :] - (rate * slope)[:, None] * acc
    factor = _scale(gamma, rate, rows, row_inside)[:, None]
    inside = row_inside[:, None] & (columns < CHANNELS)[None, :]
    places = rows[:, None] * CHANNELS + columns[None, :]
    tl.store(dweight + places, factor * value, inside)
    w = _tile(weight, rows, columns, OUTPUTS, CHANNELS)
    tl.store(scaled + places, (factor * w).to(scaled.dtype.element_ty), inside)


@triton.jit
def _factor_and_slope(gamma, invstd, dgamma, rows, inside, PIXELS):
    rate = tl.load(invstd + rows, inside, 0.0)
    return _scale(gamma, rate, rows, inside), -rate * tl.load(dgamma + rows, inside, 0.0) / PIXELS


@triton.jit
def fold_matrix_kernel(
    weight,
    gamma,
    mean_y,
    invstd,
    sum_dz,
    dgamma,
    matrix,
    vector,
    OUTPUTS,
    CHANNELS,
    PIXELS,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_n = tl.cdiv(CHANNELS, BLOCK_N)
    tile_m, tile_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    right = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if tile_m < tl.cdiv(CHANNELS, BLOCK_M):
        left = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first in range(0, OUTPUTS, BLOCK_K):
            rows = first + tl.arange(0, BLOCK_K)
            factor, slope = _factor_and_slope(gamma, invstd, dgamma, rows, rows < OUTPUTS, PIXELS)
            a = _tile(weight, rows, left, OUTPUTS, CHANNELS)
            b = _tile(weight, rows, right, OUTPUTS, CHANNELS) * (factor * slope)[:, None]
            acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
        tl.store(
            matrix + left[:, None] * CHANNELS + right[None, :],
            acc.to(matrix.dtype.element_ty),
            (left < CHANNELS)[:, None] & (right < CHANNELS)[None, :],
        )
    else:  # one row of tiles more, for the vector
        total = tl.zeros((BLOCK_N,), tl.float64)
        for first in range(0, OUTPUTS, BLOCK_K):
            rows = first + tl.arange(0, BLOCK_K)
            inside = rows < OUTPUTS
            factor, slope = _factor_and_slope(gamma, invstd, dgamma, rows, inside, PIXELS)
            offset = -tl.load(sum_dz + rows, inside, 0.0) / PIXELS
            centre = tl.load(mean_y + rows, inside, 0.0).to(tl.float64)
            each = factor.to(tl.float64) * (offset.to(tl.float64) - slope.to(tl.float64) * centre)
            w = _tile(weight, rows, right, OUTPUTS, CHANNELS)
            total += tl.sum(w.to(tl.float64) * each[:, None], 0)
        tl.store(vector + right, total.to(tl.float32), right < CHANNELS)


@triton.jit
def rectified_mean_kernel(weight, bias, mean, CHANNELS, BLOCK: tl.constexpr):
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < CHANNELS
    spread = tl.abs(tl.load(weight + channels, inside, 0.0))
    level = tl.load(bias + channels, inside, 0.0)
    # Within bounds, so that nothing overflows: far before them both terms are what they are in the limit.
    ratio = tl.minimum(tl.maximum(level / tl.maximum(spread, 1e-30), -30.0), 30.0)
    density = tl.exp(-0.5 * ratio * ratio) * 0.3989422804014327
    below = 0.5 * (1.0 + tl.erf(ratio * 0.7071067811865476))
    tl.store(mean + channels, level * below + spread * density, inside)


def rectified_mean(weight: Tensor, bias: Tensor) -> Tensor:
    """reference.folded.rectified_mean of two (C,), float32."""
    mean, block = torch.empty_like(weight), 128
    launch(
        rectified_mean_kernel,
        (cdiv(weight.shape[0], block),),
        {"weight": weight, "bias": bias, "mean": mean, "CHANNELS": weight.shape[0]},
        {"BLOCK": block},
        Config(warps=4, stages=1),
    )
    return mean


def fold_statistics(
    weight: Tensor,
    mean: Tensor,
    covariance: Tensor,
    shift: Tensor | None,
    eps: float,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics of y = c W^T from those of c: mean_y = W mean, var = max(diag(W S W^T), 0), invstd.

    One launch; two where W S has so many steps that its columns are split over programs.

    Args:
        weight: W, (N, K) or (N, K, 1, 1), float32, bfloat16 or float16.
        mean, covariance: (K,) and S, (K, K), float32, contiguous.
        shift: (K,) float32, what was taken from the convolution's input to make c; None for nothing.
        precision: of W S, as tl.dot takes it; as float32 unless given.

    Returns:
        mean_y, (c + shift) W^T's mean, var, invstd = 1 / sqrt(var + eps), each (N,), float32.
    """
    w = _matrix(weight)
    outputs, channels = w.shape
    split = channels >= SPLIT_FROM
    # More rows read S fewer times; float32 products hold their operands in registers, where more would spill.
    config = Config(32 if split and w.dtype != torch.float32 else 16, tile(channels, 64), tile(channels, 32))
    splits = cdiv(channels, config.block_n) if split else 1
    parts = None if splits == 1 else mean.new_empty(3, splits, outputs, dtype=torch.float64)
    results = {name: mean.new_empty(outputs) for name in ("mean_y", "true_mean", "var", "invstd")}
    launch(
        fold_statistics_kernel,
        (cdiv(outputs, config.block_m), splits),
        {
            "weight": w, "mean": mean, "covariance": covariance, "shift": shift, "parts": parts, **results,
            "EPS": eps, "OUTPUTS": outputs, "CHANNELS": channels,
        },
        {"PRECISION": precision or _as_float32(w.dtype), **config.blocks()},
        config,
        flops=2 * outputs * channels * (channels + 2),
    )  # fmt: skip
    if parts is not None:
        block = 128
        launch(
            merge_statistics_kernel,
            (cdiv(outputs, block),),
            {"parts": parts, **results, "EPS": eps, "SPLITS": splits, "OUTPUTS": outputs},
            {"AT_ONCE": 1 << (splits - 1).bit_length(), "BLOCK": block},
            Config(warps=4, stages=1),
        )
    return results["mean_y"], results["true_mean"], results["var"], results["invstd"]


def fold_gradients(
    weight: Tensor,
    gamma: Tensor | None,
    mean_y: Tensor,
    invstd: Tensor,
    mean: Tensor | None,
    covariance: Tensor | None,
    sum_dz: Tensor,
    product: Tensor,
    pixels: int,
    precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of the parameters, and dc = dz scaled + c matrix^T + vector. Two launches; one if frozen.

        dgamma  = invstd (diag(W Q^T) - sum_dz mean_y)
        dweight = scale (Q - invstd dgamma (W S) - sum_dz mean^T)
        matrix  = W^T diag(scale slope) W,  slope = -invstd dgamma / P
        vector  = (scale (-sum_dz / P - slope mean_y)) W
        scaled  = scale W

    Statistics are of this process's pixels alone. Where they are frozen, dweight = scale Q.

    Args:
        weight: W, (N, K) or (N, K, 1, 1), float32, bfloat16 or float16; gamma: (N,) float32, None for ones.
        mean_y, invstd: (N,) float32, of c W^T.
        mean, covariance: (K,) and S, (K, K), float32, of c; None where the statistics are frozen.
        sum_dz: (N,); product: Q = dz^T c, (N, K); float32.
        pixels: P.
        precision: of all products, as tl.dot takes it; else W S is as float32, and so is the matrix of a float32
            weight, while that of another is rounded anyway and made in TF32, whose range is that of float32.

    Returns:
        dweight (N, K), dgamma (N,), scaled (N, K), matrix (K, K), vector (K,): float32, but scaled and matrix, which
        are in the weight's dtype.
        matrix and vector are None where the statistics are frozen.
    """
    w = _matrix(weight)
    outputs, channels = w.shape
    sizes = {"OUTPUTS": outputs, "CHANNELS": channels}
    frozen, exact = mean is None or covariance is None, w.dtype == torch.float32
    # Without tensor cores operands are held in registers, and larger tiles would spill.
    config = Config(16 if exact else 32, tile(channels, 64), tile(channels, 32))
    dweight, dgamma = product.new_empty(outputs, channels), product.new_empty(outputs)
    scaled = torch.empty_like(w)
    launch(
        fold_dweight_kernel,
        (cdiv(outputs, config.block_m) * cdiv(channels, config.block_n),),
        {
            "weight": w, "gamma": gamma, "mean_y": mean_y, "invstd": invstd,
            "mean": None if frozen else mean, "covariance": None if frozen else covariance, "sum_dz": sum_dz,
            "product": product.contiguous(), "dweight": dweight, "dgamma": dgamma,
            "scaled": scaled, **sizes,
        },
        {"PRECISION": precision or _as_float32(w.dtype), **config.blocks()},
        config,
        flops=2 * outputs * channels * (2 if frozen else channels + 3),
    )  # fmt: skip
    if frozen:
        return dweight, dgamma, scaled, None, None
    config = Config(tile(channels, 32), tile(channels, 64), tile(outputs, 32 if exact else 64))
    matrix, vector = w.new_empty(channels, channels), product.new_empty(channels)
    launch(
        fold_matrix_kernel,
        ((cdiv(channels, config.block_m) + 1) * cdiv(channels, config.block_n),),
        {
            "weight": w, "gamma": gamma, "mean_y": mean_y, "invstd": invstd, "sum_dz": sum_dz,
            "dgamma": dgamma, "matrix": matrix, "vector": vector, **sizes, "PIXELS": pixels,
        },
        {"PRECISION": precision or ("ieee" if exact else "tf32"), **config.blocks()},
        config,
        flops=2 * outputs * channels * (channels + 1),
    )  # fmt: skip
    return dweight, dgamma, scaled, matrix, vector


def _matrix(weight: Tensor) -> Tensor:
    return weight.view(weight.shape[:2]).contiguous()


def _as_float32(dtype: torch.dtype) -> str:
    """Products of float32's accuracy; on tensor cores where the activations have fewer bits anyway."""
    return "ieee" if dtype == torch.float32 else "tf32x3"

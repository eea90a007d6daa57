"""The passes of a block over its pixels as ops that make activations and gradients on the way, as Triton kernels do.

Each has the Triton kernel, the same by the vendor's library and passes of our own, and a reference; which of the first
two runs for a shape is measured (kernels.tuning). See reference.passes for what they compute.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backend import choice, why_not_triton
from resnet_fused.ops import _checks, folded
from resnet_fused.ops._matmul import pieces as pieces_of
from resnet_fused.ops._matmul import rows_in_piece, sum_of_inner, times_into
from resnet_fused.ops._primitive import primitive
from resnet_fused.ops.batch_norm_stats import batch_norm_stats
from resnet_fused.ops.bn_add_relu import backward_dy as bn_add_relu_backward_dy
from resnet_fused.ops.bn_relu import backward_pass as bn_relu_backward
from resnet_fused.ops.bn_relu import backward_reduce as bn_relu_backward_reduce
from resnet_fused.ops.bn_relu import forward_pass as bn_relu
from resnet_fused.ops.masked_grad import fresh, masked_grad
from resnet_fused.reference import passes as reference
from resnet_fused.reference.layout import mask_shape, statistics_dtype
from resnet_fused.reference.operands import Activation, Gradient, MaybeTensor, gradient_slopes, norm_terms
from resnet_fused.reference.passes import Fields, activation, gradient, nothing, seen, window

#: Elements of a tensor that Triton kernels can address: they count in 32 bits.
COUNTABLE = 2**31
#: Rows or columns of a kernel that they have a bit for.
MOST_TAPS = 31
_GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups"


def value_of(a: Activation) -> Tensor:
    """An activation in memory, by our own pass over it."""
    if a.mean is not None:
        value: Tensor = bn_relu(a.x, a.mean, a.invstd, a.weight, a.bias, a.shift)
        return value
    return a.x if a.shift is None else a.x - a.shift.to(a.x.dtype).view(1, -1, 1, 1)


def gradient_of(dy: Gradient) -> Tensor:
    """A gradient in memory, by our own pass over it."""
    value: Tensor
    if dy.mean is None:
        if dy.bits is None:
            return dy.g
        value = fresh(dy.g)
        masked_grad(dy.g, dy.bits, value, False, None)
    elif dy.bits is None:
        value = bn_relu_backward(dy.g, *dy[2:9])
    else:
        value = bn_add_relu_backward_dy(dy.g, dy.bits, *dy[2:6], *dy[7:9])
    return value


def runs_triton(x: Tensor, groups: int = 1) -> bool:
    """Whether Triton kernels serve an activation; they know no groups."""
    return (
        why_not_triton(x.device.type) is None
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and groups == 1
        and x.numel() < COUNTABLE
    )


@functools.cache
def kernels(family: str) -> Any:
    """A module of kernels, imported late: a machine without Triton gets this far in no op."""
    return importlib.import_module(f"resnet_fused.kernels.{family}")


#: Of each problem and device: launcher, configurations and the problem as it is remembered, so that a call is cheap.
_known: dict[Any, tuple[Any, list[Any], Any]] = {}


def forget() -> None:
    """Configurations are asked for again."""
    _known.clear()


def _work(
    family: str,
    x: Tensor,
    sizes: Sequence[Any],
    arguments: tuple[Any, ...],
    vendor: Callable[[], Any],
    exact: Callable[[], Any],
    has_kernel: bool = True,
) -> Any:
    """What kernels.<family> and the vendor can do alike, for the tuner; the launcher has the family's name.

    Args:
        sizes: what distinguishes problems for which the fastest may differ, beside the dtype.
        arguments: of the launcher, but for the configuration.
        has_kernel: else there is only the vendor.
    """
    tuning = kernels("tuning")
    dtype = kernels("problem").dtype_name(x.dtype)
    key = (family, *sizes, dtype, x.device)
    if key not in _known:
        problem = tuning.Problem(family, tuple(int(size) for size in sizes), dtype)
        launcher, candidates = None, []
        if has_kernel:
            home = kernels(family)
            launcher, candidates = getattr(home, _LAUNCHERS.get(family, family)), home.configs(*arguments)
        _known[key] = launcher, candidates, problem
    run, candidates, problem = _known[key]
    return tuning.Work(problem, candidates, lambda config: run(*arguments, config), vendor, exact)


_LAUNCHERS = {"conv": "conv_stats"}


def _fastest(
    family: str,
    x: Tensor,
    sizes: Sequence[Any],
    arguments: tuple[Any, ...],
    vendor: Callable[[], Any],
    exact: Callable[[], Any],
) -> Any:
    """Runs a kernel in the configuration that is fastest, or the vendor if that is. Arguments: see ``_work``."""
    work = _work(family, x, sizes, arguments, vendor, exact)
    chosen = kernels("tuning").choose(work, x.device)
    return vendor() if chosen is None else work.run(chosen)


def _fastest_sharing(works: list[Any], shared: Any, x: Tensor) -> list[Any]:
    """The results of works whose vendors all need what ``shared`` makes, in the way that is fastest in sum."""
    chosen = kernels("tuning").choose_sharing(works, shared, x.device)
    return [
        work.vendor() if config is None else work.run(config)
        for work, config in zip(works, chosen, strict=True)
    ]


def _exactly(op: Callable[..., Any], x: Tensor, *arguments: Any) -> Callable[[], Any]:
    """What the reference makes of an op's arguments in more bits than those of the activation ``x``."""
    wide = torch.float64 if x.dtype == torch.float32 else torch.float32

    def widened(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(wide) if value.is_floating_point() else value
        return [widened(each) for each in value] if isinstance(value, (list, tuple)) else value

    return lambda: op(*widened(arguments))


def _given(fields: Sequence[MaybeTensor]) -> list[bool]:
    return [field is not None for field in fields]


def _given_of(operand: Activation | Gradient) -> list[bool]:
    """Without terms and slopes, which kernels make themselves where they are not given."""
    return _given(operand[1:6] if isinstance(operand, Activation) else operand[1:9])


def _launches(x: Tensor) -> bool:
    """Whether Triton kernels may serve an activation where the vendor's library does the rest."""
    return runs_triton(x) and choice() not in ("vendor", "reference")


def _terms(y: Tensor, *norm: MaybeTensor) -> Tensor:
    """Of a batch norm of ``y``: mean, invstd, weight and bias."""
    make: Callable[..., Tensor] = kernels("reductions").terms_of if _launches(y) else norm_terms
    return make(*norm)


def _conv_stats(
    source: Fields,
    conv: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    eps: float,
    measure: bool,
    gamma: MaybeTensor = None,
    beta: MaybeTensor = None,
) -> tuple[Tensor, ...]:
    a, geometry = activation(source), window(stride, padding, dilation, groups)

    def vendor() -> tuple[Tensor, ...]:
        y = torch.ops.aten.convolution.default(
            value_of(a), conv, None, stride, padding, dilation, False, [0, 0], groups
        )
        y = y.contiguous(memory_format=torch.channels_last)
        if not measure:
            return y, *nothing(y, 4)
        mean, var, invstd = batch_norm_stats(y, eps)
        return y, mean, var, invstd, _terms(y, mean, invstd, gamma, beta)

    height, width = geometry.out_size(a.x, conv)
    countable = len(a.x) * height * width * len(conv) < COUNTABLE and max(conv.shape[2:]) <= MOST_TAPS
    if not runs_triton(a.x, groups) or not countable:
        return vendor()
    sizes = (*a.x.shape, *conv.shape, *stride, *padding, *dilation, *_given_of(a), measure)
    rest = eps, measure, gamma, beta
    exact = _exactly(reference.conv_stats, a.x, source, conv, stride, padding, dilation, groups, *rest)
    found: tuple[Tensor, ...] = _fastest("conv", a.x, sizes, (a, conv, geometry, *rest), vendor, exact)
    return found


def _fake_conv_stats(
    source: Fields,
    conv: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    eps: float,
    measure: bool,
    *_: MaybeTensor,
) -> tuple[Tensor, ...]:
    x = activation(source).x
    height, width = window(stride, padding, dilation, groups).out_size(x, conv)
    y = fresh_channels_last(x, len(conv), height, width)
    return y, *((*_vectors(x, len(conv), 3), _three(x, len(conv))) if measure else nothing(x, 4))


def fresh_channels_last(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    size = (x.shape[0], channels, height, width)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _vectors(x: Tensor, channels: int, count: int) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(channels, dtype=statistics_dtype(x.dtype)) for _ in range(count))


def _three(x: Tensor, channels: int) -> Tensor:
    """Terms or slopes."""
    return x.new_empty(3, channels, dtype=statistics_dtype(x.dtype))


conv_stats = primitive(
    f"conv_stats(Tensor?[] source, Tensor conv, {_GEOMETRY}, float eps, bool measure, Tensor? gamma=None,"
    " Tensor? beta=None) -> (Tensor y, Tensor mean, Tensor var, Tensor invstd, Tensor terms)",
    reference.conv_stats,
    _fake_conv_stats,
    _conv_stats,
    triton=True,
    check=_checks.conv_stats,
)


def _gram(source: Fields, every: list[int]) -> tuple[Tensor, Tensor]:
    a = activation(source)

    def vendor() -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = folded.gram(value_of(a._replace(x=seen(a.x, every))))
        return found

    if not runs_triton(a.x):
        return vendor()
    sizes = (*a.x.shape, *every, *_given_of(a))
    exact = _exactly(reference.gram, a.x, source, every)
    found: tuple[Tensor, Tensor] = _fastest("gram", a.x, sizes, (a, _pair(every)), vendor, exact)
    return found


def _pair(every: list[int]) -> tuple[int, int]:
    return every[0], every[1]


gram_of = primitive(
    "gram_of(Tensor?[] source, int[] every) -> (Tensor mean, Tensor covariance)",
    reference.gram,
    lambda source, every: folded.fake_gram(source[0]),
    _gram,
    triton=True,
    check=_checks.gram_of,
)


def _expand(
    source: Fields,
    conv: MaybeTensor,
    norm: Fields,
    skip: Tensor,
    skip_shift: MaybeTensor,
    skip_conv: MaybeTensor,
    skip_norm: Fields,
    every: list[int],
) -> tuple[Tensor, Tensor]:
    a = activation(source)

    def vendor() -> tuple[Tensor, Tensor]:
        other = value_of(Activation(seen(skip, every), shift=skip_shift))
        found: tuple[Tensor, Tensor]
        found = folded.folded_add_relu(value_of(a), conv, *norm, other, skip_conv, *skip_norm)
        return found

    outputs = a.x.shape[1] if conv is None else len(conv)
    large = max(a.x.numel() // a.x.shape[1] * outputs, skip.numel()) >= COUNTABLE
    if not runs_triton(a.x) or large:
        return vendor()
    sizes = (
        *a.x.shape,
        outputs,
        *skip.shape,
        *every,
        *_given_of(a),
        *_given((conv, *norm, skip_conv, *skip_norm)),
    )
    arguments = (a, conv, tuple(norm), skip, skip_shift, skip_conv, tuple(skip_norm), _pair(every))
    exact = _exactly(reference.expand, a.x, source, conv, norm, skip, skip_shift, skip_conv, skip_norm, every)
    found: tuple[Tensor, Tensor] = _fastest("expand", a.x, sizes, arguments, vendor, exact)
    return found


def _fake_expand(source: Fields, conv: MaybeTensor, *_: Any) -> tuple[Tensor, Tensor]:
    x = activation(source).x
    out = fresh_channels_last(x, x.shape[1] if conv is None else conv.shape[0], x.shape[2], x.shape[3])
    return out, out.new_empty(mask_shape(out), dtype=torch.uint8)


expand = primitive(
    "expand(Tensor?[] source, Tensor? conv, Tensor?[] norm, Tensor skip, Tensor? skip_shift, Tensor? skip_conv,"
    " Tensor?[] skip_norm, int[] every) -> (Tensor out, Tensor mask)",
    reference.expand,
    _fake_expand,
    _expand,
    triton=True,
    check=_checks.expand,
)


def _folded_wgrad(
    grad: Tensor, bits: Tensor, source: Fields, every: list[int], skip: Fields, skip_every: list[int]
) -> tuple[Tensor, ...]:
    a, other = activation(source), activation(skip) if skip else None

    def vendor() -> tuple[Tensor, ...]:
        dz = gradient_of(Gradient(grad, bits))

        def product(c: Activation, every: list[int]) -> Tensor:
            return sum_of_inner(dz, value_of(c._replace(x=seen(c.x, every))))

        sums = dz.sum((0, 2, 3), dtype=statistics_dtype(dz.dtype))
        second = nothing(grad, 1)[0] if other is None else product(other, skip_every)
        return product(a, every), second, sums

    largest = max(a.x.numel(), 0 if other is None else other.x.numel())
    if not runs_triton(grad) or largest >= COUNTABLE:
        return vendor()
    sizes = (
        *grad.shape,
        *a.x.shape,
        *every,
        *_given_of(a),
        *([] if other is None else other.x.shape),
        *skip_every,
    )
    arguments = (grad, bits, a, _pair(every), other, _pair(skip_every))
    exact = _exactly(reference.folded_wgrad, grad, grad, bits, source, every, skip, skip_every)
    product, second, sums = _fastest("folded_wgrad", grad, sizes, arguments, vendor, exact)
    return product, nothing(grad, 1)[0] if second is None else second, sums


def _fake_folded_wgrad(
    grad: Tensor, bits: Tensor, source: Fields, every: list[int], skip: Fields, skip_every: list[int]
) -> tuple[Tensor, ...]:
    outputs, dtype = grad.shape[1], statistics_dtype(grad.dtype)
    products = [grad.new_empty(outputs, activation(x).x.shape[1], dtype=dtype) for x in (source, skip) if x]
    return products[0], products[1] if skip else nothing(grad, 1)[0], _vectors(grad, outputs, 1)[0]


folded_wgrad = primitive(
    "folded_wgrad(Tensor grad, Tensor bits, Tensor?[] source, int[] every, Tensor?[] skip, int[] skip_every)"
    " -> (Tensor product, Tensor skip_product, Tensor sum_dz)",
    reference.folded_wgrad,
    _fake_folded_wgrad,
    _folded_wgrad,
    triton=True,
    check=_checks.folded_wgrad,
)


def _folded_dgrad(
    grad: Tensor,
    bits: Tensor,
    factors: Fields,
    source: Fields,
    every: list[int],
    skip_factors: Fields,
    skip: Fields,
    skip_every: list[int],
) -> tuple[Tensor, ...]:
    a, other = activation(source), activation(skip) if skip else None

    def vendor() -> tuple[Tensor, ...]:
        dz = gradient_of(Gradient(grad, bits))
        da = _vendor_input_gradient(dz, a, every, *factors)
        dskip = grad.new_empty(0)
        if other is not None:
            dskip = _vendor_input_gradient(dz, other, skip_every, *skip_factors)
        return da, dskip, *_sums_below(da, a)

    largest = max(a.x.numel(), 0 if other is None else other.x.numel())
    if not runs_triton(grad) or largest >= COUNTABLE:
        return vendor()
    flags = _given_of(a) + _given((*factors, *skip_factors))
    sizes = (*grad.shape, *a.x.shape, *every, *flags, *([] if other is None else other.x.shape), *skip_every)
    both = [kernels("folded_dgrad").Factors(*each) for each in (factors, skip_factors)]
    arguments = (grad, bits, both[0], a, _pair(every), both[1], other, _pair(skip_every))
    exact = _exactly(
        reference.folded_dgrad, grad, grad, bits, factors, source, every, skip_factors, skip, skip_every
    )
    da, dskip, *sums = _fastest("folded_dgrad", grad, sizes, arguments, vendor, exact)
    return da, grad.new_empty(0) if dskip is None else dskip, *(nothing(da, 3) if sums[0] is None else sums)


def _vendor_input_gradient(
    dz: Tensor, a: Activation, every: list[int], scaled: MaybeTensor, square: MaybeTensor, vector: MaybeTensor
) -> Tensor:
    assert scaled is not None
    da: Tensor = fresh(dz, None, scaled.shape[1])
    rows, matrix = rows_in_piece(dz, dz.shape[1]), scaled.transpose(0, 1).contiguous()
    for to, part in zip(pieces_of(da, rows), pieces_of(dz, rows), strict=True):
        times_into(to, part, matrix)
    if square is not None:
        folded.add_product_(da, value_of(a._replace(x=seen(a.x, every))), square, vector)
    return da


def _sums_below(da: Tensor, below: Activation) -> tuple[Tensor, ...]:
    if below.mean is None or below.invstd is None:
        return nothing(da, 3)
    dz, dz_xhat = bn_relu_backward_reduce(da, *below[:5])
    terms = _terms(below.x, *below[1:5]) if below.terms is None else below.terms
    make = kernels("reductions").slopes_of if _launches(below.x) else gradient_slopes
    pixels = below.x.numel() // below.x.shape[1]
    return dz, dz_xhat, make(dz, dz_xhat, below.mean, below.invstd, terms, pixels)


def _fake_sums(below: Activation) -> tuple[Tensor, ...]:
    if below.mean is None:
        return nothing(below.x, 3)
    channels = below.x.shape[1]
    return *_vectors(below.x, channels, 2), _three(below.x, channels)


def _fake_folded_dgrad(
    grad: Tensor,
    bits: Tensor,
    factors: Fields,
    source: Fields,
    every: list[int],
    skip_factors: Fields,
    *_: Any,
) -> tuple[Tensor, ...]:
    scaled = [m[0] for m in (factors, skip_factors) if m and m[0] is not None]
    found = [fresh_channels_last(grad, m.shape[1], grad.shape[2], grad.shape[3]) for m in scaled]
    return found[0], found[1] if len(found) > 1 else grad.new_empty(0), *_fake_sums(activation(source))


folded_dgrad = primitive(
    "folded_dgrad(Tensor grad, Tensor bits, Tensor?[] factors, Tensor?[] source, int[] every, Tensor?[] skip_factors,"
    " Tensor?[] skip, int[] skip_every) -> (Tensor da, Tensor dskip, Tensor sum_dz, Tensor sum_dz_xhat,"
    " Tensor slopes)",
    reference.folded_dgrad,
    _fake_folded_dgrad,
    _folded_dgrad,
    triton=True,
    check=_checks.folded_dgrad,
)


def _conv_backward(
    dy: Fields,
    source: Fields,
    conv: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    residual: MaybeTensor,
    residual_bits: MaybeTensor,
    every: list[int],
    needs: list[bool],
) -> tuple[Tensor, ...]:
    given, a, geometry = gradient(dy), activation(source), window(stride, padding, dilation, groups)
    convolution = (stride, padding, dilation, groups)
    triton = runs_triton(a.x, groups) and given.g.numel() < COUNTABLE
    if triton:  # once for both gradients
        given = kernels("reductions").with_slopes(given)
        a = kernels("reductions").with_terms(a)

    def make(config: Any = None) -> Tensor:
        return gradient_of(given)

    made = functools.cache(make)

    def vendor_input() -> tuple[Tensor, ...]:
        found, _, _ = torch.ops.aten.convolution_backward.default(
            made(), a.x, conv, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
        )
        da = found.contiguous(memory_format=torch.channels_last)
        if residual is not None:
            if residual_bits is not None and tuple(every) == (1, 1):
                masked_grad(residual, residual_bits, da, True, None)
            else:
                da[:, :, :: every[0], :: every[1]] += gradient_of(Gradient(residual, residual_bits))
        return da, *_sums_below(da, a)

    def vendor_weight() -> Tensor:
        g = made()
        if conv.shape[2:] == (1, 1) and geometry.padding == (0, 0) and groups == 1:
            product = sum_of_inner(g, value_of(a._replace(x=seen(a.x, stride))))
            return product[:, None, None].permute(0, 3, 1, 2)
        _, found, _ = torch.ops.aten.convolution_backward.default(
            g, value_of(a), conv, None, stride, padding, dilation, False, [0, 0], groups, [False, True, False]
        )
        return found.to(statistics_dtype(g.dtype)).contiguous(memory_format=torch.channels_last)

    def ways() -> Iterator[Any]:
        """The gradients that are needed, the weight's first, for the tuner."""
        sizes = (*a.x.shape, *conv.shape, *stride, *padding, *dilation)
        if needs[1]:
            exact = _exactly(reference.wgrad, a.x, dy, source, conv, *convolution)
            flags = _given_of(given) + _given_of(a)
            yield _work("wgrad", a.x, (*sizes, *flags), (given, a, conv, geometry), vendor_weight, exact)
        if needs[0]:
            rest = residual, residual_bits
            exact = _exactly(reference.dgrad, a.x, dy, conv, *convolution, source, *rest, every)
            flags = _given_of(given) + _given_of(a) + _given(rest)
            known = (max(stride) == 1 or max(dilation) == 1) and max(conv.shape[2:]) <= MOST_TAPS
            arguments = (given, conv, geometry, a, *rest, _pair(every))
            yield _work("dgrad", a.x, (*sizes, *every, *flags), arguments, vendor_input, exact, known)

    if triton:
        shared = _work("gradient", given.g, (*given.g.shape, *_given_of(given)), (), make, make, False)
        found = _fastest_sharing([*ways()], shared, a.x)
    else:
        vendors = [*([vendor_weight] if needs[1] else []), *([vendor_input] if needs[0] else [])]
        found = [vendor() for vendor in vendors]
    dconv = found[0] if needs[1] else nothing(a.x, 1)[0]
    da, *sums = found[-1] if needs[0] else (a.x.new_empty(0), None)
    return da, *(nothing(a.x, 3) if sums[0] is None else sums), dconv


def _fake_conv_backward(dy: Fields, source: Fields, conv: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    a, (needs_input, needs_weight) = activation(source), rest[-1]
    x, dtype = a.x, statistics_dtype(a.x.dtype)
    da, sums, dconv = x.new_empty(0), nothing(x, 3), nothing(x, 1)[0]
    if needs_input:
        da, sums = torch.empty_like(x), _fake_sums(a)
    if needs_weight:
        dconv = torch.empty(conv.shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
    return da, *sums, dconv


conv_backward = primitive(
    f"conv_backward(Tensor?[] dy, Tensor?[] source, Tensor conv, {_GEOMETRY}, Tensor? residual, Tensor? residual_bits,"
    " int[] every, bool[] needs) -> (Tensor da, Tensor sum_dz, Tensor sum_dz_xhat, Tensor slopes,"
    " Tensor dconv)",
    reference.conv_backward,
    _fake_conv_backward,
    _conv_backward,
    triton=True,
    check=_checks.conv_backward,
)

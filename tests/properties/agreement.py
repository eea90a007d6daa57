"""How results of one draw are compared with eager PyTorch's.

The accuracy rule compares geometric means over several draws (tests.accuracy). An example is a single draw, in which
eager may be exact by chance and we not, or a sum may cancel to nothing. So an example also measures what rounding does
to these operands: the exact result is computed once more with every intermediate value and gradient moved by a random
rounding of the dtype at hand (Monte Carlo arithmetic). With errors as norms,

    e_fused <= 8 * (1.5 * e_eager + 4 * eps * |exact| + e_rounded)

where 8 is what the rule has for one of several draws, and e_rounded the largest of ROUNDINGS (most of which are only
computed where the first is not enough). In float64 eager is the exact result, and the limit
1000 * (eps * |exact| + e_rounded): more than sums of 5000 terms need, and far less than one wrong element adds to a
norm. There values are moved by sixteen times as much, lest the moves be rounded away, and e_rounded is a sixteenth; and
for |exact| stands the largest of all results, as some are exactly zero only by eager's order of operations.

Rounding also decides on which side of zero the input of a ReLU lies, and which of two equal maxima a window has. There
a gradient depends on luck: it is compared where rounding decides nothing (``is_decided``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.accuracy import ONE_DRAW

Results = Mapping[str, Tensor]
#: Of ``eps * |exact| + e_rounded``, in float64; and how many eps values are moved by.
FLOAT64, MOVES = 1000.0, 16.0
#: In Monte Carlo arithmetic an example is computed so many times.
ROUNDINGS = 8


def moves_by(dtype: torch.dtype) -> float:
    """What Monte Carlo arithmetic, which is done in float64, moves values of a dtype by."""
    return torch.finfo(dtype).eps * (MOVES if dtype == torch.float64 else 1.0)


def outcome(compute: Callable[[], Any]) -> Any:
    """What ``compute`` returns, or the exception that it raises."""
    try:
        return compute()
    except Exception as error:
        return error


def fails_alike(fused: Any, eager: Any) -> bool:
    """Whether eager raised an exception, as ``outcome`` returns it: then the fused one has to raise its type.

    Raises:
        Exception: the fused one did, and eager did not.
    """
    if isinstance(eager, Exception):
        assert type(fused) is type(eager), f"{fused!r} instead of {eager!r}"
        return True
    if isinstance(fused, Exception):
        raise fused
    assert fused.out.requires_grad == eager.out.requires_grad
    return False


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        ctx.eps = eps
        return _moved(x, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _moved(grad, ctx.eps), None


def _moved(x: Tensor, eps: float) -> Tensor:
    return x + x * (torch.rand_like(x) - 0.5) * eps


def rounded(x: Tensor, eps: float) -> Tensor:
    """``x``, each element moved by up to eps / 2 of itself; its gradient likewise."""
    moved: Tensor = _Rounded.apply(x, eps)
    return moved


def batch_norm_rounded(
    y: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    bn_eps: float,
    eps: float,
) -> Tensor:
    """F.batch_norm in Monte Carlo arithmetic; ``eps``: of the statistics' dtype."""
    vector = (1, -1, 1, 1)
    y = rounded(y, eps)
    if training:
        pixels = y.numel() // y.shape[1]
        # Of the mean as it is, and not of the rounded one: with few pixels gradients depend on whether these agree.
        exact_mean = y.mean((0, 2, 3))
        mean = rounded(exact_mean, eps)
        var = rounded((y - exact_mean.view(vector)).square().mean((0, 2, 3)), eps)
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.detach(), momentum)
            running_var.lerp_(var.detach() * (pixels / (pixels - 1)), momentum)
    else:
        assert running_mean is not None and running_var is not None
        mean, var = running_mean, running_var
    xhat = rounded(rounded(y - mean.view(vector), eps) * (var + bn_eps).rsqrt().view(vector), eps)
    z = xhat if weight is None else rounded(xhat * weight.view(vector), eps)
    return z if bias is None else rounded(z + bias.view(vector), eps)


def is_decided(exact: Tensor, moved: Tensor) -> Tensor:
    """Where values are farther from zero than rounding may move them: thirty times what it did to their like."""
    errors = moved - exact
    typical = errors[errors.isfinite()].square().mean().sqrt()
    return (exact.abs() > 30 * typical) | ~exact.isfinite()


def assert_same_kind(fused: Results, eager: Results) -> None:
    """The same results, of the same shapes and dtypes."""
    assert fused.keys() == eager.keys(), fused.keys() ^ eager.keys()
    for name, theirs in eager.items():
        ours = fused[name]
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), name


def assert_equal(fused: Results, eager: Results) -> None:
    """For results without elements, and sums of none."""
    assert_same_kind(fused, eager)
    for name, theirs in eager.items():
        assert torch.equal(fused[name], theirs), name


def assert_accurate(
    fused: Results, eager: Results, exact: Results, moved: Iterator[Results], dtype: torch.dtype
) -> None:
    """The rule above.

    Args:
        exact: in float64, of those results that are to be compared; moved: likewise, in Monte Carlo arithmetic.
        dtype: what the operands are rounded to.
    """
    eps, drawn = torch.finfo(dtype).eps, [next(moved)]
    largest = max(float(truth.double().norm()) for truth in exact.values())
    for name, truth in exact.items():
        truth, ours = truth.double(), fused[name]  # num_batches_tracked is an integer
        assert torch.isfinite(truth).all(), f"{name} is not finite"

        def error(x: Tensor) -> float:
            return float((x.double() - truth).norm())  # noqa: B023

        size, by_fused, by_eager = float(truth.norm()), error(ours), error(eager[name])
        if by_eager > size and dtype != torch.float64:
            # What cancels to nothing, as gradients through a batch norm of two values do: no digit is right in eager.
            assert ours.isfinite().all(), f"{name} is not finite"
            continue
        by_rounding = 0.0
        for i in range(ROUNDINGS):
            if i == len(drawn):
                drawn.append(next(moved))
            by_rounding = max(by_rounding, error(drawn[i][name]))
            if dtype == torch.float64:
                most = FLOAT64 * (eps * largest + by_rounding / MOVES)
            else:
                most = ONE_DRAW * (1.5 * by_eager + 4 * eps * size + by_rounding)
            if by_fused <= most:
                break
        assert by_fused <= most, (
            f"{name}: error {by_fused:.3g} > {most:.3g}; eager's {by_eager:.3g}, that of rounding {by_rounding:.3g}, "
            f"|exact| {size:.3g}"
        )


def not_finite_alike(fused: Tensor, eager: Sequence[Tensor], sums: bool) -> Tensor:
    """Where a result is finite and eager's is not, in either layout, or the other way round.

    Args:
        eager: in both layouts.
        sums: whether values are sums over several elements. They are NaN or infinite by the order of summation; others
            must be what eager's are.
    """
    wrong = torch.ones(fused.shape, dtype=torch.bool)
    for theirs in eager:
        same = fused.isfinite() == theirs.isfinite()
        if not sums:
            same &= fused.isfinite() | (fused == theirs) | (fused.isnan() & theirs.isnan())
        wrong &= ~same
    return wrong


def assert_close_where_finite(name: str, fused: Tensor, eager: Tensor) -> None:
    """The accuracy of what an infinite or NaN operand leaves finite, in float64; the other dtypes run the same code."""
    if fused.dtype != torch.float64:
        return
    finite = fused.isfinite() & eager.isfinite()
    ours, theirs = fused[finite], eager[finite]
    assert float((ours - theirs).norm()) <= 1e-9 * (1 + float(theirs.norm())), name

"""Calls of ops whose operands do not fit: none may end the process, or return what nobody has computed.

A case starts from operands that fit and changes one or two of them. It has to end with an error that has a message,
or with what the reference makes of the same operands. A case depends on its seed alone, and is printed before it runs:

    python -m tests.ops.ill_fitting --seed 17 --cases 1
"""

from __future__ import annotations

import argparse
import random
import resource
import secrets
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused import functional
from resnet_fused.backend import backend, interprets
from resnet_fused.ops.dispatch import IMPLEMENTATIONS
from resnet_fused.types import BatchNorm
from tests.ops import operands
from tests.ops.operands import LAYOUTS, OPS

#: What a call may end with. AssertionError, AttributeError and the like are no answer to a user.
ERRORS = (RuntimeError, ValueError, TypeError, IndexError, MemoryError)
DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool,
    torch.complex64,
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3, 7, 100, 2**15, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**31), -(2**63), 2**64,
)  # fmt: skip
FLOATS = (0.0, -1.0, 1e-3, 1e3, float("inf"), float("nan"))
FUNCTIONS = ("bn_relu", "bn_add_relu", "bn_bn_add_relu", "bn_relu_maxpool")


class Call(NamedTuple):
    """``run`` and ``oracle`` take ``arguments``, which may be nested in lists, tuples and Norms."""

    name: str
    run: Callable[..., Any]
    oracle: Callable[..., Any] | None
    arguments: list[Any]


# Calls whose operands fit


def _sizes(rng: random.Random) -> tuple[int, ...]:
    return (
        rng.choice((1, 2, 3)),
        rng.choice((1, 2, 7, 8, 11, 31, 64, 70)),
        rng.randint(1, 9),
        rng.randint(1, 9),
    )


def _native(name: str, rng: random.Random) -> Call:
    layout, dtype = rng.choice(LAYOUTS), rng.choice(DTYPES[:4])
    arguments = operands.native_arguments(name, layout, dtype, rng.random() < 0.7, _sizes(rng))
    return Call(name, getattr(OPS, name), operands.reference_of(name), list(arguments))


def _fresh_like(rng: random.Random) -> Call:
    x = rng.choice(LAYOUTS)(torch.rand(_sizes(rng)))
    sizes = [rng.choice((None, 1, 2, 5)) for _ in range(4)]
    return Call("fresh_like", OPS.fresh_like, None, [x, *sizes])


def _composed(name: str, rng: random.Random) -> Call:
    case = rng.choice([case for case in operands.CASES if operands.op_of(case) == name])
    dtype = torch.float32 if interprets() else rng.choice((torch.float64, torch.float64, *DTYPES[1:4]))
    make = operands.Maker(dtype, operands.SIZES[rng.choice([*operands.SIZES])])
    arguments = [list(x) if type(x) is tuple else x for x in operands.CASES[case](make)]
    return Call(name, getattr(OPS, name), operands.reference_of(name), arguments)


def _function(name: str, rng: random.Random) -> Call:
    """Of the public API, with its backward."""
    dtype, sizes = rng.choice(DTYPES[:4]), _sizes(rng)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    layout, training = rng.choice(LAYOUTS), rng.random() < 0.5

    def activation() -> Tensor:
        x: Tensor = layout(torch.randn(sizes).to(dtype))
        return x.requires_grad_()

    def vectors() -> list[Any]:
        weight, bias = (
            ([torch.rand(sizes[1], dtype=wide) for _ in range(2)]) if rng.random() < 0.7 else (None,) * 2
        )
        return [
            torch.rand(sizes[1], dtype=wide),
            torch.rand(sizes[1], dtype=wide),
            weight,
            bias,
            training,
            0.1,
            1e-5,
        ]

    def run(*arguments: Any) -> list[Tensor]:
        out = getattr(functional, name)(*arguments)
        leaves = [x for x in _tensors(arguments) if x.requires_grad and x.is_leaf]
        gradient = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out)
        return [
            out,
            *(x for x in torch.autograd.grad(out, leaves, gradient, allow_unused=True) if x is not None),
        ]

    def oracle(*arguments: Any) -> list[Tensor]:
        with backend("reference"):
            return run(*arguments)

    arguments: list[Any] = [activation()]
    if name == "bn_bn_add_relu":
        arguments += [activation(), BatchNorm(*vectors()), BatchNorm(*vectors())]
    else:
        arguments += [activation()] if name == "bn_add_relu" else []
        arguments += vectors()
    return Call(f"functional.{name}", run, oracle, arguments)


def fitting(rng: random.Random) -> Call:
    names = [*IMPLEMENTATIONS, *(f"functional.{name}" for name in FUNCTIONS)]
    if interprets():
        names = sorted(name for name, found in IMPLEMENTATIONS.items() if found.triton)
    name = rng.choice(names)
    if name.startswith("functional."):
        return _function(name.removeprefix("functional."), rng)
    if name == "fresh_like":
        return _fresh_like(rng)
    return _native(name, rng) if IMPLEMENTATIONS[name].composed is None else _composed(name, rng)


# Changes


def _tensors(arguments: Any) -> Iterator[Tensor]:
    if isinstance(arguments, Tensor):
        yield arguments
    elif isinstance(arguments, (list, tuple)):
        for each in arguments:
            yield from _tensors(each)


def _like(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """New values of the dtype of ``x``."""
    if x.dtype in (torch.uint8, torch.bool):
        return torch.randint(0, 256, tuple(sizes)).to(x.dtype)
    return torch.rand(tuple(sizes), dtype=torch.float64).add_(0.1).to(x.dtype)


def _resized(x: Tensor, rng: random.Random) -> Tensor:
    if x.dim() == 0:
        return _like(x, (rng.choice((0, 1, 3)),))
    sizes, dim = list(x.shape), rng.randrange(x.dim())
    sizes[dim] = max(0, rng.choice((0, 1, sizes[dim] - 1, sizes[dim] + 1, 2 * sizes[dim], sizes[dim] + 64)))
    found = _like(x, sizes)
    is_channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return found.contiguous(memory_format=torch.channels_last) if is_channels_last else found


def _of_another_rank(x: Tensor, rng: random.Random) -> Tensor:
    changes = (
        lambda: x.unsqueeze(rng.randint(0, x.dim())), lambda: x.flatten(), lambda: x[..., None, None],
        lambda: x.sum(0) if x.dim() else x, lambda: _like(x, ()), lambda: x.squeeze(),
    )  # fmt: skip
    return rng.choice(changes)()


def _of_other_strides(x: Tensor, rng: random.Random) -> Tensor:
    """The same sizes; mostly other values."""
    if x.dim() == 0:
        return x
    dim = rng.randrange(x.dim())
    kind = rng.randrange(6)
    if kind == 0:
        return x.transpose(0, dim).contiguous().transpose(0, dim)
    if kind == 1:
        return x[:1].expand(x.shape) if len(x) else x
    if kind == 2:
        return torch.stack([x, x], -1)[..., 0]
    if kind == 3:  # behind an offset that vector instructions do not like
        return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) if x.numel() else x
    if kind == 4:
        return x.contiguous()
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.flip(0)


def _of_other_values(x: Tensor, rng: random.Random) -> Tensor:
    if not x.is_floating_point():  # bits, or the indices of max-pooling, of which there are nine
        return torch.randint(0, rng.choice((9, 256)), x.shape).to(x.dtype)
    found = x.clone()
    if x.numel():
        found[tuple(rng.randrange(size) for size in x.shape)] = rng.choice(FLOATS)
    return found


def _changed_tensor(x: Tensor, others: Sequence[Any], rng: random.Random) -> Any:
    if x.is_meta or x.layout != torch.strided:  # by a change before this one
        return x
    changes: dict[str, Callable[[], Any]] = {
        "resized": lambda: _resized(x, rng),
        "resized too": lambda: _resized(x, rng),
        "of another rank": lambda: _of_another_rank(x, rng),
        "of another dtype": lambda: x.to(rng.choice(DTYPES)),
        "of other strides": lambda: _of_other_strides(x, rng),
        "of other strides too": lambda: _of_other_strides(x, rng),
        "of other values": lambda: _of_other_values(x, rng),
        "None": lambda: None,
        "meta": lambda: x.to("meta"),
        "sparse": lambda: x.to_sparse(),
        "another operand": lambda: rng.choice(others),
    }
    # Bytes are what kernels might take for addresses.
    kind = "of other values" if x.dtype == torch.uint8 and rng.random() < 0.4 else rng.choice([*changes])
    return changes[kind]()


def _changed_list(x: list[Any], others: Sequence[Any], rng: random.Random) -> list[Any]:
    """Shorter, longer, or empty."""
    found = list(x)
    kind = rng.randrange(4)
    if kind == 0 and found:
        del found[rng.randrange(len(found))]
    elif kind == 1:
        found.insert(rng.randint(0, len(found)), found[0] if found else rng.choice(others))
    elif kind == 2:
        found.append(1 if found and isinstance(found[0], int) else None)
    else:
        found = []
    return found


def changed(x: Any, others: Sequence[Any], rng: random.Random) -> Any:
    """An operand with a change anywhere in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(x, Tensor):
            found = _changed_tensor(x.detach(), others, rng)
            needs = x.requires_grad and isinstance(found, Tensor) and found.is_floating_point()
            return found.detach().requires_grad_() if needs else found
        if isinstance(x, (list, tuple)):
            if not x or (isinstance(x, list) and rng.random() < 0.2):
                return _changed_list([*x], others, rng)
            found, at = (
                [*x],
                rng.randrange(7 if isinstance(x, BatchNorm) else len(x)),
            )  # not group and counter
            found[at] = changed(x[at], others, rng)
            return BatchNorm(*found) if isinstance(x, BatchNorm) else found
        if x is None:
            return rng.choice([*others, _like(others[0], (rng.choice((0, 1, 11)),))])
        if isinstance(x, bool):
            return rng.choice((not x, 2, None))
        return rng.choice(NUMBERS) if isinstance(x, int) else rng.choice(FLOATS)


def made(seed: int) -> Call:
    """The call of a seed."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    call = fitting(rng)
    arguments = list(call.arguments)
    others: list[Any] = [x.detach() for x in _tensors(arguments)]
    if not call.name.startswith("functional."):
        others.append([others[0], others[0]])
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(len(arguments))
        arguments[at] = changed(arguments[at], others, rng)
    return call._replace(arguments=arguments)


# What comes of it


def described(x: Any) -> str:
    if isinstance(x, Tensor):
        strides = tuple(x.stride()) if x.layout == torch.strided else x.layout
        place = "" if x.device.type == "cpu" else f" {x.device}"
        return f"{str(x.dtype).removeprefix('torch.')}{tuple(x.shape)}/{strides}{place}"
    if isinstance(x, (list, tuple)):
        return f"[{', '.join(described(each) for each in x)}]"
    return repr(x)


def copied(x: Any) -> Any:
    """With strides and all, of each tensor its own; meta and sparse tensors as they are."""
    if isinstance(x, Tensor):
        if x.is_meta or x.layout != torch.strided:
            return x
        found = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
        found = (
            found.copy_(x.detach())
            if 0 not in x.stride()
            else x.detach().clone().as_strided(x.shape, x.stride())
        )
        return found.requires_grad_(x.requires_grad)
    if isinstance(x, BatchNorm):
        return BatchNorm(*(copied(each) for each in x))
    return [copied(each) for each in x] if isinstance(x, (list, tuple)) else x


def _difference(ours: Tensor, theirs: Tensor, exact: bool, finite: bool) -> str | None:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"returned {described(ours)} where the reference returns {described(theirs)}"
    if ours.layout != torch.strided:
        return None
    if ours.is_floating_point():  # infinity minus infinity depends on the order of sums
        ours, theirs = (torch.where(x.isfinite(), x.double(), torch.inf) for x in (ours, theirs))
        if finite and bool((ours.isinf() & theirs.isfinite()).any()):
            return "returned NaN or infinity where the reference does not"
        if not finite:
            theirs = torch.where(ours.isinf(), ours, theirs)
            ours = torch.where(theirs.isinf(), theirs, ours)
    # In fewer bits rounding may turn a mask's bit, and all that hangs on it.
    if exact and not torch.allclose(ours.double(), theirs.double(), rtol=1e-7, atol=1e-9):
        return "returned other values than the reference"
    return None


def outcome(call: Call) -> tuple[str, str | None]:
    """In a word how a call ended, and what is wrong with that."""
    ours, theirs = copied(call.arguments), copied(call.arguments)
    try:
        results = call.run(*ours)
    except ERRORS as error:
        return "refused", None if str(error) else f"{type(error).__name__} without a message"
    except Exception as error:
        return "refused", f"{type(error).__name__}: {error}"
    if call.oracle is None or any(x.is_meta for x in _tensors(call.arguments)):
        return "returned", None
    try:
        expected = call.oracle(*theirs)
    except Exception:
        return "returned alone", None
    floats = [x for x in _tensors(call.arguments) if x.is_floating_point()]
    exact = all(x.dtype == torch.float64 for x in floats)
    # What is not finite may spread, multiplied with the zeros of a padding.
    finite = all(x.layout != torch.strided or bool(x.isfinite().all()) for x in floats)
    pairs = [*_tensors([results, ours])], [*_tensors([expected, theirs])]
    # What is too large for float16 by its rounding alone may spread, too.
    finite = finite and all(bool(x.isfinite().all()) for x in pairs[1] if x.dtype == torch.float16)
    if len(pairs[0]) != len(pairs[1]):
        return "returned", f"returned {len(pairs[0])} tensors where the reference returns {len(pairs[1])}"
    differences = (_difference(a, b, exact, finite) for a, b in zip(*pairs, strict=True))
    return "returned", next((text for text in differences if text is not None), None)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, help="of the first case; random unless given")
    parser.add_argument("--log", help="file for the cases; standard output unless given")
    parser.add_argument("--memory", type=int, default=16, help="GB, at most; 0: any, for AddressSanitizer")
    chosen = parser.parse_args(arguments)
    if chosen.memory:  # sizes that nobody has memory for fail at once, on any machine
        resource.setrlimit(
            resource.RLIMIT_AS, (chosen.memory << 30, resource.getrlimit(resource.RLIMIT_AS)[1])
        )
    first = secrets.randbelow(2**31) if chosen.seed is None else chosen.seed
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    warnings.simplefilter("ignore")
    start, ends, wrong = time.monotonic(), Counter[str](), []
    with open(chosen.log, "w") if chosen.log else sys.stdout as log:
        for seed in range(first, first + chosen.cases):
            call = made(seed)
            text = f"case {seed}: {call.name}({', '.join(described(x) for x in call.arguments)})"
            print(text, file=log, flush=True)
            end, problem = outcome(call)
            ends[end] += 1
            if problem is not None:
                wrong.append(f"{text}\n    {problem}")
    took = f"{time.monotonic() - start:.0f} s from seed {first}"
    print(
        *wrong, f"{chosen.cases} cases in {took}: {dict(ends)}, {len(wrong)} wrong", sep="\n", file=sys.stderr
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

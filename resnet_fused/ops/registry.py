"""Ops of PyTorch's dispatcher: schema, fake and reference are registered here, native kernels by csrc."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backend import uses_reference
from resnet_fused.ops.dispatch import IMPLEMENTATIONS, Implementations


def register_op(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    implementation: Callable[..., Any] | None = None,
    triton: bool = False,
    check: Callable[..., bool] | None = None,
    operands: Callable[..., tuple[Any, ...]] | None = None,
    on_cpu: str = "",
) -> Callable[..., Any]:
    """Defines ``resnet_fused::<schema>`` and returns the function that calls it.

    The reference is registered for every device; a native kernel takes precedence where csrc registered one.
    Ops carry no autograd formula: the autograd.Functions around them do, which costs less per call.

    Args:
        schema: name, arguments and results, as torch.library.define takes them.
        reference: what the op computes, in plain PyTorch.
        fake: the same results without data: shapes, dtypes and strides of the native kernel.
        implementation: what runs on CPU and CUDA instead of a native kernel: the vendor's library with native ops
            around it or, where that is faster, a Triton kernel.
        triton: whether there is a Triton kernel.
        check: takes the arguments, raises where they do not fit, and returns whether only the reference supports such
            arguments. Native kernels have theirs in csrc/bindings_common.h.
        operands: makes the arguments of reference, fake and implementation, which take the operands of types, from
            those of the schema. None: they are the same.
        on_cpu: what of it csrc computes on a CPU, where that is faster.
    """
    name = schema.partition("(")[0]
    qualified = f"resnet_fused::{name}"
    torch.library.define(qualified, schema.removeprefix(name), tags=(torch.Tag.pt2_compliant_tag,))
    handle = getattr(torch.ops.resnet_fused, name).default
    arguments = handle._schema.arguments
    needed = [
        i for i, x in enumerate(arguments) if isinstance(x.type, torch.TensorType) or x.name in ("a", "dy")
    ]
    if operands is not None:
        reference, fake = _typed(operands, reference), _typed(operands, fake)
        implementation = None if implementation is None else _typed(operands, implementation)
    if check is None:
        check = functools.partial(_needs_tensors, name, needed)
    elif implementation is not None:
        implementation = _checked(check, implementation, reference)
    IMPLEMENTATIONS[name] = Implementations(reference, implementation, triton, on_cpu)
    reference = _checked(check, reference, reference)
    torch.library.impl(qualified, "CompositeExplicitAutograd", reference)
    torch.library.register_fake(qualified, _on_one_device(name, needed, fake))
    if implementation is not None:
        torch.library.impl(qualified, ("cpu", "cuda"), implementation)

    def call(*args: Any) -> Any:
        if uses_reference():
            return reference(*args)
        try:
            return handle(*args)
        except RuntimeError as error:
            if _is_out_of_memory(error, args):
                raise torch.OutOfMemoryError(str(error)) from error
            raise

    return call


def _typed(operands: Callable[..., tuple[Any, ...]], function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any) -> Any:
        return function(*operands(*args))

    return run


def _checked(
    check: Callable[..., bool], implementation: Callable[..., Any], reference: Callable[..., Any]
) -> Callable[..., Any]:
    @functools.wraps(implementation)
    def run(*args: Any) -> Any:
        return reference(*args) if check(*args) else implementation(*args)

    return run


def _needs_tensors(name: str, needed: Sequence[int], *args: Any) -> bool:
    """The check of a reference whose native kernel has its own: the dispatcher takes None for any tensor.

    Of an Activation or a Gradient, which ops take as lists, the first field is needed.
    """
    if any(args[i] is None or (isinstance(args[i], list) and args[i][:1] in ([], [None])) for i in needed):
        raise TypeError(f"{name}: expected tensors as operands {needed}, got None for one of them")
    return True


def _tensors(args: Iterable[Any]) -> Iterator[Tensor]:
    for x in args:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from _tensors(x)


def _on_one_device(name: str, needed: Sequence[int], fake: Callable[..., Any]) -> Callable[..., Any]:
    """A fake runs as soon as one operand is a meta tensor, and would give uninitialized results beside real ones."""

    @functools.wraps(fake)
    def run(*args: Any) -> Any:
        devices = {str(x.device) for x in _tensors(args)}
        if len(devices) > 1:
            raise ValueError(f"{name}: operands must be on one device, got {', '.join(sorted(devices))}")
        _needs_tensors(name, needed, *args)
        return fake(*args)

    return run


def _is_out_of_memory(error: RuntimeError, args: tuple[Any, ...]) -> bool:
    """Whether a native op failed for memory of a GPU: through the stable ABI every error is a RuntimeError."""
    return (
        not isinstance(error, torch.OutOfMemoryError)
        and "out of memory" in str(error)
        and any(x.is_cuda for x in _tensors(args))
    )

"""How a primitive becomes an op of the dispatcher: schema, fake and reference here, native kernels from csrc."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from resnet_fused.backend import uses_reference

#: Names of all primitives, in the order of their definition.
PRIMITIVES: list[str] = []
#: Those that are compositions of others and of vendor products on CPU and CUDA, by name.
COMPOSITIONS: dict[str, Callable[..., Any]] = {}
#: Those of them that have a Triton kernel too.
TRITON: set[str] = set()


def primitive(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    composition: Callable[..., Any] | None = None,
    triton: bool = False,
) -> Callable[..., Any]:
    """Defines ``resnet_fused::<schema>`` and returns the function that calls it.

    The reference is registered for every device; a native kernel takes precedence where csrc registered one.
    Primitives carry no autograd formula: the autograd.Functions around them do, which costs less per call.

    Args:
        schema: name, arguments and results, as torch.library.define takes them.
        reference: what the op computes, in plain PyTorch.
        fake: the same results without data: shapes, dtypes and strides of the native kernel.
        composition: what runs on CPU and CUDA instead of a native kernel: vendor products and other primitives.
        triton: the composition chooses between those and a Triton kernel.
    """
    name = schema.partition("(")[0]
    qualified = f"resnet_fused::{name}"
    torch.library.define(qualified, schema.removeprefix(name), tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "CompositeExplicitAutograd", reference)
    torch.library.register_fake(qualified, fake)
    if composition is not None:
        torch.library.impl(qualified, ("cpu", "cuda"), composition)
        COMPOSITIONS[name] = composition
        if triton:
            TRITON.add(name)
    handle = getattr(torch.ops.resnet_fused, name).default
    PRIMITIVES.append(name)

    def call(*args: Any) -> Any:
        return reference(*args) if uses_reference() else handle(*args)

    return call

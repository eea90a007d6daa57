"""Which implementation of an op runs: a Triton kernel, the native kernel of csrc, or the vendor's library.

``IMPLEMENTATIONS`` says which exist; registry.register_op fills it. Where Triton and the vendor both support a shape,
``fastest`` runs the one that was measured to be faster (kernels.autotune). Triton is imported when the first of its
kernels is asked for: a machine without it never gets there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from resnet_fused.backend import choice, why_not_triton, why_plain
from resnet_fused.types import Activation, Gradient

if TYPE_CHECKING:
    from resnet_fused.kernels.autotune.search import Tunable
    from resnet_fused.kernels.launch import Config

#: Elements of a tensor that Triton kernels can address: they count in 32 bits.
MAX_NUMEL = 2**31
#: Kernel height or width that they have a mask bit for.
MAX_KERNEL_SIZE = 31


class Implementations(NamedTuple):
    """Of one op.

    reference: what it computes, by PyTorch alone; with the arguments of its schema.
    composed: GEMMs and convolutions of the vendor's library with native ops around them, or a Triton kernel where
    ``triton`` says that there is one and it is faster; None: csrc has a native kernel.
    on_cpu: what of it csrc computes on a CPU, where that is faster.
    """

    reference: Callable[..., Any]
    composed: Callable[..., Any] | None
    triton: bool
    on_cpu: str = ""


#: By the name of the op, in the order in which ops are registered.
IMPLEMENTATIONS: dict[str, Implementations] = {}


def status() -> list[dict[str, str]]:
    """One row per op and device type: {op, device, implementation, reason}; reason is "" where nothing is missing.

    implementation: native (csrc), vendor (the vendor's library and native ops), both (native where it is faster, of
    what ``reason`` says), triton (where it is faster than the vendor) or reference.
    """
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    rows = []
    for device in devices:
        missing = why_plain(device)
        for op, implementations in IMPLEMENTATIONS.items():
            implementation, reason = "native", missing
            if missing is not None:
                implementation = "reference"
            elif implementations.composed is not None:
                reason = why_not_triton(device) if implementations.triton else None
                implementation = "triton" if implementations.triton and reason is None else "vendor"
                if device == "cpu" and implementations.on_cpu and choice() == "auto":
                    implementation, reason = "native, vendor", implementations.on_cpu
            rows.append(
                {"op": op, "device": device, "implementation": implementation, "reason": reason or ""}
            )
    return rows


def runs_triton(x: Tensor, groups: int = 1) -> bool:
    """Whether Triton kernels support an activation, and a convolution of it with ``groups``."""
    return (
        why_not_triton(x.device.type) is None
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and groups == 1
        and x.numel() < MAX_NUMEL
    )


class TritonKernel(NamedTuple):
    """A launcher, and the configurations to try for its arguments (all but the configuration itself)."""

    launch: Callable[..., Any]
    configs: Callable[..., list[Config]]


@functools.cache
def _triton_kernels() -> dict[str, TritonKernel]:
    from resnet_fused.kernels import (
        conv1x1_bn_add_relu,
        conv_bn_stats,
        dgrad,
        folded_dgrad,
        folded_wgrad,
        input_covariance,
        wgrad,
    )

    return {
        "conv_bn_stats": TritonKernel(conv_bn_stats.conv_bn_stats, conv_bn_stats.configs),
        "dgrad": TritonKernel(dgrad.dgrad, dgrad.configs),
        "wgrad": TritonKernel(wgrad.wgrad, wgrad.configs),
        "input_covariance": TritonKernel(input_covariance.input_covariance, input_covariance.configs),
        "conv1x1_bn_add_relu": TritonKernel(
            conv1x1_bn_add_relu.conv1x1_bn_add_relu, conv1x1_bn_add_relu.configs
        ),
        "folded_wgrad": TritonKernel(folded_wgrad.folded_wgrad, folded_wgrad.configs),
        "folded_dgrad": TritonKernel(folded_dgrad.folded_dgrad, folded_dgrad.configs),
    }


@functools.cache
def _autotuner() -> ModuleType:
    from resnet_fused.kernels.autotune import search

    return search


@functools.cache
def coefficient_kernels() -> ModuleType:
    """The kernels that compute ``bn_coeffs`` and ``dy_coeffs``."""
    from resnet_fused.kernels import bn_coeffs

    return bn_coeffs


#: By op, sizes, dtype and device: the launcher, its configurations and the tuning key, so that a call is cheap.
_known: dict[Any, tuple[Any, list[Config], Any]] = {}


def clear_cache() -> None:
    """Configurations are computed again."""
    _known.clear()


def tunable(
    kernel: str,
    x: Tensor,
    sizes: Sequence[Any],
    arguments: tuple[Any, ...],
    vendor: Callable[[], Any],
    reference: Callable[..., Any],
    has_kernel: bool = True,
) -> Tunable:
    """A Triton kernel and what the vendor does instead, for the autotuner.

    Args:
        sizes: what distinguishes problems for which the fastest may differ, beside the dtype.
        arguments: of the launcher, but for the configuration, and of the reference.
        vendor: computes the results with the vendor's library.
        reference: computes them from arguments in a wider dtype, to check the kernel's.
        has_kernel: else there is only the vendor.
    """
    search = _autotuner()
    dtype = search.dtype_name(x.dtype)
    key = (kernel, *sizes, dtype, x.device)
    if key not in _known:
        tuning_key = search.TuningKey(kernel, tuple(int(size) for size in sizes), dtype)
        launch, configs = None, []
        if has_kernel:
            triton = _triton_kernels()[kernel]
            launch, configs = triton.launch, triton.configs(*arguments)
        _known[key] = launch, configs, tuning_key
    launch, configs, tuning_key = _known[key]

    def exact() -> Any:
        wide = torch.float64 if x.dtype == torch.float32 else torch.float32
        return reference(
            *tree_map_only(Tensor, lambda t: t.to(wide) if t.is_floating_point() else t, arguments)
        )

    result: Tunable = search.Tunable(
        tuning_key, configs, lambda config: launch(*arguments, config), vendor, exact
    )
    return result


def fastest(candidate: Tunable, device: torch.device) -> Any:
    """The results of the fastest configuration, or of the vendor if that is faster."""
    chosen = _autotuner().choose(candidate, device)
    return candidate.vendor() if chosen is None else candidate.run(chosen)


def fastest_sharing(candidates: list[Tunable], shared: Tunable, device: torch.device) -> list[Any]:
    """Results of the fastest combination of candidates whose vendor implementations all use that of ``shared``."""
    chosen = _autotuner().choose_sharing(candidates, shared, device)
    return [
        candidate.vendor() if config is None else candidate.run(config)
        for candidate, config in zip(candidates, chosen, strict=True)
    ]


def are_given(fields: Sequence[Tensor | None]) -> list[bool]:
    return [field is not None for field in fields]


def operand_is_given(operand: Activation | Gradient) -> list[bool]:
    """Without coefficients, which kernels compute themselves where they are not given."""
    return are_given(operand[1:6] if isinstance(operand, Activation) else operand[1:9])

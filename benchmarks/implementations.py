"""Who takes part: ours, eager PyTorch, the compiler and other libraries; and whether each computes the same."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

from benchmarks.harness import OURS, Entrant, failure
from benchmarks.peers import CONTIGUOUS, PEERS, Missing, peer_model
from benchmarks.precision import Precision
from tests.accuracy import relative_error

BASELINE = "eager_channels_last"
EAGER = ("eager", BASELINE)
COMPILED = {"compile_default": "default", "compile_max_autotune": "max-autotune"}
IMPLS = (OURS, *EAGER, *COMPILED, *PEERS)
#: Stands for the float64 computation among the names of implementations.
EXACT = "exact"
DRAWS = 6

#: A module, or a function of tensors.
Module = TypeVar("Module")
#: Results of the implementation of a name, on the inputs of one draw.
Attempt = Callable[[str], list[Tensor]]


def default_impls(device: torch.device, layer: str) -> tuple[str, ...]:
    """All on a GPU. On a CPU no other library has kernels, and a quarter of an hour has to do for the whole suite."""
    on_cpu = {
        "op": (OURS, *EAGER),
        "block": (OURS, BASELINE, "compile_default"),
        "model": (OURS, *EAGER, "compile_default"),
    }
    return IMPLS if device.type == "cuda" else on_cpu[layer]


def modules(
    impls: Iterable[str], eager: nn.Module, fused: nn.Module, precision: Precision, device: torch.device
) -> dict[str, nn.Module | Missing]:
    """A module of each name with the same weights.

    Args:
        eager: the reference's, channels_last, on the device; copied for each but ours.
        fused: ours.
    """
    found: dict[str, nn.Module | Missing] = {}
    # Else the compiler counts this module as another shape of the one before, and gives up on static ones.
    torch.compiler.reset()
    for impl in impls:
        if impl == OURS:
            found[impl] = fused
            continue
        own = copy.deepcopy(eager)
        if impl == "eager":
            found[impl] = own.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        elif impl in COMPILED:
            own.compile(mode=COMPILED[impl], dynamic=False)
            found[impl] = own
        else:
            found[impl] = own if impl == BASELINE else peer_model(impl, own, precision.dtype, device)
    return found


def laid_out(impl: str, x: Tensor) -> Tensor:
    """An input as the implementation wants it: channels_last for all but eager PyTorch's own default and some peers."""
    return (
        x.contiguous() if impl in ("eager", *CONTIGUOUS) else x.contiguous(memory_format=torch.channels_last)
    )


def begin(impl: str) -> None:
    """Says that a step begins, to which a compiler that replays CUDA graphs owes no results of the one before."""
    if impl in COMPILED:
        torch.compiler.cudagraph_mark_step_begin()


def verdicts(
    draw: Callable[[], Attempt], impls: Iterable[str], eps: float, draws: int = DRAWS
) -> dict[str, str]:
    """A note for each implementation: empty where it computes what the reference does, else what is wrong.

    Held to the accuracy rule with eager PyTorch in channels_last as the yardstick, each result (``Attempt``'s, of which
    the first is the output) in at least a quarter of the draws: see tests/ops/test_residual_block.py. The yardstick has
    to give the float64 output to 10 % itself. What others raise becomes their note; ours raises.
    """
    impls = list(impls)
    notes: dict[str, str] = {}
    misses: Counter[tuple[str, int]] = Counter()
    worst: dict[str, str] = {}
    for count in range(1, draws + 1):
        attempt = draw()
        exact = attempt(EXACT)
        limits = [1.5 * relative_error(x, e) + 4 * eps for x, e in zip(attempt(BASELINE), exact, strict=True)]
        if not limits[0] <= 0.15 + 4 * eps:
            notes[BASELINE] = f"its output differs from float64's by {(limits[0] - 4 * eps) / 1.5:.2g}"
        for impl in impls:
            if impl in notes or impl == BASELINE:
                continue
            try:
                errors = [relative_error(x, e) for x, e in zip(attempt(impl), exact, strict=True)]
            except Exception as raised:  # whatever another library raises
                if impl == OURS:
                    raise
                notes[impl] = failure(raised)
                continue
            for i, (error, limit) in enumerate(zip(errors, limits, strict=True)):
                if not error <= limit:
                    misses[impl, i] += 1
                    worst[impl] = f"result {i} differs from float64's by {error:.2g}, allowed {limit:.2g}"
        wrong = {impl for (impl, _), missed in misses.items() if missed > 3 / 4 * count}
        if not wrong - notes.keys():
            break
    return {impl: notes.get(impl, worst[impl] if impl in wrong else "") for impl in impls}


def entrants(
    found: dict[str, Module | Missing],
    notes: dict[str, str],
    run_of: Callable[[str, Module], Callable[[], object]],
) -> list[Entrant]:
    """An entrant for each of them; one that is missing does not run."""
    return [
        Entrant(impl, None, one.reason)
        if isinstance(one, Missing)
        else Entrant(impl, run_of(impl, one), notes[impl])
        for impl, one in found.items()
    ]

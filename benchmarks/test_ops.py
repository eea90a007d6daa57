"""Each fused op against the eager sequence it replaces, at the shapes of ResNet-50, channels_last."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.conftest import Compare
from benchmarks.providers import BATCH, PEERS, make_providers, to_layout
from benchmarks.roofline import Ceilings, op_bytes
from resnet_fused import functional as fused
from resnet_fused.cli.precision import Precision
from resnet_fused.cli.steps import COMPILED, begin_step
from resnet_fused.measure import EXACT, OURS, Case, Results, check_accuracy
from resnet_fused.types import BatchNorm

LAYER = "op"
#: Channels and image size of every batch norm whose ReLU follows at once.
INNER = [(64, 56), (128, 56), (128, 28), (256, 28), (256, 14), (512, 14), (512, 7)]
#: The same at the ends of blocks.
OUTER = [(256, 56), (512, 28), (1024, 14), (2048, 7)]
STEM = [(64, 112)]

Function = Callable[..., Tensor]


def eager_bn_relu(y: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.relu(F.batch_norm(y, None, None, w, b, True), inplace=True)


def eager_bn_add_relu(y: Tensor, w: Tensor, b: Tensor, x: Tensor) -> Tensor:
    out = F.batch_norm(y, None, None, w, b, True)
    out += x
    return F.relu(out, inplace=True)


def eager_bn_bn_add_relu(y: Tensor, w: Tensor, b: Tensor, x: Tensor, wx: Tensor, bx: Tensor) -> Tensor:
    return eager_bn_add_relu(y, w, b, F.batch_norm(x, None, None, wx, bx, True))


def eager_bn_relu_maxpool(y: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.max_pool2d(eager_bn_relu(y, w, b), 3, 2, 1)


def fused_bn_relu(y: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return fused.bn_relu(y, None, None, w, b, True)


def fused_bn_add_relu(y: Tensor, w: Tensor, b: Tensor, x: Tensor) -> Tensor:
    return fused.bn_add_relu(y, x, None, None, w, b, True)


def fused_bn_bn_add_relu(y: Tensor, w: Tensor, b: Tensor, x: Tensor, wx: Tensor, bx: Tensor) -> Tensor:
    norm, skip_norm = (BatchNorm(None, None, *vectors, True, 0.1, 1e-5) for vectors in ((w, b), (wx, bx)))
    return fused.bn_bn_add_relu(y, x, norm, skip_norm)


def fused_bn_relu_maxpool(y: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return fused.bn_relu_maxpool(y, None, None, w, b, True)


#: name: (eager, fused, shapes, which arguments there are: a = activation, v = vector of channels)
OPS: dict[str, tuple[Function, Function, list[tuple[int, int]], str]] = {
    "bn_relu": (eager_bn_relu, fused_bn_relu, STEM + INNER, "avv"),
    "bn_add_relu": (eager_bn_add_relu, fused_bn_add_relu, OUTER, "avva"),
    "bn_bn_add_relu": (eager_bn_bn_add_relu, fused_bn_bn_add_relu, OUTER, "avvavv"),
    "bn_relu_maxpool": (eager_bn_relu_maxpool, fused_bn_relu_maxpool, STEM, "avv"),
}
CASES = [(name, *shape) for name, (_, _, shapes, _) in OPS.items() for shape in shapes]


def make_inputs(
    kinds: str, channels: int, size: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    def make(kind: str) -> Tensor:
        if kind == "v":
            return torch.randn(channels, device=device).requires_grad_()
        x = torch.randn(BATCH, channels, size, size, device=device, dtype=dtype)
        return x.to(memory_format=torch.channels_last).requires_grad_()

    return [make(kind) for kind in kinds]


def function_of(provider: str, name: str) -> Function:
    eager, ours, *_ = OPS[name]
    if provider in COMPILED:
        return torch.compile(eager, mode=COMPILED[provider], dynamic=False)
    return ours if provider == OURS else eager


@pytest.mark.parametrize(("name", "channels", "size"), CASES)
def test_op(
    name: str,
    channels: int,
    size: int,
    precision: Precision,
    device: torch.device,
    names: tuple[str, ...],
    ceilings: Ceilings,
    compare: Compare,
) -> None:
    torch.compiler.reset()
    eager, *_, kinds = OPS[name]
    functions = {key: function_of(key, name) for key in names if key not in PEERS}
    inputs: list[Tensor] = []
    grad = torch.empty(0)

    def draw(seed: int) -> Results:
        nonlocal inputs, grad
        torch.manual_seed(seed)
        inputs = make_inputs(kinds, channels, size, precision.dtype, device)
        grad = torch.randn_like(eager(*inputs)).masked_fill(undecided(eager, inputs), 0.0)

        def results(provider: str) -> list[Tensor]:
            begin_step(provider)
            given = [_leaf(provider, x, torch.float64 if provider == EXACT else x.dtype) for x in inputs]
            out = functions.get(provider, eager)(*given)
            return [out.detach(), *torch.autograd.grad(out, given, grad.to(out.dtype))]

        return results

    notes = check_accuracy(draw, functions, precision.eps)

    def run_of(provider: str, op: Function) -> Callable[[], object]:
        given = [_leaf(provider, x, x.dtype) for x in inputs]
        incoming = to_layout(provider, grad)

        def run() -> object:
            begin_step(provider)
            return torch.autograd.grad(op(*given), given, incoming)

        return run

    shape = (BATCH, channels, size, size)
    roofline_ms = op_bytes(name, shape, precision.name) / ceilings.bandwidth * 1e3
    case = Case(LAYER, name, "fwd_bwd", precision.name, BATCH, "x".join(map(str, shape)), roofline_ms)
    compare(case, make_providers(functions, functions, notes, run_of), 12 if size > 28 else 24)


def _leaf(provider: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.detach().to(dtype)
    return (to_layout(provider, x) if x.dim() == 4 else x).requires_grad_()


def undecided(eager: Function, inputs: list[Tensor]) -> Tensor:
    """Where rounding may decide whether, or to which element of a window, the output's gradient goes: bool."""
    exact = [x.detach().double() for x in inputs]
    if eager is not eager_bn_relu_maxpool:
        out = eager(*exact)
        return (out != 0) & (out < 1e-3)
    values = eager_bn_relu(*exact)
    out = F.max_pool2d(values, 3, 2, 1)
    windows = F.unfold(values, 3, padding=1, stride=2).view(*values.shape[:2], 9, *out.shape[2:])
    first, second = windows.topk(2, dim=2).values.unbind(2)
    return (out != 0) & ((out < 1e-3) | (first - second < 1e-3))

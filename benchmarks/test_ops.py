"""Each fused op against the eager sequence it replaces, at the shapes of ResNet-50, channels_last."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import BATCH, Comparison
from resnet_fused import functional as fused
from resnet_fused.ops import Norm
from tests.accuracy import assert_as_accurate

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
    norm, skip_norm = (Norm(None, None, *vectors, True, 0.1, 1e-5) for vectors in ((w, b), (wx, bx)))
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


@pytest.mark.parametrize("mode", ["fwd_bwd", "bwd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("name", "channels", "size"), CASES)
def test_op(
    name: str,
    channels: int,
    size: int,
    dtype: torch.dtype,
    mode: str,
    device: torch.device,
    compare: Callable[[Comparison, Callable[[], object], Callable[[], object], int], None],
) -> None:
    eager, fused_op, _, kinds = OPS[name]
    inputs = make_inputs(kinds, channels, size, dtype, device)
    results = {op: op(*inputs) for op in (eager, fused_op)}
    grad = torch.randn_like(results[eager])
    check(eager, fused_op, inputs, grad)

    def step(op: Function) -> Callable[[], object]:
        if mode == "bwd":
            return lambda: torch.autograd.grad(results[op], inputs, grad, retain_graph=True)
        return lambda: torch.autograd.grad(op(*inputs), inputs, grad)

    shape = f"{BATCH}x{channels}x{size}x{size}"
    label = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    compare(
        Comparison("op", name, mode, label, BATCH, shape),
        step(eager),
        step(fused_op),
        20 if size > 28 else 40,
    )


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


def check(eager: Function, fused_op: Function, inputs: list[Tensor], grad: Tensor) -> None:
    """Holds the fused op to the accuracy rule on the very inputs that are timed."""
    grad = grad.masked_fill(undecided(eager, inputs), 0.0)

    def outputs(op: Function, dtype: torch.dtype | None) -> list[Tensor]:
        copies = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
        out = op(*copies)
        return [out.detach(), *torch.autograd.grad(out, copies, grad.to(out.dtype))]

    found = zip(outputs(fused_op, None), outputs(eager, None), outputs(eager, torch.float64), strict=True)
    for i, (by_fused, by_eager, exact) in enumerate(found):
        assert_as_accurate(f"result {i}", by_fused, by_eager, exact)

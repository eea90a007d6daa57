"""What has the same bits in every run, and with every number of threads; ``make determinism`` records it.

On a CPU only oneDNN's convolutions depend on the number of threads: their partial sums are one for each thread. They do
so in eager PyTorch too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused
from tests.model_pairs import KINDS, make_model
from tests.ops.operands import LAYOUTS, NATIVE, OPS, copied, native_arguments, tensors
from tests.threads import assert_independent_of_threads, assert_same_bits, threads

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
by_dtype = pytest.mark.parametrize("dtype", DTYPES)
by_kind = pytest.mark.parametrize("kind", KINDS)


#: What ops call of the vendor's convolutions.
CONVOLUTIONS = (
    (torch.ops.aten.convolution, "default"),
    (torch.ops.aten.convolution_backward, "default"),
    (torch.ops.mkldnn._convolution_pointwise_, "binary"),
    (torch, "conv2d"),
)


def on_one_thread(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with threads(1):
            return function(*args, **kwargs)

    return run


@contextlib.contextmanager
def convolutions_on_one_thread() -> Iterator[None]:
    """Runs the vendor's convolutions of residual blocks on one thread, whatever the number of threads is."""
    with contextlib.ExitStack() as stack:
        for owner, name in CONVOLUTIONS:
            stack.enter_context(mock.patch.object(owner, name, on_one_thread(getattr(owner, name))))
        yield


def trained(kind: str, dtype: str, device: str = "cpu", steps: int = 1) -> list[Tensor]:
    """Outputs, gradients and the final state_dict of some steps of SGD, from the same weights every time."""
    torch.manual_seed(0)
    model: nn.Module = make_model(resnet_fused, kind, layers=[1, 1, 1, 1]).to(
        device, memory_format=torch.channels_last
    )
    x = torch.randn(6, 3, 48, 48, device=device).to(memory_format=torch.channels_last)
    if dtype == "fp64":
        model, x = model.double(), x.double()
    labels = torch.arange(len(x), device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast(device, DTYPES[dtype], enabled=dtype in ("bf16", "fp16")):
            out = model(x)
        F.cross_entropy(out if dtype == "fp64" else out.float(), labels).backward()
        found += [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
    return [*found, *model.state_dict().values()]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("name", NATIVE)
def test_ops_with_any_number_of_threads(name: str, layout: Any, dtype: str) -> None:
    """Batch norm, ReLU, addition and max-pooling in csrc: with 1, 2, 3 and 4 threads"""
    arguments = native_arguments(name, layout, DTYPES[dtype], True, (5, 24, 30, 31))

    def run() -> list[Tensor]:
        given = copied(arguments)
        return tensors([getattr(OPS, name)(*given), given])  # also those that are written

    assert_independent_of_threads(run)


@by_dtype
@by_kind
def test_training_twice(kind: str, dtype: str) -> None:
    """Steps of training on a CPU: two runs with two threads"""
    with threads(2):
        assert_same_bits(trained(kind, dtype), trained(kind, dtype), "in the second run")


@by_kind
def test_training_in_float64(kind: str) -> None:
    """Steps of training in float64 on a CPU: with 1, 2, 3 and 4 threads"""
    assert_independent_of_threads(lambda: trained(kind, "fp64"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@by_kind
def test_all_but_convolutions(kind: str, dtype: str) -> None:
    """Residual blocks on a CPU: with 1, 2, 3 and 4 threads, but for oneDNN's convolutions, which ran on one"""
    model = make_model(resnet_fused, kind, layers=[1, 1, 1, 1]).to(memory_format=torch.channels_last)
    blocks = nn.Sequential(model.layer1, model.layer2, model.layer3, model.layer4)
    x = torch.randn(6, 64, 12, 12).to(memory_format=torch.channels_last).requires_grad_()
    leaves = [x, *blocks.parameters()]

    def run() -> list[Tensor]:
        with torch.autocast("cpu", DTYPES[dtype], enabled=dtype != "fp32"):
            out = blocks(x)
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]

    with convolutions_on_one_thread():
        assert_independent_of_threads(run)


@pytest.mark.gpu
@by_dtype
@by_kind
def test_training_twice_on_a_gpu(kind: str, dtype: str) -> None:
    """Steps of training on a GPU: two runs"""
    assert_same_bits(trained(kind, dtype, "cuda"), trained(kind, dtype, "cuda"), "in the second run")

"""Whole blocks, forward and all gradients, against float64 by the accuracy rule; what they keep and allocate."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused
from resnet_fused import models, ops, reference
from resnet_fused.layout import dense
from resnet_fused.ops import block_backward
from resnet_fused.types import BatchNorm, ConvBN
from tests.accuracy import (
    DRAWS,
    DRAWS_OF_MEAN,
    HOSTILE_CASES,
    Results,
    assert_accurate,
    hostile_input,
    relative_error,
    shift_from_zero,
)
from tests.conftest import RESIDUAL_BLOCK
from tests.model_pairs import block_pair


@dataclass(frozen=True)
class Block:
    """Kernel sizes of the main path, and what the block does to shape. ``width``: inner channels, of the input's."""

    kernels: tuple[int, ...]
    expansion: float = 1.0  # output channels, of the input's
    width: float = 1.0
    stride: int = 1
    groups: int = 1
    dilation: int = 1
    downsample: bool = False


BLOCKS = {
    "bottleneck": Block((1, 3, 1), width=0.25),
    "bottleneck_stride": Block((1, 3, 1), expansion=2, width=0.5, stride=2, downsample=True),
    "bottleneck_downsample": Block((1, 3, 1), expansion=4, width=1, downsample=True),
    "bottleneck_groups": Block((1, 3, 1), width=0.5, groups=4),
    "bottleneck_dilation": Block((1, 3, 1), expansion=2, width=0.5, dilation=2, downsample=True),
    "bottleneck_wide": Block((1, 3, 1), width=2),  # K > N: not folded
    "basic_block": Block((3, 3)),
    "basic_block_stride": Block((3, 3), expansion=2, width=2, stride=2, downsample=True),
}


@dataclass
class Case:
    """The tensors of a block by name: x; of each convolution, the shortcut's last, weight, gamma, beta, mean, var."""

    block: Block
    tensors: dict[str, Tensor]

    @property
    def count(self) -> int:
        return len(self.block.kernels) + self.block.downsample

    @property
    def differentiable(self) -> list[str]:
        return ["x", *(f"{name}{i}" for i in range(self.count) for name in ("weight", "gamma", "beta"))]

    def to(self, dtype: torch.dtype | None) -> Case:
        """Fresh leaves; with a dtype all in that."""
        fresh = {n: (t if dtype is None else t.to(dtype)).detach() for n, t in self.tensors.items()}
        fresh |= {n: fresh[n].clone() for n in fresh if n.startswith(("mean", "var"))}
        return Case(self.block, fresh | {n: fresh[n].requires_grad_() for n in self.differentiable})

    def geometry(self, i: int) -> dict[str, Any]:
        """Arguments of the i-th convolution."""
        block, main = self.block, len(self.block.kernels)
        if i == main:
            return {"stride": block.stride}
        kernel = block.kernels[i]
        inner = kernel == 3 and i == (1 if main == 3 else 0)
        dilation = block.dilation if inner else 1
        return {
            "stride": block.stride if inner else 1,
            "padding": dilation * (kernel // 2),
            "dilation": dilation,
            "groups": block.groups if inner else 1,
        }


def make_case(
    name: str, hostile: str, dtype: torch.dtype, device: str = "cpu", images: int | None = None
) -> Case:
    block = BLOCKS[name]
    # Convolutions round what they add up to the dtype: of a smaller deviation from the mean nothing would be left.
    level = min(1e3, 0.25 / torch.finfo(dtype).eps)
    x = hostile_input(hostile, dtype, "channels_last", device, level).y[:images]
    if hostile == "two_values":
        x = x[
            :, :16
        ]  # fewer, so that seldom one of the channels within has two values that are by chance almost equal
    inputs = x.shape[1]
    outputs, width = round(inputs * block.expansion), max(1, int(inputs * block.width))
    if block.groups > 1:
        width = -(-width // block.groups) * block.groups
    channels = [inputs, *[width] * (len(block.kernels) - 1), outputs]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = {"x": x}
    probe = Case(block, tensors)
    for i in range(probe.count):
        shortcut = i == len(block.kernels)
        k, n = (inputs, outputs) if shortcut else (channels[i], channels[i + 1])
        kernel, groups = (1, 1) if shortcut else (block.kernels[i], probe.geometry(i).get("groups", 1))
        weight = torch.randn(n, k // groups, kernel, kernel) / (kernel * (k // groups) ** 0.5)
        gamma = 0.5 + torch.rand(n)
        if hostile == "gamma":
            gamma[::3], gamma[1::3] = 0.0, -gamma[1::3]
        tensors[f"weight{i}"] = weight.to(device, dtype)
        tensors[f"gamma{i}"], tensors[f"beta{i}"] = (
            gamma.to(device, wide),
            torch.randn(n).mul(0.3).to(device, wide),
        )
        tensors[f"mean{i}"], tensors[f"var{i}"] = (
            torch.randn(n).to(device, wide),
            (0.5 + torch.rand(n)).to(device, wide),
        )
    return probe


def plain(case: Case, training: bool, rectified: list[Tensor] | None = None) -> Tensor:
    """The block in plain PyTorch; ``rectified`` takes what its ReLUs are given."""
    t = case.tensors
    rectified = [] if rectified is None else rectified

    def normed(a: Tensor, i: int) -> Tensor:
        y = F.conv2d(a, t[f"weight{i}"], **case.geometry(i))
        return F.batch_norm(y, t[f"mean{i}"], t[f"var{i}"], t[f"gamma{i}"], t[f"beta{i}"], training)

    a, last = t["x"], len(case.block.kernels) - 1
    for i in range(last):
        rectified.append(normed(a, i))
        a = F.relu(rectified[-1])
    rectified.append(normed(a, last) + (normed(t["x"], last + 1) if case.block.downsample else t["x"]))
    return F.relu(rectified[-1])


def fused(case: Case, training: bool) -> Tensor:
    t, parts = case.tensors, []
    for i in range(case.count):
        geometry = {k: v if k == "groups" else (v, v) for k, v in case.geometry(i).items()}
        norm = BatchNorm(t[f"mean{i}"], t[f"var{i}"], t[f"gamma{i}"], t[f"beta{i}"], training, 0.1, 1e-5)
        parts.append(ConvBN(t[f"weight{i}"], norm, **geometry))
    main = len(case.block.kernels)
    return ops.residual_block(t["x"], parts[:main], parts[main] if case.block.downsample else None)


def results(
    op: Any, case: Case, grad: Tensor, training: bool, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    fresh = case.to(dtype)
    out = op(fresh, training)
    wanted = [fresh.tensors[name] for name in fresh.differentiable]
    grads = torch.autograd.grad(out, wanted, grad.to(out.dtype))
    found = {"output": out.detach()} | {f"d{n}": g for n, g in zip(fresh.differentiable, grads, strict=True)}
    if training:
        found |= {n: t for n, t in fresh.tensors.items() if n.startswith(("mean", "var"))}
    return found


def gradient_for(out: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient of the output that is zero where rounding alone decides whether the last ReLU lets it through."""
    grad = torch.randn_like(out).to(dtype).double()
    return grad.masked_fill(out.abs() < 16 * torch.finfo(dtype).eps, 0.0)


def hopeless(case: Case) -> set[str]:
    """Gradients that have gone back through a batch norm of two values.

    Of dz that leaves nothing but what eps and rounding make of it: the error is of any size, and by chance larger for
    one implementation or the other. (A single batch norm of two values is held to the rule in test_accuracy.py.)
    """
    ends = {len(case.block.kernels) - 1, case.count - 1 if case.block.downsample else -1}
    kept = {"output", *(f"d{name}{i}" for i in ends for name in ("gamma", "beta"))}
    return {f"d{name}" for name in case.differentiable} - kept


#: Block, input, and whether it trains.
RUNS = [
    *((name, "plain", training) for name in BLOCKS for training in (True, False)),
    *(
        (name, hostile, True)
        for name in ("bottleneck", "bottleneck_stride", "bottleneck_wide", "basic_block_stride")
        for hostile in HOSTILE_CASES[1:]
    ),
    *(("bottleneck_stride", hostile, False) for hostile in HOSTILE_CASES[1:]),
]


@pytest.mark.parametrize(("name", "hostile", "training"), RUNS)
def test_accuracy(name: str, hostile: str, training: bool, dtype: torch.dtype, device: str) -> None:
    check_accuracy(name, hostile, training, dtype, device)


def check_accuracy(
    name: str, hostile: str, training: bool, dtype: torch.dtype, device: str, images: int | None = None
) -> None:
    """The accuracy rule; in eps the dtype is that which activations between convolutions are rounded to.

    images: at most so many.
    """
    if hostile == "two_values" and dtype == torch.bfloat16 and BLOCKS[name].stride > 1:
        pytest.skip(
            "oneDNN's bfloat16 weight gradient of a strided 3x3 on one pixel is now and then NaN, in eager too"
        )

    def draw() -> tuple[Results, Results, Results]:
        case = make_case(name, hostile, dtype, device, images)
        shift_betas(case, training)
        grad = gradient_for(plain(case.to(torch.float64), training).detach(), dtype)
        found = (
            results(fused, case, grad, training, None),
            results(plain, case, grad, training, None),
            results(plain, case, grad, training, torch.float64),
        )
        left_out = hopeless(case) if hostile == "two_values" and training else set()
        by_fused, by_eager, exact = ({n: t for n, t in f.items() if n not in left_out} for f in found)
        return by_fused, by_eager, exact

    rounds_mean = hostile == "mean" and dtype == torch.float32
    assert_accurate(draw, dtype, DRAWS_OF_MEAN if rounds_mean else DRAWS)


def shift_betas(case: Case, training: bool) -> None:
    """Changes the betas so that rounding does not decide on which side of zero a ReLU's input lies."""
    for i in range(len(case.block.kernels)):
        values: list[Tensor] = []
        with torch.no_grad():
            plain(case.to(torch.float64), training, rectified=values)
        beta = case.tensors[f"beta{i}"]
        case.tensors[f"beta{i}"] = beta + shift_from_zero(values[i]).to(beta.dtype)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", BLOCKS)
def test_gradcheck(name: str, training: bool) -> None:
    nearest = 0.0
    while nearest < 1e-4:  # finite differences must not cross a kink
        case = make_case(name, "odd_size", torch.float64)
        case.tensors["x"] = dense(case.tensors["x"][:2, :, :9, :7])
        values: list[Tensor] = []
        plain(case.to(None), training, rectified=values)
        nearest = min(float(v.detach().abs().min()) for v in values)
    names = case.differentiable

    def call(*values: Tensor) -> Tensor:
        return fused(
            Case(case.block, case.to(None).tensors | dict(zip(names, values, strict=True))), training
        )

    inputs = [
        case.tensors[n].detach().clone(memory_format=torch.preserve_format).requires_grad_() for n in names
    ]
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", BLOCKS)
def test_float64_equals_plain(name: str, training: bool, backend: str) -> None:
    case = make_case(name, "plain", torch.float64)
    grad = torch.randn_like(plain(case.to(None), training))
    with resnet_fused.backend(backend):
        by_fused = results(fused, case, grad, training, None)
    by_plain = results(plain, case, grad, training, None)
    for result, expected in by_plain.items():
        assert relative_error(by_fused[result], expected) < 1e-10, result


@pytest.mark.parametrize("name", BLOCKS)
def test_in_chunks(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch is split into many chunks, which small tensors would not need."""
    monkeypatch.setattr("resnet_fused.ops.vendor_gemm.CHUNK_BYTES", {"cpu": 4096, "cuda": 4096})
    check_accuracy(name, "odd_size", True, dtype, "cpu")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "name", ["bottleneck", "bottleneck_downsample", "bottleneck_stride", "basic_block_stride"]
)
def test_recomputed(name: str, dtype: torch.dtype, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where folding costs too much a 1x1 convolution runs again in backward; in 16 bits its output is saved."""
    monkeypatch.setattr(RESIDUAL_BLOCK, "FOLD_LIMIT", 0)
    called = []
    convolve = block_backward.conv_bn_stats
    monkeypatch.setattr(block_backward, "conv_bn_stats", lambda *args: called.append(args) or convolve(*args))
    check_accuracy(name, "plain", training, dtype, "cpu")
    assert bool(called) == (dtype == torch.float32)


@pytest.mark.parametrize(
    ("kind", "inplanes", "planes", "outputs"),
    [("Bottleneck", 4, 1, None), ("Bottleneck", 3, 1, 4), ("BasicBlock", 4, 1, 1)],
    ids=["within", "within_downsample", "output"],
)
def test_blocks_with_one_channel(kind: str, inplanes: int, planes: int, outputs: int | None) -> None:
    shortcut = None
    if outputs is not None:
        shortcut = nn.Sequential(nn.Conv2d(inplanes, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
    eager = getattr(reference, kind)(inplanes, planes, 1, shortcut).double()
    fused = getattr(models, kind)(inplanes, planes, 1, copy.deepcopy(shortcut)).double()
    fused.load_state_dict(eager.state_dict())
    x = torch.randn(4, inplanes, 8, 6, dtype=torch.float64).to(memory_format=torch.channels_last)
    by_fused, by_eager = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours, theirs = fused(by_fused), eager(by_eager)
    assert relative_error(ours, theirs) < 1e-10
    grad = torch.randn_like(theirs)
    ours.backward(grad)
    theirs.backward(grad)
    assert by_fused.grad is not None and by_eager.grad is not None
    assert relative_error(by_fused.grad, by_eager.grad) < 1e-10


@pytest.mark.parametrize("evaluating", [False, True], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(5, 64, 3, 3), (4, 64, 8, 8), (2, 64, 28, 28)], ids=["45", "256", "1568"])
def test_statistics_of_one_batch(shape: tuple[int, ...], evaluating: bool) -> None:
    """momentum=None takes the first batch's statistics whole, where 0.1 of it hides nine tenths of their error.

    With bn2 in evaluation what conv3 reads has a mean of 100 deviations: which mean is not known before bn2 has run.
    """

    def draw() -> tuple[Results, Results, Results]:
        fused, eager = (block.float() for block in block_pair("bottleneck", torch.channels_last))
        for module in [*fused.modules(), *eager.modules()]:
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        if evaluating:
            for block in (fused, eager):
                block.get_submodule("bn2").eval().running_var.mul_(1e4)
        exact = copy.deepcopy(eager).double()
        x = torch.randn(shape).to(memory_format=torch.channels_last)
        for block in (fused, eager, exact):
            block(x.to(next(block.parameters()).dtype))
        variances = [
            {name: block.get_submodule(name).running_var for name in ("bn3", "downsample.1")}
            for block in (fused, eager, exact)
        ]
        return variances[0], variances[1], variances[2]

    assert_accurate(draw)


def test_last_convolution_with_a_stride() -> None:
    """It is not folded: folding subsamples the input of the shortcut alone."""
    shortcut = nn.Sequential(nn.Conv2d(16, 16, 1, stride=2, bias=False), nn.BatchNorm2d(16))
    eager = reference.Bottleneck(16, 4, 1, shortcut)
    eager.conv3 = nn.Conv2d(4, 16, 1, stride=2, bias=False)
    fused = models.Bottleneck(16, 4, 1, copy.deepcopy(shortcut))
    fused.conv3 = copy.deepcopy(eager.conv3)
    fused.load_state_dict(eager.state_dict())
    x = torch.randn(4, 16, 12, 12, dtype=torch.float64).to(memory_format=torch.channels_last)
    assert relative_error(fused.double()(x), eager.double()(x)) < 1e-10


def test_computes_no_gradient_that_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a frozen weight, and of an input that needs none."""
    needs = []
    run = block_backward.conv_backward
    monkeypatch.setattr(block_backward, "conv_backward", lambda *args: needs.append(args[-1]) or run(*args))
    block, _ = block_pair("basic", torch.channels_last, downsample=False)
    block.get_submodule("conv2").requires_grad_(False)
    x = torch.randn(2, 64, 8, 8, dtype=torch.float64).to(memory_format=torch.channels_last)
    block(x).sum().backward()
    assert needs == [[True, False], [False, True]]


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_autocast_leaves_float64_alone(kind: str) -> None:
    fused, eager = block_pair(kind, torch.channels_last)
    x = torch.randn(2, 64, 8, 8, dtype=torch.float64).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = fused(x), eager(x)
    assert ours.dtype == theirs.dtype == torch.float64
    assert relative_error(ours, theirs) < 1e-10

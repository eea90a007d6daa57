"""The kernels of a training step, each with the fewest bytes that it can move and its operations.

A kernel reads each of its inputs once and writes each of its outputs once. Weights, their gradients and covariances
count, in the dtype of the activations; vectors of channels do not. A 1x1 convolution with a stride touches only the
pixels that it uses. Shapes and operations of convolutions are those of the reference model, run on meta tensors;
nothing is fitted. ``benchmarks.roofline`` makes limits and tables of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from resnet_fused.reference import resnet

#: Bytes per element of an activation.
ELEMENT = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2}
SCHEDULES = ("eager", "fused", "folded")
#: Operations per element of kernels that are no GEMM; they never decide a limit.
STATISTICS, AFFINE, RELU, ADD, REDUCE, BN_BACKWARD, POOL = 4, 2, 1, 1, 5, 4, 8


@dataclass(frozen=True)
class Kernel:
    """One launch, for the whole batch.

    Args:
        name: the module and what the kernel does, such as ``layer1.0.conv2 wgrad``.
        block: ``stem``, ``layer1.0``, ... or ``rest`` (pooling, classifier, loss and optimizer).
        kind: conv, dgrad, wgrad and covariance are GEMMs; statistics, reduce, pointwise, pool and optimizer are not.
        bytes: read and written.
        flops: floating point operations, two for a multiply-add.
    """

    name: str
    block: str
    kind: str
    bytes: int
    flops: int


@dataclass(frozen=True)
class Conv:
    """A convolution; sizes in elements per image, operations per image.

    Args:
        whole_x, x: the input, and what the convolution reads of it.
        pixels: of the output.
        flops: of forward, and as many of dgrad and of wgrad.
        folds: a 1x1 convolution whose batch norm may be folded (section 2.3 of the design).
    """

    name: str
    inputs: int
    outputs: int
    whole_x: int
    x: int
    pixels: int
    weights: int
    flops: int
    folds: bool

    @property
    def y(self) -> int:
        return self.outputs * self.pixels

    @property
    def covariance_flops(self) -> int:
        """Of c^T c, and as many of c (W^T diag(b) W) in the input's gradient."""
        return 2 * self.pixels * self.inputs**2


@dataclass(frozen=True)
class Block:
    """A residual block: its convolutions in order, and the one of its downsample branch."""

    name: str
    convs: tuple[Conv, ...]
    downsample: Conv | None

    @property
    def x(self) -> int:
        return self.convs[0].whole_x

    @property
    def out(self) -> int:
        return self.convs[-1].y

    def last(self, folds: bool) -> list[Conv]:
        """The convolutions before the residual add: those that are folded, or those that are not."""
        return [c for c in (self.convs[-1], self.downsample) if c and c.folds == folds]


@dataclass(frozen=True)
class Network:
    """The stem's convolution, the elements of its pooled output per image, the blocks and the classifier."""

    stem: Conv
    pooled: int
    blocks: tuple[Block, ...]
    features: int
    classes: int
    parameters: int


@cache
def network(arch: str, image_size: int = 224) -> Network:
    """The shapes of an architecture.

    Raises:
        ValueError: an unknown architecture, or an image size below 1.
    """
    if arch not in resnet.ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}: choose one of {', '.join(resnet.ARCHITECTURES)}")
    _check_positive("image_size", image_size)
    shapes: dict[nn.Module, tuple[torch.Size, torch.Size]] = {}

    def record(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        shapes[module] = inputs[0].shape, output.shape

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = getattr(resnet, arch)().eval()
        for module in model.modules():
            module.register_forward_hook(record)
        model(torch.empty(1, 3, image_size, image_size))
    flops = counter.get_flop_counts()

    def conv(name: str) -> Conv:
        module = model.get_submodule(name)
        x, y = (shape.numel() for shape in shapes[module])
        pixels, is_1x1 = y // module.out_channels, module.kernel_size == (1, 1)
        return Conv(
            name,
            module.in_channels,
            module.out_channels,
            whole_x=x,
            x=module.in_channels * pixels if is_1x1 else x,
            pixels=pixels,
            weights=module.weight.numel(),
            flops=sum(flops[f"ResNet.{name}"].values()),
            folds=is_1x1 and module.groups == 1 and module.in_channels <= module.out_channels,
        )

    blocks = []
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        for name, module in getattr(model, stage).named_children():
            name = f"{stage}.{name}"
            convs = [conv(f"{name}.conv{i}") for i in (1, 2, 3) if hasattr(module, f"conv{i}")]
            downsample = conv(f"{name}.downsample.0") if module.downsample else None
            blocks.append(Block(name, tuple(convs), downsample))
    parameters = sum(p.numel() for p in model.parameters())
    pooled = shapes[model.maxpool][1].numel()
    return Network(
        conv("conv1"), pooled, tuple(blocks), model.fc.in_features, model.fc.out_features, parameters
    )


# Kernels


class _Step:
    """Collects kernels; elements and operations are given per image, weights once per launch."""

    def __init__(self, batch: int, dtype: str) -> None:
        self.batch, self.element, self.block = batch, ELEMENT[dtype], "stem"
        self.kernels: list[Kernel] = []

    def __call__(
        self, name: str, kind: str, *tensors: int, flops: int = 0, weights: int = 0, other: float = 0
    ) -> None:
        """Adds a kernel that moves ``tensors`` (elements of activations) and ``other`` (bytes), per image."""
        moved = self.batch * (self.element * sum(tensors) + other) + self.element * weights
        self.kernels.append(Kernel(name, self.block, kind, round(moved), self.batch * flops))

    def gemm(self, conv: Conv, kind: str, *tensors: int, other: float = 0) -> None:
        self(f"{conv.name} {kind}", kind, *tensors, flops=conv.flops, weights=conv.weights, other=other)


def _eager(add: _Step, net: Network) -> None:
    """Operator by operator, as autograd runs it; max-pool indices are int64."""

    def forward(c: Conv) -> None:
        add.gemm(c, "conv", c.x, c.y)
        add(f"{c.name} bn statistics", "statistics", c.y, flops=STATISTICS * c.y)
        add(f"{c.name} bn apply", "pointwise", c.y, c.y, flops=AFFINE * c.y)

    def relu(name: str, size: int) -> None:
        add(f"{name} relu", "pointwise", size, size, flops=RELU * size)

    def relu_backward(name: str, size: int) -> None:
        add(f"{name} relu backward", "pointwise", size, size, size, flops=RELU * size)

    def backward(c: Conv) -> None:
        add(f"{c.name} bn backward reduce", "reduce", c.y, c.y, flops=REDUCE * c.y)
        add(f"{c.name} bn backward", "pointwise", c.y, c.y, c.y, flops=BN_BACKWARD * c.y)
        if c is not net.stem:
            add.gemm(c, "dgrad", c.y, c.whole_x)
        add.gemm(c, "wgrad", c.y, c.x)

    forward(net.stem)
    relu(net.stem.name, net.stem.y)
    add("maxpool", "pool", net.stem.y, net.pooled, flops=POOL * net.pooled, other=8 * net.pooled)
    for block in net.blocks:
        add.block = block.name
        for c in block.convs:
            forward(c)
            if c is not block.convs[-1]:
                relu(c.name, c.y)
        if block.downsample:
            forward(block.downsample)
        add(f"{block.name} add", "pointwise", *[block.out] * 3, flops=ADD * block.out)
        relu(block.name, block.out)
    for block in reversed(net.blocks):
        add.block = block.name
        relu_backward(block.name, block.out)
        if block.downsample:
            backward(block.downsample)
        for c in reversed(block.convs):
            if c is not block.convs[-1]:
                relu_backward(c.name, c.y)
            backward(c)
        add(f"{block.name} add gradients", "pointwise", *[block.x] * 3, flops=ADD * block.x)
    add.block = "stem"
    add("maxpool backward", "pool", net.pooled, net.stem.y, flops=net.pooled, other=8 * net.pooled)
    relu_backward(net.stem.name, net.stem.y)
    backward(net.stem)


def _fused(add: _Step, net: Network, fold: bool) -> None:
    """Everything per channel in a prologue or an epilogue; with ``fold``, section 2.3 of the design wherever it can be.

    A masked gradient is never written: kernels that need ``dz`` read the gradient and its bits. The two gradients of a
    block's input are added in the epilogue of conv1's dgrad.
    """
    stem, indices = net.stem, net.pooled  # a max-pool index is one byte
    add.gemm(stem, "conv", stem.x, stem.y)
    add("bn+relu+maxpool", "pool", stem.y, net.pooled, flops=3 * stem.y + POOL * net.pooled, other=indices)
    for block in net.blocks:
        add.block = block.name
        folded = block.last(folds=True) if fold else []
        last, down, out = block.convs[-1], block.downsample, block.out
        for c in (*block.convs, *([down] if down else [])):
            if c not in folded:
                add.gemm(c, "conv", c.x, c.y)
        for c in folded:
            add(f"{c.name} covariance", "covariance", c.x, flops=c.covariance_flops, weights=c.inputs**2)
        # Reads the input of what is folded, the output of what is not, and the identity shortcut.
        operands = [c.x if c in folded else c.y for c in (last, down) if c] + ([] if down else [out])
        add(
            f"{block.name} bn+add+relu",
            "conv" if folded else "pointwise",
            *operands,
            out,
            flops=sum(c.flops for c in folded) + (AFFINE + ADD + RELU) * out,
            weights=sum(c.weights for c in folded),
            other=out / 8,
        )
    for block in reversed(net.blocks):
        add.block = block.name
        _fused_backward(add, block, block.last(folds=True) if fold else [])
    add.block = "stem"
    # The gradient before the max-pool is gathered from the pooled one in both kernels, and not written.
    add("bn+relu+maxpool backward reduce", "reduce", net.pooled, stem.y, flops=6 * stem.y, other=indices)
    add.gemm(stem, "wgrad", net.pooled, stem.y, stem.x, other=indices)


def _fused_backward(add: _Step, block: Block, folded: list[Conv]) -> None:
    down, out, bits = block.downsample, block.out, block.out / 8
    plain = [c for c in (block.convs[-1], down) if c and c not in folded]
    if plain:
        ys = [c.y for c in plain]
        add(f"{block.name} reduce", "reduce", out, *ys, flops=REDUCE * sum(ys), other=bits)
    if folded:  # one kernel each for both branches: dz is read once
        name, weights = "+".join(c.name for c in folded), sum(c.weights for c in folded)
        flops, more = sum(c.flops for c in folded), sum(c.covariance_flops for c in folded)
        xs, squares = [c.x for c in folded], sum(c.inputs**2 for c in folded)
        add(f"{name} folded wgrad", "wgrad", out, *xs, flops=flops, weights=weights, other=bits)
        add(
            f"{name} folded dgrad",
            "dgrad",
            out,
            *xs,
            *xs,
            flops=flops + more,
            weights=weights + squares,
            other=bits,
        )
    for c in plain:
        # The epilogue of dgrad reads the BN's input for its mask and sums; the downsample's input has no BN before it.
        before = [] if c is down else [c.x]
        add.gemm(c, "dgrad", out, c.y, *before, c.x, other=bits)
        add.gemm(c, "wgrad", out, c.y, c.x, other=bits)
    for c in reversed(block.convs[:-1]):
        if c is block.convs[0]:
            shortcut, mask = (down.x, 0.0) if down else (out, bits)
            add.gemm(c, "dgrad", c.y, c.y, shortcut, c.x, other=mask)
        else:
            add.gemm(c, "dgrad", c.y, c.y, c.x, c.x)
        add.gemm(c, "wgrad", c.y, c.y, c.x)


def _rest(add: _Step, net: Network) -> None:
    """Pooling, classifier, loss and SGD with momentum: one multi-tensor kernel over float32 parameters."""
    add.block = "rest"
    last, features, classes = net.blocks[-1].out, net.features, net.classes
    matrix = {"flops": 2 * features * classes, "weights": features * classes}
    add("avgpool", "pool", last, features, flops=last)
    add("fc", "conv", features, classes, **matrix)
    add("loss", "pointwise", classes, flops=3 * classes)
    add("loss backward", "pointwise", classes, classes, flops=3 * classes)
    add("fc dgrad", "dgrad", classes, features, **matrix)
    add("fc wgrad", "wgrad", classes, features, **matrix)
    add("avgpool backward", "pool", features, last, flops=last)
    # Reads parameter, momentum and gradient, writes the first two, and the copy of lower precision if there is one.
    per_parameter = 4 * 4 + add.element * (1 if add.element == 4 else 2)
    add.kernels.append(Kernel("sgd", "rest", "optimizer", net.parameters * per_parameter, net.parameters * 4))


def step(
    arch: str,
    batch: int,
    image_size: int = 224,
    dtype: str = "bf16",
    schedule: str = "folded",
    *,
    whole: bool = False,
) -> list[Kernel]:
    """The kernels of one training step, in order.

    Args:
        dtype: of activations, gradients and the weights that kernels read: fp32, tf32, bf16 or fp16.
        schedule: eager, fused or folded, the rows of the table in section 1 of the design.
        whole: with pooling, classifier, loss and optimizer; without, stem and blocks only.

    Raises:
        ValueError: one of the arguments is not one of the above.
    """
    _check_positive("batch", batch)
    check_choice("dtype", dtype, ELEMENT)
    check_choice("schedule", schedule, SCHEDULES)
    net, collected = network(arch, image_size), _Step(batch, dtype)
    if schedule == "eager":
        _eager(collected, net)
    else:
        _fused(collected, net, fold=schedule == "folded")
    if whole:
        _rest(collected, net)
    return collected.kernels


def _check_positive(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(choices)}")

"""What a training step has to move and compute: its kernels, each with the fewest bytes and its operations.

Every kernel reads each of its inputs once and writes each of its outputs once. Weights, their gradients and Gram
matrices count, in the dtype of the activations; vectors of channels do not. A 1x1 convolution with a stride touches
only the pixels that it uses. The list comes from walking the module tree of the reference model; nothing is fitted.
``benchmarks.roofline`` turns it into limits and tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from resnet_fused.reference import resnet

#: Bytes of an element of an activation.
ELEMENT = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2}
WAYS = ("eager", "fused", "folded", "vendor")
#: Operations per element of passes that are no GEMM; they never decide a limit.
STATISTICS, AFFINE, RELU, ADD, REDUCE, NORM_BACKWARD, POOL = 4, 2, 1, 1, 5, 4, 8


@dataclass(frozen=True)
class Kernel:
    """One launch, for the whole batch.

    Args:
        name: of the module that it belongs to and what it does, such as ``layer1.0.conv2 wgrad``.
        block: ``stem``, ``layer1.0``, ... or ``rest`` (pooling, classifier, loss and optimizer).
        kind: conv, dgrad, wgrad and gram are GEMMs; statistics, reduce, pointwise, pool and optimizer are passes.
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
    """A convolution without bias of square images; sizes in elements per image."""

    name: str
    inputs: int
    outputs: int
    kernel: int
    stride: int
    groups: int
    size_in: int
    size_out: int

    @property
    def whole_x(self) -> int:
        return self.inputs * self.size_in**2

    @property
    def x(self) -> int:
        """What is read of the input: of a strided 1x1, the pixels it uses."""
        return self.inputs * self.size_out**2 if self.kernel == 1 else self.whole_x

    @property
    def y(self) -> int:
        return self.outputs * self.size_out**2

    @property
    def weights(self) -> int:
        return self.outputs * self.inputs // self.groups * self.kernel**2

    @property
    def flops(self) -> int:
        """Of forward, and as many of dgrad and of wgrad."""
        return 2 * self.size_out**2 * self.weights

    @property
    def gram(self) -> int:
        """Operations of c^T c, and as many of the c (W^T diag(b) W) in da."""
        return 2 * self.size_out**2 * self.inputs**2

    @property
    def folds(self) -> bool:
        return self.kernel == 1 and self.groups == 1 and self.inputs <= self.outputs


@dataclass(frozen=True)
class Block:
    """A residual block: its convolutions in order, and the one of its shortcut."""

    name: str
    convs: tuple[Conv, ...]
    downsample: Conv | None

    @property
    def x(self) -> int:
        return self.convs[0].whole_x

    @property
    def out(self) -> int:
        return self.convs[-1].y

    @property
    def folds(self) -> bool:
        return self.convs[-1].folds


@dataclass(frozen=True)
class Network:
    """The stem's convolution, the elements of its pooled output per image, the blocks and the classifier."""

    stem: Conv
    pooled: int
    blocks: tuple[Block, ...]
    features: int
    classes: int
    parameters: int

    @property
    def convs(self) -> list[Conv]:
        blocks = [[*b.convs, *([b.downsample] if b.downsample else [])] for b in self.blocks]
        return [self.stem, *(conv for block in blocks for conv in block)]


@cache
def network(
    arch: str, image_size: int = 224, replace_stride_with_dilation: tuple[bool, bool, bool] | None = None
) -> Network:
    """The shapes of an architecture, from its module tree built without memory.

    Raises:
        ValueError: an unknown architecture, or an image size below 1.
    """
    if arch not in resnet.ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}: choose one of {', '.join(resnet.ARCHITECTURES)}")
    _positive("image_size", image_size)
    with torch.device("meta"):
        model = getattr(resnet, arch)(replace_stride_with_dilation=replace_stride_with_dilation)

    def conv(name: str, module: nn.Conv2d, size: int) -> Conv:
        (kernel, _), (stride, _), (dilation, _) = module.kernel_size, module.stride, module.dilation
        assert module.bias is None and not isinstance(module.padding, str)
        out = (size + 2 * module.padding[0] - dilation * (kernel - 1) - 1) // stride + 1
        return Conv(name, module.in_channels, module.out_channels, kernel, stride, module.groups, size, out)

    stem = conv("conv1", model.conv1, image_size)
    size = (stem.size_out - 1) // 2 + 1
    pooled = stem.outputs * size**2
    blocks = []
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        for i, module in enumerate(getattr(model, stage)):
            name, start, convs = f"{stage}.{i}", size, []
            for j in (1, 2, 3):
                if inner := getattr(module, f"conv{j}", None):
                    convs.append(conv(f"{name}.conv{j}", inner, size))
                    size = convs[-1].size_out
            shortcut = module.downsample
            downsample = None if shortcut is None else conv(f"{name}.downsample", shortcut[0], start)
            blocks.append(Block(name, tuple(convs), downsample))
    parameters = sum(p.numel() for p in model.parameters())
    return Network(stem, pooled, tuple(blocks), model.fc.in_features, model.fc.out_features, parameters)


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
        add(f"{c.name} bn backward", "pointwise", c.y, c.y, c.y, flops=NORM_BACKWARD * c.y)
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


def _fused(add: _Step, net: Network, fold: bool = False) -> None:
    """Everything per channel in a prologue or an epilogue; with ``fold``, section 2.3 of the design wherever it pays.

    A masked gradient is never written: who needs ``dz`` reads the gradient and its bits. The two gradients of a
    block's input are added in the epilogue of conv1's dgrad.
    """
    stem, windows = net.stem, net.pooled  # a window's index is one byte
    add.gemm(stem, "conv", stem.x, stem.y)
    add("bn+relu+maxpool", "pool", stem.y, net.pooled, flops=3 * stem.y + POOL * net.pooled, other=windows)
    for block in net.blocks:
        add.block = block.name
        last, down, out = block.convs[-1], block.downsample, block.out
        for c in block.convs:
            if not (fold and c.folds and c is last):
                add.gemm(c, "conv", c.x, c.y)
        folded = [c for c in (last, down) if c and fold and c.folds]
        if down and down not in folded:
            add.gemm(down, "conv", down.x, down.y)
        for c in folded:
            add(f"{c.name} gram", "gram", c.x, flops=c.gram, weights=c.inputs**2)
        # y of what is not folded, the input of what is, or the identity.
        sources = [c.x if c in folded else c.y for c in (last, down) if c] + ([] if down else [out])
        add(
            f"{block.name} end",
            "conv" if folded else "pointwise",
            *sources,
            out,
            flops=sum(c.flops for c in folded) + (AFFINE + ADD + RELU) * out,
            weights=sum(c.weights for c in folded),
            other=out / 8,
        )
    for block in reversed(net.blocks):
        add.block = block.name
        _fused_backward(add, block, fold)
    add.block = "stem"
    # The pool's gradient is gathered from the pooled one in both; dz is not written.
    add("bn+relu+maxpool backward reduce", "reduce", net.pooled, stem.y, flops=6 * stem.y, other=windows)
    add.gemm(stem, "wgrad", net.pooled, stem.y, stem.x, other=windows)


def _fused_backward(add: _Step, block: Block, fold: bool) -> None:
    last, down, out = block.convs[-1], block.downsample, block.out
    bits = out / 8
    folded = [c for c in (last, down) if c and fold and c.folds]
    plain = [c for c in (last, down) if c and c not in folded]
    if plain:
        ys = [c.y for c in plain]
        add(f"{block.name} end reduce", "reduce", out, *ys, flops=REDUCE * sum(ys), other=bits)
    if folded:  # Q and da of both in one kernel each: dz is read once
        name, weights = "+".join(c.name for c in folded), sum(c.weights for c in folded)
        flops, gram = sum(c.flops for c in folded), sum(c.gram for c in folded)
        xs = [c.x for c in folded]
        add(f"{name} Q", "wgrad", out, *xs, flops=flops, weights=weights, other=bits)
        squares = sum(c.inputs**2 for c in folded)
        add(f"{name} da", "dgrad", out, *xs, *xs, flops=flops + gram, weights=weights + squares, other=bits)
    for c in plain:
        # dgrad's epilogue reads the y below for its mask and sums; a shortcut's input has its own end for that.
        below = [] if c is down else [c.x]
        add.gemm(c, "dgrad", out, c.y, *below, c.x, other=bits)
        add.gemm(c, "wgrad", out, c.y, c.x, other=bits)
    for c in reversed(block.convs[:-1]):
        if c is block.convs[0]:
            shortcut, mask = (down.x, 0.0) if down else (out, bits)
            add.gemm(c, "dgrad", c.y, c.y, shortcut, c.x, other=mask)
        else:
            add.gemm(c, "dgrad", c.y, c.y, c.x, c.x)
        add.gemm(c, "wgrad", c.y, c.y, c.x)


def _vendor(add: _Step, net: Network) -> None:
    """Folded, with vendor GEMMs: no prologues, and no epilogue but that of a block's end, whose y stays in cache."""
    stem, pooled = net.stem, net.pooled

    def statistics(c: Conv) -> None:
        add(f"{c.name} statistics", "statistics", c.y, flops=STATISTICS * c.y)

    def activate(c: Conv, again: str = "") -> None:
        add(f"{c.name} bn+relu{again}", "pointwise", c.y, c.y, flops=(AFFINE + RELU) * c.y)

    add.gemm(stem, "conv", stem.x, stem.y)
    statistics(stem)
    add("bn+relu+maxpool", "pool", stem.y, pooled, flops=3 * stem.y + POOL * pooled, other=pooled)
    for block in net.blocks:
        add.block = block.name
        last, down, out = block.convs[-1], block.downsample, block.out
        folded = [c for c in (last, down) if c and c.folds]
        for c in block.convs:
            if c not in folded:
                add.gemm(c, "conv", c.x, c.y)
                statistics(c)
            if c is not last:
                activate(c)
        for c in folded:
            add(f"{c.name} gram", "gram", c.x, flops=c.gram, weights=c.inputs**2)
            add.gemm(c, "conv", c.x)
        kept = [] if last in folded else [last.y]
        residual = [] if down else [out]
        add(f"{block.name} end", "pointwise", *kept, *residual, out, flops=4 * out, other=out / 8)
    for block in reversed(net.blocks):
        add.block = block.name
        last, down, out = block.convs[-1], block.downsample, block.out
        if last.folds:
            add(f"{block.name} dz", "pointwise", out, out, flops=RELU * out, other=out / 8)
        else:
            add(f"{last.name} bn backward reduce", "reduce", out, out, flops=REDUCE * out, other=out / 8)
            add(f"{last.name} bn backward", "pointwise", *[out] * 4, flops=5 * out, other=out / 8)
        for c, below in reversed(list(zip(block.convs, (None, *block.convs), strict=False))):
            if below:
                activate(below, " again")
            if c is last and c.folds:
                _vendor_folded_backward(add, c)
            else:
                if c is not last:
                    add(f"{c.name} bn backward reduce", "reduce", c.y, c.y, flops=REDUCE * c.y)
                    add(f"{c.name} bn backward", "pointwise", *[c.y] * 3, flops=NORM_BACKWARD * c.y)
                add.gemm(c, "dgrad", c.y, c.x)
                add.gemm(c, "wgrad", c.y, c.x)
        if down:
            _vendor_folded_backward(add, down)
        # Of a strided shortcut only its pixels change: they are read and written in place.
        changed = down.x if down else block.x
        add(f"{block.name} add gradients", "pointwise", *[changed] * 3, flops=ADD * changed)
    add.block = "stem"
    add("bn+relu+maxpool backward reduce", "reduce", pooled, stem.y, flops=6 * stem.y, other=pooled)
    add("bn+relu+maxpool backward", "pool", pooled, stem.y, stem.y, flops=5 * stem.y, other=pooled)
    add.gemm(stem, "wgrad", stem.y, stem.x)


def _vendor_folded_backward(add: _Step, c: Conv) -> None:
    add(f"{c.name} Q", "wgrad", c.y, c.x, flops=c.flops, weights=c.weights)
    add(f"{c.name} da of dz", "dgrad", c.y, c.x, flops=c.flops, weights=c.weights)
    add(f"{c.name} da of c", "dgrad", c.x, c.x, c.x, flops=c.gram, weights=c.inputs**2)


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
    moved, flops = net.parameters * per_parameter, net.parameters * 4
    add.kernels.append(Kernel("sgd", "rest", "optimizer", moved, flops))


_WAYS: dict[str, Callable[[_Step, Network], None]] = {
    "eager": _eager,
    "fused": _fused,
    "folded": lambda add, net: _fused(add, net, fold=True),
    "vendor": _vendor,
}


def step(
    arch: str,
    batch: int,
    image_size: int = 224,
    dtype: str = "bf16",
    way: str = "folded",
    *,
    whole: bool = False,
    replace_stride_with_dilation: Sequence[bool] | None = None,
) -> list[Kernel]:
    """The kernels of one training step, in order.

    Args:
        arch: a key of ``resnet.ARCHITECTURES``.
        batch: images a add.
        image_size: height and width of an image in pixels.
        dtype: of activations, gradients and the weights that kernels read: fp32, tf32, bf16 or fp16.
        way: eager, fused, folded or vendor; see section 3 of the design and the functions of this module.
        whole: with pooling, classifier, loss and optimizer; without, stem and blocks only.
        replace_stride_with_dilation: as for the models.

    Raises:
        ValueError: one of the arguments is not one of the above.
    """
    net = _checked(arch, batch, image_size, dtype, way, replace_stride_with_dilation)
    collected = _Step(batch, dtype)
    _WAYS[way](collected, net)
    if whole:
        _rest(collected, net)
    return collected.kernels


def held_bytes(
    arch: str,
    batch: int,
    image_size: int = 224,
    dtype: str = "bf16",
    way: str = "folded",
    *,
    replace_stride_with_dilation: Sequence[bool] | None = None,
) -> int:
    """Bytes held from forward for backward, without parameters and buffers. Arguments and errors: those of ``step``.

    Eager holds the image, every convolution's output, every ReLU's output, pooled values and int64 indices, and
    under autocast a copy of every weight matrix. The other ways hold the image, one-byte indices, every block's
    input, the outputs of the convolutions that are not folded, one bit per element of a block's output, and per
    folded convolution its Gram matrix. All hold float32 vectors: two per batch norm and the mean of a Gram matrix.
    """
    net = _checked(arch, batch, image_size, dtype, way, replace_stride_with_dilation)
    element = ELEMENT[dtype]
    vectors = 2 * 4 * sum(c.outputs for c in net.convs)
    if way == "eager":
        relus = net.stem.y + sum(c.y for b in net.blocks for c in b.convs)
        elements = net.stem.x + sum(c.y for c in net.convs) + relus + net.pooled + net.features
        copies = sum(c.weights for c in net.convs) + net.features * net.classes if element < 4 else 0
        return batch * (element * elements + 8 * net.pooled) + element * copies + vectors
    last = {block.convs[-1] for block in net.blocks} | {b.downsample for b in net.blocks}
    folded = [c for c in net.convs if way != "fused" and c.folds and c in last]
    elements = net.stem.x + net.features + sum(b.x for b in net.blocks)
    elements += sum(c.y for c in net.convs if c not in folded)
    bits = sum(b.out for b in net.blocks)
    grams = 4 * sum(c.inputs**2 + c.inputs for c in folded)
    return batch * (element * elements + net.pooled) + -(-batch * bits // 8) + grams + vectors


def _checked(
    arch: str, batch: int, image_size: int, dtype: str, way: str, dilate: Sequence[bool] | None
) -> Network:
    _positive("batch", batch)
    if dtype not in ELEMENT:
        raise ValueError(f"unknown dtype {dtype!r}: choose one of {', '.join(ELEMENT)}")
    if way not in WAYS:
        raise ValueError(f"unknown way {way!r}: choose one of {', '.join(WAYS)}")
    if dilate is not None and len(dilate) != 3:
        raise ValueError(f"replace_stride_with_dilation must be None or three booleans, got {dilate!r}")
    return network(arch, image_size, None if dilate is None else (dilate[0], dilate[1], dilate[2]))


def _positive(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")

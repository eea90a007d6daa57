"""A whole residual block as one autograd.Function: bottleneck and basic block.

A block is a chain of convolutions, each with a batch norm and a ReLU, and one or two branches whose sum goes through a
last ReLU: the main path's last convolution with its batch norm, and the shortcut, which is the block's input or a
convolution of it with a batch norm of its own. A branch whose convolution is 1x1 is *folded* where that pays: its
output is never stored (folded_conv_bn). Where it doesn't, backward may compute the output again (output_policy).

For backward it saves its input, the outputs of the chain's convolutions (and of a branch that is neither folded nor
recomputed), one mask bit per element of its output, and per-channel vectors; relu(bn(y)) is recomputed where it is
needed.

Operands are *lazy* where Triton kernels or native convolutions can run: their prologues compute relu(bn(y)) and dy
while they load. Elsewhere each is materialized once, and shared by the ops that read it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.layout import dense, is_channels_last, statistics_dtype
from resnet_fused.ops import block_forward
from resnet_fused.ops._autograd import (
    autocast_dtype,
    differentiable_backward,
    needs_plain_backward,
    normalized,
    remember,
    remembered,
    save,
    saved,
    without_autocast,
)
from resnet_fused.ops.block_backward import Backward
from resnet_fused.ops.block_forward import BlockSpec, ConvSpec, Parameters
from resnet_fused.ops.bn_stats import (
    BnMode,
    check_bn,
    in_statistics_dtype,
    running_stats,
    update_running_stats,
)
from resnet_fused.ops.conv3x3 import supports_conv3x3
from resnet_fused.ops.conv_wgrad import supports_conv_wgrad
from resnet_fused.ops.dispatch import runs_triton
from resnet_fused.ops.inference import folded_block, forget, runs_folded
from resnet_fused.types import BatchNorm, BatchStats, ConvBN, ConvGeometry, InputCovariance


class _ResidualBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        skip: Tensor | None,
        spec: tuple[BlockSpec, list[BatchNorm] | None],
        *flat: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """The output; if ``bns`` is None, also means and unbiased variances for the running statistics."""
        block, bns = spec
        results = block_forward.forward(x, skip, block, _grouped(flat))
        out, mask, ys, stats, folds, branch_ys, running = results
        if bns is not None:
            # Here, since checkpointing stops a recomputed forward as soon as all is saved.
            update_running_stats(bns, running)
            running = []
        ctx.block = block
        ctx.counts = len(flat), len(stats), len(folds)
        rest = *(v for s in stats for v in s), *(v for f in folds for v in f)
        biases = flat[2::3]
        remember(ctx, biases)
        ctx.biased = tuple(bias is not None for bias in biases)
        # Outputs whose batch norm's backward reads the bias; Triton kernels do so in branches too.
        outputs = [*ys, *(branch_ys if block.triton else [])]
        copies = [_copied(*each) for each in zip_longest(biases, stats, outputs)]
        save(ctx, [x, skip, *ys, *branch_ys], [mask, *flat[0::3], *flat[1::3], *copies, *rest])
        ctx.mark_non_differentiable(*running)
        ctx.set_materialize_grads(False)
        return out, *running

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (3 + ctx.counts[0])
        flats, count, branches = ctx.counts
        activations, others = saved(ctx)
        x, skip, *ys = activations[:-branches]
        branch_ys = activations[-branches:]
        mask, values = others[0], iter(others[1:])
        take = lambda count: [next(values) for _ in range(count)]  # noqa: E731
        parameters = [Parameters(*p) for p in zip(*(take(flats // 3) for _ in range(3)), strict=True)]
        stats = [BatchStats(*take(len(BatchStats._fields))) for _ in range(count)]
        for i, (p, batch) in enumerate(zip(parameters, stats, strict=True)):
            if ctx.biased[i] and batch.bn_coeffs is not None:
                parameters[i] = p._replace(beta=batch.bn_coeffs[1])
        folds = [InputCovariance(*take(len(InputCovariance._fields))) for _ in range(branches)]
        needs = ctx.needs_input_grad
        with without_autocast(grad.device.type):
            if needs_plain_backward(grad):
                return _differentiable(ctx, x, skip, parameters, stats, grad)
            needed = needs[0], list(needs[3::3])
            backward = Backward(ctx.block, needed, x, skip, mask, parameters, ys, stats, folds, branch_ys)
            inputs = backward.run(grad)
        grads = (*inputs, None, *(g for conv in backward.grads for g in conv))
        return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


def _grouped(flat: Sequence[Tensor | None]) -> list[Parameters]:
    return [Parameters(*flat[i : i + 3]) for i in range(0, len(flat), 3)]  # type: ignore[arg-type]


def _copied(bias: Tensor | None, stats: BatchStats, output: Tensor | None) -> Tensor | None:
    """A bias for backward, which eager does not save: it may change in place before. None where it is not needed."""
    if bias is None or output is None or stats.bn_coeffs is not None:  # which hold it
        return None
    return bias.clone()


def _differentiable(
    ctx: Any,
    x: Tensor,
    skip: Tensor | None,
    parameters: list[Parameters],
    stats: list[BatchStats],
    grad: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients by plain PyTorch, that can be differentiated again."""
    block: BlockSpec = ctx.block
    biases = remembered(ctx)
    flat = [v for p, bias in zip(parameters, biases, strict=True) for v in p._replace(beta=bias)]

    def conv_bn(a: Tensor, p: Parameters, i: int) -> Tensor:
        spec = block.convs[i]
        mode = BnMode(spec.running_stats is None, spec.group)
        down, right = spec.input_stride
        y = F.conv2d(a[:, :, ::down, ::right], p.weight.to(a.dtype), None, *spec.geometry)
        return normalized(y, p.gamma, p.beta, stats[i], mode)

    def forward(x: Tensor, skip: Tensor | None, *flat: Tensor | None) -> Tensor:
        parameters, last = _grouped(flat), block.chain
        a = x
        for i in range(last):
            a = F.relu(conv_bn(a, parameters[i], i)).to(x.dtype)
        z = conv_bn(a, parameters[last], last)
        shortcut = x if skip is None else skip
        if len(parameters) > last + 1:
            shortcut = conv_bn(shortcut, parameters[-1], last + 1)
        return F.relu(z + shortcut).to(x.dtype)

    needs = (*ctx.needs_input_grad[:2], *ctx.needs_input_grad[3:])
    dx, dskip, *grads = differentiable_backward(forward, (x, skip, *flat), needs, grad)
    return dx, dskip, None, *grads


#: Multiplications per element of its output that folding a 1x1 convolution may cost beside those of the convolution:
#: above, computing the output again in backward takes less time and saves the same memory. Measured on a CPU.
FOLD_LIMIT = 50
#: The same, above which the output is saved.
RECOMPUTE_LIMIT = 300
#: Bytes of its output from which a 1x1 convolution is folded on a CPU: what is smaller stays in the cache, and the
#: passes that folding saves take less time than the ops that it adds.
FOLD_BYTES = 24 << 20
#: The same for computing it again. In 16 bits, and in blocks with groups, which have no native 3x3 convolution, it is
#: saved: there this takes more time than fusion saves.
RECOMPUTE_BYTES = 8 << 20
#: With few pixels the terms of dy nearly cancel, and folding rounds them separately.
FOLD_PIXELS = 32


def output_policy(
    conv: ConvBN, pixels: int, dtype: torch.dtype, lazy: bool = False, grouped: bool = False
) -> str:
    """What becomes of the output of a branch's convolution: it is "folded", "recomputed" in backward, or "saved".

    A 1x1 convolution that does not contract can be folded. It always pays where folding adds no pass over memory
    (``lazy``). Else, with K inputs, N outputs and P pixels, it takes P K^2 multiplications for the covariance and as
    many for its part of dc, and three times N K^2 for the variances, dW and W^T diag W.

    Args:
        grouped: whether a convolution of the block has groups.
    """
    n, k, *kernel = conv.weight.shape
    if kernel != [1, 1] or conv.groups != 1 or conv.padding != (0, 0) or k > n:
        return "saved"
    if not _always(pixels >= FOLD_PIXELS):
        return "saved"
    if lazy:
        return "folded"
    cost, outputs = k * k * (2 * pixels + 3 * n), pixels * n
    if _always(cost <= FOLD_LIMIT * outputs):
        return "folded" if _always(outputs * dtype.itemsize >= FOLD_BYTES) else "saved"
    if dtype.itemsize == 2 or grouped or not _always(outputs * dtype.itemsize >= RECOMPUTE_BYTES):
        return "saved"
    return "recomputed" if _always(cost <= RECOMPUTE_LIMIT * outputs) else "saved"


def _always(condition: bool) -> bool:
    """A condition on sizes that torch.compile must not guard on: False unless it holds for every size there may be."""
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def convolved_shape(shape: Sequence[int], convs: Sequence[ConvBN]) -> tuple[int, ...] | None:
    """(N, C, H, W) after some convolutions, one after the other; None if they do not fit."""
    n, channels, *size = shape
    for conv in convs:
        outputs, inputs, *kernel = conv.weight.shape
        if inputs * conv.groups != channels:
            return None
        channels = outputs
        size = [
            (size[i] + 2 * conv.padding[i] - conv.dilation[i] * (kernel[i] - 1) - 1) // conv.stride[i] + 1
            for i in range(2)
        ]
        if min(size) < 1:
            return None
    return n, channels, *size


def _spec(conv: ConvBN, dtype: torch.dtype, policy: str, subsamples: bool, lazy: bool) -> ConvSpec:
    """subsamples: whether a stride is one of the input."""
    input_stride, stride = (1, 1), conv.stride
    if subsamples and conv.weight.shape[2:] == (1, 1) and conv.padding == (0, 0):
        input_stride, stride = conv.stride, (1, 1)
    geometry = ConvGeometry(stride, conv.padding, conv.dilation, conv.groups)
    stats = None if conv.bn.training else running_stats(conv.bn, dtype)
    flags = policy == "folded", policy == "recomputed", lazy
    return ConvSpec(geometry, input_stride, conv.bn.eps, conv.bn.group, stats, *flags)


def _is_lazy(x: Tensor, conv: ConvBN) -> bool:
    """Whether there are native kernels that compute a convolution's operands in their prologues."""
    return supports_conv3x3(x, conv.weight, conv[2:]) or supports_conv_wgrad(
        x, conv.weight.shape, conv.groups
    )


def residual_block(
    x: Tensor, convs: Sequence[ConvBN], downsample: ConvBN | None, skip: Tensor | None = None
) -> Tensor:
    """relu(bn(conv(...relu(bn(conv(x)))...)) + shortcut), for ``x`` (N, C, H, W), dense in channels_last.

    Running statistics are updated in place where the batch's are used. Under autocast everything runs in its dtype.

    Args:
        convs: the convolutions of the main path with their batch norms; all but the last with a ReLU after them.
        downsample: that of the shortcut; None: the shortcut is its input.
        skip: the shortcut's input, (N, C', H', W'), channels_last; None: ``x``.

    Raises:
        ValueError: ``x`` is contiguous, the convolutions do not fit each other, or a batch has one value per channel.
        RuntimeError: a batch norm has another number of channels than its convolution's output, or no running
            statistics in evaluation.
    """
    device = x.device.type
    dtype = autocast_dtype(device) or x.dtype
    if x.dtype == torch.float64:
        dtype = x.dtype  # autocast leaves it alone
    x = dense(x).to(dtype)  # in this order: the other dtype of an expanded tensor would be contiguous
    if not is_channels_last(x):
        raise ValueError("a block as one op takes channels_last: use x.to(memory_format=torch.channels_last)")
    source = x if skip is None else dense(skip).to(dtype)
    shortcut = [] if downsample is None else [downsample]
    shape = convolved_shape(x.shape, convs)
    if shape is None or shape != convolved_shape(source.shape, shortcut):
        raise ValueError(f"the convolutions do not fit each other or an input of shape {tuple(x.shape)}")
    pixels, vectors = shape[0] * shape[2] * shape[3], statistics_dtype(dtype)
    every_conv, triton = [*convs, *shortcut], runs_triton(x)
    for conv in every_conv:
        check_bn(conv.bn, len(conv.weight))
    if runs_folded(x, every_conv):
        with without_autocast(device):
            return folded_block(x, source, convs, downsample, math.prod(shape))
    forget(every_conv)
    with without_autocast(device):
        chain = len(convs) - 1
        policies = ["saved"] * chain
        # Not where the gradient w.r.t. all pixels of an input is needed that has no other one.
        subsamples = [False] * len(convs) + [skip is None] * len(shortcut)
        rest = pixels, dtype, triton, any(conv.groups > 1 for conv in every_conv)
        policies += [
            output_policy(conv, *rest) if subsampled or conv.stride == (1, 1) else "saved"
            for conv, subsampled in zip(every_conv[chain:], subsamples[chain:], strict=True)
        ]
        specs = [
            _spec(conv, vectors, policy, subsampled, triton or (policy != "folded" and _is_lazy(x, conv)))
            for conv, policy, subsampled in zip(every_conv, policies, subsamples, strict=True)
        ]
        flat: list[Tensor | None] = []
        for conv in every_conv:
            bn = conv.bn
            flat += [conv.weight, in_statistics_dtype(bn.weight, x), in_statistics_dtype(bn.bias, x)]
        out: Tensor
        training = [conv.bn for conv in every_conv if conv.bn.training]
        # torch.compile takes no buffers that an autograd.Function changes.
        bns = None if torch.compiler.is_compiling() else training
        spec = BlockSpec(tuple(specs), chain, triton), bns
        out, *running = _ResidualBlock.apply(x, None if skip is None else source, spec, *flat)
    if bns is None:
        update_running_stats(training, running)
    return out

"""A residual block in evaluation on the CPU, without gradients: batch norms are folded into the weights before them.

    relu(bn(conv(x)) + residual) = relu(conv'(x) + bias' + residual)
    weight' = weight * scale,  bias' = bias - running_mean * scale,  scale = gamma / sqrt(running_var + eps)

Each convolution is one kernel, which adds the residual too: oneDNN's, or for 3x3 convolutions ours where that was
measured to be faster (conv3x3). Weights are folded and laid out for the kernel once, see ``_Folded``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from resnet_fused.backend import why_plain
from resnet_fused.ops.conv3x3 import conv3x3_filters, conv3x3_inference, runs_conv3x3
from resnet_fused.ops.masked_grad import fresh_like
from resnet_fused.ops.vendor_gemm import CHUNK_BYTES, HAS_ONEDNN
from resnet_fused.types import ConvBN

_mkldnn = torch.ops.mkldnn


def runs_folded(x: Tensor, convs: Sequence[ConvBN]) -> bool:
    """Whether a block runs on ``x`` with its batch norms folded into its weights."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or any(conv.bn.training for conv in convs):
        return False
    if not (HAS_ONEDNN and torch._C._get_mkldnn_enabled() and why_plain("cpu") is None):
        return False
    weights = [t for conv in convs for t in _sources(conv) if t is not None]
    return (
        not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights)))
        and type(x) is Tensor
        and all(type(t) in (Tensor, torch.nn.Parameter) for t in weights)
        and not any(t.is_inference() or t.device.type != "cpu" for t in weights)
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and _mkldnn._is_mkldnn_bf16_supported()))
    )


def _sources(conv: ConvBN) -> tuple[Tensor | None, ...]:
    bn = conv.bn
    return conv.weight, bn.running_mean, bn.running_var, bn.weight, bn.bias


def _geometry(conv: ConvBN) -> tuple[Any, ...]:
    """As the ops of torch.ops.mkldnn take it."""
    return conv.padding, conv.stride, conv.dilation, conv.groups


class _Folded:
    """A convolution with the batch norm folded into it, in the layouts of the kernels that have run.

    Valid as long as ``signature`` is that of the convolution: version counters tell whether PyTorch changed a tensor in
    place, addresses whether it was replaced, and a checksum of 64 elements of each whether something changed it that
    PyTorch doesn't count, as an assignment to ``parameter.data``.
    """

    def __init__(self, conv: ConvBN, signature: tuple[Any, ...]) -> None:
        self.signature = signature
        self.bias = self._fold(conv)[1].float()
        self._filters: Tensor | None = None
        self._weight: Tensor | None = None
        self._packed: tuple[torch.Size, Tensor | None] = torch.Size(), None

    @staticmethod
    def signature_of(conv: ConvBN, dtype: torch.dtype) -> tuple[Any, ...]:
        tensors = _sources(conv)
        counters = (None if t is None else (t._version, t.data_ptr(), t.dtype) for t in tensors)
        checksum = torch.ops.resnet_fused.sampled_checksum.default(*tensors)
        return dtype, conv.bn.eps, *conv[2:], checksum, *counters

    @staticmethod
    def _fold(conv: ConvBN) -> tuple[Tensor, Tensor]:
        """(weight', bias') in float64."""
        weight, mean, var, gamma, beta = (None if t is None else t.detach().double() for t in _sources(conv))
        assert weight is not None and mean is not None and var is not None
        scale = torch.rsqrt(var + conv.bn.eps) * (1 if gamma is None else gamma)
        return weight * scale.view(-1, 1, 1, 1), (0 if beta is None else beta) - mean * scale

    def filters(self, conv: ConvBN) -> Tensor:
        """For conv3x3_inference."""
        if self._filters is None:
            self._filters = conv3x3_filters(self._fold(conv)[0].float())
        return self._filters

    def for_vendor(self, conv: ConvBN, x: Tensor) -> Tensor:
        """For oneDNN; in the layout that it prefers for ``x``, where the shape of ``x`` is that of the call before.

        For another shape it may prefer another layout, and takes long to get there from this one.
        """
        if self._weight is None:
            self._weight = self._fold(conv)[0].to(x.dtype, memory_format=torch.channels_last)
        shape, packed = self._packed
        if shape != x.shape:
            self._packed = x.shape, None
            return self._weight
        if packed is None:
            packed = _mkldnn._reorder_convolution_weight(self._weight, *_geometry(conv), x.shape)
            self._packed = shape, packed
        return packed


#: By weight. Other processes and copies of a model fold for themselves.
_folded = WeakTensorKeyDictionary()


def forget(convs: Sequence[ConvBN]) -> None:
    """Frees what was computed from the weights of convolutions, which are trained again."""
    if not torch.compiler.is_compiling() and _folded:
        for conv in convs:
            _folded.pop(conv.weight, None)


def _of(conv: ConvBN, dtype: torch.dtype) -> _Folded:
    signature = _Folded.signature_of(conv, dtype)
    folded: _Folded | None = _folded.get(conv.weight)
    if folded is None or folded.signature != signature:
        folded = _folded[conv.weight] = _Folded(conv, signature)
    return folded


def _conv_bias(x: Tensor, conv: ConvBN, relu: bool, residual: Tensor | None = None) -> Tensor:
    """conv'(x) + bias' + residual, with a ReLU after it where ``relu``."""
    folded = _of(conv, x.dtype)
    if relu and runs_conv3x3("inference", x, conv.weight, conv[2:]):
        return conv3x3_inference(x, folded.filters(conv), folded.bias, residual)
    geometry = _geometry(conv)
    weight, bias = folded.for_vendor(conv, x), folded.bias
    y: Tensor
    if residual is None or conv.groups > 1:  # there is no sum after a grouped convolution
        y = _mkldnn._convolution_pointwise.default(x, weight, bias, *geometry, "none", [], "")
        y = y if residual is None else y.add_(residual)
    else:
        bias = bias.to(x.dtype)  # it takes no other
        y = _mkldnn._convolution_pointwise.binary(
            x, residual, weight, bias, *geometry, "add", 1.0, None, [], None
        )
    # Not oneDNN's ReLU, which makes zero of NaN. One of its own takes up to 4 % of a model's time.
    y = y.relu_() if relu else y
    return y.contiguous(memory_format=torch.channels_last)


def _block(x: Tensor, skip: Tensor, convs: Sequence[ConvBN], downsample: ConvBN | None) -> Tensor:
    a = x
    for conv in convs[:-1]:
        a = _conv_bias(a, conv, relu=True)
    skip = skip if downsample is None else _conv_bias(skip, downsample, relu=False)
    return _conv_bias(a, convs[-1], relu=True, residual=skip)


def folded_block(
    x: Tensor, skip: Tensor, convs: Sequence[ConvBN], downsample: ConvBN | None, outputs: int
) -> Tensor:
    """ops.residual_block for operands that ``runs_folded`` accepts. ``outputs``: elements of the result."""
    largest = max(x.numel(), skip.numel(), outputs)
    return by_images(lambda x, skip: _block(x, skip, convs, downsample), (x, skip), largest)


def by_images(run: Callable[..., Tensor], inputs: Sequence[Tensor], elements: int) -> Tensor:
    """``run(*inputs)``, a few images at a time: what one kernel writes is in the cache when the next reads it.

    Args:
        elements: of the largest tensor that ``run`` reads or makes.
    """
    images, itemsize = len(inputs[0]), inputs[0].element_size()
    chunks = -(-images // max(1, CHUNK_BYTES["cpu"] * images // (elements * itemsize)))
    if chunks == 1:
        return run(*inputs)
    out, at_once = None, -(-images // chunks)
    for first in range(0, images, at_once):
        part = run(*(x[first : first + at_once] for x in inputs))
        if out is None:
            out = fresh_like(part, images)
        out[first : first + at_once].copy_(part)
    assert out is not None
    return out

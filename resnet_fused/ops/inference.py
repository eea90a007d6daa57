"""A residual block in evaluation on the CPU, without gradients: batch norms are folded into the weights before them.

    relu(bn(conv(x)) + residual) = relu(conv'(x) + bias' + residual)
    weight' = weight * scale,  bias' = bias - running_mean * scale,  scale = gamma / sqrt(running_var + eps)

Each convolution is one kernel, which adds the residual and applies the ReLU too: oneDNN's, or for 3x3 convolutions ours
where that was measured to be faster (conv3x3). Weights are folded and laid out for the kernel once, see ``_Folded``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from resnet_fused.backend import why_plain
from resnet_fused.ops.conv3x3 import conv3x3_filters, conv3x3_inference, runs_conv3x3
from resnet_fused.ops.masked_grad import fresh_like
from resnet_fused.ops.vendor_gemm import CHUNK_BYTES
from resnet_fused.types import ConvBN

_mkldnn = torch.ops.mkldnn


def runs_folded(x: Tensor, convs: Sequence[ConvBN]) -> bool:
    """Whether a block runs on ``x`` with its batch norms folded into its weights."""
    if x.device.type != "cpu" or any(conv.bn.training for conv in convs) or torch.compiler.is_compiling():
        return False
    tensors = [x, *(t for conv in convs for t in _sources(conv) if t is not None)]
    return (
        not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and all(type(t) in (Tensor, torch.nn.Parameter) and not t.is_inference() for t in tensors[1:])
        and type(x) is Tensor
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and _mkldnn._is_mkldnn_bf16_supported()))
        and torch._C._get_mkldnn_enabled()
        and why_plain("cpu") is None
    )


def _sources(conv: ConvBN) -> tuple[Tensor | None, ...]:
    bn = conv.bn
    return conv.weight, bn.running_mean, bn.running_var, bn.weight, bn.bias


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
        self._packed: Tensor | None = None

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

    def packed(self, conv: ConvBN, x: Tensor) -> Tensor:
        """For oneDNN, in the layout that it prefers for inputs like ``x``."""
        if self._packed is None:
            weight = self._fold(conv)[0].to(x.dtype, memory_format=torch.channels_last)
            geometry = conv.padding, conv.stride, conv.dilation, conv.groups
            self._packed = _mkldnn._reorder_convolution_weight(weight, *geometry, x.shape)
        return self._packed


#: By weight. Other processes and copies of a model fold for themselves.
_folded = WeakTensorKeyDictionary()


def forget(convs: Sequence[ConvBN]) -> None:
    """Frees what was computed from the weights of convolutions, which are trained again."""
    if _folded:
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
    geometry = conv.padding, conv.stride, conv.dilation, conv.groups
    packed, bias = folded.packed(conv, x), folded.bias
    y: Tensor
    if residual is None or conv.groups > 1:  # there is no sum after a grouped convolution
        activation = "relu" if relu and residual is None else "none"
        y = _mkldnn._convolution_pointwise.default(x, packed, bias, *geometry, activation, [], "")
        if residual is not None:
            y = y.add_(residual).relu_()
    else:
        bias = bias.to(x.dtype)  # it takes no other
        y = _mkldnn._convolution_pointwise.binary(
            x, residual, packed, bias, *geometry, "add", 1.0, "relu", [], None
        )
    return y.contiguous(memory_format=torch.channels_last)


def _block(x: Tensor, convs: Sequence[ConvBN], downsample: ConvBN | None) -> Tensor:
    a = x
    for conv in convs[:-1]:
        a = _conv_bias(a, conv, relu=True)
    skip = x if downsample is None else _conv_bias(x, downsample, relu=False)
    return _conv_bias(a, convs[-1], relu=True, residual=skip)


def folded_block(
    x: Tensor, convs: Sequence[ConvBN], downsample: ConvBN | None, shape: tuple[int, ...]
) -> Tensor:
    """What ops.residual_block computes, for operands that ``runs_folded`` accepts; ``shape`` is that of the output.

    A few images at a time, so that what one convolution writes is in the cache when the next reads it.
    """
    images, widest = len(x), max(x.numel(), torch.Size(shape).numel())
    at_once = max(1, CHUNK_BYTES["cpu"] * images // (widest * x.element_size()))
    if at_once >= images:
        return _block(x, convs, downsample)
    out: Tensor = fresh_like(x, *shape)
    for x_chunk, out_chunk in zip(x.split(at_once), out.split(at_once), strict=True):
        out_chunk.copy_(_block(x_chunk, convs, downsample))
    return out

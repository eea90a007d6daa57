"""Other libraries' fused batch norm and ReLU behind one interface. None is imported before it is asked for.

A peer that cannot take part is a ``Missing`` with the reason. Whether one that does computes the right thing is for its
caller to check, and what it raises when it first runs for its caller to catch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import peer_cudnn
from resnet_fused import reference

Function = Callable[..., Tensor]
#: relu(bn(y)), or relu(bn(y) + residual), of a module that Norms.make has made.
Run = Callable[[nn.Module, Tensor, Tensor | None], Tensor]

OPS = ("bn_relu", "bn_add_relu", "bn_bn_add_relu", "bn_relu_maxpool")
#: Where the peers have kernels.
DEVICE_TYPE = "cuda"


@dataclass(frozen=True)
class Missing:
    """Why a peer does not take part."""

    reason: str


class Norms(NamedTuple):
    """``make`` gives a module to hold the parameters and buffers of the one it is given; it may be the same one."""

    make: Callable[[nn.BatchNorm2d], nn.Module]
    run: Run


@dataclass(frozen=True)
class Peer:
    """What a library asks for.

    ``load`` may raise ImportError or OSError. ``multiple``: what numbers of channels have to be divisible by, for each
    dtype that there is. ``contiguous``: its kernels walk along the pixels of a channel rather than along the channels.
    """

    load: Callable[[], Norms]
    install: str
    multiple: dict[torch.dtype, int]
    contiguous: bool = False
    why_no_ops: str = ""


def _load_cudnn() -> Norms:
    return Norms(lambda bn: bn, peer_cudnn.make_run(import_module("cudnn")))


def _load_apex() -> Norms:
    batch_norm = import_module("apex.contrib.groupbn.batch_norm")

    def run(norm: nn.Module, y: Tensor, residual: Tensor | None) -> Tensor:
        given = [x.permute(0, 2, 3, 1).contiguous() for x in (y, residual) if x is not None]
        out: Tensor = norm(*given)
        if out.requires_grad:
            # Its backward reads the gradient's memory as NHWC, whatever the strides say.
            out.register_hook(lambda grad: grad.contiguous())
        return out.permute(0, 3, 1, 2)

    return Norms(lambda bn: _adopt(batch_norm.BatchNorm2d_NHWC(bn.num_features, fuse_relu=True), bn), run)


def _load_inplace_abn() -> Norms:
    inplace_abn = import_module("inplace_abn.functions").inplace_abn

    def run(norm: nn.Module, y: Tensor, residual: Tensor | None) -> Tensor:
        # It keeps its output and finds its input again from that. A ReLU cannot be undone, so it stands behind, and
        # writes to another tensor.
        bn: Any = norm
        scale = bn.weight - bn.eps  # what it multiplies by is |scale| + eps
        stats = (bn.running_mean, bn.running_var, bn.training, bn.momentum, bn.eps)
        out = inplace_abn(y, scale, bn.bias, *stats, activation="identity")
        return F.relu(out) if residual is None else F.relu(out + residual, inplace=True)

    return Norms(lambda bn: bn, run)


def _load_attorch() -> Norms:
    attorch = import_module("attorch")

    def make(bn: nn.BatchNorm2d) -> nn.Module:
        norm = attorch.BatchNorm2d(bn.num_features, act_func="relu", device=bn.weight.device)
        return _adopt(norm, bn)

    def run(norm: nn.Module, y: Tensor, residual: Tensor | None) -> Tensor:
        # Of a channels_last input its gradients are wrong.
        out: Tensor = norm(y.contiguous(), None if residual is None else residual.contiguous())
        return out

    return Norms(make, run)


def _adopt(norm: nn.Module, bn: nn.BatchNorm2d) -> nn.Module:
    """``norm`` with the parameters, buffers and settings of ``bn``."""
    for name, tensor in (*bn.named_parameters(), *bn.named_buffers()):
        setattr(norm, name, tensor)
    settings: Any = norm
    settings.eps, settings.momentum = bn.eps, bn.momentum
    return norm.train(bn.training)


_F32, _BF16, _F16 = torch.float32, torch.bfloat16, torch.float16
_PEERS = {
    "cudnn_frontend": Peer(_load_cudnn, "pip install nvidia-cudnn-frontend", {_F32: 4, _BF16: 8, _F16: 8}),
    "apex": Peer(
        _load_apex,
        "APEX_BNP=1 pip install --no-build-isolation git+https://github.com/NVIDIA/apex",
        {_F16: 4},
    ),
    "inplace_abn": Peer(
        _load_inplace_abn,
        "pip install --no-build-isolation inplace-abn",
        {_F32: 1, _F16: 1},
        contiguous=True,
        why_no_ops="writes over its input: an op by itself would be timed with a copy of that; see blocks and models",
    ),
    "attorch": Peer(
        _load_attorch,
        "clone https://github.com/BobMcDear/attorch and put that folder on PYTHONPATH",
        {_F32: 1, _BF16: 1, _F16: 1},
        contiguous=True,
    ),
}
PEERS: tuple[str, ...] = tuple(_PEERS)
#: Peers that are at their best with contiguous activations; the others with channels_last ones.
CONTIGUOUS = frozenset(name for name, peer in _PEERS.items() if peer.contiguous)


def peer_op(
    peer: str, op: str, dtype: torch.dtype, channels: int, device: torch.device
) -> Function | Missing:
    """relu(bn(y)) or relu(bn(y) + residual) by another library, in training, eps 1e-5.

    Args:
        peer: one of PEERS.
        op: one of OPS. "bn_relu" takes y, weight, bias, "bn_add_relu" also residual: activations (N, C, H, W) of
            ``dtype``, and float32 vectors (C,). No peer has the others.
        channels: C.

    Raises:
        ValueError: an unknown peer or op.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    norms = _norms(peer, dtype, {channels}, device)
    if op not in ("bn_relu", "bn_add_relu"):
        return Missing(f"{peer} has no {op}")
    if why := _PEERS[peer].why_no_ops:
        return Missing(f"{peer} {why}")
    if isinstance(norms, Missing):
        return norms
    norm: Any = norms.make(nn.BatchNorm2d(channels, device=device))
    del norm.weight, norm.bias

    def function(y: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        norm.weight, norm.bias = weight, bias
        return norms.run(norm, y, residual)

    return function


def peer_model(peer: str, model: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module | Missing:
    """A copy of a model in which another library does each batch norm that ends in a ReLU, with the addition between.

    Convolutions, and the batch norms of shortcuts, which have no ReLU, are PyTorch's. Parameters and buffers have the
    model's names, order and values. Inputs may lie as they like.

    Args:
        peer: one of PEERS.
        model: a BasicBlock, Bottleneck or ResNet of resnet_fused.reference, with nn.BatchNorm2d.
        dtype: of the activations that it will see; float32 parameters go with each.

    Raises:
        ValueError: an unknown peer or another kind of model.
    """
    if type(model) not in _PARTS:
        kinds = ", ".join(kind.__name__ for kind in _PARTS)
        raise ValueError(f"model must be one of the reference's {kinds}, got {type(model).__name__}")
    channels = {bn.num_features for bn in model.modules() if isinstance(bn, nn.BatchNorm2d)}
    norms = _norms(peer, dtype, channels, device)
    if isinstance(norms, Missing):
        return norms
    layout = torch.contiguous_format if peer in CONTIGUOUS else torch.channels_last
    copied: Any = copy.deepcopy(model).to(memory_format=layout)  # type: ignore[call-overload]
    for part in list(copied.modules()):
        if kind := _PARTS.get(type(part)):
            part.__class__, part.run = kind, norms.run
            for name in ("bn1", "bn2", "bn3"):
                if hasattr(part, name):
                    setattr(part, name, norms.make(getattr(part, name)))
    copied.register_forward_pre_hook(
        lambda _, given: tuple(x.contiguous(memory_format=layout) for x in given)
    )
    return copied


class _BasicBlock(reference.BasicBlock):
    run: Run

    def forward(self, x: Tensor) -> Tensor:
        out = self.run(self.bn1, self.conv1(x), None)
        return self.run(self.bn2, self.conv2(out), x if self.downsample is None else self.downsample(x))


class _Bottleneck(reference.Bottleneck):
    run: Run

    def forward(self, x: Tensor) -> Tensor:
        out = self.run(self.bn1, self.conv1(x), None)
        out = self.run(self.bn2, self.conv2(out), None)
        return self.run(self.bn3, self.conv3(out), x if self.downsample is None else self.downsample(x))


class _ResNet(reference.ResNet):
    run: Run

    def _stem(self, x: Tensor) -> Tensor:
        return self.maxpool(self.run(self.bn1, self.conv1(x), None))


_PARTS: dict[type[nn.Module], type[nn.Module]] = {
    reference.BasicBlock: _BasicBlock,
    reference.Bottleneck: _Bottleneck,
    reference.ResNet: _ResNet,
}


def _norms(peer: str, dtype: torch.dtype, channels: set[int], device: torch.device) -> Norms | Missing:
    if peer not in _PEERS:
        raise ValueError(f"peer must be one of {', '.join(PEERS)}, got {peer!r}")
    wanted = _PEERS[peer]
    if device.type != DEVICE_TYPE:
        return Missing(f"{peer} needs a {DEVICE_TYPE.upper()} device, not {device.type}")
    if dtype not in wanted.multiple:
        takes = ", ".join(_name(known) for known in wanted.multiple)
        return Missing(f"{peer} takes {takes}, not {_name(dtype)}")
    if odd := sorted(c for c in channels if c % wanted.multiple[dtype]):
        return Missing(
            f"{peer} takes multiples of {wanted.multiple[dtype]} channels in {_name(dtype)}, not {odd}"
        )
    try:
        return wanted.load()
    except (ImportError, OSError) as error:
        return Missing(f"{peer} could not be imported ({error}): {wanted.install}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

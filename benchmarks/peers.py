"""Other libraries' ResNets, and their fused batch norm and ReLU, where they are installed.

No library is imported before it is asked for. One that cannot run is a ``Missing`` with the reason; whether one that
runs computes the right thing is for its caller to check.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.peer_cudnn import norm_class
from resnet_fused import reference

#: relu(bn(y)) or relu(bn(y) + residual), with the parameters and buffers of the batch norm.
MakeNorm = Callable[[nn.BatchNorm2d], nn.Module]
#: The model of that name, with random weights.
MakeModel = Callable[[str], nn.Module]


@dataclass(frozen=True)
class Missing:
    """Why a provider does not run."""

    reason: str


@dataclass(frozen=True)
class Peer:
    """A library with whole models, or with a fused batch norm and ReLU for CUDA devices.

    Args:
        install: the command.
        models: imports the library and gives its models; may raise ImportError or OSError, as ``norms`` may.
        norms: imports the library and gives its fused batch norm.
        multiples: of ``norms``, what the number of channels must be divisible by, for each dtype that it takes.
    """

    install: str
    models: Callable[[], MakeModel] | None = None
    norms: Callable[[], MakeNorm] | None = None
    multiples: dict[torch.dtype, int] = field(default_factory=dict)

    def why_missing(self, name: str, dtype: torch.dtype, channels: set[int], device: torch.device) -> str:
        """Why ``norms`` cannot run on this input, or ""."""
        known = str(dtype).removeprefix("torch.")
        if device.type != "cuda":
            return f"{name} needs a CUDA device, not {device.type}"
        if dtype not in self.multiples:
            return f"{name} does not take {known}"
        if odd := sorted(c for c in channels if c % self.multiples[dtype]):
            return f"{name} takes multiples of {self.multiples[dtype]} channels in {known}, not {odd}"
        return ""


def _torchvision() -> MakeModel:
    models = import_module("torchvision.models")
    return lambda arch: getattr(models, arch)()


def _timm() -> MakeModel:
    return import_module("timm").create_model


def _cudnn() -> MakeNorm:
    return norm_class(import_module("cudnn")).adopt


def _apex() -> MakeNorm:
    batch_norm: Any = import_module("apex.contrib.groupbn.batch_norm").BatchNorm2d_NHWC

    class NormReLU(batch_norm):
        def forward(self, y: Tensor, residual: Tensor | None = None) -> Tensor:
            given = [x.permute(0, 2, 3, 1).contiguous() for x in (y, residual) if x is not None]
            out: Tensor = super().forward(*given)
            if out.requires_grad:
                # Its backward reads the gradient's memory as NHWC, whatever the strides say.
                out.register_hook(lambda grad: grad.contiguous())
            return out.permute(0, 3, 1, 2)

    def make(bn: nn.BatchNorm2d) -> nn.Module:
        norm = NormReLU(bn.num_features, fuse_relu=True)
        for name, tensor in (*bn.named_parameters(), *bn.named_buffers()):
            setattr(norm, name, tensor)
        norm.eps, norm.momentum = bn.eps, bn.momentum
        return norm.train(bn.training)

    return make


_F32, _BF16, _F16 = torch.float32, torch.bfloat16, torch.float16
PEERS = {
    "torchvision": Peer("pip install torchvision", models=_torchvision),
    "timm": Peer("pip install timm", models=_timm),
    "cudnn_frontend": Peer(
        "pip install nvidia-cudnn-frontend", norms=_cudnn, multiples={_F32: 4, _BF16: 8, _F16: 8}
    ),
    "apex": Peer(
        "APEX_BNP=1 pip install --no-build-isolation git+https://github.com/NVIDIA/apex",
        norms=_apex,
        multiples={_F16: 4},
    ),
}


def peer_op(
    name: str, op: str, dtype: torch.dtype, channels: int, device: torch.device
) -> Callable[..., Tensor] | Missing:
    """``bn_relu`` of (y, weight, bias) or ``bn_add_relu`` of (y, weight, bias, residual), in training, eps 1e-5."""
    peer = PEERS[name]
    if peer.norms is None or op not in ("bn_relu", "bn_add_relu"):
        return Missing(f"{name} has no {op}")
    if why := peer.why_missing(name, dtype, {channels}, device):
        return Missing(why)
    try:
        norm = peer.norms()(nn.BatchNorm2d(channels, device=device))
    except (ImportError, OSError) as error:
        return _not_installed(name, error)

    def function(y: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        out: Tensor = functional_call(norm, {"weight": weight, "bias": bias}, (y, residual))
        return out

    return function


def peer_module(
    name: str, arch: str, block: str, eager: nn.Module, dtype: torch.dtype, device: torch.device
) -> nn.Module | Missing:
    """A library's model, or the eager one with a library's batch norms where a ReLU follows; with eager's weights.

    Args:
        arch: such as "resnet50".
        block: a submodule, such as "layer1.0"; "" for the whole model.
        eager: that model or block of resnet_fused.reference.
    """
    peer = PEERS[name]
    channels = {bn.num_features for bn in eager.modules() if isinstance(bn, nn.BatchNorm2d)}
    if peer.norms and (why := peer.why_missing(name, dtype, channels, device)):
        return Missing(why)
    try:
        if peer.norms:
            return with_norms(eager, peer.norms())
        assert peer.models
        module = peer.models()(arch).get_submodule(block)
    except (ImportError, OSError) as error:
        return _not_installed(name, error)
    module.load_state_dict(eager.state_dict())
    module = module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module.train(eager.training)


def with_norms(model: nn.Module, make: MakeNorm) -> nn.Module:
    """A copy of a model or block of resnet_fused.reference whose batch norms before a ReLU are those of ``make``."""
    copied = copy.deepcopy(model)
    for part in list(copied.modules()):
        for kind, fused in _FUSED.items():
            if type(part) is kind:
                part.__class__ = fused
                for bn in ("bn1", "bn2", "bn3"):
                    if hasattr(part, bn):
                        setattr(part, bn, make(getattr(part, bn)))
    return copied


def _not_installed(name: str, error: ImportError | OSError) -> Missing:
    return Missing(f"{name} could not be imported ({error}): {PEERS[name].install}")


class _BasicBlock(reference.BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn1(self.conv1(x))
        out = self.bn2(self.conv2(out), x if self.downsample is None else self.downsample(x))
        return out


class _Bottleneck(reference.Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        out = self.bn3(self.conv3(out), x if self.downsample is None else self.downsample(x))
        return out


class _ResNet(reference.ResNet):
    def _stem(self, x: Tensor) -> Tensor:
        return self.maxpool(self.bn1(self.conv1(x)))


_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    reference.BasicBlock: _BasicBlock,
    reference.Bottleneck: _Bottleneck,
    reference.ResNet: _ResNet,
}

"""``fuse`` and ``unfuse``: ResNets of torchvision, timm and resnet_fused.reference, converted in place.

A block or stem changes its class: the new one is derived from the old one, has its name, and replaces its forward. All
else stays what it was: parameters, buffers, modules, hooks, attributes, and what ``isinstance`` and ``repr`` say.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from resnet_fused import models
from resnet_fused.blocks import (
    FusedBasicBlock,
    FusedBlock,
    FusedBottleneck,
    FusedPart,
    FusedStem,
    plain_class,
)
from resnet_fused.modules import Parts

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_STAGES = ("layer1", "layer2", "layer3", "layer4")
#: Of timm's blocks: what may be between their convolutions, where it is not None or nn.Identity.
_TIMM_EXTRAS = ("drop_block", "aa", "se", "drop_path")


class _TimmBasicBlock(FusedBlock):
    _parts = Parts(("conv1", "conv2"), ("bn1", "bn2"), ("act1", "act2"), _TIMM_EXTRAS)


class _TimmBottleneck(FusedBlock):
    _parts = Parts(("conv1", "conv2", "conv3"), ("bn1", "bn2", "bn3"), ("act1", "act2", "act3"), _TIMM_EXTRAS)


class _TorchvisionStem(FusedStem):
    """For torchvision's ResNet."""

    def _forward_impl(self, x: Tensor) -> Tensor:
        y = self._fused_stem(x)
        if y is None:
            out: Tensor = super()._forward_impl(x)  # type: ignore[misc]
            return out
        for name in (*_STAGES, "avgpool"):
            y = getattr(self, name)(y)
        out = self.fc(torch.flatten(y, 1))  # type: ignore[operator]
        return out


class _TimmStem(FusedStem):
    """For timm's ResNet."""

    _parts = Parts(("conv1",), ("bn1",), ("act1",))

    def forward_features(self, x: Tensor) -> Tensor:
        y = self._fused_stem(x)
        if y is None:
            out: Tensor = super().forward_features(x)  # type: ignore[misc]
            return out
        stages = [getattr(self, name) for name in _STAGES]
        if self.grad_checkpointing:
            from timm.models import checkpoint_seq

            out = checkpoint_seq(stages, y, flatten=True)
            return out
        for stage in stages:
            y = stage(y)
        return y


class _GetterStem(FusedStem):
    """For torchvision's IntermediateLayerGetter, which runs the children of a ResNet one after the other."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        results: dict[str, Tensor] = OrderedDict()
        names: Any = self.return_layers
        y = None if _returns_stem(self) else self._fused_stem(x)
        if y is None:
            results = super().forward(x)
            return results
        for name, module in self.named_children():
            if name not in _CHILDREN[:3]:
                y = y if name == "maxpool" else module(y)
                if name in names:
                    results[names[name]] = y
        return results


#: The first children of a getter.
_CHILDREN = ("conv1", "bn1", "relu", "maxpool")


def _returns_stem(getter: Any) -> bool:
    """Whether a getter returns what a fused stem doesn't compute."""
    return not getter.return_layers.keys().isdisjoint(_CHILDREN[:3])


class _Known(NamedTuple):
    """A class that can be fused.

    Args:
        module, name: where it is defined, and as what.
        method, base: which method the fused class replaces by that of ``base``.
        names: of the attributes and globals that the method uses. Where it uses others, in another version of the
            library, it may compute something else.
    """

    module: str
    name: str
    method: str
    base: type[FusedPart]
    names: frozenset[str]

    @property
    def kind(self) -> type[nn.Module] | None:
        """The class; None where its module is not imported, and so nothing is an instance of it."""
        return getattr(sys.modules.get(self.module), self.name, None)


def _block(module: str, name: str, base: type[FusedPart]) -> _Known:
    names = {"downsample", *(name for names in base._parts for name in names)}
    return _Known(module, name, "forward", base, frozenset(names))


_REFERENCE, _TORCHVISION, _TIMM = (
    "resnet_fused.reference.resnet",
    "torchvision.models.resnet",
    "timm.models.resnet",
)
_STEM = frozenset(("conv1", "bn1", "relu", "maxpool"))
_KNOWN = (
    _block(_REFERENCE, "BasicBlock", models.BasicBlock),
    _block(_REFERENCE, "Bottleneck", models.Bottleneck),
    _block(_TORCHVISION, "BasicBlock", FusedBasicBlock),
    _block(_TORCHVISION, "Bottleneck", FusedBottleneck),
    _block(_TIMM, "BasicBlock", _TimmBasicBlock),
    _block(_TIMM, "Bottleneck", _TimmBottleneck),
    _Known(_REFERENCE, "ResNet", "_stem", models.ResNet, _STEM),
    _Known(
        _TORCHVISION,
        "ResNet",
        "_forward_impl",
        _TorchvisionStem,
        _STEM.union(_STAGES, ("avgpool", "torch", "flatten", "fc")),
    ),
    _Known(
        _TIMM,
        "ResNet",
        "forward_features",
        _TimmStem,
        frozenset(("conv1", "bn1", "act1", "maxpool", *_STAGES))
        | {"grad_checkpointing", "torch", "jit", "is_scripting", "checkpoint_seq"},
    ),
    _Known(
        "torchvision.models._utils",
        "IntermediateLayerGetter",
        "forward",
        _GetterStem,
        frozenset(("OrderedDict", "items", "return_layers")),
    ),
)


def fused_class_of(module: nn.Module) -> type[nn.Module] | str | None:
    """The class that ``fuse`` gives a block or stem, or why there is none; None for a module that is neither."""
    kind = type(module)
    known = _known(kind)
    if known is None or (known.base is _GetterStem and [*module._modules][:4] != [*_CHILDREN]):
        return None
    if known.method in vars(module):
        return f"has a {known.method} of its own"
    own = getattr(known.kind, known.method)
    if getattr(kind, known.method) is not own:
        return f"is a {kind.__name__} with a {known.method} of its own"
    if set(own.__code__.co_names) != known.names:
        return f"is of a version of {known.module.partition('.')[0]} that fuse doesn't know"
    if known.base is _GetterStem and _returns_stem(module):
        return "returns what is computed within the stem"
    return _fused_class(kind)


def _known(kind: type[nn.Module]) -> _Known | None:
    return next((known for known in _KNOWN if issubclass(kind, known.kind or ())), None)


#: By the class that they are made from: one class for all instances, as isinstance and pickle need.
_made: dict[type[nn.Module], type[nn.Module]] = {}


def _fused_class(kind: type[nn.Module]) -> type[nn.Module]:
    known = _known(kind)
    assert known is not None
    if issubclass(known.base, kind):
        return known.base
    if kind not in _made:
        own = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
        own |= {"_plain": kind, "__reduce_ex__": _reduce_ex}
        _made[kind] = type(kind.__name__, (known.base, kind), own)
    return _made[kind]


def _reduce_ex(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    """For pickle and copy, which find a class by its name, and so the plain one."""
    reduced: Any = object.__reduce_ex__(self, max(2, protocol))
    return _new, (plain_class(self),), *reduced[2:]


def _new(kind: type[nn.Module]) -> nn.Module:
    return object.__new__(_fused_class(kind))


def fuse(model: ModuleT) -> ModuleT:
    """Makes the residual blocks and the stem of a model train and evaluate fused, in place.

    Blocks are those of torchvision's and timm's ResNets, ResNeXts and wide ResNets, and of resnet_fused.reference,
    wherever they are in the model: in detection and segmentation models too. Parameters, buffers and names stay the
    same, so an optimizer or a checkpoint made before still fits. A block that can't be fused (squeeze and excitation,
    stochastic depth, another activation, ...) runs as before: ``explain(model, x)`` says which and why.

    Convert model and images to channels_last for speed: ``fuse(model).to(memory_format=torch.channels_last)``.

    Args:
        model: any module; fusing it again changes nothing.

    Returns:
        ``model``.

    Raises:
        TypeError: it is no module.
        ValueError: no part of it is a block or stem that can be fused.
    """
    _check(model, "fuse")
    for module in model.modules():
        if not isinstance(module, FusedPart) and isinstance(kind := fused_class_of(module), type):
            module.__class__ = kind
    if not any(isinstance(module, FusedPart) for module in model.modules()):
        kinds = "those of torchvision's and timm's ResNets"
        raise ValueError(f"{type(model).__name__} has no residual block that fuse can convert: {kinds}")
    return model


def unfuse(model: ModuleT) -> ModuleT:
    """Undoes ``fuse``, in place: every block and stem runs its plain forward.

    A model of this package becomes one of resnet_fused.reference. A model without fused parts stays as it is.

    Returns:
        ``model``.

    Raises:
        TypeError: it is no module.
        ValueError: a fused part has got another class since, as from fully_shard, or is a subclass of one.
    """
    _check(model, "unfuse")
    fused = [(name, module) for name, module in model.named_modules() if isinstance(module, FusedPart)]
    for name, module in fused:
        if plain_class(module) is None:
            raise ValueError(
                f"{name or 'the model'} is a {type(module).__name__}, which is derived from a fused class"
            )
    for _, module in fused:
        module.__class__ = plain_class(module)  # type: ignore[assignment]
    return model


def _check(model: object, function: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function} takes a torch.nn.Module, got {type(model).__name__}")

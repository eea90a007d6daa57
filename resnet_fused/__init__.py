"""Drop-in ResNets for PyTorch whose conv-BN-ReLU-add blocks train fused.

    model = resnet_fused.resnet50()            # where torchvision.models.resnet50() stood
    model = resnet_fused.fuse(model)           # or converts a model of torchvision or timm

Ten constructors with torchvision's names, arguments and pretrained weights; ``list_models`` and ``get_model`` for their
names; ``fuse`` and ``unfuse``; ``explain`` (what does not run fused, and why), ``functional`` (the fused ops),
``reference`` (the same in plain PyTorch), ``backend`` (which implementation runs) and ``GraphedStep`` (a training step
as one CUDA graph).
"""

from resnet_fused import functional, reference
from resnet_fused._version import __version__
from resnet_fused.backend import backend, warn_unless_native
from resnet_fused.cuda_graph import GraphedStep
from resnet_fused.explain import explain
from resnet_fused.fuse import fuse, unfuse
from resnet_fused.models import (
    BasicBlock,
    Bottleneck,
    ResNet,
    get_model,
    list_models,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)

warn_unless_native()
del warn_unless_native

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "GraphedStep",
    "ResNet",
    "__version__",
    "backend",
    "explain",
    "functional",
    "fuse",
    "get_model",
    "list_models",
    "reference",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "unfuse",
    "wide_resnet50_2",
    "wide_resnet101_2",
]

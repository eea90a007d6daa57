"""The ResNets in plain PyTorch, with torchvision's arguments, modules, initialisation, state_dict and errors.

A faster model subclasses the blocks and ``ResNet``, overrides ``forward`` of the blocks and ``_stem``, and is
made from the same table with ``build``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from resnet_fused import weights
from resnet_fused.reference.constructor import Constructor, document, torchvision_arguments
from resnet_fused.weights import Weights

NormLayer = Callable[..., nn.Module]


def conv3x3(
    in_planes: int, out_planes: int, stride: int = 1, groups: int = 1, dilation: int = 1
) -> nn.Conv2d:
    """A 3x3 convolution without bias that keeps the size at stride 1."""
    return nn.Conv2d(
        in_planes, out_planes, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=False
    )


def conv1x1(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    """A 1x1 convolution without bias."""
    return nn.Conv2d(in_planes, out_planes, 1, stride, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut.

    Args:
        inplanes: channels of the input.
        planes: channels of both convolutions.
        stride: of the first convolution.
        downsample: what the shortcut applies to the input; None is the identity.
        groups, base_width, dilation: the block has no variants of these; for the signature of Bottleneck.
        norm_layer: makes a normalization from a number of channels; None is nn.BatchNorm2d.

    Raises:
        ValueError: groups is not 1 or base_width is not 64.
        NotImplementedError: dilation is above 1.
    """

    expansion: int = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        if groups != 1 or base_width != 64:
            raise ValueError("BasicBlock only supports groups=1 and base_width=64")
        if dilation > 1:
            raise NotImplementedError("Dilation > 1 not supported in BasicBlock")
        norm = norm_layer or nn.BatchNorm2d
        # The order is part of the interface: it is that of the random numbers and of the state_dict.
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, inplanes, H, W) to (N, planes, H/stride, W/stride), rounded up."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and an expanding 1x1 convolution and a shortcut; the stride sits on the 3x3.

    Args:
        inplanes: channels of the input.
        planes: channels of the inner convolutions at base_width 64 and one group, a quarter of the output's.
        stride: of the 3x3 convolution.
        downsample: what the shortcut applies to the input; None is the identity.
        groups, dilation: of the 3x3 convolution.
        base_width: channels per group of the inner convolutions, where planes is 64.
        norm_layer: makes a normalization from a number of channels; None is nn.BatchNorm2d.
    """

    expansion: int = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        norm = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        outplanes = planes * self.expansion
        # The order is part of the interface: it is that of the random numbers and of the state_dict.
        self.conv1 = conv1x1(inplanes, width)
        self.bn1 = norm(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm(width)
        self.conv3 = conv1x1(width, outplanes)
        self.bn3 = norm(outplanes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, inplanes, H, W) to (N, 4*planes, H/stride, W/stride), rounded up."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet(nn.Module):
    """A stem, four stages of residual blocks, and a linear classifier.

    Args:
        block: BasicBlock, Bottleneck, or a subclass.
        layers: the number of blocks of each of the four stages.
        num_classes: outputs of the classifier.
        zero_init_residual: zero weight in each block's last normalization: it starts as its shortcut.
        groups, width_per_group: of every 3x3 convolution of a Bottleneck.
        replace_stride_with_dilation: for each of the last three stages, whether it keeps its input's size and
            dilates its 3x3 convolutions instead.
        norm_layer: makes a normalization from a number of channels; None is nn.BatchNorm2d.

    Raises:
        ValueError: replace_stride_with_dilation does not have three elements, or BasicBlock does not support
            groups or width_per_group.
        NotImplementedError: BasicBlock with dilation.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        dilate = (
            [False, False, False] if replace_stride_with_dilation is None else replace_stride_with_dilation
        )
        if len(dilate) != 3:
            raise ValueError(
                f"replace_stride_with_dilation should be None or a 3-element tuple, got {dilate}"
            )
        self._norm_layer: NormLayer = norm_layer or nn.BatchNorm2d
        self.inplanes = 64
        self.dilation = 1
        self.groups = groups
        self.base_width = width_per_group
        self.conv1 = nn.Conv2d(3, self.inplanes, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 64, layers[0])
        self.layer2 = self._make_layer(block, 128, layers[1], stride=2, dilate=dilate[0])
        self.layer3 = self._make_layer(block, 256, layers[2], stride=2, dilate=dilate[1])
        self.layer4 = self._make_layer(block, 512, layers[3], stride=2, dilate=dilate[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        self._initialize(zero_init_residual)

    def _make_layer(
        self,
        block: type[BasicBlock | Bottleneck],
        planes: int,
        blocks: int,
        stride: int = 1,
        dilate: bool = False,
    ) -> nn.Sequential:
        """One stage, and the bookkeeping of channels and dilation for the next."""
        outplanes = planes * block.expansion
        first_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        downsample = None
        if stride != 1 or self.inplanes != outplanes:
            downsample = nn.Sequential(conv1x1(self.inplanes, outplanes, stride), self._norm_layer(outplanes))

        # By position here and by name below, as torchvision does: a block of the user's may rename its parameters.
        # The first block of a dilated stage still sees pixels at the previous stage's distance.
        groups, width, norm = self.groups, self.base_width, self._norm_layer
        first = block(self.inplanes, planes, stride, downsample, groups, width, first_dilation, norm)
        self.inplanes = outplanes
        rest = (
            block(outplanes, planes, groups=groups, base_width=width, dilation=self.dilation, norm_layer=norm)
            for _ in range(1, blocks)
        )
        return nn.Sequential(first, *rest)

    def _initialize(self, zero_init_residual: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
                if module.weight is not None:
                    nn.init.ones_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if zero_init_residual:
            for module in self.modules():
                if isinstance(module, (BasicBlock, Bottleneck)):
                    weight = (module.bn3 if isinstance(module, Bottleneck) else module.bn2).weight
                    if isinstance(weight, Tensor):
                        nn.init.zeros_(weight)

    def _stem(self, x: Tensor) -> Tensor:
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self._stem(x)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, H, W) to scores (N, num_classes)."""
        return self._forward_impl(x)


BlockKind = Literal["basic", "bottleneck"]
BLOCKS: dict[BlockKind, type[BasicBlock | Bottleneck]] = {"basic": BasicBlock, "bottleneck": Bottleneck}


class Architecture(NamedTuple):
    """What a name stands for; ``fixed`` are the arguments of ResNet that belong to the name."""

    title: str
    block: BlockKind
    layers: tuple[int, int, int, int]
    fixed: Mapping[str, int] = MappingProxyType({})


ARCHITECTURES: dict[str, Architecture] = {
    "resnet18": Architecture("ResNet-18", "basic", (2, 2, 2, 2)),
    "resnet34": Architecture("ResNet-34", "basic", (3, 4, 6, 3)),
    "resnet50": Architecture("ResNet-50", "bottleneck", (3, 4, 6, 3)),
    "resnet101": Architecture("ResNet-101", "bottleneck", (3, 4, 23, 3)),
    "resnet152": Architecture("ResNet-152", "bottleneck", (3, 8, 36, 3)),
    "resnext50_32x4d": Architecture(
        "ResNeXt-50, 32 groups of 4", "bottleneck", (3, 4, 6, 3), {"groups": 32, "width_per_group": 4}
    ),
    "resnext101_32x8d": Architecture(
        "ResNeXt-101, 32 groups of 8", "bottleneck", (3, 4, 23, 3), {"groups": 32, "width_per_group": 8}
    ),
    "resnext101_64x4d": Architecture(
        "ResNeXt-101, 64 groups of 4", "bottleneck", (3, 4, 23, 3), {"groups": 64, "width_per_group": 4}
    ),
    "wide_resnet50_2": Architecture(
        "ResNet-50 with twice the inner channels", "bottleneck", (3, 4, 6, 3), {"width_per_group": 128}
    ),
    "wide_resnet101_2": Architecture(
        "ResNet-101 with twice the inner channels", "bottleneck", (3, 4, 23, 3), {"width_per_group": 128}
    ),
}

ResNetT = TypeVar("ResNetT", bound=ResNet)


def build(
    name: str,
    model: type[ResNetT],
    blocks: Mapping[BlockKind, type[BasicBlock | Bottleneck]],
    given: Weights | None,
    kwargs: dict[str, Any],
    progress: bool = True,
) -> ResNetT:
    """The architecture ``name``, made of a model class and its blocks.

    Args:
        name: a key of ARCHITECTURES.
        model: ResNet or a subclass.
        blocks: the class for each kind of block.
        given: the weights to load, as ``weights.find`` takes them; None leaves the initialisation.
        kwargs: arguments of ResNet after ``layers``.
        progress: shows the progress of a download.

    Raises:
        ValueError: kwargs disagrees with an argument that belongs to the name or to the weights.
        Exception: what ``weights.find``, ``weights.read`` and ``load_state_dict`` raise.
    """
    architecture = ARCHITECTURES[name]
    source = None if given is None else weights.find(name, given)
    classes = {} if source is None or source.url is None else {"num_classes": weights.CLASSES}
    fixed = {**architecture.fixed, **classes}
    for argument, value in fixed.items():
        if kwargs.get(argument, value) != value:
            raise ValueError(
                f"The parameter '{argument}' expected value {value} but got {kwargs[argument]} instead."
            )
    made = model(blocks[architecture.block], architecture.layers, **{**kwargs, **fixed})
    if source is not None:
        made.load_state_dict(weights.read(source, progress))
    return made


def constructors(
    model: type[ResNetT], blocks: Mapping[BlockKind, type[BasicBlock | Bottleneck]], module: str
) -> dict[str, Constructor[ResNetT]]:
    """torchvision's function for each of ARCHITECTURES, in their order, as if defined in ``module``."""

    def constructor(name: str) -> Constructor[ResNetT]:
        def make(*, weights: Weights | None = None, progress: bool = True, **kwargs: Any) -> ResNetT:
            return build(name, model, blocks, weights, kwargs, progress)

        make.__name__ = make.__qualname__ = name
        make.__module__ = module
        document(make, ARCHITECTURES[name].title, ARCHITECTURES[name].fixed, model)
        return torchvision_arguments(make)

    return {name: constructor(name) for name in ARCHITECTURES}


(
    resnet18, resnet34, resnet50, resnet101, resnet152, resnext50_32x4d, resnext101_32x8d, resnext101_64x4d,
    wide_resnet50_2, wide_resnet101_2,
) = constructors(ResNet, BLOCKS, __name__).values()  # fmt: skip

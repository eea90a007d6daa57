"""Small ResNets of torchvision's that ``fuse`` converts: what hypothesis draws of them, and how they are made."""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models import ResNet, resnet

from resnet_fused import fuse
from tests.model_pairs import KINDS
from tests.properties.block_cases import (
    FEWEST_CHANNELS,
    Mode,
    Norms,
    modes,
    norms,
    prepare,
    put_faults,
    randomize,
    three_for_two,
)
from tests.properties.strategies import Fault, Placement, place_with, placements, rarely


class Model(NamedTuple):
    """A ResNet of one to four short stages, and its images.

    width: channels of the first stage's inner convolutions. dilated: whether the second stage has a dilation instead of
    a stride.
    """

    kind: str
    layers: tuple[int, ...]
    width: int
    groups: int
    dilated: bool
    batch: int
    height: int
    width_of_images: int
    norms: Norms
    mode: Mode
    x: Placement
    faults: tuple[Fault, ...]

    def make(self) -> tuple[nn.Module, nn.Module, Tensor]:
        """The fused model, the plain one, and images at their place."""
        torch.manual_seed(self.mode.seed)
        block = getattr(resnet, KINDS[self.kind])
        with torch.device("meta"):  # without drawing weights of its own
            plain = ResNet(block, [1, 1, 1, 1])
        plain.inplanes, plain._norm_layer, plain.groups = self.width, self.norms.make, self.groups
        plain.conv1 = nn.Conv2d(3, self.width, 7, 2, 3, bias=False)
        plain.bn1 = self.norms.make(self.width)
        for i in range(4):
            stage = nn.Sequential()
            if i < len(self.layers):
                planes, stride = self.width << i, 1 if i == 0 else 2
                stage = plain._make_layer(block, planes, self.layers[i], stride, self.dilated and i == 1)
            setattr(plain, f"layer{i + 1}", stage)
        plain.fc = nn.Linear(plain.inplanes, 3)
        randomize(plain, self.mode)
        x = torch.randn(self.batch, 3, self.height, self.width_of_images)
        put_faults(self.faults, plain, x)
        prepare(plain, self.mode)
        return fuse(copy.deepcopy(plain)), plain, place_with(self.faults, self.x, x.to(self.mode.dtype))


_sides = st.sampled_from((1, 2, 5, 8, 13, 16, 23, 32))


def models(faults: st.SearchStrategy[tuple[Fault, ...]]) -> st.SearchStrategy[Model]:
    @st.composite
    def draw_model(draw: st.DrawFn) -> Model:
        kind = draw(st.sampled_from(tuple(KINDS)))
        layers = tuple(draw(st.lists(st.sampled_from((1, 1, 2)), min_size=1, max_size=3)))
        bottleneck, mode, width = kind == "bottleneck", draw(modes()), draw(_sides)
        height, dilated = draw(_sides), draw(st.booleans()) if bottleneck else False
        channels = draw(st.sampled_from((4, 8, 16)))
        if not bottleneck and len(layers) > 1 and mode.rounds_to != torch.float64:
            channels = max(channels, FEWEST_CHANNELS)
        batch = 0 if draw(rarely) else draw(st.sampled_from((1, 2, 3)))
        if mode.rounds_to.itemsize == 2:
            width = max(width, 16)  # as in block_cases.blocks: no image is narrower than a stride
        stride = 2 << len(layers) >> (dilated and len(layers) > 1)
        batch = three_for_two(batch, math.ceil(height / stride) * math.ceil(width / stride), mode)
        return Model(
            kind,
            layers,
            channels,
            draw(st.sampled_from((1, 2))) if bottleneck else 1,
            dilated,
            batch,
            height,
            width,
            draw(norms),
            mode,
            draw(placements()),
            draw(faults),
        )

    return draw_model()

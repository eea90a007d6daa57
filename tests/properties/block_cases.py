"""Residual blocks and small ResNets: what hypothesis draws of them, how they are made, and how they run."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from tests.model_pairs import KINDS
from tests.properties.agreement import batch_norm_rounded, moves_by, rounded
from tests.properties.strategies import (
    CHANNELS,
    DTYPES,
    GRAD_MODES,
    Fault,
    Placement,
    activation_shapes,
    grad_modes,
    placements,
    rarely,
    seeds,
)

#: Of fewer channels, oneDNN's weight gradient of a channels_last 1x1 convolution of stride 2 writes outside its buffers
#: if it has two threads or more (oneDNN's issue 6035): in eager as well, the heap is corrupted.
FEWEST_CHANNELS = 16


class Norms(NamedTuple):
    """The arguments of all norms; of torchvision.ops.FrozenBatchNorm2d where ``frozen``."""

    frozen: bool
    eps: float
    momentum: float | None
    affine: bool
    tracked: bool

    def make(self, channels: int) -> nn.Module:
        if self.frozen:
            return FrozenBatchNorm2d(channels, self.eps)
        return nn.BatchNorm2d(channels, self.eps, self.momentum, self.affine, self.tracked)


_mostly = rarely.map(lambda rare: not rare)
norms = st.builds(
    Norms,
    rarely,
    st.sampled_from((1e-5, 1e-5, 1e-3, 0.5)),
    st.sampled_from((0.1, 0.1, None, 0.0, 1.0)),
    _mostly,
    _mostly,
)


class Mode(NamedTuple):
    """How a module runs, and what of it is trained.

    evaluating: one bit for each norm that uses its running statistics in training. trained: one bit for each parameter,
    and for the input the first. far: whether biases keep the inputs of ReLUs away from zero, so that rounding decides
    no gradient in 16 bits. wide_norms: whether norms stay in float32 where the rest has 16 bits.
    """

    dtype: torch.dtype
    autocast: bool
    training: bool
    evaluating: int
    trained: int
    grad_mode: str
    far: bool
    wide_norms: bool
    channels_last: bool
    seed: int

    @property
    def rounds_to(self) -> torch.dtype:
        return torch.bfloat16 if self.autocast and self.dtype != torch.float64 else self.dtype


_bits = st.just(-1) | st.just(0) | st.integers(0, 2**20 - 1)


def modes(dtypes: tuple[torch.dtype, ...] = DTYPES) -> st.SearchStrategy[Mode]:
    autocast = rarely if torch.bfloat16 in dtypes else st.just(False)
    # Not to bfloat16 with norms in float16: eager refuses, and fused blocks compute it.
    dtypes_and_autocast = st.tuples(st.sampled_from(dtypes), autocast).map(
        lambda drawn: (drawn[0], drawn[1] and drawn[0] != torch.float16)
    )
    return st.builds(
        lambda both, *rest: Mode(*both, *rest),
        dtypes_and_autocast,
        st.sampled_from((True, True, False)),
        st.just(0) | _bits,
        st.just(-1) | _bits,
        grad_modes,
        st.booleans(),
        st.booleans(),
        st.integers(0, 3).map(bool),
        seeds,
    )


class Block(NamedTuple):
    """The arguments of a block, its input, and which of our kernels run.

    native: whether convolutions run in native kernels where there are any, though measured to be slower. folds: whether
    1x1 convolutions are folded, though the batch is small.
    """

    kind: str
    shape: tuple[int, int, int, int]
    planes: int
    stride: int
    groups: int
    base_width: int
    dilation: int
    downsample: bool
    norms: Norms
    mode: Mode
    x: Placement
    grad: Placement
    native: bool
    folds: bool
    faults: tuple[Fault, ...]

    def make(self, library: Any) -> nn.Module:
        block = getattr(library, KINDS[self.kind])
        outputs, norm = self.planes * block.expansion, self.norms.make
        shortcut = None
        if self.downsample:
            conv = nn.Conv2d(self.shape[1], outputs, 1, self.stride, bias=False)
            shortcut = nn.Sequential(conv, norm(outputs))
        sizes = self.groups, self.base_width, self.dilation
        made: nn.Module = block(self.shape[1], self.planes, self.stride, shortcut, *sizes, norm)
        return made

    @contextlib.contextmanager
    def kernels(self) -> Iterator[None]:
        sizes = dict.fromkeys(("FOLD_BYTES", "RECOMPUTE_BYTES"), 0 if self.folds else 1 << 60)
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.multiple("resnet_fused.ops.residual_block", **sizes))
            for module in ("conv3x3", "conv_wgrad"):
                name = f"resnet_fused.ops.{module}.is_faster"
                stack.enter_context(mock.patch(name, lambda *_: self.native))
            yield


def three_for_two(batch: int, pixels: int, mode: Mode) -> int:
    """Images of a batch, so that no norm but those in float64 has two values a channel.

    Of these a batch norm makes 1 and -1: in 16 bits rounding may decide which is which, and gradients cancel to what
    rounding left, a hundred times more or less of it by luck, in eager as well.
    """
    return 3 if batch * pixels == 2 and mode.rounds_to != torch.float64 else batch


@st.composite
def blocks(
    draw: st.DrawFn,
    elements: int,
    faults: st.SearchStrategy[tuple[Fault, ...]],
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> Block:
    """Blocks whose shortcut fits, mostly."""
    kind = draw(st.sampled_from(tuple(KINDS)[::-1]))
    stride, downsample = draw(st.sampled_from((1, 1, 2, 3))), draw(st.booleans())
    groups, base_width, dilation, expansion = 1, 64, 1, 1
    planes = draw(st.sampled_from((8, 4, 7, 16, 3, 2, 13, 33, 64, 130, 1)))
    if kind == "bottleneck":
        expansion = 4
        groups = draw(st.sampled_from((1, 1, 1, 2, 3, 4)))
        base_width = draw(st.sampled_from([w for w in (64, 64, 128, 32, 16, 4) if planes * w >= 64]))
        dilation = draw(st.sampled_from((1, 1, 2, 3)))
    inputs = planes * expansion
    if downsample or draw(rarely):
        inputs = draw(st.sampled_from(CHANNELS))
    elif not draw(rarely):
        stride = 1
    mode = draw(modes(dtypes))
    if downsample and stride > 1 and mode.rounds_to != torch.float64:
        inputs = max(inputs, FEWEST_CHANNELS)
    widest = max(inputs, planes * expansion, planes * base_width * groups // 64)
    n, _, h, w = draw(activation_shapes(elements, widest))
    if mode.rounds_to.itemsize == 2 and 0 < w < stride:
        w = stride  # for narrower images oneDNN's weight gradients are made of memory that nobody has written
    for pixels in (h * w, math.ceil(h / stride) * math.ceil(w / stride)):
        n = three_for_two(n, pixels, mode)
    return Block(
        kind,
        (n, inputs, h, w),
        planes,
        stride,
        groups,
        base_width,
        dilation,
        downsample,
        draw(norms),
        mode,
        draw(placements()),
        draw(placements()),
        draw(st.booleans()),
        draw(st.integers(0, 3)) > 0,
        draw(faults),
    )


def norms_of(module: nn.Module) -> dict[str, Any]:
    return {
        name: norm
        for name, norm in module.named_modules()
        if isinstance(norm, (nn.BatchNorm2d, FrozenBatchNorm2d))
    }


def randomize(module: nn.Module, mode: Mode) -> None:
    """Random parameters and running statistics, in float32."""
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.normal_(conv.weight, std=conv.weight[0].numel() ** -0.5)
    found = norms_of(module)
    for name, norm in found.items():
        if norm.running_mean is not None:
            nn.init.normal_(norm.running_mean, std=0.5)
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
        if norm.weight is None:
            continue
        if mode.far:
            nn.init.uniform_(norm.weight, 0.2, 0.4)
            nn.init.uniform_(norm.bias, 4, 5)
            # Not of the norms before a sum, which would be next to zero where signs differ.
            if name.endswith("bn1"):
                norm.bias.data *= torch.randn_like(norm.bias).sign()
        else:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias, std=0.5)


def put_faults(faults: tuple[Fault, ...], module: nn.Module, x: Tensor) -> None:
    tensors = dict(module.named_parameters()) | dict(module.named_buffers()) | {"input": x}
    for fault in faults:
        if fault.operand in tensors:
            fault.put_into(tensors[fault.operand].data)


def prepare(module: nn.Module, mode: Mode) -> nn.Module:
    """In the dtype, layout and mode that were drawn."""
    layout = torch.channels_last if mode.channels_last else torch.contiguous_format
    module.to(mode.dtype, memory_format=layout)
    for norm in norms_of(module).values():
        # A FrozenBatchNorm2d of torchvision's would return float32, which the next convolution refuses.
        if mode.wide_norms and mode.dtype.itemsize == 2 and isinstance(norm, nn.BatchNorm2d):
            norm.float()
    module.train(mode.training)
    if mode.training:
        for i, norm in enumerate(norms_of(module).values()):
            norm.train(not mode.evaluating >> i & 1)
    for i, parameter in enumerate(module.parameters(), start=1):
        parameter.requires_grad_(bool(mode.trained >> i & 1))
    return module


class Run:
    """A forward pass of a module; then its backward."""

    def __init__(self, module: nn.Module, x: Tensor, mode: Mode) -> None:
        self.module, self.x = module, x.detach().requires_grad_(bool(mode.trained & 1))
        with GRAD_MODES[mode.grad_mode](), torch.autocast("cpu", torch.bfloat16, enabled=mode.autocast):
            self.out: Tensor = module(self.x)

    def results(self, grad: Tensor) -> dict[str, Tensor]:
        """The output, gradients from that w.r.t. the output, and buffers."""
        found = {"output": self.out.detach()} | dict(self.module.named_buffers())
        if self.out.requires_grad:
            self.out.backward(grad.to(self.out.dtype))
        leaves = {"input": self.x} | dict(self.module.named_parameters())
        return found | {f"{name} gradient": t.grad for name, t in leaves.items() if t.grad is not None}


class Exact:
    """A module in float64, in Monte Carlo arithmetic if asked for.

    decisions: what rounding may move across zero: the inputs of ReLUs, and how much larger maxima are than the next.
    """

    def __init__(self, module: nn.Module, mode: Mode, moves: bool) -> None:
        self.module = copy.deepcopy(module).double()
        self.mode = mode._replace(autocast=False)
        self.eps = moves_by(mode.rounds_to) if moves else 0.0
        wide = torch.float64 if mode.dtype == torch.float64 else torch.float32
        self.wide_eps = moves_by(wide) if moves else 0.0
        self.decisions: list[Tensor] = []

    def run(self, x: Tensor) -> Run:
        batch_norm, conv2d, relu, max_pool2d = F.batch_norm, F.conv2d, F.relu, F.max_pool2d

        def moved_batch_norm(*args: Any) -> Tensor:
            if not self.eps:
                return batch_norm(*args)
            return rounded(batch_norm_rounded(*args, eps=self.wide_eps), self.eps)

        def noted_relu(z: Tensor, inplace: bool = False) -> Tensor:
            self.decisions.append(z.detach().clone())
            return rounded(relu(z), self.eps)

        def noted_max_pool2d(a: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            windows = F.unfold(F.pad(a.detach(), (1, 1, 1, 1)), 3, stride=2).view(*a.shape[:2], 9, -1)
            first, second = windows.topk(2, dim=2)[0].unbind(2)
            self.decisions.append((first - second).where(first > 0, 1.0))
            return max_pool2d(a, *args, **kwargs)

        replaced = {
            "batch_norm": moved_batch_norm,
            "conv2d": lambda *args, **kwargs: rounded(conv2d(*args, **kwargs), self.eps),
            "relu": noted_relu,
            "max_pool2d": noted_max_pool2d,
        }
        with mock.patch.multiple(F, **replaced):
            return Run(self.module, x.double(), self.mode)

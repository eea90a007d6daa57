"""A fused model beside its reference: equal weights, and how their results are compared."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused
from resnet_fused import reference
from tests.accuracy import shift_from_zero


def nodes(out: Tensor) -> list[str]:
    """Names of all autograd nodes behind a tensor."""
    seen, todo = set(), [out.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return [node.name() for node in seen]


#: Short ResNets by their kind of block: two blocks of one size, and three with a downsample convolution.
KINDS = {"basic": "BasicBlock", "bottleneck": "Bottleneck"}


def make_model(library: Any, kind: str, **kwargs: Any) -> nn.Module:
    """One of KINDS with seven classes, unless arguments of ResNet say other."""
    options = {"layers": [2, 1, 1, 1], "num_classes": 7} | kwargs
    model: nn.Module = library.ResNet(getattr(library, KINDS[kind]), **options)
    return model


def pair(kind: str, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """The fused model and its reference with equal random weights and statistics; see make_model.

    Biases keep most activations well away from zero, on either side: where a ReLU sits within rounding of zero, float32
    itself decides the gradient, and the two models may decide differently.
    """
    eager = make_model(reference, kind, **kwargs)
    for name, module in eager.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, 3.0, 4.0)
            if name.endswith("bn1") or (
                name.endswith("bn2") and isinstance(eager.layer1[0], reference.Bottleneck)
            ):
                module.bias.data *= torch.randn_like(module.bias).sign()
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    with torch.device("meta"):  # without drawing weights
        fused = make_model(resnet_fused, kind, **kwargs)
    fused.to_empty(device="cpu").load_state_dict(eager.state_dict(), strict=True)
    return fused, eager


def draw_away_from_kinks(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Images for a ResNet, whose biases are changed: rounding decides no ReLU and no maximum; see shift_from_zero.

    Images and the first weights are small integers over powers of two, so that two outputs of the first convolution are
    either equal or far apart.
    """
    x = torch.randint(-2, 3, shape).float()
    with torch.no_grad():
        model.conv1.weight.copy_(torch.randint(-2, 3, model.conv1.weight.shape) / 64)
    exact, latest = copy.deepcopy(model).double(), []

    def shift_bias(relu: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        shift = shift_from_zero(inputs[0])
        latest[-1].bias += shift
        return inputs[0] + shift.view(1, -1, 1, 1)

    for module in exact.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda norm, *_: latest.append(norm))
        elif isinstance(module, nn.ReLU):
            module.register_forward_pre_hook(shift_bias)
    with torch.no_grad():
        exact(x.double())
    for (name, bias), changed in zip(model.named_parameters(), exact.parameters(), strict=True):
        if name.endswith("bias") and name != "fc.bias":
            bias.data.copy_(changed)
    return x


def randomize_norm(module: nn.Module) -> None:
    """Random parameters and running statistics, where it is a batch norm and has them."""
    if isinstance(module, nn.BatchNorm2d):
        if module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
        if module.track_running_stats:
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)


def block_pair(
    kind: str, layout: torch.memory_format, training: bool = True, downsample: bool = True
) -> tuple[nn.Module, nn.Module]:
    """A fused "basic" or "bottleneck" block and its reference in float64, for inputs (N, 64, H, W).

    With 128 or more pixels a bottleneck's last convolution is folded, and its shortcut's too.
    """
    planes = 64 if kind == "basic" or downsample else 16
    blocks = []
    for library in (resnet_fused, reference):
        cls = getattr(library, KINDS[kind])
        outputs = planes * cls.expansion
        shortcut = nn.Sequential(nn.Conv2d(64, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        block = cls(64, planes, 1, shortcut if downsample else None)
        blocks.append(block.double().train(training).to(memory_format=layout))
    fused, eager = blocks
    eager.apply(randomize_norm)
    fused.load_state_dict(eager.state_dict())
    return fused, eager


def scrambled(t: Tensor) -> Tensor:
    """The same values in memory of another order, with gaps."""
    order = random.sample(range(t.dim()), t.dim())
    wide = t.new_empty([2 * t.shape[i] for i in order])
    there = wide[tuple(slice(None, None, 2) for _ in order)].permute([order.index(i) for i in range(t.dim())])
    return there.copy_(t)


def results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients of input and parameters, and running statistics after one pass."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = model(x)
    # A loss whose gradient is neither constant nor tiny.
    F.cross_entropy(out, torch.arange(len(x)) % out.shape[1]).backward()
    found = {"output": out.detach(), "input gradient": x.grad}
    found |= {f"{name} gradient": p.grad for name, p in model.named_parameters() if p.grad is not None}
    found |= {name: b for name, b in model.named_buffers() if b.is_floating_point()}
    return found


def kind_of(name: str) -> str:
    """layer1.0.bn1.weight gradient -> norm weight gradient."""
    module, _, result = name.rpartition(".")
    for kind, parts in {"norm": ("bn", "downsample.1"), "conv": ("conv", "downsample.0")}.items():
        if any(part in module for part in parts):
            return f"{kind} {result}"
    return "fc gradient" if module == "fc" else name


def assert_equal(fused: dict[str, Tensor], eager: dict[str, Tensor]) -> None:
    """Equal up to the rounding of float64: every tensor, beside the largest of its kind."""
    assert fused.keys() == eager.keys()
    largest: dict[str, float] = {}
    for name, tensor in eager.items():
        largest[kind_of(name)] = max(largest.get(kind_of(name), 0.0), float(tensor.norm()))
    for name, expected in eager.items():
        assert float((fused[name] - expected).norm()) <= 1e-9 * largest[kind_of(name)], name

"""The figures of docs/training-fold.md: ``python -m benchmarks.training_fold [--write]``.

Relative errors against float64 of a 1x1 convolution with its batch norm, residual and ReLU, eager and folded, and which
convolutions of a ResNet are folded. ``--write`` puts the tables into the page, between its markers.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from resnet_fused.ops._branch import Stage, folded_gradients, folds, measure_folded
from resnet_fused.ops.folded import add_product_, folded_add_relu, folded_backward
from torch import Tensor

from benchmarks.page import show
from resnet_fused import reference
from resnet_fused.types import BatchNorm, ConvBN
from resnet_fused.reference.batch_norm import scale

PAGE = Path(__file__).parent.parent / "docs" / "training-fold.md"
K, N, IMAGES, SIZE = 64, 256, 4, 56
RESULTS = ("output", "dx", "dW", "dgamma")
EPS = 1e-5


def inputs(ratio: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """Input of |mean| / std = ratio, weight, gamma, beta, residual and gradient; P = 4 * 56 * 56 = 12,544."""
    torch.manual_seed(0)
    x = torch.randn(IMAGES, K, SIZE, SIZE) + ratio * torch.randn(K).sign().view(-1, 1, 1)
    made = {
        "x": x,
        "W": torch.randn(N, K, 1, 1) / K**0.5,
        "residual": torch.randn(IMAGES, N, SIZE, SIZE),
        "grad": torch.randn(IMAGES, N, SIZE, SIZE),
    }
    made = {name: t.to(dtype).to(memory_format=torch.channels_last) for name, t in made.items()}
    return made | {"gamma": torch.rand(N) + 0.5, "beta": torch.randn(N) * 0.3}


def eager(t: dict[str, Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Convolution, F.batch_norm, addition and ReLU, and autograd's gradients; in ``dtype`` if one is given."""
    t = {name: x if dtype is None else x.to(dtype) for name, x in t.items()}
    wanted = [t[name].detach().clone().requires_grad_() for name in ("x", "W", "gamma")]
    x, weight, gamma = wanted
    z = F.batch_norm(F.conv2d(x, weight), None, None, gamma, t["beta"], True, eps=EPS)
    out = F.relu(z + t["residual"])
    return [out.detach(), *torch.autograd.grad(out, wanted, t["grad"])]


def folded(t: dict[str, Tensor], centred: bool) -> list[Tensor]:
    """The same by the primitives of the folded convolution, with or without centring its input."""
    x, weight, gamma = t["x"], t["W"], t["gamma"]
    stage = Stage((1, 1), (1, 1), (0, 0), (1, 1), 1, EPS, None, None, True)
    shift = None
    if centred:
        mean, _, _ = torch.ops.resnet_fused.batch_norm_stats(x, 0.0)
        shift = mean.to(x.dtype).float()
    c = x if shift is None else x - shift.to(x.dtype).view(1, -1, 1, 1)
    measured, fold = measure_folded(c, weight.flatten(1), shift, stage)
    used = measured.used
    out, mask = folded_add_relu(
        c, weight, used.mean, used.invstd, gamma, t["beta"], t["residual"], *[None] * 5
    )
    factor = scale(used.invstd, gamma).view(-1, 1, 1, 1)
    matrix = (weight * factor).transpose(0, 1).to(x.dtype).contiguous()
    sum_dz, (product,), (dx,) = folded_backward(t["grad"], mask, [c], [matrix])
    wide, pixels = weight.flatten(1).float(), c.numel() // K
    found = folded_gradients(wide, gamma, used, fold, stage, sum_dz, product, pixels)
    assert found.matrix is not None and found.vector is not None
    add_product_(dx, c, found.matrix.to(x.dtype)[:, :, None, None], found.vector)
    return [out, dx, found.weight.view_as(weight), found.gamma]


def error(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).norm() / exact.norm())


def accuracy_table() -> str:
    """Relative errors, eager / folded uncentred / folded centred, by dtype and |mean| / std of the input."""
    lines = [
        "| dtype, mean/std of the input | " + " | ".join(RESULTS) + " |",
        "| --- |" + " --- |" * len(RESULTS),
    ]
    for dtype, label in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for ratio in (0, 10, 1000):
            t = inputs(ratio, dtype)
            # No gradient where rounding may decide whether the ReLU lets it through: that is not what is compared.
            t["grad"] = t["grad"].masked_fill(eager(t, torch.float64)[0] < 0.05, 0.0)
            exact = eager(t, torch.float64)
            runs = [eager(t), folded(t, centred=False), folded(t, centred=True)]
            cells = [
                " / ".join(f"{error(run[i], exact[i]):.0e}" for run in runs) for i in range(len(RESULTS))
            ]
            lines.append(
                f"| {label}, {ratio} | " + " | ".join(cells).replace("e-0", "e-").replace("e+0", "e") + " |"
            )
    return "\n".join(lines)


def folded_table(batch: int = 16, size: int = 224) -> str:
    """The convolutions of ResNet-50 that could be folded, and which are, at a batch and image size."""
    with torch.device("meta"):
        model = reference.resnet50()
    lines = [
        "| convolution | K | N | pixels P | K^2 (2P + 3N) / PN | folded |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    pixels = size // 4
    for stage in range(1, 5):
        pixels = pixels if stage == 1 else pixels // 2
        block = model.get_submodule(f"layer{stage}.0")
        count = batch * pixels * pixels
        for name, place in (("conv3", "conv3"), ("downsample", "downsample.0")):
            conv: Any = block.get_submodule(place)
            norm = BatchNorm(None, None, None, None, True, 0.1, EPS)
            part = ConvBN(conv.weight, norm, conv.stride, conv.padding, conv.dilation, conv.groups)
            n, k = conv.weight.shape[:2]
            cost = k * k * (2 * count + 3 * n) / (count * n)
            answer = "yes" if folds(part, count) else "no"
            lines.append(f"| layer{stage}, {name} | {k} | {n} | {count:,} | {cost:.0f} | {answer} |")
    return "\n".join(lines)


TABLES = {"accuracy": accuracy_table, "folded": folded_table}


def main(arguments: list[str]) -> int:
    return show({name: make() for name, make in TABLES.items()}, PAGE, "--write" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

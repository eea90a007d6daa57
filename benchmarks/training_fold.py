"""The tables of docs/training-fold.md: ``python -m benchmarks.training_fold [--write]``.

Relative errors against float64 of a 1x1 convolution with batch norm, residual and ReLU: eager, and by the page's
formulas with and without centring. And which convolutions of ResNet-50 are folded on a CPU.
"""

from __future__ import annotations

import itertools
import re
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.page import ROOT, Page, markdown
from resnet_fused import reference
from resnet_fused.ops.residual_block import output_policy
from resnet_fused.types import BatchNorm, ConvBN

K, N, PIXELS = 64, 256, 4 * 56 * 56
RESULTS = ("output", "dx", "dW", "dgamma")
EPS = 1e-5
_FLOAT = re.compile(r"\d+e-?\d+")


def inputs(ratio: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """Input of |mean| / std = ratio (P, K), weight (N, K), residual and gradient (P, N), gamma and beta (N)."""
    torch.manual_seed(0)
    tensors = {
        "x": torch.randn(PIXELS, K) + ratio * torch.randn(K).sign(),
        "W": torch.randn(N, K) / K**0.5,
        "residual": torch.randn(PIXELS, N),
        "grad": torch.randn(PIXELS, N),
    }
    tensors = {name: t.to(dtype) for name, t in tensors.items()}
    return tensors | {"gamma": torch.rand(N) + 0.5, "beta": torch.randn(N) * 0.3}


def eager(t: dict[str, Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Convolution, F.batch_norm, addition and ReLU, and autograd's gradients; in ``dtype`` if one is given."""
    t = {name: x if dtype is None else x.to(dtype) for name, x in t.items()}
    wanted = [t[name].detach().clone().requires_grad_() for name in ("x", "W", "gamma")]
    x, weight, gamma = wanted
    z = F.batch_norm(F.linear(x, weight), None, None, gamma, t["beta"], True, eps=EPS)
    out = F.relu(z + t["residual"])
    return [out.detach(), *torch.autograd.grad(out, wanted, t["grad"])]


def folded(t: dict[str, Tensor], centred: bool) -> list[Tensor]:
    """The same by the page's formulas: GEMMs of operands in the activations' dtype, accumulated in float32."""
    dtype, x, weight, gamma = t["x"].dtype, t["x"].float(), t["W"].float(), t["gamma"]

    def mm(a: Tensor, b: Tensor) -> Tensor:
        return a.to(dtype).float() @ b.to(dtype).float()

    shift = x.mean(0).to(dtype).float() if centred else torch.zeros(K)
    c = (x - shift).to(dtype).float()
    mean = c.mean(0)
    covariance = mm(c.T, c) / PIXELS - mean.outer(mean)
    variance = ((weight @ covariance) * weight).sum(1).clamp(min=0)  # rounding may make it negative
    invstd = (variance + EPS).rsqrt()
    scale, t_n = gamma * invstd, -weight @ mean
    out = F.relu(scale * (mm(c, weight.T) + t_n) + t["beta"] + t["residual"].float())

    dz = t["grad"].float() * (out > 0)
    q, dbeta = mm(dz.T, c), dz.sum(0)
    dgamma = invstd * ((weight * q).sum(1) + dbeta * t_n)
    slope, offset = -invstd * dgamma / PIXELS, -dbeta / PIXELS
    of_variance = PIXELS * slope[:, None] * (weight @ covariance)
    dweight = scale[:, None] * (q + of_variance - dbeta[:, None] * mean)
    matrix, vector = weight.T @ ((scale * slope)[:, None] * weight), (scale * (slope * t_n + offset)) @ weight
    dx = mm(dz, scale[:, None] * weight) + mm(c, matrix) + vector
    return [out.to(dtype), dx.to(dtype), dweight, dgamma]


def error(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).norm() / exact.norm())


def accuracy_table() -> str:
    """Relative errors, eager / folded without centring / folded with it, by dtype and |mean| / std of the input."""
    torch.set_num_threads(2)  # with one PyTorch convolves by other code than oneDNN
    import pandas as pd

    rows = []
    for (dtype, label), ratio in itertools.product(
        ((torch.float32, "fp32"), (torch.bfloat16, "bf16")), (0, 10, 1000)
    ):
        t = inputs(ratio, dtype)
        # No gradient where rounding may decide whether the ReLU lets it through: that is not what is compared.
        t["grad"] = t["grad"].masked_fill(eager(t, torch.float64)[0] < 0.05, 0.0)
        exact = eager(t, torch.float64)
        runs = [eager(t), folded(t, centred=False), folded(t, centred=True)]
        cells = (" / ".join(f"{error(x, e):.0e}" for x in xs) for *xs, e in zip(*runs, exact, strict=True))
        short = (cell.replace("e-0", "e-").replace("e+0", "e") for cell in cells)
        rows.append([f"{label}, {ratio}", *short])
    return markdown(pd.DataFrame(rows, columns=["dtype, mean/std of the input", *RESULTS]))


def folded_table(batch: int = 16, size: int = 224) -> str:
    """The convolutions of ResNet-50 that could be folded, and what is done, at a batch and image size."""
    import pandas as pd

    with torch.device("meta"):
        model = reference.resnet50()
    rows = []
    for stage, name in itertools.product(range(1, 5), ("conv3", "downsample.0")):
        conv: Any = model.get_submodule(f"layer{stage}.0.{name}")
        pixels = batch * (size // 2 ** (stage + 1)) ** 2
        bn = BatchNorm(None, None, None, None, True, 0.1, EPS)
        operand = ConvBN(conv.weight, bn, conv.stride, conv.padding, conv.dilation, conv.groups)
        n, k = conv.weight.shape[:2]
        rows.append(
            {
                "convolution": f"layer{stage}, {name.removesuffix('.0')}",
                "K": k,
                "N": n,
                "pixels P": f"{pixels:,}",
                "K^2 (2P + 3N) / PN": f"{k * k * (2 * pixels + 3 * n) / (pixels * n):.0f}",
                "its output": output_policy(operand, pixels, torch.float32),
            }
        )
    return markdown(pd.DataFrame(rows))


def similar(page: str, new: str) -> bool:
    """Equal, and errors within a factor of 2.5: sums run in another order on another processor.

    Errors above 0.05 are of results without a correct digit, and may be anything.
    """
    pairs = zip(*(map(float, _FLOAT.findall(text)) for text in (page, new)), strict=False)
    return _FLOAT.sub("", page) == _FLOAT.sub("", new) and all(
        0.4 <= a / b <= 2.5 or min(a, b) > 0.05 for a, b in pairs
    )


PAGE = Page(
    path=ROOT / "docs" / "training-fold.md",
    command="python -m benchmarks.training_fold --write",
    tables=lambda: {"accuracy": accuracy_table(), "folded": folded_table()},
    equal=similar,
)

if __name__ == "__main__":
    sys.exit(PAGE.main(sys.argv[1:], __doc__))

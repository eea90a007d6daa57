"""The tables of docs/launch-plan.md: ``python -m benchmarks.launch_plan [--write]``.

What a training step of ResNet-50 launches on a GPU (resnet_fused.plan) beside the folded step of the roofline model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from benchmarks.page import ROOT, Page, markdown
from benchmarks.roofline_model import Kernel, step
from resnet_fused.plan import Planned, plan

ARCH, BATCH, DTYPE = "resnet50", 256, "bf16"
STEM = (
    "cuDNN's 7x7 convolution has no epilogue and no prologue: statistics are a pass of their own (1.6 MB), and dy is"
    " written for its weight gradient and read again (3.2 MB)"
)
PARTIAL = "partial sums of the splits"
#: Of each line: its name, our kernel, the end of the model's names, and why they differ.
LINES = (
    ("convolution", "conv_bn_stats", "conv", "mean and sums of every tile, for the statistics"),
    ("covariance", "input_covariance", "covariance", f"{PARTIAL}, float32"),
    ("folded convolutions, BN, add, ReLU", "conv1x1_bn_add_relu", "bn+add+relu", ""),
    ("Q of folded convolutions", "folded_wgrad", "folded wgrad", PARTIAL),
    (
        "input gradient of folded convolutions",
        "folded_dgrad",
        "folded dgrad",
        "two sums of every tile, for the BN",
    ),
    ("weight gradient", "wgrad", "wgrad", PARTIAL),
    ("input gradient", "dgrad", "dgrad", "two sums of every tile"),
)
#: Of the other launches: what they are for, and their kernels.
OTHERS = {
    "merges of partial sums": ("norm_statistics", "sum_tiles", "sum_splits", "covariance"),
    "per-channel vectors and matrices of folded convolutions": (
        "rectified_mean", "fold_statistics", "merge_statistics", "fold_dweight", "fold_matrix", "mean",
    ),
    "running statistics, unbiased variances, batch counters": (
        "_foreach_lerp_", "_foreach_mul", "_foreach_add_", "mul",
    ),
    "gradients of weights in the weights' dtype": ("_to_copy",),
    "a second copy of the bias gradient that both branches of a block have": ("clone",),
    "the stem's two reductions": ("batch_norm_stats merge", "bn_relu_maxpool_backward_reduce merge"),
}  # fmt: skip


def passes_table() -> str:
    """The kernels over activations beside the model's."""
    import pandas as pd

    planned = [p for p in plan(ARCH, BATCH, DTYPE) if p.is_pass]
    model = step(ARCH, BATCH, 224, DTYPE, "folded")
    ours, theirs = [p for p in planned if p.block != "stem"], [k for k in model if k.block != "stem"]
    groups: list[tuple[str, list[Planned], list[Kernel], str]] = [
        ("stem", [p for p in planned if p.block == "stem"], [k for k in model if k.block == "stem"], STEM)
    ]
    for name, kernel, suffix, why in LINES:
        same = [k for k in theirs if k.name.partition(" ")[2] == suffix]
        groups.append((name, [p for p in ours if p.kernel == kernel], same, why))
    assert len(planned) == sum(len(launched) for _, launched, _, _ in groups), "a launch is on no line"
    assert len(model) == sum(len(same) for _, _, same, _ in groups), "a kernel of the model is on no line"
    rows = []
    for name, launched, modelled, why in [*groups, ("all", planned, model, "")]:
        moved, fewest = _bytes(launched), _bytes(modelled)
        figures = [len(launched), len(modelled), _mb(moved), _mb(fewest), f"{moved / fewest - 1:+.1%}"]
        rows.append([name, *figures, why])
    heads = ["passes over activations", "launches", "model", "MB per image", "model", "", "why"]
    return markdown(pd.DataFrame(rows, columns=heads))


def others_table() -> str:
    """Everything else that a step launches: it touches weights, vectors of channels and partial sums."""
    import pandas as pd

    planned = plan(ARCH, BATCH, DTYPE)
    small = [p for p in planned if not p.is_pass]
    groups = [(name, [p for p in small if p.kernel in kernels]) for name, kernels in OTHERS.items()]
    assert len(small) == sum(len(group) for _, group in groups), "a kernel is on no line"
    rows = [
        (name, len(group), _mb(_bytes(group))) for name, group in [*groups, ("all, with the passes", planned)]
    ]
    return markdown(pd.DataFrame(rows, columns=["other launches", "launches", "MB per image"]))


def _bytes(entries: Iterable[Planned | Kernel]) -> int:
    return sum(entry.bytes for entry in entries)


def _mb(count: int) -> str:
    return f"{count / BATCH / 1e6:.2f}"


PAGE = Page(
    path=ROOT / "docs" / "launch-plan.md",
    command="python -m benchmarks.launch_plan --write",
    tables=lambda: {"passes": passes_table(), "small": others_table()},
)

if __name__ == "__main__":
    sys.exit(PAGE.main(sys.argv[1:], __doc__))

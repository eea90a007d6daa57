"""The figures of docs/launch-plan.md: ``python -m benchmarks.launch_plan [--write]``.

What a training step of ResNet-50 launches on a GPU (resnet_fused.plan), beside the kernels that the roofline's third
row counts, line by line. ``--write`` puts the tables into the page, between their markers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.page import show
from benchmarks.roofline_model import Kernel, step
from resnet_fused.plan import Planned, plan

PAGE = Path(__file__).parent.parent / "docs" / "launch-plan.md"
ARCH, BATCH, DTYPE = "resnet50", 256, "bf16"

#: Of each line: its name, our kernel, the end of the model's names, and why they differ.
LINES = (
    ("convolution", "conv", "conv", "mean and squares of every tile, for the statistics"),
    ("Gram", "gram", "gram", "what the splits of the pixels have found, float32"),
    ("end of a block", "expand", "end", ""),
    ("Q of folded convolutions", "folded_wgrad", "Q", "what the splits have found"),
    ("da of folded convolutions", "folded_dgrad", "da", "two sums of every tile, for the batch norm below"),
    ("weight gradient", "wgrad", "wgrad", "what the splits have found"),
    ("input gradient", "dgrad", "dgrad", "two sums of every tile"),
)
STEM = (
    "cuDNN's 7x7 convolution has no epilogue and no prologue: statistics are a pass of their own (1.6 MB), and dy is"
    " written for its weight gradient and read again (3.2 MB)"
)


def compared(
    planned: Sequence[Planned], model: Sequence[Kernel]
) -> list[tuple[str, list[int], list[int], str]]:
    """(line, launches and bytes of the plan's passes, those of the model, why they differ)."""
    stem = [p for p in planned if p.is_pass and p.block == "stem"]
    found = [("stem", _sums(stem), _sums(k for k in model if k.block == "stem"), STEM)]
    for name, kernel, suffix, why in LINES:
        ours = [p for p in planned if p.is_pass and p.block != "stem" and p.kernel == kernel]
        theirs = [k for k in model if k.block != "stem" and k.name.endswith(f" {suffix}")]
        found.append((name, _sums(ours), _sums(theirs), why))
    return found


def _sums(entries: Iterable[Planned | Kernel]) -> list[int]:
    entries = list(entries)
    return [len(entries), sum(entry.bytes for entry in entries)]


def passes_table() -> str:
    """The passes over activations beside the model's kernels."""
    planned, model = plan(ARCH, BATCH, DTYPE), step(ARCH, BATCH, 224, DTYPE, "folded")
    lines = [
        "| passes over activations | launches | model | MB an image | model | | why |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    rows = compared(planned, model)
    passes = _sums(p for p in planned if p.is_pass)
    assert passes == [sum(row[1][i] for row in rows) for i in (0, 1)], "a pass is on no line"
    assert _sums(model) == [sum(row[2][i] for row in rows) for i in (0, 1)], (
        "a kernel of the model is on no line"
    )
    for name, ours, theirs, why in [*rows, ("all", passes, _sums(model), "")]:
        more = f"{ours[1] / theirs[1] - 1:+.1%}"
        figures = f"{ours[0]} | {theirs[0]} | {_mb(ours[1])} | {_mb(theirs[1])} | {more}"
        lines.append(f"| {name} | {figures} | {why} |")
    return "\n".join(lines)


def _mb(count: int) -> str:
    return f"{count / BATCH / 1e6:.2f}"


#: Of the other launches: their kernels and what they are for.
SMALL = (
    (
        "merges of what tiles and splits have left",
        ("norm_statistics", "sum_tiles", "sum_splits", "covariance"),
    ),
    (
        "the algebra of folded convolutions",
        ("rectified_mean", "fold_statistics", "merge_statistics", "fold_dweight", "fold_matrix", "mean"),
    ),
    (
        "running statistics, unbiased variances, batch counters",
        ("_foreach_lerp_", "_foreach_mul", "_foreach_add_", "mul"),
    ),
    ("gradients of weights in the weights' dtype", ("_to_copy",)),
    ("a second copy of the bias gradient that both branches of a block have", ("clone",)),
    ("the stem's two reductions", ("batch_norm_stats merge", "bn_relu_maxpool_backward_reduce merge")),
)


def small_table() -> str:
    """Everything else that a step launches: it touches weights, vectors and what tiles have left."""
    planned = plan(ARCH, BATCH, DTYPE)
    small = [p for p in planned if not p.is_pass]
    lines = ["| other launches | launches | MB an image |", "| --- | ---: | ---: |"]
    left = len(small)
    for name, kernels in SMALL:
        count, moved = _sums(p for p in small if p.kernel in kernels)
        left -= count
        lines.append(f"| {name} | {count} | {_mb(moved)} |")
    assert left == 0, "a small kernel is on no line"
    count, moved = _sums(planned)
    lines.append(f"| all, with the passes | {count} | {_mb(moved)} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {"passes": passes_table, "small": small_table}


def main(arguments: list[str]) -> int:
    return show({name: make() for name, make in TABLES.items()}, PAGE, "--write" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

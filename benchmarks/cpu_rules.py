"""What is faster on this CPU: ``python -m benchmarks.cpu_rules [--write] [--table FILE]``.

3x3 convolutions, each pass between two batch norms, interleaved:

    ours      the kernels of csrc/cpu/conv, with batch norm, ReLU, statistics and sums in the same pass
    vendor    oneDNN's convolution, with our passes around it: what runs where ours are slower
    eager     oneDNN's convolution, with PyTorch's batch norm and ReLU
    conv      oneDNN's convolution alone

The fourth pass is evaluation's, where weights are folded and packed beforehand: a convolution with bias and ReLU.

Then the gradients of 1x1 and strided convolutions (wgrad_rules), and residual blocks, forward and backward in training,
fused and as PyTorch's operators (block_rules).

For each number of channels and image size the rule is the batch size from which ours are faster. ``--write`` puts it
into resnet_fused/ops/cpu_rules.json, beside those of other machines: ours run where they are faster on all that have
the instruction set. To measure that of an older machine, limit everything to it:

    RESNET_FUSED_CPU_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python -m benchmarks.cpu_rules
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import torch
from torch import Tensor

import resnet_fused
from benchmarks import block_rules, wgrad_rules
from benchmarks.page import markdown
from benchmarks.wgrad_rules import VENDOR, Run
from resnet_fused import native
from resnet_fused.backend import choice
from resnet_fused.measure import (
    EAGER,
    OURS,
    Case,
    Comparison,
    Provider,
    device_name,
    quantiles,
)
from resnet_fused.ops import conv3x3, cpu_rules
from resnet_fused.ops.bn_relu import bn_relu_backward_reduce
from resnet_fused.ops.conv_bn import conv_backward, conv_bn_stats
from resnet_fused.ops.vendor_conv import materialize, materialize_gradient
from resnet_fused.types import Activation, Gradient

CHANNELS = (64, 128, 256, 512)
SIZES = (56, 28, 14, 8, 7, 4, 2)
BATCHES = (1, 2, 4, 8, 16, 64)
PASSES = ("forward", "dgrad", "wgrad", "inference")
#: Elements of the largest activation: beyond, the ratio doesn't change any more.
MOST_ELEMENTS = 64 * 28 * 28 * 64
#: Image size up to which results are checked: float64 convolutions are slow.
LARGEST_CHECKED = 14
#: What a pair of sizes counts as for which no batch is large enough.
NEVER = 1 << 30
CONV = "conv"
_ATEN, _MKLDNN = torch.ops.aten, torch.ops.mkldnn
_GEOMETRY = [1, 1], [1, 1], [1, 1], 1
_CONV = [1, 1], [1, 1], [1, 1], False, [0, 0], 1


def passes(
    channels: int, size: int, batch: int, dtype: torch.dtype = torch.float32
) -> dict[str, dict[str, Run]]:
    """By pass and provider, on the same random operands."""

    def activation() -> Tensor:
        return torch.randn(batch, channels, size, size).to(dtype, memory_format=torch.channels_last)

    def vectors() -> list[Tensor]:
        return [(torch.rand(channels) + offset).to(dtype) for offset in (-0.5, 0.5, 0.5, -0.5)]

    x, y, g = activation(), activation(), activation()
    weight = (torch.randn(channels, channels, 3, 3) / (9 * channels) ** 0.5).to(
        dtype, memory_format=torch.channels_last
    )
    bn, y_bn = vectors(), vectors()
    a = Activation(x, *bn)
    dy = Gradient(g, None, y, *y_bn, *bn_relu_backward_reduce(g, y, *y_bn))
    value, dy_value = materialize(a), materialize_gradient(dy)

    def forward() -> Any:
        return conv_bn_stats([*a], weight, *_GEOMETRY, 1e-5, True, None, None, False)

    def backward(dy: Gradient, a: Activation, needs: list[bool]) -> Any:
        return conv_backward([*dy], [*a], weight, *_GEOMETRY, None, None, [1, 1], needs)

    def conv_gradient(needs: list[bool]) -> Any:
        return _ATEN.convolution_backward(dy_value, value, weight, None, *_CONV, needs)

    def eager_forward() -> Any:
        normed, *_ = _ATEN.native_batch_norm(x, bn[2], bn[3], None, None, True, 0.1, 1e-5)
        return _ATEN.convolution(normed.relu_(), weight, None, *_CONV)

    def eager_dgrad() -> Any:
        dz = _ATEN.threshold_backward(conv_gradient([True, False, False])[0], value, 0)
        return _ATEN.native_batch_norm_backward(dz, x, bn[2], None, None, *bn[:2], True, 1e-5, [True] * 3)

    bias = vectors()[0]
    filters = conv3x3.conv3x3_filters(weight.float())
    packed = _MKLDNN._reorder_convolution_weight(weight.float(), *_GEOMETRY, x.shape)

    def conv_bias_relu() -> Any:
        if dtype != torch.float32:
            return torch.conv2d(x, weight, bias, padding=1).relu_()
        return _MKLDNN._convolution_pointwise.default(x, packed, bias, *_GEOMETRY, "relu", [], "")

    def inference() -> Any:
        if dtype != torch.float32 or choice() == "vendor":
            return conv_bias_relu()
        return conv3x3.conv3x3_inference(x, filters, bias, None)

    def eager_evaluation() -> Any:
        y = _ATEN.convolution(x, weight, None, *_CONV)
        return _ATEN.native_batch_norm(y, bn[2], bn[3], *bn[:2], False, 0.1, 1e-5)[0].relu_()

    def by(backend: str, run: Run) -> Run:
        def chosen() -> Any:
            with resnet_fused.backend(backend), mock.patch.object(conv3x3, "is_faster", lambda *_: True):
                return run()

        return chosen

    ours = {
        "forward": forward,
        "dgrad": lambda: backward(dy, a, [True, False]),
        "wgrad": lambda: backward(dy, a, [False, True]),
        "inference": inference,
    }
    # Both gradients share what is materialized: it counts once, as part of dgrad.
    vendor = ours | {"wgrad": lambda: backward(Gradient(dy_value), Activation(value), [False, True])}
    eager = {
        "forward": eager_forward,
        "dgrad": eager_dgrad,
        "wgrad": lambda: conv_gradient([False, True, False]),
        "inference": eager_evaluation,
    }
    conv = {
        "forward": lambda: _ATEN.convolution(value, weight, None, *_CONV),
        "dgrad": lambda: conv_gradient([True, False, False]),
        "wgrad": eager["wgrad"],
        "inference": lambda: _ATEN.convolution(x, weight, None, *_CONV),
    }
    return {
        name: {
            OURS: by("auto", ours[name]),
            VENDOR: by("vendor", vendor[name]),
            EAGER: eager[name],
            CONV: conv[name],
        }
        for name in PASSES
    }


def check(channels: int, size: int, batch: int) -> None:
    """Raises AssertionError where ours break the accuracy rule in one of the passes."""

    def runs_in(dtype: torch.dtype) -> dict[str, list[Run]]:
        runs = passes(channels, size, batch, dtype)
        return {who: [runs[name][who] for name in PASSES] for who in (OURS, VENDOR)}

    wgrad_rules.check(f"{channels} channels, {size}x{size}, batch {batch}", runs_in)


def measure(channels: int, size: int, batch: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each pass: milliseconds, and ratios of the others' to ours."""
    device, rows = torch.device("cpu"), []
    flops = 2 * 9 * channels**2 * batch * size**2
    for name, runs in passes(channels, size, batch).items():
        case = Case("op", name, "train", "fp32", batch, f"{batch}x{channels}x{size}x{size}")
        comparison = Comparison(case, [Provider(who, run) for who, run in runs.items()], device)
        comparison.warm_up()
        for _ in comparison.rounds(rounds):
            pass
        medians = {p.name: statistics.median(p.times) for p in comparison.providers}
        row = {"channels": channels, "size": size, "batch": batch, "name": name, "ours_ms": medians[OURS]}
        row |= {"gflops": flops / medians[OURS] / 1e6, "vendor_ms": medians[VENDOR]}
        for who in (VENDOR, EAGER, CONV):
            row[f"{who} / ours"] = quantiles(comparison.ratios(comparison.ours, comparison[who]))["median"]
        rows.append(row)
    return rows


def rule(frame: pd.DataFrame, names: Iterable[str], tie: float = 1.0) -> dict[str, dict[str, dict[str, int]]]:
    """[name][channels][size]: the batch size from which on ours gain the most over all batches that were measured.

    Args:
        tie: the ratio from which ours gain.
    """
    result: dict[str, dict[str, dict[str, int]]] = {name: {} for name in names}
    for (name, channels, size), rows in frame.groupby(["name", "channels", "size"]):
        # By the logarithm of the ratio, so that one noisy figure decides nothing.
        gains = rows.sort_values("batch", ascending=False)
        total = (gains["vendor / ours"] / tie).map(math.log).cumsum()
        best = gains.batch[total.idxmax()] if total.max() > 0 else NEVER
        result[name].setdefault(str(channels), {})[str(size)] = int(best)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_rules", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--write", action="store_true", help=f"put the rule into {cpu_rules.RULES.name}")
    parser.add_argument("--table", type=Path, help="write all times to a CSV file")
    parser.add_argument("--rounds", type=int, default=7, help="runs of each provider")
    arguments = parser.parse_args()
    rows = []
    cases = [
        (channels, size, batch)
        for channels in CHANNELS
        for size in SIZES
        for batch in BATCHES
        if batch * size**2 * channels <= MOST_ELEMENTS
    ]
    with torch.no_grad():
        for i, case in enumerate(cases, 1):
            print(
                f"{i} of {len(cases)}: {case[0]} channels, {case[1]}x{case[1]}, batch {case[2]}",
                file=sys.stderr,
            )
            if case[2] == 2 and case[1] <= LARGEST_CHECKED:
                check(*case)
            rows += measure(*case, arguments.rounds)
        wgrads = pd.DataFrame(wgrad_rules.measure(arguments.rounds))
    frame = pd.DataFrame(rows)
    how = f"{torch.get_num_threads()} threads, torch {torch.__version__}, {date.today()}"
    machine = {
        "isa": native.cpu_isa(),
        "machine": cpu_name(),
        "measured": how,
        "convolutions": rule(frame, PASSES) | rule(wgrads, wgrad_rules.NAMES),
    }
    if arguments.write:
        write(machine)  # blocks run by it
    blocks = pd.DataFrame(block_rules.measure(arguments.rounds))
    machine["blocks"] = block_rules.limited(rule(blocks, block_rules.NAMES, block_rules.TIE))
    if arguments.table:
        pd.concat([frame, wgrads, blocks]).to_csv(arguments.table, index=False, float_format="%.4g")
    for measured in (frame, wgrads, blocks):
        print(markdown(measured.round(2)))
    print(f"\n{json.dumps(machine)}")
    if arguments.write:
        write(machine)
    return 0


def cpu_name() -> str:
    """Of the processor with its model number: virtual machines give different ones the same name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    numbers = [" ".join(line.split()) for line in lines if line.startswith(("cpu family", "model\t"))]
    name = device_name(torch.device("cpu")).partition(" (")[0]
    return ", ".join([name, *(number.replace(" :", "") for number in numbers[:2])])


def write(machine: dict[str, Any]) -> None:
    """Puts the rule of a machine in place of what was measured on one of its name before."""
    same = machine["isa"], machine["machine"]
    machines = json.loads(cpu_rules.RULES.read_text())["machines"]
    machines = [*(m for m in machines if (m["isa"], m["machine"]) != same), machine]
    lines = ",\n".join(_json_lines(m) for m in machines)
    about = (
        "written by python -m benchmarks.cpu_rules --write; convolutions[pass] and blocks[kind]"
        " [channels][height and width]: the batch size from which ours are faster"
    )
    cpu_rules.RULES.write_text(f'{{"about": "{about}",\n"machines": [\n{lines}\n]}}\n')
    cpu_rules.tables.cache_clear()
    cpu_rules._least_pixels.cache_clear()


def _json_lines(machine: dict[str, Any]) -> str:
    """A line for each table and number of channels."""
    parts = [json.dumps({name: value for name, value in machine.items() if isinstance(value, str)})[1:-1]]
    for kind, tables in machine.items():
        if not isinstance(tables, str):
            named = [
                f'  "{name}": {{\n   '
                + ",\n   ".join(f'"{channels}": {json.dumps(sizes)}' for channels, sizes in table.items())
                + "}"
                for name, table in tables.items()
            ]
            parts.append(f'"{kind}": {{\n' + ",\n".join(named) + "}")
    return " {" + ",\n ".join(parts) + "}"


if __name__ == "__main__":
    sys.exit(main())

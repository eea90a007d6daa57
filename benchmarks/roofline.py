"""How fast a training step could be: ``python -m benchmarks.roofline [--help]``.

The limit of a kernel is the larger of bytes / bandwidth and operations / rate, and that of a step the sum over its
kernels (``benchmarks.roofline_model`` lists them). Without options: ResNet-50 in bf16 on an H100, by every way to run
a step. With ``--kernels`` the parts of one way; with ``--results`` what measured times reach of their limits.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.roofline_model import ELEMENT, WAYS, Kernel, held_bytes, step
from resnet_fused.measure import device_name, milliseconds
from resnet_fused.reference.resnet import ARCHITECTURES

__all__ = ["H100", "Ceilings", "Kernel", "held_bytes", "limit", "main", "measure", "op_bytes", "step"]


@dataclass(frozen=True)
class Ceilings:
    """What a device can do: bandwidth in bytes per second, flops in floating point operations per second.

    Raises:
        ValueError: one of them is not a positive finite number.
    """

    bandwidth: float
    flops: float

    def __post_init__(self) -> None:
        for name, value, unit in (
            ("bandwidth", self.bandwidth, "bytes"),
            ("flops", self.flops, "operations"),
        ):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive, in {unit} per second, got {value!r}")

    def memory_seconds(self, kernel: Kernel) -> float:
        return kernel.bytes / self.bandwidth

    def compute_seconds(self, kernel: Kernel) -> float:
        return kernel.flops / self.flops

    def __str__(self) -> str:
        return f"{self.bandwidth / 1e9:,.1f} GB/s, {self.flops / 1e9:,.0f} GFLOP/s"


#: Measured on an H100 SXM, bf16; see section 1 of the design.
H100 = Ceilings(bandwidth=3.0e12, flops=790e12)


def limit(kernels: Iterable[Kernel], ceilings: Ceilings) -> float:
    """Seconds that the kernels take at least, one after the other."""
    return sum(max(ceilings.memory_seconds(k), ceilings.compute_seconds(k)) for k in kernels)


def op_bytes(name: str, mode: str, shape: tuple[int, int, int, int], dtype: str) -> int:
    """Bytes that a fused op alone must move in training.

    Batch norm cannot start before it has seen everything, forward and backward: two passes over its inputs each.

    Args:
        name: of the op: bn_relu, bn_add_relu, bn_bn_add_relu or bn_relu_maxpool.
        mode: fwd, bwd or fwd_bwd.
        shape: of the convolution's output, (N, C, H, W).
        dtype: of activations and gradients: fp32, tf32, bf16 or fp16.

    Raises:
        ValueError: an op, mode or dtype that is not modelled.
    """
    if dtype not in ELEMENT:
        raise ValueError(f"unknown dtype {dtype!r}: choose one of {', '.join(ELEMENT)}")
    n, c, h, w = shape
    elements, windows = n * c * h * w, n * c * ((h - 1) // 2 + 1) * ((w - 1) // 2 + 1)
    y, bits, pooled = ELEMENT[dtype] * elements, -(-elements // 8), (ELEMENT[dtype] + 1) * windows
    passes = {
        # statistics y, pass y -> out | reduce g y, pass g y -> dy
        "bn_relu": (3 * y, 5 * y),
        # statistics y, pass y residual -> out bits | reduce g bits y, pass g bits y -> dy dresidual
        "bn_add_relu": (4 * y + bits, 6 * y + 2 * bits),
        # statistics y skip, pass y skip -> out bits | reduce g bits y skip, pass g bits y skip -> dy dskip
        "bn_bn_add_relu": (5 * y + bits, 8 * y + 2 * bits),
        # statistics y, pass y -> out indices | reduce g indices y, pass g indices y -> dy
        "bn_relu_maxpool": (2 * y + pooled, 3 * y + 2 * pooled),
    }
    if name not in passes:
        raise ValueError(f"op {name!r} is not modelled: choose one of {', '.join(passes)}")
    forward, backward = passes[name]
    modes = {"fwd": forward, "bwd": backward, "fwd_bwd": forward + backward}
    if mode not in modes:
        raise ValueError(f"unknown mode {mode!r} of an op: choose one of {', '.join(modes)}")
    return modes[mode]


def measure(dtype: str, device: torch.device) -> Ceilings:
    """This machine's ceilings, in about two seconds: a warm copy of 256 MB, and the faster of two convolutions.

    Raises:
        ValueError: an unknown dtype, or tf32 on a CPU.
    """
    if dtype not in ELEMENT:
        raise ValueError(f"unknown dtype {dtype!r}: choose one of {', '.join(ELEMENT)}")
    if dtype == "tf32" and device.type == "cpu":
        raise ValueError("a CPU has no tf32 to measure: pass --dtype fp32")
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    batch = 256 if device.type == "cuda" else 16
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    try:
        rates = [
            _conv_rate((batch, channels, 14, 14), kernel, kinds.get(dtype, torch.float32), device)
            for channels, kernel in ((256, 3), (1024, 1))
        ]
    finally:
        torch.backends.cudnn.allow_tf32 = before
    return Ceilings(bandwidth=_copy_rate(device), flops=max(rates))


def _copy_rate(device: torch.device) -> float:
    """Bytes read and written per second."""
    source = torch.ones(64 * 2**20, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)


def _conv_rate(
    shape: tuple[int, int, int, int], kernel: int, dtype: torch.dtype, device: torch.device
) -> float:
    """Operations per second of a convolution to 256 channels that keeps the size."""
    x = torch.randn(shape, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    w = torch.randn(256, shape[1], kernel, kernel, device=device, dtype=dtype)
    w = w.to(memory_format=torch.channels_last)
    operations = 2 * shape[0] * shape[2] * shape[3] * w.numel()
    return operations / _seconds(lambda: F.conv2d(x, w, padding=kernel // 2), device)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The fastest of up to ten runs in about half a second, after one that warms up."""
    with torch.no_grad():
        run()
        times: list[float] = []
        while len(times) < 10 and sum(times) < 500:
            times.append(milliseconds(run, device))
    return min(times) / 1e3


def ways_table(
    arch: str, batch: int, image_size: int, dtype: str, ways: Iterable[str], ceilings: Ceilings, whole: bool
) -> str:
    """One line per way to run a step."""
    heads = ("kernels", "MB/image", "GFLOP/image", "limit ms", "limit img/s", "held MB/image")
    lines = [f"{'way':10}" + "".join(f"{head:>15}" for head in heads)]
    for way in ways:
        kernels = step(arch, batch, image_size, dtype, way, whole=whole)
        seconds = limit(kernels, ceilings)
        moved, flops = sum(k.bytes for k in kernels) / batch, sum(k.flops for k in kernels) / batch
        held = held_bytes(arch, batch, image_size, dtype, way) / batch
        lines.append(
            f"{way:10}{len(kernels):15}{moved / 1e6:15.1f}{flops / 1e9:15.2f}"
            f"{seconds * 1e3:15.3f}{batch / seconds:15,.{0 if batch / seconds > 1000 else 1}f}{held / 1e6:15.1f}"
        )
    return "\n".join(lines)


def kernels_table(kernels: list[Kernel], ceilings: Ceilings) -> str:
    """A line per block and kind of kernel, in the order of the network, and then per kind over the whole step."""
    groups: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault((kernel.block, kernel.kind), []).append(kernel)
    blocks = list(dict.fromkeys(kernel.block for kernel in kernels))
    kinds = list(dict.fromkeys(kernel.kind for kernel in kernels))
    heads = ("kernels", "MB", "GFLOP", "limit us")
    lines = [f"{'block':12}{'kind':13}" + "".join(f"{head:>11}" for head in heads) + "  limited by"]

    def add(block: str, kind: str, group: list[Kernel]) -> None:
        moved, flops = sum(k.bytes for k in group) / 1e6, sum(k.flops for k in group) / 1e9
        memory_bound = sum(ceilings.memory_seconds(k) >= ceilings.compute_seconds(k) for k in group)
        side = {0: "compute", len(group): "memory"}.get(memory_bound, f"memory {memory_bound}/{len(group)}")
        lines.append(
            f"{block:12}{kind:13}{len(group):11}{moved:11.2f}{flops:11.2f}{limit(group, ceilings) * 1e6:11.1f}"
            f"  {side}"
        )

    for block in blocks:
        for kind in kinds:
            if (block, kind) in groups:
                add(block, kind, groups[block, kind])
    for kind in kinds:
        add("all", kind, [k for k in kernels if k.kind == kind])
    add("all", "all", kernels)
    return "\n".join(lines)


def results_table(
    rows: list[dict[str, Any]], ceilings_of: Callable[[str], Ceilings], ways: Iterable[str]
) -> str:
    """Measured times against their limits: models by each way, ops by their memory limit; ``*`` is below half.

    Args:
        rows: of a results file, as ``harness.write_results`` makes them.
        ceilings_of: those of a dtype.
        ways: which limits a model's time is held against.
    """
    ways = list(ways)
    models, ops, left_out = [], [], set()
    for row in rows:
        if row["median_ms"] is None:
            continue
        if row["layer"] == "model" and row["mode"] == "train" and row["name"] in ARCHITECTURES:
            models.append(row)
            continue
        try:
            ops.append((row, op_bytes(row["name"], row["mode"], _shape(row["shape"]), row["dtype"])))
        except ValueError:
            left_out.add(f"{row['layer']} {row['name']} {row['mode']}")
    lines = []
    if models:
        lines.append(
            f"{'training step':18}{'dtype':6}{'batch':>6}  {'implementation':22}{'ms':>9}"
            + "".join(f"{way:>9}" for way in ways)
        )
    for row in models:
        size, ceilings = _shape(row["shape"])[-1], ceilings_of(row["dtype"])
        text = f"{row['name']:18}{row['dtype']:6}{row['batch']:6}  {row['impl']:22}{row['median_ms']:9.1f}"
        for way in ways:
            kernels = step(row["name"], row["batch"], size, row["dtype"], way, whole=True)
            text += _share(limit(kernels, ceilings), row["median_ms"])
        lines.append(text)
    if ops:
        lines.append(
            f"{'op':16}{'mode':8}{'dtype':6}{'shape':>16}  {'implementation':22}{'MB':>8}{'ms':>9}{'share':>9}"
        )
    for row, moved in ops:
        share = _share(moved / ceilings_of(row["dtype"]).bandwidth, row["median_ms"])
        lines.append(
            f"{row['name']:16}{row['mode']:8}{row['dtype']:6}{row['shape']:>16}  {row['impl']:22}"
            f"{moved / 1e6:8.1f}{row['median_ms']:9.2f}{share}"
        )
    if left_out:
        lines.append(f"not modelled, left out: {', '.join(sorted(left_out))}")
    return "\n".join(lines)


def _share(seconds: float, measured_ms: float) -> str:
    """The limit as a share of the measured time: 100 % is as fast as can be, and more is a tensor found in cache."""
    share = seconds / (measured_ms / 1e3)
    return f"{share:8.0%}{'*' if share < 0.5 else ' '}"


def _shape(text: str) -> tuple[int, int, int, int]:
    sizes = text.split("x")
    if len(sizes) != 4 or not all(size.isdigit() for size in sizes):
        raise ValueError(f"the shape of a row must be NxCxHxW, got {text!r}")
    n, c, h, w = map(int, sizes)
    return n, c, h, w


def read_results(path: Path, dtype: str | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and rows of a results file, of one dtype if it is given.

    Raises:
        ValueError: the file is not there, is no results file, or has no such rows.
    """
    advice = "pass a file that `make bench RESULTS=NAME.json` wrote"
    try:
        results = json.loads(path.read_text())
        header, rows = results["header"], results["rows"]
        needed = ("layer", "name", "mode", "dtype", "batch", "shape", "impl", "median_ms")
        rows = [{**row, **{key: row[key] for key in needed}} for row in rows]
        header = {**header, "threads": int(header["threads"])}
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): {advice}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a results file ({error!r}): {advice}") from error
    found = sorted({row["dtype"] for row in rows})
    rows = [row for row in rows if dtype in (None, row["dtype"])]
    if not rows:
        raise ValueError(f"{path} has no rows of {dtype or 'any dtype'}; it has {', '.join(found) or 'none'}")
    return header, rows


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Torch runs with this many threads for a while; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measured(dtypes: Iterable[str], threads: int | None) -> dict[str, Ceilings]:
    """The ceilings of each dtype, printed as they are found."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ceilings = {}
    with _threads(threads):
        on = f"{device_name(device)}, {torch.get_num_threads()} threads"
        for dtype in dtypes:
            ceilings[dtype] = measure(dtype, device)
            print(f"measured on {on}, {dtype}: {ceilings[dtype]}")
    return ceilings


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument("--arch", default="resnet50", help="one of the ten ResNets (default: resnet50)")
    parser.add_argument("--batch", type=int, default=256, help="images a step (default: 256)")
    parser.add_argument("--image-size", type=int, default=224, help="pixels of a side (default: 224)")
    parser.add_argument("--dtype", help="fp32, tf32, bf16 or fp16 (default: bf16; with --results, all in it)")
    parser.add_argument("--bandwidth", type=float, help="bytes per second (default: 3.0e12, an H100)")
    parser.add_argument("--flops", type=float, help="operations per second (default: 790e12, an H100)")
    parser.add_argument("--measure", action="store_true", help="measure this machine's ceilings instead")
    parser.add_argument("--way", default="all", help="eager, fused, folded, vendor or all (default: all)")
    parser.add_argument(
        "--whole", action="store_true", help="with pooling, classifier, loss and optimizer; --results always"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--kernels", action="store_true", help="the kernels of one way, by block and kind")
    what.add_argument("--results", type=Path, help="measured times of this file as shares of their limits")
    return parser


def main(arguments: list[str]) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    given = options.bandwidth is not None or options.flops is not None
    if options.measure and given:
        parser.error("--measure finds the ceilings itself: leave out --bandwidth and --flops")
    if options.way not in (*WAYS, "all"):
        parser.error(f"unknown way {options.way!r}: choose one of {', '.join(WAYS)} or all")
    if options.kernels and options.way == "all":
        parser.error(f"--kernels shows one way: add --way and one of {', '.join(WAYS)}")
    ways = WAYS if options.way == "all" else (options.way,)
    try:
        if options.results:
            if not options.measure and None in (options.bandwidth, options.flops):
                parser.error(
                    "--results needs the ceilings of the machine that the file is from: --bandwidth and --flops, or,"
                    " on that machine, --measure"
                )
            return _show_results(options, ways)
        dtype = options.dtype or "bf16"
        # Bad input is refused before anything is measured.
        kernels = step(options.arch, options.batch, options.image_size, dtype, ways[0], whole=options.whole)
        if options.measure:
            ceilings = _measured([dtype], None)[dtype]
        else:
            bandwidth = H100.bandwidth if options.bandwidth is None else options.bandwidth
            ceilings = Ceilings(bandwidth, H100.flops if options.flops is None else options.flops)
        print(
            f"{options.arch}, batch {options.batch}, {options.image_size}x{options.image_size}, {dtype}",
            end="",
        )
        print(f", {'whole step' if options.whole else 'stem and blocks'}; {ceilings}")
        if options.kernels:
            print(kernels_table(kernels, ceilings))
        else:
            size, whole = options.image_size, options.whole
            print(ways_table(options.arch, options.batch, size, dtype, ways, ceilings, whole))
    except ValueError as error:
        parser.error(str(error))
    return 0


def _show_results(options: argparse.Namespace, ways: Iterable[str]) -> int:
    header, rows = read_results(options.results, options.dtype)
    dtypes = sorted({row["dtype"] for row in rows})
    if options.measure:
        ceilings = _measured(dtypes, header["threads"])
    else:
        given = Ceilings(options.bandwidth, options.flops)
        ceilings = dict.fromkeys(dtypes, given)
        print(f"given for {', '.join(dtypes)}: {given}")
    print(f"times from {header['device']}, {header['threads']} threads; * is below half of the limit")
    print(results_table(rows, ceilings.__getitem__, ways))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

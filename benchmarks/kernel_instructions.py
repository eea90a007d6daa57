"""What a step asks of the schedulers of an H100: ``python -m benchmarks.kernel_instructions [--help]``.

Without a GPU: every pass is compiled for sm_90, the instructions in its loop are counted, and how often programs go
through it is known. A multiprocessor issues four instructions in a cycle at best. Memory, tensor cores and instructions
are three lower bounds of the time; what is expected is the largest of them, each over the part of its rate that a
kernel is assumed to reach (``REACHED``).
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.kernel_resources import (
    CompileError,
    Specialisation,
    binary,
    compile_all,
    nvidia_tool,
    specialisation,
    usage,
)
from benchmarks.page import show
from benchmarks.roofline import H100
from benchmarks.roofline_model import Kernel
from resnet_fused.kernels.autotune.heuristics import MULTIPROCESSORS
from resnet_fused.kernels.launch import Launch, cdiv
from resnet_fused.plan import PASSES, launches
from resnet_fused.reference.resnet import ARCHITECTURES

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
#: Instructions of a warp that a multiprocessor issues at a time, and its cycles in a second, as under load.
ISSUED, CLOCK = 4, 1.7e9
#: Part of the instructions outside of loops that a program runs, of paths for all shapes. Assumed.
STRAIGHT = 0.7
#: Parts of the rates that a kernel is expected to reach; of instructions where programs share a multiprocessor, and
#: where one is alone. Assumed, from what GEMMs written in Triton reach: a measurement is to correct them.
REACHED = {"memory": 0.85, "products": 0.65, "issue": 0.65, "issue alone": 0.5}
#: Of a multiprocessor: registers, and bytes of shared memory, of which every program takes some more than it asks for.
REGISTERS, SHARED, RESERVED = 65536, 228 << 10, 1 << 10
_LABEL = re.compile(r"\s*(\.L_\w+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);")
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L_\w+)\)")
_PRODUCT = re.compile(r"\b(?:HGMMA|HMMA)\b")


@dataclass(frozen=True)
class Code:
    """Instructions of a kernel: in each loop that multiplies, in order, and in all else; registers of a thread; bytes
    of shared memory of a program."""

    loops: tuple[int, ...]
    rest: int
    registers: int = 0
    shared: int = 0

    def programs(self, warps: int) -> int:
        """Programs that share a multiprocessor."""
        registers = 32 * warps * 8 * cdiv(max(self.registers, 1), 8)
        return min(REGISTERS // registers, SHARED // (self.shared + RESERVED))


@dataclass(frozen=True)
class Bound:
    """Seconds that a launch takes at least, by what it waits for."""

    issue: float
    memory: float
    products: float
    programs: int = 1

    @property
    def limit(self) -> float:
        """The roofline's."""
        return max(self.memory, self.products)

    @property
    def excess(self) -> float:
        """Of the instructions over the roofline."""
        return max(0.0, self.issue - self.limit)

    @property
    def expected(self) -> float:
        issue = REACHED["issue" if self.programs > 1 else "issue alone"]
        return max(self.memory / REACHED["memory"], self.products / REACHED["products"], self.issue / issue)


def code_of(listing: str) -> Code:
    """From what nvdisasm prints of one kernel."""
    labels: dict[str, int] = {}
    lines: list[str] = []
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(lines)
        elif instruction := _INSTRUCTION.match(line):
            lines.append(instruction[1])
    found = []
    for end, line in enumerate(lines):
        branch = _BRANCH.search(line)
        begin = labels.get(branch[1], end) if branch else end
        if begin < end and any(_PRODUCT.search(each) for each in lines[begin : end + 1]):
            found.append((begin, end))
    inner = [
        (begin, end)
        for begin, end in found
        if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e in found)
    ]
    loops = tuple(end - begin + 1 for begin, end in inner)
    return Code(loops, len(lines) - sum(loops))


def steps_of(launch: Launch) -> list[float]:
    """How often a program goes through each of its loops."""
    given, config = {**launch.arguments, **launch.constants}, launch.config
    if launch.name in ("wgrad", "gram", "folded_wgrad"):
        return [cdiv(cdiv(given["PIXELS"], config.splits), config.block_m)]
    channels = cdiv(given["CHANNELS"], config.block_k)
    if launch.name == "conv":
        return [given["KERNEL_H"] * given["KERNEL_W"] * channels]
    if launch.name == "expand":
        skip = [] if given["skip_conv"] is None else [cdiv(given["SKIP_CHANNELS"], config.block_k)]
        return [channels, *skip]
    outputs = cdiv(given["OUTPUTS"], config.block_k)
    if launch.name == "folded_dgrad":
        return [outputs, channels]
    if launch.name == "dgrad":
        taps = given["KERNEL_H"] * given["KERNEL_W"] / (given["STRIDE_H"] * given["STRIDE_W"])
        return [max(1.0, taps) * outputs]
    raise ValueError(f"{launch.name} is no pass over activations: choose of {', '.join(PASSES)}")


def bound(launch: Launch, code: Code) -> Bound:
    """Loops that the compiler made one of stand for both."""
    loops = code.loops or (0,)
    steps = steps_of(launch)
    each = sum(count * loops[min(i, len(loops) - 1)] for i, count in enumerate(steps)) + STRAIGHT * code.rest
    cycles = math.prod(launch.grid) * launch.config.warps * each / ISSUED / MULTIPROCESSORS
    kernel = Kernel(launch.name, "", "", launch.bytes, launch.flops)
    programs = code.programs(launch.config.warps)
    return Bound(cycles / CLOCK, H100.memory_seconds(kernel), H100.compute_seconds(kernel), programs)


def disassembled(what: Specialisation, arch: int = 90) -> Code:
    """Compiles a kernel and counts; raises CompileError where it does not compile."""
    made = binary(what, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [str(nvidia_tool("nvdisasm")), "-c", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return replace(
        code_of(listing), registers=usage(made.asm["cubin"])["REG"], shared=int(made.metadata.shared)
    )


Counted = Sequence[tuple[Launch, Code, Bound]]


def counted(arch: str, batch: int) -> Counted:
    """All passes of a step in bf16; raises CompileError where one does not compile."""
    passes = [launch for launch in launches(arch, batch, "bf16") if launch.name in PASSES]
    needed = list(dict.fromkeys(map(specialisation, passes)))
    codes = {what: code for what, _, code in compile_all([(what, 90) for what in needed], disassembled)}
    if wrong := [code for code in codes.values() if isinstance(code, str)]:
        raise CompileError(wrong[0])
    return [
        (launch, code, bound(launch, code)) for launch in passes for code in [codes[specialisation(launch)]]
    ]


def kernel_table(found: Counted) -> str:
    """By kernel, in milliseconds of a step."""
    lines = [
        "| kernel | launches | memory ms | tensor cores ms | roofline ms | instructions ms | excess ms | expected ms |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    fields = ("memory", "products", "limit", "issue", "excess", "expected")
    for name in (*PASSES, "all"):
        bounds = [b for launch, _, b in found if name in (launch.name, "all")]
        figures = " | ".join(f"{sum(getattr(b, field) for b in bounds) * 1e3:.2f}" for field in fields)
        lines.append(f"| {name} | {len(bounds)} | {figures} |")
    return "\n".join(lines)


def resource_table(found: Counted) -> str:
    """By kernel, from the least to the most of its launches."""
    lines = [
        "| kernel | instructions ms | registers | shared memory KiB | programs per multiprocessor |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]

    def span(values: Iterable[float]) -> str:
        ends = sorted(round(value) for value in values)
        return "-".join(str(value) for value in dict.fromkeys((ends[0], ends[-1])))

    for name in PASSES:
        mine = [(code, b) for launch, code, b in found if launch.name == name]
        issue = sum(b.issue for _, b in mine) * 1e3
        spans = [
            span(code.registers for code, _ in mine), span(code.shared / 1024 for code, _ in mine),
            span(b.programs for _, b in mine),
        ]  # fmt: skip
        lines.append(f"| {name} | {issue:.2f} | {' | '.join(spans)} |")
    return "\n".join(lines)


def excess_table(found: Counted, most: int) -> str:
    """The launches whose instructions exceed the roofline most, alike ones together."""
    groups: dict[tuple[str, str, str, Bound], int] = {}
    for launch, _, b in found:
        shape = "x".join(map(str, next(iter(launch.arguments.values())).shape))
        key = (launch.name, str(launch.config), shape, b)
        groups[key] = groups.get(key, 0) + 1
    lines = [
        "| kernel | configuration | first operand | launches | roofline us | instructions us |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for (name, config, shape, b), count in sorted(
        groups.items(), key=lambda item: -item[0][3].excess * item[1]
    )[:most]:
        lines.append(f"| {name} | {config} | {shape} | {count} | {b.limit * 1e6:.0f} | {b.issue * 1e6:.0f} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_instructions", description=__doc__)
    parser.add_argument("--arch", default="resnet50", choices=ARCHITECTURES, metavar="ARCH")
    parser.add_argument("--batch", type=int, default=256, help="images a step (default: 256)")
    parser.add_argument(
        "--most", type=int, default=12, help="launches that are shown by themselves (default: 12)"
    )
    parser.add_argument(
        "--write", action="store_true", help="put the tables of ResNet-50 into docs/performance.md"
    )
    options = parser.parse_args(arguments)
    if options.batch < 2 or options.most < 1:
        parser.error("--batch must be at least 2 and --most at least 1")
    if options.write and (options.arch, options.batch) != ("resnet50", 256):
        parser.error("the page shows resnet50 at batch 256: leave out --arch and --batch")
    found = counted(options.arch, options.batch)
    tables = {
        "kernels": kernel_table(found),
        "resources": resource_table(found),
        "excess": excess_table(found, options.most),
    }
    return show(tables, PAGE, options.write)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Instructions of the kernels of a training step on an H100, without a GPU: ``python -m tools.kernel_instructions``.

Every kernel is compiled for sm_90, the instructions in its loops are counted, and how often programs run through them
is known. A multiprocessor issues at most four instructions in a cycle, so that instructions are a lower bound of the
time beside those of the roofline, memory and tensor cores. "Expected" is the largest of the three, each divided by the
part of its rate that a kernel is assumed to reach (``REACHED``).
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.page import ROOT, Page, markdown
from benchmarks.roofline import H100
from benchmarks.roofline_model import Kernel
from resnet_fused.kernels.autotune.heuristics import MULTIPROCESSORS
from resnet_fused.kernels.launch import Launch, cdiv
from resnet_fused.plan import PASSES, launches
from tools.kernel_resources import (
    CompileError,
    Specialisation,
    binary,
    compile_all,
    nvidia_tool,
    specialisation,
    usage,
)

if TYPE_CHECKING:  # a machine with a GPU may have nothing but torch
    import pandas as pd

ARCH, BATCH = "resnet50", 256
#: Launches that are listed by themselves.
LISTED = 12
#: Instructions that a multiprocessor issues per cycle, one per warp, and its cycles per second under load.
ISSUED, CLOCK = 4, 1.7e9
#: Part of the instructions outside of loops that a program runs, since some are for other shapes. Assumed.
STRAIGHT = 0.7
#: Parts of the rates that a kernel is expected to reach; of instructions where several programs share a multiprocessor,
#: and where there is one. Assumed, from what GEMMs written in Triton reach, until they are measured.
REACHED = {"memory": 0.85, "tensor cores": 0.65, "instructions": 0.65, "instructions, one program": 0.5}
#: Of a multiprocessor: registers, and bytes of shared memory, of which every program takes ``RESERVED`` more.
REGISTERS, SHARED, RESERVED = 65536, 228 << 10, 1 << 10
_LABEL = re.compile(r"\s*(\.L_\w+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);")
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L_\w+)\)")
_MMA = re.compile(r"\b(?:HGMMA|HMMA)\b")


@dataclass(frozen=True)
class Code:
    """A compiled kernel.

    Args:
        loops: instructions of each innermost loop with tensor-core instructions, in order.
        rest: all other instructions.
        registers: per thread.
        shared: bytes of shared memory per program.
    """

    loops: tuple[int, ...]
    rest: int
    registers: int = 0
    shared: int = 0

    def programs(self, warps: int) -> int:
        """Programs that fit on a multiprocessor."""
        registers = 32 * warps * 8 * cdiv(max(self.registers, 1), 8)
        return min(REGISTERS // registers, SHARED // (self.shared + RESERVED))


@dataclass(frozen=True)
class Bound:
    """Seconds that a launch takes at least, by what limits it, and programs per multiprocessor."""

    instructions: float
    memory: float
    tensor_cores: float
    programs: int = 1

    @property
    def roofline(self) -> float:
        return max(self.memory, self.tensor_cores)

    @property
    def excess(self) -> float:
        """Time of the instructions beyond the roofline."""
        return max(0.0, self.instructions - self.roofline)

    @property
    def expected(self) -> float:
        reached = REACHED["instructions" if self.programs > 1 else "instructions, one program"]
        return max(
            self.memory / REACHED["memory"],
            self.tensor_cores / REACHED["tensor cores"],
            self.instructions / reached,
        )


def code_of(listing: str) -> Code:
    """From the output of nvdisasm for one kernel."""
    labels: dict[str, int] = {}
    lines: list[str] = []
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(lines)
        elif instruction := _INSTRUCTION.match(line):
            lines.append(instruction[1])
    spans = []
    for end, line in enumerate(lines):
        branch = _BRANCH.search(line)
        begin = labels.get(branch[1], end) if branch else end
        if begin < end and any(_MMA.search(each) for each in lines[begin : end + 1]):
            spans.append((begin, end))
    innermost = [
        (begin, end)
        for begin, end in spans
        if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e in spans)
    ]
    loops = tuple(end - begin + 1 for begin, end in innermost)
    return Code(loops, len(lines) - sum(loops))


def iterations(launch: Launch) -> list[float]:
    """How often a program runs through each of its loops."""
    given, config = {**launch.arguments, **launch.constants}, launch.config
    if launch.name in ("wgrad", "input_covariance", "folded_wgrad"):
        return [cdiv(cdiv(given["pixels"], config.splits), config.block_m)]
    channels = cdiv(given["channels"], config.block_k)
    if launch.name == "conv_bn_stats":
        return [given["KERNEL_H"] * given["KERNEL_W"] * channels]
    if launch.name == "conv1x1_bn_add_relu":
        skip = [] if given["skip_weight"] is None else [cdiv(given["skip_channels"], config.block_k)]
        return [channels, *skip]
    outputs = cdiv(given["outputs"], config.block_k)
    if launch.name == "folded_dgrad":
        return [outputs, channels]
    if launch.name == "dgrad":
        taps = given["KERNEL_H"] * given["KERNEL_W"] / (given["stride_h"] * given["stride_w"])
        return [max(1.0, taps) * outputs]
    raise ValueError(f"the loops of {launch.name} are not known: choose of {', '.join(PASSES)}")


def bound(launch: Launch, code: Code) -> Bound:
    """Where the compiler has merged loops, the last one stands for the others too."""
    loops = code.loops or (0,)
    per_warp = STRAIGHT * code.rest + sum(
        count * loops[min(i, len(loops) - 1)] for i, count in enumerate(iterations(launch))
    )
    cycles = math.prod(launch.grid) * launch.config.warps * per_warp / ISSUED / MULTIPROCESSORS
    kernel = Kernel(launch.name, "", "", launch.bytes, launch.flops)
    programs = code.programs(launch.config.warps)
    return Bound(cycles / CLOCK, H100.memory_seconds(kernel), H100.compute_seconds(kernel), programs)


def disassembled(what: Specialisation, arch: int = 90) -> Code:
    """Compiles a kernel and counts; raises CompileError where it does not compile."""
    kernel = binary(what, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(nvidia_tool("nvdisasm")), "-c", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code = code_of(listing)
    return Code(code.loops, code.rest, usage(kernel.asm["cubin"])["REG"], int(kernel.metadata.shared))


def counted(arch: str = ARCH, batch: int = BATCH) -> list[tuple[Launch, Code]]:
    """The kernels over activations of a step in bf16; raises CompileError where one does not compile."""
    chosen = [launch for launch in launches(arch, batch, "bf16") if launch.name in PASSES]
    needed = [specialisation(launch) for launch in chosen]
    pairs = [(what, 90) for what in dict.fromkeys(needed)]
    codes = {what: code for what, _, code in compile_all(pairs, disassembled)}
    if errors := [code for code in codes.values() if isinstance(code, str)]:
        raise CompileError(errors[0])
    return [(launch, codes[what]) for launch, what in zip(chosen, needed, strict=True)]


def frame_of(counted_launches: list[tuple[Launch, Code]]) -> pd.DataFrame:
    """A row per launch; times in seconds."""
    import pandas as pd

    rows = []
    for launch, code in counted_launches:
        b = bound(launch, code)
        rows.append(
            {
                "kernel": launch.name,
                "configuration": str(launch.config),
                "first operand": "x".join(map(str, next(iter(launch.arguments.values())).shape)),
                "launches": 1,
                "memory": b.memory,
                "tensor cores": b.tensor_cores,
                "roofline": b.roofline,
                "instructions": b.instructions,
                "excess": b.excess,
                "expected": b.expected,
                "registers": code.registers,
                "shared memory KiB": round(code.shared / 1024),
                "programs per multiprocessor": b.programs,
            }
        )
    return pd.DataFrame(rows)


def tables_of(frame: pd.DataFrame) -> dict[str, str]:
    """By kernel in milliseconds of a step; resources from least to most; the launches with most excess."""
    names = [name for name in PASSES if name in set(frame.kernel)]
    times = ["memory", "tensor cores", "roofline", "instructions", "excess", "expected"]
    sums = frame.groupby("kernel")[["launches", *times]].sum().loc[names]
    sums.loc["all"] = sums.sum()
    kernels = (1e3 * sums[times]).map("{:.2f}".format).add_suffix(" ms")
    kernels.insert(0, "launches", sums.launches.astype(int))

    def span(values: pd.Series[int]) -> str:
        return "-".join(str(value) for value in dict.fromkeys((values.min(), values.max())))

    spans = ["registers", "shared memory KiB", "programs per multiprocessor"]
    resources = frame.groupby("kernel")[spans].agg(span).loc[names]
    resources.insert(0, "instructions ms", kernels["instructions ms"])

    same = ["kernel", "configuration", "first operand", "roofline", "instructions"]
    excess = frame.groupby(same, sort=False)[["launches", "excess"]].sum().reset_index()
    excess = excess.sort_values("excess", ascending=False, kind="stable").head(LISTED)
    excess[["roofline us", "instructions us"]] = (1e6 * excess[same[-2:]]).map("{:.0f}".format)
    return {
        "kernels": markdown(kernels.reset_index()),
        "resources": markdown(resources.reset_index()),
        "excess": markdown(excess[[*same[:3], "launches", "roofline us", "instructions us"]]),
    }


def _same(page: str, new: str) -> bool:
    """Other versions of Triton make other instructions; the page names its own."""
    import triton

    return page == new or f"Triton {triton.__version__}:" not in page


PAGE = Page(
    path=ROOT / "docs" / "performance.md",
    command="python -m tools.kernel_instructions --write",
    tables=lambda: tables_of(frame_of(counted())),
    equal=_same,
)

if __name__ == "__main__":
    sys.exit(PAGE.main(sys.argv[1:], __doc__))

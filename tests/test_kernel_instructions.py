"""Counting instructions: loops are found in a listing, and programs run through them as often as their kernel says."""

from __future__ import annotations

import math

import pytest

from resnet_fused.plan import PASSES, launches
from tools.kernel_instructions import Bound, Code, bound, code_of, frame_of, iterations, tables_of

pytest.importorskip("triton")

LISTING = """
.text.some_kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/                   BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   UIADD3 UR4, UR4, 0x1, URZ ;
.L_x_2:
        /*0040*/                   LDS.128 R4, [R2] ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0060*/              @P0  BRA `(.L_x_2) ;
        /*0070*/              @P1  BRA `(.L_x_1) ;
.L_x_3:
        /*0080*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0090*/              @!P0 BRA `(.L_x_3) ;
        /*00a0*/                   BRA `(.L_x_4) ;
.L_x_4:
        /*00b0*/                   EXIT ;
"""


def test_loops_that_multiply_are_found() -> None:
    """The innermost of them, in their order; other loops and jumps ahead are none."""
    assert code_of(LISTING) == Code((3, 2), 7)


def test_iterations_cover_the_work() -> None:
    """The operations of an iteration, times iterations and programs, are those of the launch, or little more."""
    checked = set()
    for launch in launches("resnet50", 64, "bf16"):
        if launch.name not in (
            "conv_bn_stats",
            "dgrad",
            "wgrad",
        ):  # the programs of the others are of several kinds
            continue
        config = launch.config
        each = 2 * config.block_m * config.block_n * config.block_k
        done = sum(iterations(launch)) * math.prod(launch.grid) * each
        assert 1 <= done / launch.flops < 1.5, (launch.name, str(config), done / launch.flops)
        checked.add(launch.name)
    assert checked == {"conv_bn_stats", "dgrad", "wgrad"}


def test_tables() -> None:
    code = Code((100, 50), 1000, registers=130, shared=60 << 10)
    launched = [(launch, code) for launch in launches("resnet18", 32, "bf16") if launch.name in PASSES]
    bounds = [bound(*pair) for pair in launched]
    assert all(
        b.instructions > 0 and b.expected > b.roofline == max(b.memory, b.tensor_cores) for b in bounds
    )
    tables = tables_of(frame_of(launched))
    *rows, total = [row.split(" | ") for row in tables["kernels"].splitlines()[2:]]
    assert sum(int(row[1]) for row in rows) == int(total[1]) == len(launched)
    assert all("| 130 | 60 | " in row for row in tables["resources"].splitlines()[2:])
    assert sum(int(row.split(" | ")[3]) for row in tables["excess"].splitlines()[2:]) <= len(launched)


def test_excess_is_what_goes_beyond_the_roofline() -> None:
    assert Bound(3.0, 1.0, 2.0).excess == 1.0
    assert Bound(1.0, 1.0, 2.0).excess == 0.0


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "programs"),
    [(128, 0, 8, 2), (129, 0, 8, 1), (255, 0, 4, 2), (40, 113 << 10, 4, 2), (40, 114 << 10, 4, 1)],
)
def test_programs_of_a_multiprocessor(registers: int, shared: int, warps: int, programs: int) -> None:
    assert Code((), 0, registers, shared).programs(warps) == programs

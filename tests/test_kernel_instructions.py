"""Counting instructions: loops are found in a listing, and programs go through them as often as their kernel says."""

from __future__ import annotations

import math

import pytest

from benchmarks.kernel_instructions import (
    PAGE,
    Bound,
    Code,
    bound,
    code_of,
    counted,
    excess_table,
    kernel_table,
    main,
    resource_table,
    steps_of,
)
from resnet_fused.plan import PASSES, launches

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
    """The innermost of them, in their order; others and jumps ahead are none."""
    assert code_of(LISTING) == Code((3, 2), 7)


def test_steps_cover_the_work() -> None:
    """What a step multiplies, times the steps and programs, is what the launch multiplies, or little more."""
    pytest.importorskip("triton")
    seen = set()
    for launch in launches("resnet50", 64, "bf16"):
        if launch.name not in PASSES or launch.name in ("folded_wgrad", "folded_dgrad", "expand", "gram"):
            continue  # which have programs of several kinds
        config = launch.config
        each = 2 * config.block_m * config.block_n * config.block_k
        done = sum(steps_of(launch)) * math.prod(launch.grid) * each
        assert 1 <= done / launch.flops < 1.5, (launch.name, str(config), done / launch.flops)
        seen.add(launch.name)
    assert seen == {"conv", "dgrad", "wgrad"}


def test_bounds_are_summed_by_kernel() -> None:
    pytest.importorskip("triton")
    passes = [launch for launch in launches("resnet18", 32, "bf16") if launch.name in PASSES]
    code = Code((100, 50), 1000, registers=130, shared=60 << 10)
    found = [(launch, code, bound(launch, code)) for launch in passes]
    assert all(b.issue > 0 and b.expected > b.limit == max(b.memory, b.products) for *_, b in found)
    rows = [row.split(" | ") for row in kernel_table(found).splitlines()[2:]]
    assert sum(int(row[1]) for row in rows[:-1]) == int(rows[-1][1]) == len(passes)
    assert len(excess_table(found, 3).splitlines()) == 5
    assert all("| 130 | 60 | " in row for row in resource_table(found).splitlines()[2:])


def test_excess_is_what_goes_beyond_the_roofline() -> None:
    assert Bound(3.0, 1.0, 2.0).excess == 1.0
    assert Bound(1.0, 1.0, 2.0).excess == 0.0


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "programs"),
    [(128, 0, 8, 2), (129, 0, 8, 1), (255, 0, 4, 2), (40, 113 << 10, 4, 2), (40, 114 << 10, 4, 1)],
)
def test_programs_of_a_multiprocessor(registers: int, shared: int, warps: int, programs: int) -> None:
    assert Code((), 0, registers, shared).programs(warps) == programs


def test_the_page_shows_what_is_counted() -> None:
    version = pytest.importorskip("triton").__version__
    page = PAGE.read_text()
    if f"Triton {version}:" not in page:
        pytest.skip(f"the page is of another Triton than {version}")
    found = counted("resnet50", 256)
    for table in (kernel_table(found), resource_table(found), excess_table(found, 12)):
        assert table in page, "python -m benchmarks.kernel_instructions --write"


def test_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--batch", "1"], ["--most", "0"], ["--write", "--arch", "resnet18"]):
        with pytest.raises(SystemExit):
            main(arguments)
    assert "leave out --arch and --batch" in capsys.readouterr().err

"""What a tuner may choose is safe to run: every candidate of the steps that are trained, compiled for sm_90.

Run with the Triton that is installed, and with the oldest that torch >= 2.11 brings (make test).
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from resnet_fused.kernels.launch import Launch
from tools.kernel_instructions import disassembled
from tools.kernel_resources import binary, compile_all, is_unsafe, specialisation

pytest.importorskip("triton")

KERNELS = ("conv", "dgrad", "wgrad", "gram", "expand", "folded_wgrad", "folded_dgrad")
STEPS = [(arch, batch) for arch in ("resnet50", "resnet18") for batch in (256, 64)]


def test_no_candidate_reads_registers_that_change() -> None:
    plan = importlib.import_module("resnet_fused.plan")
    launches = [launch for step in STEPS for launch in plan.candidates(*step, "bf16")]
    multiplying = [launch for launch in launches if launch.name in plan.PASSES]
    needed = list(dict.fromkeys(map(specialisation, multiplying)))
    # As many as tuning may try: configurations that differ in splits alone are one kernel.
    assert len(needed) > 300
    found = list(compile_all([(what, 90) for what in needed], is_unsafe))
    wrong = [f"{what.name} {what.config}: {result}" for what, _, result in found if result is not False]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["wgrad", "gram"])
def test_what_a_first_operand_is_made_of_is_copied_asynchronously(name: str) -> None:
    """Where both operands are computed the first is one of registers; its loads are not (tiles.unknown_zero)."""
    plan = importlib.import_module("resnet_fused.plan")
    launches = [launch for launch in plan.launches("resnet50", 256, "bf16") if launch.name == name]
    for what in dict.fromkeys(map(specialisation, launches)):
        loop = binary(what, 90).asm["ttgir"].partition("scf.for")[2].partition("scf.yield")[0]
        assert "async_copy_global_to_local" in loop
        assert "tt.load" not in loop, f"{what.name} {what.config}"


@pytest.mark.parametrize("name", KERNELS)
def test_candidates_of_which_two_share_a_multiprocessor(name: str) -> None:
    """Of every kernel, for the first of its problems in a step."""
    plan = importlib.import_module("resnet_fused.plan")
    launches = [launch for launch in plan.candidates("resnet50", 256, "bf16") if launch.name == name]

    def operands(launch: Launch) -> list[Any]:
        return [getattr(launch.arguments.get(key), "shape", None) for key in ("x", "g", "conv", "skip")]

    tried = [launch for launch in launches if operands(launch) == operands(launches[0])]
    needed = {specialisation(launch): launch.config.warps for launch in tried}
    assert any(disassembled(what).programs(warps) > 1 for what, warps in needed.items())

"""The kernels of a training step and those that autotuning may choose, compiled for each architecture without a GPU.

With the pinned Triton, and in less detail with the oldest one that torch >= 2.11 brings (make test-oldest-triton).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor

from benchmarks import counts
from resnet_fused.kernels.launch import Launch
from tools.kernel_instructions import Code
from tools.kernel_resources import (
    ARCHITECTURES,
    REGISTERS,
    Resources,
    Specialisation,
    binary,
    compile_all,
    is_unsafe,
    specialisation,
)

pytest.importorskip("triton")
from resnet_fused import plan

IS_PINNED = counts.read()["compiler"] == counts.compiler()
BUILDS: counts.Builds = counts.BUILDS if IS_PINNED else ()
SAMPLES: counts.Builds = counts.SAMPLES if IS_PINNED else ((("resnet50",), "bf16", (80, 90)),)
ARCHS = sorted({arch for *_, archs in BUILDS + SAMPLES for arch in archs})
#: Steps, of a model and a batch, of which all configurations are compiled that autotuning may try.
TUNED_STEPS = [*itertools.product(counts.ARCHS, (256, 64))] if IS_PINNED else [("resnet50", 256)]
pinned = pytest.mark.skipif(not IS_PINNED, reason=f"tested with {counts.read()['compiler']}")


@dataclass(frozen=True)
class Built:
    """A kernel that was compiled for an architecture.

    Args:
        launch: one of its launches.
        resources: or why it does not compile.
    """

    what: Specialisation
    arch: int
    launch: Launch
    resources: Resources | str

    def __str__(self) -> str:
        return f"{self.what.name} {self.what.config} on sm_{self.arch} ({self.what.details})"


def build(launches: Iterable[tuple[Launch, int]]) -> list[Built]:
    """Compiles launches, each for an architecture; a kernel that several launches share once."""
    pairs: dict[tuple[Specialisation, int], Launch] = {}
    for launch, arch in launches:
        pairs.setdefault((specialisation(launch), arch), launch)
    compiled = [Built(what, arch, pairs[what, arch], found) for what, arch, found in compile_all(pairs)]
    return sorted(compiled, key=str)


@pytest.fixture(scope="module")
def steps() -> list[Built]:
    """The kernels of the steps of both kinds of blocks."""
    built = build(counts.step_launches(BUILDS, SAMPLES))
    assert any(is_gemm(x.launch) for x in built)
    return built


@pytest.fixture(scope="module")
def candidates() -> list[Launch]:
    """What autotuning may launch on an H100 in a step of ResNet-50, by kernel and shape the best first."""
    return plan.candidates("resnet50", 256, "bf16")


def is_gemm(launch: Launch) -> bool:
    return "tl.dot(" in launch.kernel.src


def rows_are_aligned(launch: Launch) -> bool:
    """Whether it has activations, each of whose rows of channels starts at a multiple of 16 bytes."""
    activations = [x for x in launch.arguments.values() if isinstance(x, Tensor) and x.dim() == 4]
    return bool(activations) and all(x.shape[1] * x.element_size() % 16 == 0 for x in activations)


# What is wrong with a compiled kernel: a description, or ""


def spills(_: Built, found: Resources) -> str:
    return f"spills {found.spill_bytes} bytes" if found.spill_bytes else ""


def too_many_registers(_: Built, found: Resources) -> str:
    return f"{found.registers} registers" if found.registers > REGISTERS else ""


def too_much_shared_memory(x: Built, found: Resources) -> str:
    limit = ARCHITECTURES[x.arch]
    return f"{found.shared_bytes} bytes of {limit}" if found.shared_bytes > limit else ""


def no_tensor_cores(x: Built, found: Resources) -> str:
    if not is_gemm(x.launch) or x.launch.constants.get("PRECISION") == "ieee":
        return ""  # there is no tensor-core instruction for plain float32
    if not found.mma:
        return "no tensor-core instruction"
    return "no wgmma" if x.arch == 90 and found.operands & {"bf16", "f16"} and not found.wgmma else ""


def narrow_loads(x: Built, found: Resources) -> str:
    if rows_are_aligned(x.launch) and found.vector_load_bytes < 16:
        return f"loads {found.vector_load_bytes} bytes at a time"
    return ""


def unsafe(_: Built, found: Resources) -> str:
    return "may read registers while they change" if found.unsafe else ""


def serialized(_: Built, found: Resources) -> str:
    # ptxas serializes some float16 kernels whose bfloat16 code, equal but for the type, it does not serialize: the
    # table of resources counts those.
    if "f16" in found.operands:
        return ""
    return "every wgmma waits for the one before it" if found.serialized else ""


def failures(built: Iterable[Built], check: Callable[[Built, Resources], str]) -> list[str]:
    """A line for each kernel that fails a check; those that do not compile have a test of their own."""
    found = [(x, check(x, x.resources)) for x in built if isinstance(x.resources, Resources)]
    return [f"{x}: {wrong}" for x, wrong in found if wrong]


def compile_errors(built: Iterable[Built]) -> list[str]:
    return [x.resources for x in built if isinstance(x.resources, str)]


def test_every_kernel_compiles(steps: list[Built]) -> None:
    assert compile_errors(steps) == []


CHECKS = [
    spills,
    too_many_registers,
    too_much_shared_memory,
    no_tensor_cores,
    narrow_loads,
    unsafe,
    serialized,
]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_no_kernel_of_a_step(steps: list[Built], check: Callable[[Built, Resources], str], arch: int) -> None:
    built = [x for x in steps if x.arch == arch]
    assert built
    wrong = failures(built, check)
    assert not wrong, "\n" + "\n".join(wrong)


@pinned
def test_resources_are_those_of_the_table(steps: list[Built]) -> None:
    resources = counts.resource_counts((x.what, x.arch, x.resources) for x in steps)
    changed = counts.differences(counts.read()["resources"], resources)
    assert not changed, "\n".join([*changed, counts.ADVICE])


# What autotuning may choose on sm_90


def test_no_candidate_reads_registers_that_change(steps: list[Built]) -> None:
    launches = [launch for step in TUNED_STEPS for launch in plan.candidates(*step, "bf16")]
    needed = dict.fromkeys(specialisation(launch) for launch in launches if launch.name in plan.PASSES)
    # Configurations that differ in splits alone are one kernel.
    assert len(needed) > 200
    checked = {x.what for x in steps if x.arch == 90}  # by test_no_kernel_of_a_step
    # One of twenty, to save time: `make gpu-bundle` compiles all, and the autotuner rejects what does so.
    pairs = [(what, 90) for what in [*needed][::20] if what not in checked]
    wrong = [
        f"{what.name} {what.config}: {found}" for what, _, found in compile_all(pairs, is_unsafe) if found
    ]
    assert not wrong, "\n".join(wrong)


@pinned
@pytest.mark.parametrize("name", ["wgrad", "input_covariance"])
def test_loads_of_a_computed_first_operand_are_asynchronous(steps: list[Built], name: str) -> None:
    """Where both operands are computed the first one is in registers; its loads are not (tiles.runtime_zero)."""
    kernels = [
        x.what for x in steps if x.what.name == name and x.arch == 90 and "bf16" in str(x.what.signature)
    ]
    assert kernels
    for what in kernels:
        loop = binary(what, 90).asm["ttgir"].partition("scf.for")[2].partition("scf.yield")[0]
        assert "async_copy_global_to_local" in loop
        assert "tt.load" not in loop, f"{what.name} {what.config}"


@pinned
def test_some_candidate_shares_a_multiprocessor(candidates: list[Launch]) -> None:
    """For the first shape of every kernel in a step: two programs fit on a multiprocessor of an H100."""

    def operands(launch: Launch) -> list[Any]:
        return [getattr(launch.arguments.get(key), "shape", None) for key in ("x", "g", "weight", "skip")]

    tried: dict[str, list[Launch]] = {name: [] for name in plan.PASSES}
    for launch in candidates:
        group = tried.get(launch.name)
        if group is not None and (not group or operands(launch) == operands(group[0])):
            group.append(launch)
    programs = dict.fromkeys(plan.PASSES, 0)
    # heuristics puts such configurations early: mostly the first three suffice.
    for part in (slice(0, 3), slice(3, None)):
        missing = [name for name, count in programs.items() if count < 2]
        for x in build((launch, 90) for name in missing for launch in tried[name][part]):
            assert isinstance(x.resources, Resources)
            code = Code((), 0, x.resources.registers, x.resources.shared_bytes)
            programs[x.what.name] = max(programs[x.what.name], code.programs(x.what.warps))
    assert min(programs.values()) > 1, programs

"""Every kernel of a training step, compiled for every architecture without a GPU: nothing spills, nothing is slow.

With another Triton than the pinned one (make test) for sm_90 alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from benchmarks import counts
from resnet_fused.kernels.launch import Config, Launch
from tools.kernel_resources import (
    ARCHITECTURES,
    REGISTERS,
    Resources,
    Specialisation,
    compile_all,
    specialisation,
)

pytest.importorskip("triton")

IS_PINNED = counts.read()["compiler"] == counts.compiler()
BUILDS: counts.Builds = counts.BUILDS if IS_PINNED else ((counts.ARCHS, "bf16", (90,)),)
SAMPLES: counts.Builds = counts.SAMPLES if IS_PINNED else ()
COMPILED_FOR = sorted({arch for *_, archs in BUILDS + SAMPLES for arch in archs})


@dataclass(frozen=True)
class Built:
    """A kernel that was compiled for an architecture: one of its launches, and what it needs or why it failed."""

    what: Specialisation
    arch: int
    launch: Launch
    found: Resources | str

    def __str__(self) -> str:
        return f"{self.what.name} {self.what.config} on sm_{self.arch} ({self.what.details})"


def build(launches: Iterable[tuple[Launch, int]]) -> list[Built]:
    """Compiles launches, each for an architecture; what they have in common once."""
    pairs: dict[tuple[Specialisation, int], Launch] = {}
    for launch, arch in launches:
        pairs.setdefault((specialisation(launch), arch), launch)
    done = [Built(what, arch, pairs[what, arch], found) for what, arch, found in compile_all(pairs)]
    return sorted(done, key=str)


def multiplies(launch: Launch) -> bool:
    return "tl.dot(" in launch.kernel.src


def rows_are_aligned(launch: Launch) -> bool:
    """Whether it passes over activations, and the channels of all of them fill 16 bytes again and again."""
    # Kernels that merge what tiles have left are small, and so are their tiles.
    activations = [x for x in launch.arguments.values() if isinstance(x, Tensor) and x.dim() == 4]
    return bool(activations) and all(x.shape[1] * x.element_size() % 16 == 0 for x in activations)


def failures(built: Iterable[Built], wrong: Callable[[Built, Resources], str]) -> list[str]:
    """A line for each of which ``wrong`` has something to tell; what did not compile has a test of its own."""
    told = [(x, wrong(x, x.found)) for x in built if isinstance(x.found, Resources)]
    return [f"{x}: {why}" for x, why in told if why]


def uncompiled(built: Iterable[Built]) -> list[str]:
    return [x.found for x in built if isinstance(x.found, str)]


def spills(_: Built, found: Resources) -> str:
    return f"spills {found.spill_bytes} bytes" if found.spill_bytes else ""


def too_many_registers(_: Built, found: Resources) -> str:
    return f"{found.registers} registers" if found.registers > REGISTERS else ""


def too_much_shared_memory(x: Built, found: Resources) -> str:
    limit = ARCHITECTURES[x.arch]
    return f"{found.shared_bytes} bytes, {limit} there are" if found.shared_bytes > limit else ""


def no_tensor_cores(x: Built, found: Resources) -> str:
    if not multiplies(x.launch) or x.launch.constants.get("PRECISION") == "ieee":
        return ""  # float32 as it is has no tensor-core instruction
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
    # ptxas serializes plain products of float16 whose code in bfloat16, alike but for the type, it does not: those are
    # counted in the table of resources.
    if "f16" in found.operands:
        return ""
    return "every wgmma waits for the one before it" if found.serialized else ""


@pytest.fixture(scope="module")
def steps() -> list[Built]:
    """The kernels of the steps of both kinds of blocks."""
    launches = list(counts.step_launches(BUILDS, SAMPLES))
    assert any(multiplies(launch) for launch, _ in launches)
    return build(launches)


def test_everything_compiles(steps: list[Built]) -> None:
    assert uncompiled(steps) == []


@pytest.mark.parametrize("arch", COMPILED_FOR)
@pytest.mark.parametrize(
    "wrong",
    [spills, too_many_registers, too_much_shared_memory, no_tensor_cores, narrow_loads, unsafe, serialized],
    ids=lambda wrong: wrong.__name__,
)
def test_no_kernel_of_a_step(steps: list[Built], wrong: Callable[[Built, Resources], str], arch: int) -> None:
    there = [x for x in steps if x.arch == arch]
    assert there
    found = failures(there, wrong)
    assert not found, "\n" + "\n".join(found)


def test_registers_are_those_of_the_table(steps: list[Built]) -> None:
    table = counts.read()
    if not IS_PINNED:
        pytest.skip(f"the table is of {table['compiler']}, this is {counts.compiler()}")
    found = counts.resource_counts((x.what, x.arch, x.found) for x in steps)
    changed = counts.differences(table["resources"], found)
    assert not changed, "\n".join([*changed, counts.ADVICE])


def test_what_is_wrong_is_found() -> None:
    """Toy kernels, each with one fault."""
    from tests.kernels.test_kernel_resources import SPILLING, product, scale, wrong

    slow = product(config=Config(16, 16, 16, 4, 3))  # too small for wgmma
    ieee = product(torch.float32, precision="ieee")  # as it should be
    toys = (product(), product(), slow, ieee, scale(**SPILLING), wrong())
    built = build([(launch, 90) for launch in toys])
    assert len(built) == 5
    assert [line.partition(" on ")[0] for line in uncompiled(built)] == ["wrong 3 4w3s"]

    def faulty(check: Callable[[Built, Resources], str]) -> list[str]:
        return [line.partition(" on ")[0] for line in failures(built, check)]

    assert faulty(spills) == ["scale 16384 1w3s"]
    assert faulty(too_many_registers) == faulty(too_much_shared_memory) == []
    (told,) = failures(built, no_tensor_cores)
    assert told.startswith("product 16x16x16 4w3s on ") and told.endswith(": no wgmma")


def test_narrow_loads_are_found() -> None:
    from tests.kernels.test_kernel_resources import product

    aligned = product()
    arguments = {**aligned.arguments, "N": 250, "K": 250}  # the kernel is not told that rows are aligned
    hidden = Launch(aligned.kernel, (1,), arguments, aligned.constants, aligned.config)
    odd = product(size=33)  # cannot be aligned
    assert rows_are_aligned(aligned) and rows_are_aligned(hidden) and not rows_are_aligned(odd)
    (line,) = failures(build([(aligned, 80), (hidden, 80)]), narrow_loads)
    assert "not by 16: N K" in line
    assert failures(build([(odd, 80)]), narrow_loads) == []

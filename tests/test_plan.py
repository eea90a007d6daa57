"""What a step launches, beside the roofline and beside a step that really runs."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

import resnet_fused
from benchmarks.roofline_model import step
from resnet_fused.kernels.launch import Launch, observe_launches
from resnet_fused.plan import launches, plan, table

BLOCKS = {"resnet18": 8, "resnet34": 16, "resnet50": 16, "resnet101": 33, "wide_resnet50_2": 16}


def test_resnet50_is_within_a_tenth_of_the_roofline() -> None:
    """Launches and bytes of the passes; the bytes of all launches too."""
    model = step("resnet50", 256, 224, "bf16", "folded")
    planned = plan("resnet50", 256, "bf16")
    passes = [p for p in planned if p.is_pass]
    count, moved = len(model), sum(k.bytes for k in model)
    assert count <= len(passes) <= 1.1 * count
    assert moved <= sum(p.bytes for p in passes) <= 1.1 * moved
    assert sum(p.bytes for p in planned) <= 1.1 * moved
    flops = sum(
        k.flops for k in model if k.kind in ("conv", "dgrad", "wgrad", "covariance") and k.block != "stem"
    )
    assert sum(p.flops for p in passes) == pytest.approx(flops, rel=0.01)


@pytest.mark.parametrize("dtype", ["bf16", "tf32"])
@pytest.mark.parametrize("arch", BLOCKS)
def test_all_blocks_are_planned(arch: str, dtype: str) -> None:
    planned = plan(arch, 32, dtype, 64)
    counts = Counter(p.kernel for p in planned if p.is_pass)
    assert len({p.block for p in planned}) == BLOCKS[arch] + 1
    if arch in ("resnet50", "resnet101", "wide_resnet50_2"):
        assert (
            counts["conv1x1_bn_add_relu"] == counts["folded_wgrad"] == counts["folded_dgrad"] == BLOCKS[arch]
        )
        assert counts["conv_bn_stats"] == counts["wgrad"] == counts["dgrad"] == 2 * BLOCKS[arch]
    text = table(planned, 32)
    assert all(kernel in text for kernel in counts)


@pytest.mark.interpreter
def test_a_step_that_runs_launches_what_is_planned() -> None:
    torch.manual_seed(0)
    model = resnet_fused.resnet50(num_classes=10).to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    seen: list[Launch] = []
    keep_two(model)
    with resnet_fused.backend("triton"), observe_launches(seen.append):
        model(images).square().mean().backward()
    expected = launches("resnet50", 2, "fp32", 32)
    assert Counter(key(launch) for launch in seen) <= Counter(key(launch) for launch in expected)
    # Statistics are merged where a folded convolution has more channels than the first stage's, and dy_coeffs are
    # where the last one is not folded.
    later = {"merge_statistics", "dy_coeffs"}
    assert {launch.name for launch in seen} == {launch.name for launch in expected} - later


def keep_two(model: nn.Module) -> None:
    """Drops all blocks but the first two: the interpreter is slow."""
    model.layer1 = nn.Sequential(model.layer1[0], model.layer1[1])
    model.layer2, model.layer3, model.layer4 = (nn.Identity() for _ in range(3))
    model.fc = nn.Linear(256, 10)


def key(launch: Launch) -> tuple[str, str, tuple[int, ...], int]:
    return launch.name, str(launch.config), launch.grid, launch.bytes


def test_bad_arguments() -> None:
    for arguments, message in (
        (("resnet51", 8), "choose one of resnet18"),
        (("resnet18", 1), "at least 2"),
        (("resnet18", 8, "int8"), "choose one of bf16"),
        (("resnet18", 8, "bf16", 16), "at least 32"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(*arguments)
    with resnet_fused.backend("vendor"), pytest.raises(ValueError, match="switched off"):
        plan("resnet18", 8)

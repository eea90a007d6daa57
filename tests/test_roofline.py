"""The model of a step against the design's table and PyTorch's own counts, and its command line."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import roofline
from benchmarks.roofline import Ceilings, Kernel, limit, step
from benchmarks.roofline_model import ELEMENT, SCHEDULES, network
from resnet_fused.reference import resnet

BATCH = 256
GEMMS = ("conv", "dgrad", "wgrad", "covariance")


@pytest.mark.parametrize(
    ("schedule", "kernels", "moved", "images"),
    [("eager", 500, 474, 6_000), ("fused", 192, 254, 11_000), ("folded", 168, 165, 15_900)],
)
def test_table_of_the_design(schedule: str, kernels: int, moved: int, images: int) -> None:
    """Section 1, ResNet-50 in bf16 at 224x224.

    The model counts the fewest bytes, so the design's may be more, by no more than these. Fused and folded: the
    gradient of a strided downsample's input written and read at full size, three quarters of it zeros (4.2 MB), and
    the gradient before the stem's pool written and read where the pooled one would do (2.6 MB). Eager does both anyway;
    its count of kernels leaves two for classifier, loss and optimizer (2.5 MB). Besides, the design rounds: to 0.5 MB
    and 50 img/s.
    """
    net, element = network("resnet50"), ELEMENT["bf16"]
    count = step("resnet50", BATCH, 224, "bf16", schedule)
    least = most = sum(k.bytes for k in count) / BATCH / 1e6
    if schedule == "eager":
        most = sum(k.bytes for k in step("resnet50", BATCH, 224, "bf16", schedule, whole=True)) / BATCH / 1e6
    else:
        downsamples = [block.downsample for block in net.blocks if block.downsample]
        most += sum(2 * element * (conv.whole_x - conv.x) for conv in downsamples) / 1e6
        most += (2 * element * net.stem.y - (element + 1) * net.pooled) / 1e6
    assert least - 0.5 <= moved <= most + 0.5
    fastest = BATCH / limit(count, roofline.H100)
    assert fastest * least / most - 50 <= images <= fastest + 50
    # Forward and backward of 53 convolutions and norms, 49 ReLUs, 16 additions and a pool, operator by operator.
    forward, backward = 53 * 3 + 49 + 16 + 1, 53 + 52 + 53 * 2 + 49 + 16 + 1
    assert len(count) == {"eager": forward + backward}.get(schedule, kernels)


def test_operations_of_the_design() -> None:
    """24 GFLOP per image; folding adds 25 % to the forward and to the dgrad of what it folds where K = N/4."""
    plain, folded = (
        sum(k.flops for k in step("resnet50", 1, 224, "bf16", schedule) if k.kind in GEMMS)
        for schedule in ("fused", "folded")
    )
    assert plain / 1e9 == pytest.approx(24, abs=0.5)
    blocks = network("resnet50").blocks
    expanding = [block.convs[-1] for block in blocks]
    downsamples = [block.downsample for block in blocks if block.downsample]
    assert all(conv.covariance_flops * 4 == conv.flops for conv in expanding)
    epilogues = sum(4 * block.out for block in blocks)  # BN, addition and ReLU
    assert folded - epilogues - plain == 2 * sum(conv.covariance_flops for conv in expanding + downsamples)


@pytest.mark.parametrize("arch", resnet.ARCHITECTURES)
def test_every_architecture(arch: str) -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        getattr(resnet, arch)()(torch.empty(2, 3, 65, 65))
    forward = [k.flops for k in step(arch, 2, 65, "fp32", "eager", whole=True) if k.kind == "conv"]
    assert sum(forward) == counter.get_total_flops()
    for dtype, element in ELEMENT.items():
        count = {schedule: step(arch, 8, 224, dtype, schedule) for schedule in SCHEDULES}
        moved = {schedule: sum(k.bytes for k in kernels) for schedule, kernels in count.items()}
        assert moved["folded"] < moved["fused"] < moved["eager"]
        assert len(count["folded"]) <= len(count["fused"]) < len(count["eager"])
        for kernels in count.values():
            assert len({kernel.name for kernel in kernels}) == len(kernels)
            assert all(kernel.bytes > 0 and kernel.flops > 0 for kernel in kernels)
        # All but the int64 indices of the pool, written once and read once, is of the dtype.
        assert (moved["eager"] - 2 * 8 * 8 * network(arch).pooled) % element == 0


def test_one_block_by_hand() -> None:
    """layer1.1 of ResNet-50 in bf16, folded: bytes counted from section 2.3, batch 1."""
    kernels = {k.name: k for k in step("resnet50", 1, 224, "bf16", "folded") if k.block == "layer1.1"}
    outer, inner, bits = 2 * 256 * 56**2, 2 * 64 * 56**2, 256 * 56**2 // 8
    expected = {
        ".conv1 conv": outer + inner + 2 * 64 * 256,
        ".conv2 conv": inner + inner + 2 * 64 * 64 * 9,
        ".conv3 covariance": inner + 2 * 64 * 64,
        " bn+add+relu": inner + outer + outer + bits + 2 * 256 * 64,
        ".conv3 folded wgrad": outer + bits + inner + 2 * 256 * 64,
        ".conv3 folded dgrad": outer + bits + inner + inner + 2 * (256 * 64 + 64 * 64),
        ".conv2 dgrad": 4 * inner + 2 * 64 * 64 * 9,
        ".conv2 wgrad": 3 * inner + 2 * 64 * 64 * 9,
        ".conv1 dgrad": 2 * inner + outer + bits + outer + 2 * 64 * 256,
        ".conv1 wgrad": 2 * inner + outer + 2 * 64 * 256,
    }
    assert {name: kernel.bytes for name, kernel in kernels.items()} == {
        f"layer1.1{name}": moved for name, moved in expected.items()
    }


def test_limit_is_the_slower_side_of_each_kernel() -> None:
    kernels = [Kernel("copy", "b", "pointwise", 10, 1), Kernel("multiply", "b", "conv", 1, 100)]
    assert limit(kernels, Ceilings(bandwidth=2.0, flops=10.0)) == 5 + 10


def test_bytes_of_single_ops() -> None:
    shape, bits = (2, 8, 4, 4), 32  # 256 elements, 64 windows
    assert roofline.op_bytes("bn_relu", shape, "fp32") == 1024 * 8
    assert roofline.op_bytes("bn_add_relu", shape, "bf16") == 512 * 10 + 3 * bits
    assert roofline.op_bytes("bn_bn_add_relu", shape, "fp32") == 1024 * 13 + 3 * bits
    assert roofline.op_bytes("bn_relu_maxpool", shape, "bf16") == 512 * 5 + 3 * 64 * 3
    with pytest.raises(ValueError, match="unknown op 'relu'"):
        roofline.op_bytes("relu", shape, "fp32")


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert roofline.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("resnet50, batch 256, 224x224, bf16, stem and blocks; 3,000.0 GB/s")
    assert [line.split()[0] for line in lines[4:7]] == list(SCHEDULES)
    assert lines[6].split()[:3] == ["folded", "168", "163.4"]
    assert roofline.main(["--arch", "resnet18", "--whole", "--measure"]) == 0
    assert "resnet18, batch 256, 224x224, bf16, whole step; " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "resnet51"], "unknown architecture 'resnet51': choose one of resnet18"),
        (["--batch", "0"], "batch must be a whole number of at least 1, got 0"),
        (["--dtype", "int8"], "unknown dtype 'int8': choose one of fp32"),
        (["--bandwidth", "0"], "bandwidth must be a positive number per second, got 0.0"),
        (["--dtype", "tf32", "--measure"], "a CPU has no tf32"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        roofline.main(arguments)
    assert message in capsys.readouterr().err

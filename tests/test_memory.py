"""What training holds and allocates: saved tensors, the process's own memory, large tensors.

As a program it trains one model in a process of its own and prints what that took:

    python -m tests.test_memory fused
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused
from resnet_fused import models, native, reference
from resnet_fused.measure import saved_storages
from resnet_fused.ops import conv3x3, conv_wgrad, vendor_gemm
from tests.conftest import RESIDUAL_BLOCK

IMPLEMENTATIONS: dict[str, Any] = {"fused": resnet_fused, "reference": reference}
# Which convolutions fold depends on the number of pixels, so the ratios are those of this batch.
BATCH = 16
MB = 1 << 20
ROOT = Path(__file__).parents[1]


def precision(name: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if name == "bf16" else contextlib.nullcontext()


def images(count: int, size: int) -> Tensor:
    return torch.randn(count, 3, size, size).to(memory_format=torch.channels_last)


def saved_bytes(model: nn.Module, x: Tensor, dtype: str) -> int:
    with saved_storages(x, *model.parameters(), *model.buffers()) as found, precision(dtype):
        out = model(x)
    assert out.grad_fn is not None
    return sum(found.values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_saved_bytes(dtype: str) -> None:
    """Of a ResNet-18 whose blocks all run fused; test_memory_of_the_process has a ResNet-50's."""
    x = images(BATCH, 224)
    fused, eager = (
        saved_bytes(library.resnet18().to(memory_format=torch.channels_last), x, dtype)
        for library in IMPLEMENTATIONS.values()
    )
    assert fused <= 0.65 * eager, f"{fused / eager:.4f}: {fused} of {eager} bytes"


# The process's own memory.

_PAGE = 4096


def resident() -> int:
    """Bytes of memory of this process, without what the C library only keeps for later."""
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


def start_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The most that was resident at one time since start_peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure(model: nn.Module, dtype: str) -> dict[str, int]:
    """Bytes above what was there before: the most in each of two steps, and what a forward pass holds."""

    def forward(x: Tensor) -> Tensor:
        with precision(dtype):
            out = model(x)
        return F.cross_entropy(out.float(), torch.arange(len(x)))

    forward(images(4, 32)).backward()  # loads libraries, starts threads
    model.zero_grad(set_to_none=True)
    x = images(BATCH, 224)
    before, peaks = resident(), []
    for _ in range(2):
        start_peak()
        forward(x).backward()
        peaks.append(peak() - before)
        model.zero_grad(set_to_none=True)
    native.release_buffers()
    before = resident()
    with saved_storages(x, *model.parameters(), *model.buffers()) as saved:
        loss = forward(x)
    native.release_buffers()
    held = resident() - before
    assert loss.grad_fn is not None
    return {"saved": sum(saved.values()), "held": held, "first step": peaks[0], "second step": peaks[1]}


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, dict[str, int]]]:
    """``measure`` of both implementations by dtype, each in a process of its own, which is as large as what lives.

    What is freed goes back to the system at once. glibc would keep it in holes that later tensors do not fit, and the
    peaks of equal processes differ by a tenth.
    """
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": str(256 << 10),
        # What oneDNN's kernels for AMX allocate would make the figures depend on the processor.
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
    }
    figures = {}
    for impl in IMPLEMENTATIONS:
        command = [sys.executable, "-m", "tests.test_memory", impl]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        figures[impl] = json.loads(done.stdout)
    return figures


on_linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists() or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="reads the process's memory from /proc, and trims that of glibc",
)


#: What is held, and the peak, as fractions of eager's. In bfloat16 no output is computed again in backward.
LIMITS = {"fp32": (0.50, 0.60), "bf16": (0.65, 0.75)}


@on_linux
@pytest.mark.parametrize("dtype", LIMITS)
def test_memory_of_the_process(measured: dict[str, dict[str, dict[str, int]]], dtype: str) -> None:
    """What a forward pass holds, and the peaks of the first step and of a later one, for which large buffers stand by.

    What autograd says it saved is what the process grows by, but for the graph itself and parts of pages: steps of
    the same size have run before, so that kernels of that size are there.
    """
    ours, theirs = measured["fused"][dtype], measured["reference"][dtype]
    held, peak = LIMITS[dtype]
    for what, limit in (("held", held), ("first step", peak), ("second step", peak)):
        message = f"{what}: {ours[what] / theirs[what]:.4f}, {ours[what]} of {theirs[what]} bytes"
        assert ours[what] <= limit * theirs[what], message
    for figures in (ours, theirs):
        assert abs(figures["held"] - figures["saved"]) <= 2 * MB, figures


# Large tensors.


@dataclass(frozen=True)
class Shape:
    """A block, and the sizes of what it keeps and makes.

    ``forward``, ``backward``: allocations of at least the output's size. ``kept``: elements of each large saved tensor.
    ``small``: elements of all vectors and covariances together: statistics, biases behind a ReLU, covariances.
    ``native``: forward and backward where native kernels compute operands in their prologues.
    """

    kind: str
    inplanes: int
    planes: int
    stride: int
    outputs: int | None  # of the downsample convolution
    batch: int
    forward: int
    backward: int
    kept: tuple[int, ...]
    small: int
    native: tuple[int, int] | None = None


#: Pixels of an image of the input, and of one behind a stride of 2.
P, Q = 56 * 56, 28 * 28
BLOCKS = {
    # Forward: the output. Backward: dx. Kept: x, y1, y2.
    "identity": Shape(
        *("Bottleneck", 256, 64, 1, None, 8),
        forward=1,
        backward=1,
        kept=(8 * 256 * P, 8 * 64 * P, 8 * 64 * P),
        small=2 * (64 + 64 + 256) + (64 + 64) + 2 * 64 + 64 * 64,
    ),
    # dx has a quarter of the output's channels.
    "downsample": Shape(
        *("Bottleneck", 64, 64, 1, 256, 8),
        forward=1,
        backward=0,
        kept=(8 * 64 * P, 8 * 64 * P, 8 * 64 * P),
        small=2 * (64 + 64 + 256 + 256) + (64 + 64) + 2 * (2 * 64 + 64 * 64),
    ),
    # The 3x3 has the stride: y1 and a1 are as large as the output; backward: a1, da1, dy1 and dx. In a prologue: a1.
    "downsample_stride": Shape(
        *("Bottleneck", 256, 128, 2, 512, 8),
        forward=3,
        backward=4,
        kept=(8 * 256 * P, 8 * 128 * P, 8 * 128 * Q),
        small=2 * (128 + 128 + 512 + 512) + (128 + 128) + (2 * 128 + 128 * 128) + (2 * 256 + 256 * 256),
        native=(3, 3),
    ),
    # Forward: y1, a1, y2, the output. Backward: dy2, a1, da1, dy1, dx. In prologues: a1, dy2 and dy1.
    "basic": Shape(
        *("BasicBlock", 64, 64, 1, None, 16),
        forward=4,
        backward=5,
        kept=(16 * 64 * P, 16 * 64 * P, 16 * 64 * P),
        small=2 * (64 + 64) + 64,
        native=(3, 2),
    ),
    # The same; the shortcut is folded and what it sees is half as large. dy1 is made: the first convolution has the
    # stride.
    "basic_downsample_stride": Shape(
        *("BasicBlock", 64, 128, 2, 128, 32),
        forward=4,
        backward=5,
        kept=(32 * 64 * P, 32 * 128 * Q, 32 * 128 * Q),
        small=2 * (128 + 128 + 128) + 128 + 2 * 64 + 64 * 64,
        native=(3, 3),
    ),
}


def make_block(shape: Shape) -> nn.Module:
    shortcut = None
    if shape.outputs is not None:
        shortcut = nn.Sequential(
            nn.Conv2d(shape.inplanes, shape.outputs, 1, shape.stride, bias=False),
            nn.BatchNorm2d(shape.outputs),
        )
    kind: Any = getattr(models, shape.kind)
    block: nn.Module = kind(shape.inplanes, shape.planes, shape.stride, shortcut)
    return block.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@contextlib.contextmanager
def allocations() -> Iterator[list[int]]:
    """Bytes of every allocation of PyTorch on the CPU, there when the context has ended."""
    found: list[int] = []
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        yield found
    events = profile.profiler.kineto_results.events()
    found += [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", BLOCKS)
def test_large_tensors_of_a_block(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large ones are made as often as they must be, and kept are input, outputs of the chain, and bits."""
    for module in (conv3x3, conv_wgrad):  # whatever was measured on this kind of machine
        monkeypatch.setattr(module, "is_faster", lambda *_: True)
    monkeypatch.setattr(RESIDUAL_BLOCK, "FOLD_LIMIT", RESIDUAL_BLOCK.RECOMPUTE_LIMIT)
    chunk = 6 * MB
    monkeypatch.setattr(vendor_gemm, "CHUNK_BYTES", {"cpu": chunk})
    shape = BLOCKS[name]
    made = shape.forward, shape.backward
    if shape.native is not None and dtype == torch.float32:
        made = shape.native
    block = make_block(shape)
    x = torch.randn(shape.batch, shape.inplanes, 56, 56).to(dtype).to(memory_format=torch.channels_last)
    x.requires_grad_()
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with saved_storages(*block.parameters()) as kept, autocast, allocations() as by_forward:
        out = block(x)
    size = out.numel() * dtype.itemsize
    assert chunk < size  # else a chunk would go uncounted
    large = [elements * dtype.itemsize for elements in shape.kept]
    assert sorted(b for b in kept.values() if b > MB) == sorted(b for b in large if b > MB)
    assert sum(kept.values()) == sum(large) + out.numel() // 8 + 4 * shape.small
    assert list(kept.values()).count(out.numel() // 8) == 1
    grad = torch.randn_like(out)
    assert grad.stride() == out.stride()
    with allocations() as by_backward:
        out.backward(grad)
    assert x.grad is not None
    assert tuple([b >= size for b in by].count(True) for by in (by_forward, by_backward)) == made


def test_a_recomputed_output_is_not_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    for limit in (RESIDUAL_BLOCK.RECOMPUTE_LIMIT, 0):
        monkeypatch.setattr(RESIDUAL_BLOCK, "FOLD_LIMIT", limit)
        block = make_block(BLOCKS["identity"])
        x = torch.randn(2, 256, 28, 28).to(memory_format=torch.channels_last).requires_grad_()
        with saved_storages(*block.parameters()) as kept:
            block(x)
        saved.append(sum(kept.values()))
    # Nor are a shift, a mean and a covariance.
    assert saved[0] - saved[1] == 4 * (2 * 64 + 64 * 64)


if __name__ == "__main__":
    torch.set_num_threads(2)
    torch.manual_seed(0)
    trained = IMPLEMENTATIONS[sys.argv[1]].resnet50().to(memory_format=torch.channels_last)
    print(json.dumps({dtype: measure(trained, dtype) for dtype in ("fp32", "bf16")}))

"""Training for long, by several threads, and with forked processes; ``make soak`` takes 10,000 steps."""

from __future__ import annotations

import functools
import math
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import resnet_fused
from resnet_fused import reference
from tests.test_memory import MB, resident
from tests.threads import threads

pytestmark = pytest.mark.usefixtures("buffers")

STEPS = int(os.environ.get("RESNET_FUSED_TEST_STEPS", "30"))
SEED = int(os.environ.get("RESNET_FUSED_TEST_SEED", "0"))
#: Losses are compared as means of so many.
WINDOW = max(STEPS // 100, 5)
#: How many times further from the references the fused run may be than they are from each other; as in test_curves.
FACTOR = 2.0
#: From here on losses are compared. Before, differences that began with rounding still grow, at a pace of chance.
LONG = 1000
#: High: a run with 0.4 more diverges, fused or not.
LEARNING_RATE = 0.1

VARIANTS: dict[str, tuple[Any, torch.memory_format]] = {
    "fused": (resnet_fused, torch.channels_last),
    "reference": (reference, torch.channels_last),
    "contiguous": (reference, torch.contiguous_format),
}
on_linux = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="reads /proc")


def make_model(seed: int, variant: str = "fused") -> nn.Module:
    """A stem, a BasicBlock, and a Bottleneck with stride and downsample convolution: ten classes."""
    library, layout = VARIANTS[variant]
    torch.manual_seed(seed)
    downsample = nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
    blocks = [library.BasicBlock(16, 16), library.Bottleneck(16, 8, 2, downsample)]
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    return model.to(memory_format=layout)


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Batches of noise, each with the mean colour of its class; a tenth of the labels is wrong, so that losses stay."""

    def __init__(self, seed: int, steps: int, transform: Callable[[Tensor], Tensor] | None = None) -> None:
        self.seed, self.steps, self.transform = seed, steps, transform

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        colours = torch.randn(10, 3, 1, 1, generator=torch.Generator().manual_seed(self.seed))
        labels = torch.randint(10, (16,), generator=random)
        images = torch.randn(16, 3, 12, 12, generator=random) + 0.5 * colours[labels]
        if self.transform is not None:
            images = self.transform(images)
        wrong = torch.rand(16, generator=random) < 0.1
        return images, torch.where(wrong, torch.randint(10, (16,), generator=random), labels)


@dataclass
class Trained:
    """Losses of all steps, and after the first tenth of them and at the end (resident bytes, open files)."""

    losses: list[float]
    weights: dict[str, Tensor]
    used: list[tuple[int, int]]


def used() -> tuple[int, int]:
    return resident(), len(os.listdir("/proc/self/fd"))


def train(model: nn.Module, images: Images, dtype: torch.dtype = torch.float32, workers: int = 0) -> Trained:
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    fork = "fork" if workers else None
    batches = DataLoader(images, batch_size=None, num_workers=workers, multiprocessing_context=fork)
    trained = Trained([], model.state_dict(), [])
    for step, (pixels, labels) in enumerate(batches):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = model(pixels)
        loss = F.cross_entropy(out.float(), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        trained.losses.append(loss.item())
        if step in (len(images) // 10, len(images) - 1):
            trained.used.append(used())
    return trained


def means(losses: list[float]) -> list[float]:
    return [sum(losses[i : i + WINDOW]) / WINDOW for i in range(0, len(losses) - WINDOW + 1, WINDOW)]


def first_not_finite(losses: list[float]) -> int:
    return next((step for step, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))


@on_linux
@pytest.mark.timeout(6 * 3600)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
def test_losses_memory_and_files(dtype: torch.dtype) -> None:
    """Training beside two runs of the reference: as close as they are to each other, memory and open files constant"""
    runs = {variant: train(make_model(SEED, variant), Images(SEED, STEPS), dtype) for variant in VARIANTS}
    fused, *references = (run.losses for run in runs.values())
    assert first_not_finite(fused) >= min(map(first_not_finite, references))
    curves = {variant: means(run.losses) for variant, run in runs.items()}
    if STEPS >= LONG:
        spread = math.dist(curves["reference"], curves["contiguous"])
        distances = [math.dist(curves["fused"], curves[variant]) for variant in ("reference", "contiguous")]
        assert max(distances) <= FACTOR * spread, (distances, spread)
    assert curves["fused"][-1] < curves["fused"][0], "nothing was learned"
    (before, files), (after, files_after) = runs["fused"].used
    assert after <= before + 8 * MB, f"{(after - before) / MB:.1f} MB more"
    assert files_after == files


def in_threads(*functions: Callable[[], Any]) -> list[Any]:
    """What they return, run at the same time."""
    start = threading.Barrier(len(functions))

    def run(function: Callable[[], Any]) -> Any:
        start.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(run, functions))


def assert_same(one: Trained, other: Trained) -> None:
    assert one.losses == other.losses
    for name, weight in one.weights.items():
        assert torch.equal(weight, other.weights[name]), name


@on_linux
def test_two_threads_train_two_models() -> None:
    """Two threads that train two models: the bits of one after the other"""
    steps = max(STEPS // 10, 20)

    def runs() -> list[Callable[[], Trained]]:
        return [functools.partial(train, make_model(seed), Images(seed, steps)) for seed in (SEED, SEED + 1)]

    alone = [run() for run in runs()]
    for one, other in zip(in_threads(*runs()), alone, strict=True):
        assert_same(one, other)


def test_four_threads_evaluate_one_model() -> None:
    """Four threads that evaluate one model: the bits of one thread, from the first batch on"""
    steps = max(STEPS // 10, 20)
    batches = [Images(SEED + thread, steps) for thread in range(4)]

    def outputs(model: nn.Module, images: Images) -> list[Tensor]:
        with torch.no_grad():  # of each thread
            return [model(images[step][0]) for step in range(steps)]

    model = make_model(SEED).eval()
    together = in_threads(*(functools.partial(outputs, model, images) for images in batches))
    again = make_model(SEED).eval()
    for found, images in zip(together, batches, strict=True):
        assert all(map(torch.equal, found, outputs(again, images)))


@on_linux
def test_forked_workers() -> None:
    """Batches of forked workers, which themselves evaluate a fused model that the parent has used"""
    steps = max(STEPS // 10, 20)
    teacher = make_model(SEED + 1).eval()

    def transform(images: Tensor) -> Tensor:
        with torch.no_grad():
            return images + teacher(images).mean()

    with threads(1):
        images = Images(SEED, steps, transform)
        alone = train(make_model(SEED), images)
        assert_same(train(make_model(SEED), images, workers=2), alone)


@on_linux
def test_a_forked_child_trains() -> None:
    """A process that is forked after its parent has trained, and trains: the bits of the parent"""
    steps = max(STEPS // 10, 20)
    images = Images(SEED, steps)
    with threads(1):  # more than one hang in a forked process: GNU OpenMP's threads are not forked
        alone = train(make_model(SEED), images)
        child = os.fork()
        if child == 0:
            try:
                signal.alarm(300)
                assert_same(train(make_model(SEED), images), alone)
                os._exit(0)
            finally:
                os._exit(1)
    assert os.waitpid(child, 0)[1] == 0

"""Whether fused training differs from eager PyTorch by more than eager PyTorch differs from itself.

Floating-point sums depend on their order, and training amplifies that: two runs of the same recipe in another
summation order part company. How far, is measured here by runs of the reference that differ in nothing else, each from
the same weights with the same batches; the fused run may be no further from any of them than twice what the two that
are furthest apart are from each other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from resnet_fused.cli.data import Batch, Batches, Source, open_source
from resnet_fused.cli.distributed import World
from resnet_fused.cli.learner import Learner
from resnet_fused.cli.settings import Settings, make_settings
from tests.threads import threads

# Whole epochs: after fewer steps the running statistics have not arrived and accuracy is chance.
SEEDS, EPOCHS, STEPS, HELD_OUT = 2, 3, 14, 4
#: How many times further from a reference the fused run may be than the references are from each other.
FACTOR = 2.0


FUSED, REVERSED = "fused", "reversed batches"
#: Settings of each way to do the same sums. In reversed batches the sums over a batch run in the other order.
VARIANTS: dict[str, dict[str, Any]] = {
    FUSED: {"impl": "fused"},
    "reference": {"impl": "reference"},
    "contiguous": {"impl": "reference", "channels_last": False},
    REVERSED: {"impl": "reference"},
}


@dataclass
class Curve:
    """Of one run."""

    losses: list[float]  # of every step
    epochs: list[float]  # mean loss of each
    accuracies: list[float]  # on the held-out images behind each


@dataclass
class Data:
    """The batches of a run, made once for all that share them."""

    source: Source
    steps: int  # in an epoch
    training: list[list[Batch]]  # by epoch
    held_out: list[Batch]


def load(settings: Settings) -> Data:
    """Of each epoch the first STEPS batches, of the held-out ones the first HELD_OUT."""
    source = open_source(settings.data, settings.image_size, settings.seed)
    batches = Batches(source, settings.batch_size, settings.seed, 0, World(), pin=False)
    training = [list(itertools.islice(batches.training(e, 0), STEPS)) for e in range(settings.epochs)]
    held_out = [batch for batch in itertools.islice(batches.held_out(), HELD_OUT) if batch is not None]
    return Data(source, len(training[0]), training, held_out)


def run(variant: str, settings: Settings, data: Data) -> Curve:
    """Trains as the command line does."""
    own = replace(settings, **VARIANTS[variant])
    learner = Learner(own.impl, own, data.source, data.steps, torch.device("cpu"), World())
    for batches in data.training:
        for batch in batches:
            images, labels = learner.prepare(batch)
            if variant == REVERSED:
                images = images.flip(0).contiguous(memory_format=learner.memory_format)
                labels = labels.flip(0)
            learner.step(images, labels)
        learner.count_steps()
        learner.progress.finish_epoch(0.0, *learner.evaluate(data.held_out))
    history = learner.progress.history
    return Curve(
        learner.progress.losses,
        [record["train_loss"] for record in history],
        [record["val_accuracy"] for record in history],
    )


@pytest.fixture(scope="module")
def curves() -> Iterator[dict[str, Curve]]:
    """Of each variant, the runs from all seeds one after the other."""
    curves = {name: Curve([], [], []) for name in VARIANTS}
    with threads(2):
        for seed in range(SEEDS):
            recipe = {"arch": "resnet18", "epochs": EPOCHS, "seed": seed, "image_size": 16, "batch_size": 64}
            settings = make_settings(recipe, {})
            data = load(settings)
            for name, curve in curves.items():
                one = run(name, settings, data)
                curve.losses += one.losses
                curve.epochs += one.epochs
                curve.accuracies += one.accuracies
    yield curves


def test_the_same_training_in_other_bits(curves: dict[str, Curve]) -> None:
    """All start alike and none are equal: the variants differ in rounding, and in nothing else."""
    starts = range(0, SEEDS * EPOCHS * STEPS, EPOCHS * STEPS)
    for a, b in itertools.combinations(curves.values(), 2):
        assert len(a.losses) == len(b.losses) == SEEDS * EPOCHS * STEPS
        for start in starts:
            assert a.losses[start] == pytest.approx(b.losses[start], rel=1e-5)
        assert a.losses != b.losses
    for curve in curves.values():
        for i in range(0, SEEDS * EPOCHS, EPOCHS):
            assert curve.epochs[i + EPOCHS - 1] < curve.epochs[i]


@pytest.mark.parametrize("quantity", ["epochs", "accuracies"])
def test_is_as_close(quantity: str, curves: dict[str, Curve]) -> None:
    def distance(a: str, b: str) -> float:
        return math.dist(getattr(curves[a], quantity), getattr(curves[b], quantity))

    references = [name for name in VARIANTS if name != FUSED]
    largest = max(distance(a, b) for a, b in itertools.combinations(references, 2))
    assert largest > 0
    assert max(distance(FUSED, name) for name in references) <= FACTOR * largest

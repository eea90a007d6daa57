"""Fused training stays as close to plain PyTorch as plain PyTorch to itself; see tests/curves.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.curves import FACTOR, FUSED, REFERENCES, VARIANTS, Curve, load, recipe, run, spread

#: oneDNN's absence makes a step ten times slower: only at the demo's length, by hand.
NAMES = [FUSED, *(name for name in REFERENCES if name != "without oneDNN")]
# Whole epochs: behind fewer steps the running statistics have not arrived and accuracy is chance.
SEEDS, EPOCHS, STEPS, HELD_OUT = 2, 3, 14, 4


@pytest.fixture(scope="module")
def curves() -> Iterator[dict[str, Curve]]:
    """Of each variant, the runs from all seeds one after the other."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    found = {name: Curve([], [], []) for name in NAMES}
    for seed in range(SEEDS):
        settings = recipe("resnet18", EPOCHS, seed)
        data = load(settings, STEPS, HELD_OUT)
        for name, curve in found.items():
            one = run(VARIANTS[name], settings, data)
            curve.losses += one.losses
            curve.epochs += one.epochs
            curve.accuracies += one.accuracies
    torch.set_num_threads(before)
    yield found


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


def test_loss_is_as_close(curves: dict[str, Curve], record_property: Callable[[str, object], None]) -> None:
    found = spread(curves, lambda curve: curve.epochs)
    record_property("ratio", found.ratio)
    assert len(found.fused) >= 3 and min(found.references.values()) > 0
    assert found.ratio <= FACTOR, found


def test_held_out_accuracy_is_as_close(
    curves: dict[str, Curve], record_property: Callable[[str, object], None]
) -> None:
    found = spread(curves, lambda curve: curve.accuracies)
    record_property("ratio", found.ratio)
    assert found.ratio <= FACTOR, found

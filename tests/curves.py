"""Whether fused training differs from plain PyTorch by more than plain PyTorch differs from itself.

Floating-point sums depend on their order, and training amplifies that: two runs of the same recipe in another
summation order part company. How far, is measured here by runs of the reference that differ in nothing else, each from
the same weights with the same batches; the fused run may be no further from any of them than twice what the two that
are furthest apart are from each other.

    python -m tests.curves --epochs 25 --arch resnet18    # the length of `make demo`
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from resnet_fused.cli.data import Batch, Batches, Source, open_source
from resnet_fused.cli.distributed import World
from resnet_fused.cli.learner import Learner
from resnet_fused.cli.settings import Settings, make_settings

#: How many times further from a reference the fused run may be than the references are from each other.
FACTOR = 2.0


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _without_onednn() -> AbstractContextManager[None]:
    flags: AbstractContextManager[None] = torch.backends.mkldnn.flags(enabled=False)
    return flags


@dataclass(frozen=True)
class Variant:
    """One way to do the same sums."""

    impl: str = "reference"
    context: Callable[[], AbstractContextManager[None]] = nullcontext
    channels_last: bool = True
    reverse: bool = False  # the images of each batch, in which all sums over a batch run


FUSED = "fused"
VARIANTS = {
    FUSED: Variant("fused"),
    "reference": Variant(),
    "one thread": Variant(context=_one_thread),
    "contiguous": Variant(channels_last=False),
    "without oneDNN": Variant(context=_without_onednn),
    "reversed batches": Variant(reverse=True),
}
REFERENCES = [name for name in VARIANTS if name != FUSED]


@dataclass
class Curve:
    """Of one run."""

    losses: list[float]  # of every step
    epochs: list[float]  # mean loss of each
    accuracies: list[float]  # on the held-out images behind each
    seconds: float = 0.0


@dataclass
class Data:
    """The batches of a run, made once for all that share them."""

    source: Source
    steps: int  # in an epoch
    training: list[list[Batch]]  # by epoch
    held_out: list[Batch] = field(default_factory=list)


def load(settings: Settings, steps: int | None = None, held_out: int | None = None) -> Data:
    """All batches that ``settings`` ask for; of each epoch the first ``steps``, of the held-out the first so many."""
    source = open_source(settings.data, settings.image_size, settings.seed)
    batches = Batches(source, settings.batch_size, settings.seed, 0, World(), pin=False)
    training = [list(itertools.islice(batches.training(e, 0), steps)) for e in range(settings.epochs)]
    kept = [batch for batch in itertools.islice(batches.held_out(), held_out) if batch is not None]
    return Data(source, len(training[0]), training, kept)


def run(variant: Variant, settings: Settings, data: Data) -> Curve:
    """Trains as the command line does."""
    own = replace(settings, channels_last=variant.channels_last)
    learner = Learner(variant.impl, own, data.source, data.steps, torch.device("cpu"), World())
    start = time.perf_counter()
    with variant.context():
        for batches in data.training:
            for batch in batches:
                images, labels = learner.prepare(batch)
                if variant.reverse:
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
        time.perf_counter() - start,
    )


def rms(a: list[float], b: list[float]) -> float:
    """Root mean square of the differences of two curves."""
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a))


@dataclass(frozen=True)
class Spread:
    """Distances of curves in one quantity, by pairs of runs."""

    references: dict[tuple[str, str], float]
    fused: dict[str, float]

    @property
    def ratio(self) -> float:
        """Of the fused run's largest distance from a reference to the largest between two references."""
        return max(self.fused.values()) / max(self.references.values())


def spread(curves: dict[str, Curve], of: Callable[[Curve], list[float]]) -> Spread:
    """The distances of all runs in the quantity that ``of`` takes of a curve."""
    names = [name for name in curves if name != FUSED]
    return Spread(
        {(a, b): rms(of(curves[a]), of(curves[b])) for a, b in itertools.combinations(names, 2)},
        {name: rms(of(curves[FUSED]), of(curves[name])) for name in names},
    )


def recipe(arch: str, epochs: int, seed: int, image_size: int = 32, batch_size: int = 64) -> Settings:
    """The demo's, but for these."""
    given = {"arch": arch, "epochs": epochs, "seed": seed, "image_size": image_size, "batch_size": batch_size}
    return make_settings(given, {})


def weights(learner: Learner) -> Tensor:
    """All parameters of a model as one vector."""
    return torch.cat([p.detach().flatten() for p in learner.model.parameters()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--steps", type=int, help="of each epoch (all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--out", type=Path, help="a JSON file for the curves")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    settings = recipe(given.arch, given.epochs, given.seed)
    data = load(settings, given.steps)
    curves = {}
    for name in given.variants:
        curves[name] = curve = run(VARIANTS[name], settings, data)
        print(
            f"{name:<17} loss {curve.epochs[-1]:.4f}  held-out accuracy {curve.accuracies[-1]:.2%}  "
            f"{curve.seconds:.0f} s",
            flush=True,
        )
        if given.out is not None:
            given.out.write_text(json.dumps({n: vars(c) for n, c in curves.items()}) + "\n")
    for what, of in (("training loss", lambda c: c.epochs), ("held-out accuracy", lambda c: c.accuracies)):
        found = spread(curves, of)
        print(f"{what}, RMS of the difference over epochs")
        for pair, value in found.references.items():
            print(f"  {' / '.join(pair):<38} {value:.5f}")
        for name, value in found.fused.items():
            print(f"  {f'fused / {name}':<38} {value:.5f}")
        print(f"  largest of fused / largest of references {found.ratio:.2f} (limit {FACTOR})", flush=True)


if __name__ == "__main__":
    main()

"""Whole ResNets at 224x224: a training step (forward, loss, backward, SGD), and evaluation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks.conftest import Compare
from benchmarks.providers import BATCH, make_providers, modules, to_layout
from benchmarks.roofline import Ceilings, limit, step
from resnet_fused.cli.precision import Precision
from resnet_fused.cli.probe import probe
from resnet_fused.cli.steps import TrainingStep, begin_step
from resnet_fused.measure import EAGER, EXACT, OURS, SEEDS, Results, check_accuracy

LAYER = "model"
SIZE = 224
ROUNDS = 6
#: Providers whose first step and peak memory are measured in fresh processes.
PROBED = (OURS, EAGER, "compile_default")


@functools.lru_cache(maxsize=len(SEEDS))
def exact_results(train: TrainingStep, training: bool, seed: int) -> list[Tensor]:
    """In float64, which takes longest and is the same for every precision."""
    model = train.model(EXACT).train(training)
    images, labels = train.data(seed)
    if training:
        return train.loss_and_gradient(model, images.double(), labels)
    with torch.no_grad():
        return [model(images.double())]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_model(
    arch: str,
    mode: str,
    precision: Precision,
    device: torch.device,
    names: tuple[str, ...],
    ceilings: Ceilings,
    compare: Compare,
) -> None:
    tf32, training = precision.name == "tf32", mode == "train"
    train = TrainingStep(arch, BATCH, SIZE, "fp32" if tf32 else precision.name, str(device))
    # Before torch.compile has cached anything of this model.
    cudnn = {"allow_tf32": tf32, "benchmark": torch.backends.cudnn.benchmark}
    probed = {key: probe(train, key, **cudnn) for key in PROBED if key in names and training}
    eager, fused = (train.model(key).train(training) for key in (EAGER, OURS))
    runnable, missing = modules(names, arch, "", eager, fused)

    def evaluate(provider: str, module: nn.Module, images: Tensor) -> list[Tensor]:
        begin_step(provider)
        with torch.no_grad(), precision.autocast(device.type):
            return [module(images)]

    def draw(seed: int) -> Results:
        images, labels = train.data(seed)

        def results(provider: str) -> list[Tensor]:
            if provider == EXACT:
                return exact_results(dataclasses.replace(train, precision="fp32"), training, seed)
            module, given = runnable.get(provider, eager), to_layout(provider, images)
            if not training:
                return evaluate(provider, module, given)
            begin_step(provider)
            return train.loss_and_gradient(module, given, labels)

        return results

    def run_of(provider: str, module: nn.Module) -> Callable[[], object]:
        images, labels = train.data(0)
        images = to_layout(provider, images)
        if not training:
            return functools.partial(evaluate, provider, module, images)
        one_step = train.train(module)

        def run() -> None:
            begin_step(provider)
            one_step(images, labels)

        return run

    notes = check_accuracy(draw, runnable, precision.eps)
    roofline_ms = (
        limit(step(arch, BATCH, SIZE, precision.name, whole=True), ceilings) * 1e3 if training else None
    )
    providers = make_providers(names, runnable, notes | missing, run_of)
    for provider in providers:
        measured = probed.get(provider.name, {})
        provider.first_step_ms, provider.peak_mb = measured.get("first_step_ms"), measured.get("peak_mb")
    case = train.case(roofline_ms)
    compare(dataclasses.replace(case, mode=mode, dtype=precision.name), providers, ROUNDS)

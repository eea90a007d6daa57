"""How a batch becomes a step: loss, groups of batches, clipping, optimizer and schedule."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

import resnet_fused
from resnet_fused.cli import learner as learners
from resnet_fused.cli.data import Batches, open_source
from resnet_fused.cli.distributed import World
from resnet_fused.cli.learner import Learner
from resnet_fused.cli.optimizers import make_optimizer, make_schedule
from resnet_fused.cli.settings import Settings, make_settings
from tests import torchvision_ops  # noqa: F401  before torchvision
from tests.cli.conftest import SMALL, Cli, assert_same_run, digests, load, torchrun
from tests.graphed_steps import StepOnCPU

Pair = tuple[Tensor, Tensor]


def make_learner(steps: int = 3, **options: Any) -> Learner:
    """With `steps` in an epoch, on images of 16x16."""
    settings = make_settings({"image_size": 16, "batch_size": 4, "epochs": 2, **options}, {})
    return Learner("fused", settings, open_source("digits", 16, 0), steps, torch.device("cpu"), World())


def batches(learner: Learner, count: int) -> list[Pair]:
    """Random ones, the same for all learners."""
    draw = torch.Generator().manual_seed(1)
    shape = (4, learner.settings.image_size, learner.settings.image_size, 3)
    return [
        learner.prepare(
            (
                torch.randint(256, shape, dtype=torch.uint8, generator=draw),
                torch.randint(10, (4,), generator=draw),
            )
        )
        for _ in range(count)
    ]


def gradient_norm(learner: Learner) -> float:
    """Of all parameters together."""
    norms = [p.grad.norm() for p in learner.model.parameters() if p.grad is not None]
    return torch.stack(norms).norm().item()


def test_default_run_is_a_plain_loop(train: Cli, images: Path, tmp_path: Path) -> None:
    """To the last bit: options that are not given leave no trace."""
    assert train("--max-steps", 6).code == 0
    torch.manual_seed(0)
    model = resnet_fused.resnet18(num_classes=2).to(memory_format=torch.channels_last).train()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 5e-4},
        {"params": [p for p in model.parameters() if p.ndim <= 1]},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.02, momentum=0.9)
    parts = [LinearLR(optimizer, 1.0, total_iters=0), CosineAnnealingLR(optimizer, T_max=7)]
    schedule = SequentialLR(optimizer, parts, milestones=[1])
    source = open_source(str(images), 16, 0)
    data = Batches(source, 4, 0, 0, World(), pin=False)
    mean, std = (255 * torch.tensor(x).view(1, 3, 1, 1) for x in (source.mean, source.std))
    for epoch, steps in ((0, 4), (1, 2)):
        for _, (pixels, labels) in zip(range(steps), data.training(epoch, 0), strict=False):
            x = ((pixels.permute(0, 3, 1, 2).float() - mean) / std).contiguous(
                memory_format=torch.channels_last
            )
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()
            schedule.step()
    trained = load(tmp_path / "out" / "last.pt")["model"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained[name]), name


def test_label_smoothing() -> None:
    """Of the training loss alone."""
    plain, smooth = make_learner(), make_learner(label_smoothing=0.25)
    (images, labels), *_ = batches(plain, 1)
    logits = copy.deepcopy(plain.model).train()(images)
    expected = 0.75 * F.cross_entropy(logits, labels) - 0.25 * logits.log_softmax(1).mean()
    smooth.step(images, labels)
    assert smooth._pending[0][0].item() == pytest.approx(expected.item(), rel=1e-5)
    held_out = [(torch.zeros(4, 16, 16, 3, dtype=torch.uint8), labels)]
    plain.model.load_state_dict(smooth.model.state_dict())
    assert plain.evaluate(held_out) == smooth.evaluate(held_out)


def test_groups_of_batches() -> None:
    """Gradients are means over a group; the last of an epoch is smaller, and the next starts with zeros."""
    learner = make_learner(steps=3, accumulate=2, schedule="constant", warmup=0)
    data = batches(learner, 4)
    model = copy.deepcopy(learner.model).train()
    optimizer = make_optimizer(model, learner.settings, captured=False)
    for group, last in (((0,), False), ((0, 1), True), ((2,), True)):
        learner.step(*data[group[-1]])
        if last:
            optimizer.zero_grad()
            for images, labels in (data[index] for index in group):
                (F.cross_entropy(model(images), labels) / len(group)).backward()
            optimizer.step()
        for (name, ours), theirs in zip(learner.model.named_parameters(), model.parameters(), strict=True):
            assert torch.equal(ours, theirs), (group, name)
    learner.count_steps()
    learner.progress.finish_epoch(0.0, 0.0, 0.0)
    learner.step(*data[3])
    optimizer.zero_grad()
    F.cross_entropy(model(data[3][0]), data[3][1]).div(2).backward()
    for ours, theirs in zip(learner.model.parameters(), model.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_clipping(precision: str) -> None:
    """In fp16 the scale of the loss is taken out first."""
    learner = make_learner(clip_grad=0.01, precision=precision, image_size=48)
    # The scale that PyTorch starts with overflows, whereupon the step is skipped.
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=precision == "fp16")
    learner.step(*batches(learner, 1)[0])
    assert gradient_norm(learner) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("sgd", torch.optim.SGD, {"lr": 0.02, "momentum": 0.5, "weight_decay": 5e-4}),
        ("adamw", torch.optim.AdamW, {"lr": 1e-3, "betas": (0.5, 0.999), "weight_decay": 1e-2}),
        ("rmsprop", torch.optim.RMSprop, {"lr": 1e-3, "momentum": 0.5, "weight_decay": 5e-4}),
    ],
)
def test_optimizer(name: str, kind: type, expected: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    settings = make_settings({"optimizer": name, "momentum": 0.5}, {})
    optimizer = make_optimizer(model, settings, captured=False)
    assert type(optimizer) is kind
    matrices, vectors = optimizer.param_groups
    assert {key: matrices[key] for key in expected} == expected
    assert {key: vectors[key] for key in expected} == expected | {"weight_decay": 0}
    assert [len(group["params"]) for group in (matrices, vectors)] == [1, 3]
    given = {"optimizer": name, "lr": 0.5, "weight_decay": 0.25}
    assert make_settings(given, {}) == make_settings({}, given)
    assert make_settings(given, {}).lr == 0.5 and make_settings(given, {}).weight_decay == 0.25


@pytest.mark.parametrize("name", ["step", "constant"])
def test_schedule(name: str) -> None:
    """Reductions are counted from the start of the run, of which the first four steps warm up."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=7.0)
    settings = Settings(lr=1.0, warmup=0.2, schedule=name, step_size=2, gamma=0.5, epochs=6)
    schedule = make_schedule(optimizer, settings, 18)
    rates = []
    for _ in range(18):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    whole = [1.0] * 6 + [0.5] * 6 + [0.25] * 6 if name == "step" else [1.0] * 18
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1])
    assert rates[4:] == pytest.approx(whole[4:])


@pytest.mark.parametrize("options", [{"optimizer": "adamw"}, {"clip_grad": 0.01}])
def test_captured(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_learner(steps=5, lr=1e-4, **options)
    monkeypatch.setattr(learners, "GraphedStep", StepOnCPU)
    monkeypatch.setattr(learners, "why_no_cuda_graph", lambda device, world: None)
    captured = make_learner(steps=5, lr=1e-4, cuda_graph=True, **options)
    for images, labels in batches(plain, 5):
        plain.step(images, labels)
        captured.step(images, labels)
    assert captured._graphed.captures == 1  # type: ignore[union-attr]
    losses = [torch.stack(one._pending)[:, 0] for one in (captured, plain)]
    # AdamW's steps are as long for the smallest gradients, of which rounding is a large part.
    limit = 0.02 if "optimizer" in options else 1e-3
    torch.testing.assert_close(*losses, rtol=limit, atol=limit)
    if "clip_grad" in options:
        assert gradient_norm(captured) == pytest.approx(0.01, rel=1e-3)


def test_average() -> None:
    """Is what is evaluated and saved as the model; training goes on with the weights themselves."""
    plain, averaged = make_learner(steps=4, accumulate=2), make_learner(steps=4, accumulate=2, ema=0.75)
    expected: dict[str, Tensor] = {}
    held_out = [(torch.full((4, 16, 16, 3), 99, dtype=torch.uint8), torch.arange(4))]
    results = [averaged.evaluate(held_out)]
    for number, (images, labels) in enumerate(batches(plain, 4), start=1):
        plain.step(images, labels)
        averaged.step(images, labels)
        if number % 2 == 0:
            now = {name: x.clone() for name, x in plain.model.state_dict().items()}
            expected = {
                name: 0.75 * expected[name] + 0.25 * x if expected and x.is_floating_point() else x
                for name, x in now.items()
            }
            results.append(averaged.evaluate(held_out))
    assert len(set(results)) == 3
    state = averaged.state()
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, state["trained"][name]), name
        if value.is_floating_point():
            torch.testing.assert_close(state["model"][name], expected[name])
    assert state["n_averaged"] == 2
    assert results[-1] != plain.evaluate(held_out)
    plain.model.load_state_dict(state["model"])
    assert results[-1] == plain.evaluate(held_out)


def test_average_begins_and_ends_with_a_resumed_run(train: Cli, begun: Path) -> None:
    one = load(begun)["model"]
    assert train("--resume", "--max-steps", 2, "--ema", 0.5).code == 0
    two = load(begun)
    assert two["n_averaged"] == 1  # of which the first is a copy
    assert torch.equal(two["model"]["fc.weight"], two["trained"]["fc.weight"])
    assert not torch.equal(two["model"]["fc.weight"], one["fc.weight"])
    assert train("--resume", "--max-steps", 3, "--ema", 0).code == 0
    assert not {"trained", "n_averaged"} & load(begun).keys()


def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training and in evaluation, of the average too; weights keep their names."""
    compilations: list[bool] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        compilations.append(torch.is_grad_enabled())
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend, fullgraph=True))
    plain, compiled = make_learner(ema=0.5), make_learner(ema=0.5, compile=True)
    (images, labels), *_ = batches(plain, 1)
    plain.step(images, labels)
    assert not compilations
    compiled.step(images, labels)
    assert compilations == [True]
    held_out = [(torch.full((4, 16, 16, 3), 99, dtype=torch.uint8), torch.arange(4))]
    assert compiled.evaluate(held_out) == pytest.approx(plain.evaluate(held_out), rel=1e-5)
    assert compilations == [True, False]
    for (name, ours), (other, theirs) in zip(
        compiled.state()["model"].items(), plain.state()["model"].items(), strict=True
    ):
        assert name == other
        torch.testing.assert_close(ours, theirs)
    torch._dynamo.reset()


RECIPE = [
    *("--label-smoothing", 0.1, "--accumulate", 3, "--clip-grad", 1, "--optimizer", "adamw"),
    *(
        "--schedule",
        "step",
        "--step-size",
        1,
        "--gamma",
        0.5,
        "--ema",
        0.5,
        "--augment",
        "trivial",
        "--mixup",
        0.5,
        "--cutmix",
        1,
    ),
]


def test_resumed_equals_uninterrupted(train: Cli, tmp_path: Path) -> None:
    """All at once; a stop waits for the end of a group of batches."""
    assert train(*RECIPE, "--max-steps", 7, out="whole").code == 0
    stopped = train(*RECIPE, "--max-steps", 2)
    assert stopped.code == 0 and "stopped at step 3 of 8" in stopped.out
    assert "stopped at step 7 of 8" in train("--resume", "--max-steps", 7).out
    assert_same_run(tmp_path / "whole" / "last.pt", tmp_path / "out" / "last.pt")
    assert_same_run(tmp_path / "whole" / "best.pt", tmp_path / "out" / "best.pt")
    assert math.isfinite(load(tmp_path / "out" / "last.pt")["progress"]["losses"].sum())


def test_hyperparameters_of_a_resumed_run_are_those_given(train: Cli, begun: Path) -> None:
    assert train("--resume", "--max-steps", 2, "--momentum", 0.5, "--weight-decay", 0.25).code == 0
    groups = load(begun)["optimizer"]["param_groups"]
    assert [(group["momentum"], group["weight_decay"]) for group in groups] == [(0.5, 0.25), (0.5, 0)]


def test_compared(train: Cli, tmp_path: Path) -> None:
    result = train(*RECIPE, "--impl", "compare", "--max-steps", 1, "--tensorboard")
    assert result.code == 0, result.err
    assert "held-out accuracy" in result.out
    for name in ("fused", "reference"):
        assert any((tmp_path / "out" / name / "tensorboard").iterdir())


def test_two_processes(images: Path, tmp_path: Path) -> None:
    """Gradients of a whole group are summed, and rank 0's running statistics are everyone's: weights stay equal."""
    small = ("--data", images, *SMALL, "--epochs", 1, "--batch-size", 2)
    recipe = [str(option) for option in RECIPE if option not in ("--augment", "trivial")]
    printed = torchrun("-m", "resnet_fused", "train", *small, *recipe, "--out", tmp_path / "out")
    first, second = digests(printed.out)
    assert first == second
    assert load(tmp_path / "out" / "last.pt")["n_averaged"] == 2

"""GraphedStep: captured steps train as eager ones do. On a CPU a stand-in takes the place of the graph."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused import GraphedStep
from tests.graphed_steps import (
    WARMUP,
    Batch,
    StepOnCPU,
    assert_same,
    batch,
    compare,
    eager_step,
    sgd,
    small_model,
    state_of,
)


def usual(count: int = WARMUP + 1) -> list[Batch]:
    """With these a step is captured."""
    return [batch() for _ in range(count)]


def test_trains_as_eager_steps_do() -> None:
    assert compare(usual(WARMUP + 5), sgd).captures == 1


def test_last_batches_of_epochs_run_eagerly() -> None:
    """However many epochs there are: they do not follow each other."""
    step = compare([*usual(), batch(3)] * (WARMUP + 2), sgd)
    assert step.captures == 1 and step._captured[0][0][0] == (4, 3, 8, 8)


@pytest.mark.parametrize(("count", "captures"), [(WARMUP, 1), (WARMUP + 2, 2)])
def test_other_batches_are_captured_once_they_follow_each_other(count: int, captures: int) -> None:
    assert compare([*usual(), *(batch(size=10) for _ in range(count))], sgd).captures == captures


def test_another_layout_is_not_replayed() -> None:
    images, labels = batch()
    step = compare([*usual(), (images.contiguous(), labels)], sgd)
    assert step.captures == 1 and step._alike == 1


def test_other_optimizers() -> None:
    """PyTorch's own with `capturable` need a GPU."""

    class Lion(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {"lr": 0.01, "capturable": True})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad.sign() * group["lr"])

    assert compare(usual(WARMUP + 3), lambda model: Lion(model.parameters())).captures == 1


def trained(steps: int = WARMUP + 1, **options: Any) -> tuple[StepOnCPU, nn.Module, torch.optim.SGD]:
    model = small_model()
    optimizer = sgd(model)
    step = StepOnCPU(model, optimizer, F.cross_entropy, warmup=WARMUP, **options)
    for _ in range(steps):
        step(*batch())
    return step, model, optimizer


def test_neither_construction_nor_capture_changes_anything() -> None:
    step, model, optimizer = trained(0)
    assert not optimizer.state and not step.is_captured
    for _ in range(WARMUP):
        assert not step.is_captured
        step(*batch())
    before, lr = state_of(model, optimizer), [group["lr"] for group in optimizer.param_groups]
    random = torch.get_rng_state()
    images, labels = batch()
    torch.set_rng_state(random)
    step._capture(step._signature(images, labels), images, labels)
    after = state_of(model, optimizer)
    assert_same(
        {name: x for name, x in after.items() if "gradient" not in name},
        {name: x for name, x in before.items() if "gradient" not in name},
    )
    assert [group["lr"] for group in optimizer.param_groups] == lr


def test_results_are_the_callers() -> None:
    step, *_ = trained()
    loss, logits = step(*batch())
    copies = loss.clone(), logits.clone()
    step(*batch())
    assert torch.equal(loss, copies[0]) and torch.equal(logits, copies[1])
    assert not loss.requires_grad and not logits.requires_grad


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_learning_rates_stay_what_they_are_and_are_followed(as_tensor: bool) -> None:
    step, model, optimizer = trained()
    rates = [torch.tensor(0.0), torch.tensor([0.0])] if as_tensor else [0, 0.0]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    before = [p.detach().clone() for p in model.parameters()]
    step(*batch())
    assert step.captures == 1
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, rates, strict=True))
    for rate, group in zip((0.5, 0.0), optimizer.param_groups, strict=True):
        group["lr"].fill_(rate) if as_tensor else group.update(lr=rate)
    step(*batch())
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert moved == [p.ndim > 1 for p in model.parameters()]


def frozen_norm(model: Any, optimizer: Any) -> None:
    model[1].eval()


def no_gradient(model: Any, optimizer: Any) -> None:
    model[0].weight.requires_grad_(False)


def moved(model: Any, optimizer: Any) -> None:
    model[0].weight.data = model[0].weight.data.clone(memory_format=torch.preserve_format)


def momentum(model: Any, optimizer: Any) -> None:
    optimizer.param_groups[1]["momentum"] = 0.5


@pytest.mark.parametrize("change", [frozen_norm, no_gradient, moved, momentum], ids=lambda f: f.__name__)
def test_changes_count_at_once_and_are_captured_later(change: Callable[[Any, Any], None]) -> None:
    step, model, optimizer = trained()
    other = copy.deepcopy(model)
    reference = sgd(other)
    reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for changed in ((model, optimizer), (other, reference)):
        change(*changed)
    for index in range(WARMUP + 2):
        assert step.captures == 1 + (index > WARMUP), index
        one = batch()
        torch.manual_seed(index)
        loss, _ = step(*one)
        torch.manual_seed(index)
        assert torch.equal(loss, eager_step(other, reference, *one)[0]), index
    assert_same(
        {name: x for name, x in state_of(model, optimizer).items() if "gradient" not in name},
        {name: x for name, x in state_of(other, reference).items() if "gradient" not in name},
    )


def test_state_that_is_loaded_is_used() -> None:
    """The graph writes into buffers that the optimizer no longer has."""
    step, model, optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    following = [batch() for _ in range(WARMUP + 2)]

    def go_on() -> list[Tensor]:
        torch.manual_seed(0)
        return [step(*one)[0] for one in following]

    expected = go_on()
    optimizer.load_state_dict(saved[0])
    model.load_state_dict(saved[1])
    assert not step.is_captured
    assert all(torch.equal(a, b) for a, b in zip(go_on(), expected, strict=True))
    assert step.captures == 2


def test_an_optimizer_does_not_keep_the_graph() -> None:
    step, _, optimizer = trained()
    gone = weakref.ref(step)
    del step
    gc.collect()
    assert gone() is None
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("overflows", [(0,), (0, 2), (WARMUP + 1,)], ids=str)
def test_gradients_that_overflow_are_skipped(overflows: tuple[int, ...]) -> None:
    """As by an optimizer that is not fused, before and after the capture; buffers are not left unfilled."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    other = copy.deepcopy(model)
    optimizers = sgd(model), sgd(other, fused=False)
    scalers = [torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2) for _ in range(2)]
    step = StepOnCPU(model, optimizers[0], F.cross_entropy, scaler=scalers[0], warmup=WARMUP)
    for index in range(WARMUP + 4):
        images, labels = batch(size=2)
        if index in overflows:
            images[0] = float("inf")
        step(images, labels)
        eager_step(other, optimizers[1], images, labels, scaler=scalers[1])
        assert scalers[0].state_dict() == scalers[1].state_dict()
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert step.captures == 1


def test_autocast_is_that_of_the_step() -> None:
    seen: list[tuple[bool, bool]] = []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()))
        return F.cross_entropy(logits, labels)

    model = small_model()
    logits = StepOnCPU(model, sgd(model), loss, autocast=torch.bfloat16)(*batch())[1]
    assert logits.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert StepOnCPU(model, sgd(model), loss)(*batch())[1].dtype == torch.float32
    assert seen == [(True, False), (False, False)]


def refused(match: str, optimizer: Callable[[nn.Module], Any] = sgd, **options: Any) -> None:
    model = small_model()
    with pytest.raises(ValueError, match=match):
        StepOnCPU(model, optimizer(model), F.cross_entropy, **options)


def test_optimizers_that_cannot_be_captured() -> None:
    scaler = torch.amp.GradScaler("cpu")
    refused(r"make it SGD\(\.\.\., fused=True\)", lambda model: sgd(model, fused=False))
    refused(r"make it SGD\(\.\.\., fused=True\)", lambda model: torch.optim.SGD(model.parameters()))
    refused(r"make it AdamW\(\.\.\., capturable=True\)", lambda model: torch.optim.AdamW(model.parameters()))
    refused(r"Adagrad has no option `capturable`", lambda model: torch.optim.Adagrad(model.parameters()))
    capturable = {"capturable": True, "foreach": False}
    refused(
        r"GradScaler\.step waits .* make it Adam\(\.\.\., fused=True\)",
        lambda model: torch.optim.Adam(model.parameters(), **capturable),
        scaler=scaler,
    )
    refused("use dampening=0", lambda model: sgd(model, dampening=0.5), scaler=scaler)


def test_an_optimizer_that_became_one_by_loading_is_refused_before_the_capture() -> None:
    step, model, optimizer = trained()
    optimizer.load_state_dict(sgd(model, fused=False).state_dict())
    for _ in range(WARMUP):
        step(*batch())
    with pytest.raises(ValueError, match="fused=True"):
        step(*batch())


def test_bad_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    refused("warmup must be at least 1, got 0", warmup=0)
    refused("autocast must be", autocast=torch.float32)
    model = small_model()
    with pytest.raises(ValueError, match="a model on one CUDA device; this one is on cpu"):
        GraphedStep(model, sgd(model), F.cross_entropy)
    nothing = nn.ReLU()
    with pytest.raises(ValueError, match="no device, having no parameters"):
        GraphedStep(nothing, sgd(model), F.cross_entropy)
    step, *_ = trained(0)
    images, labels = batch()
    with pytest.raises(ValueError, match="labels must be on cpu, the model's device, got meta"):
        step(images, labels.to("meta"))
    with pytest.raises(ValueError, match="images must not require a gradient"):
        step(images.requires_grad_(), labels)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    refused("a step of 2 processes")

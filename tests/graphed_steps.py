"""Models, optimizers and eager steps that captured steps are compared with; a stand-in for the graph on a CPU."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fused import GraphedStep
from resnet_fused.cuda_graph import Outputs

WARMUP = 3
Batch = tuple[Tensor, Tensor]


def tensors_of(step: GraphedStep) -> list[Tensor]:
    """All that a step of training changes."""
    tensors = [*step._model.state_dict().values()]
    for state in step._optimizer.state.values():
        tensors += [x for x in state.values() if isinstance(x, Tensor)]
    if step._scaler is not None:
        tensors += [step._scaler._scale, step._scaler._growth_tracker]
    return tensors


class StandIn:
    """Replays by running the step's Python again, on the tensors and with the hyperparameters of the capture."""

    def __init__(self, step: GraphedStep, run: Callable[[], Outputs]) -> None:
        self.run = run
        self.groups = step._optimizer.param_groups
        self.captured = [dict(group) for group in self.groups]
        for x in step._inputs:
            x.zero_()
        before, random = [x.clone() for x in tensors_of(step)], torch.get_rng_state()
        self.outputs = run()
        torch.set_rng_state(random)
        with torch.no_grad():  # a capture runs nothing
            for x, old in zip(tensors_of(step), before, strict=True):
                x.copy_(old)
        self.parameters = list(step._parameters)
        self.gradients = [p.grad for p in self.parameters]

    def replay(self) -> None:
        now = [dict(group) for group in self.groups]
        for group, captured in zip(self.groups, self.captured, strict=True):
            group.update(captured)
        with torch.enable_grad():
            results = self.run()
        for group, given in zip(self.groups, now, strict=True):
            group.update(given)
        for own, result in zip(self.outputs, results, strict=True):
            own.copy_(result)
        for own, p in zip(self.gradients, self.parameters, strict=True):
            if own is not None:
                own.copy_(p.grad)


class StepOnCPU(GraphedStep):
    """With the stand-in instead of a graph."""

    captures = 0

    def _check_devices(self, devices: set[torch.device]) -> torch.device:
        return devices.pop()

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        yield

    def _record(self, run: Callable[[], Outputs]) -> tuple[Any, Outputs]:
        self.captures += 1
        graph = StandIn(self, run)
        return graph, graph.outputs


def small_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.25),
        nn.Linear(8, 5),
    ).to(memory_format=torch.channels_last)


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "lr": 0.05}]
    return torch.optim.SGD(groups, **({"lr": 0.1, "momentum": 0.9, "fused": True} | options))


def batch(count: int = 4, size: int = 8, device: str = "cpu", classes: int = 5) -> Batch:
    images = torch.randn(count, 3, size, size).to(device, memory_format=torch.channels_last)
    return images, torch.randint(classes, (count,)).to(device)


def eager_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    autocast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> Outputs:
    """As a user writes it, with learning rates as float32 tensors, to which a graph rounds them."""
    given = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=images.device)
    scaler = scaler or torch.amp.GradScaler(images.device.type, enabled=False)
    optimizer.zero_grad()
    with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    for group, lr in zip(optimizer.param_groups, given, strict=True):
        group["lr"] = lr
    return loss.detach(), logits.detach()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {name: x.detach().clone() for name, x in model.state_dict().items()}
    tensors |= {
        f"{name} gradient": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }
    for index, state in enumerate(optimizer.state.values()):
        tensors |= {f"{key} {index}": x.clone() for key, x in state.items() if isinstance(x, Tensor)}
    return tensors


def assert_same(given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert given.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(given[name], value), name


def compare(batches: list[Batch], make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> StepOnCPU:
    """Both train on the same batches with a schedule; returns the captured one."""
    model = small_model()
    other = copy.deepcopy(model)
    optimizers = make_optimizer(model), make_optimizer(other)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8) for optimizer in optimizers]
    step = StepOnCPU(model, optimizers[0], F.cross_entropy, warmup=WARMUP)
    for index, (images, labels) in enumerate(batches):
        torch.manual_seed(index)
        results = step(images, labels)
        torch.manual_seed(index)
        expected = eager_step(other, optimizers[1], images, labels)
        for ours, theirs in zip(results, expected, strict=True):
            assert torch.equal(ours, theirs), index
        assert_same(state_of(model, optimizers[0]), state_of(other, optimizers[1]))
        for schedule in schedules:
            schedule.step()
    return step

"""GraphedStep: captured steps train as eager ones do. On a CPU a stand-in takes the place of the graph."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused
from resnet_fused import GraphedStep
from resnet_fused.cuda_graph import Outputs

WARMUP = 3
Batch = tuple[Tensor, Tensor]


def tensors_of(step: GraphedStep) -> list[Tensor]:
    """All that a step of training changes."""
    found = [*step._model.state_dict().values()]
    for state in step._optimizer.state.values():
        found += [x for x in state.values() if isinstance(x, Tensor)]
    if step._scaler is not None:
        found += [step._scaler._scale, step._scaler._growth_tracker]
    return found


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


def made(seed: int = 0) -> nn.Sequential:
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
    found = {name: x.detach().clone() for name, x in model.state_dict().items()}
    found |= {
        f"{name} gradient": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }
    for index, state in enumerate(optimizer.state.values()):
        found |= {f"{key} {index}": x.clone() for key, x in state.items() if isinstance(x, Tensor)}
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def compare(batches: list[Batch], make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> StepOnCPU:
    """Both train on the same batches with a schedule; returns the captured one."""
    model = made()
    other = copy.deepcopy(model)
    optimizers = make_optimizer(model), make_optimizer(other)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8) for optimizer in optimizers]
    step = StepOnCPU(model, optimizers[0], F.cross_entropy, warmup=WARMUP)
    for index, (images, labels) in enumerate(batches):
        torch.manual_seed(index)
        found = step(images, labels)
        torch.manual_seed(index)
        expected = eager_step(other, optimizers[1], images, labels)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs), index
        assert_same(state_of(model, optimizers[0]), state_of(other, optimizers[1]))
        for schedule in schedules:
            schedule.step()
    return step


def test_trains_as_eager_steps_do() -> None:
    step = compare([batch() for _ in range(WARMUP + 5)], sgd)
    assert step.captures == 1


def test_last_batches_of_epochs_run_eagerly() -> None:
    """However many epochs there are: they do not follow each other."""
    epoch = [*(batch() for _ in range(WARMUP + 1)), batch(3)]
    step = compare(epoch * (WARMUP + 2), sgd)
    assert step.captures == 1 and step._captured[0][0][0] == (4, 3, 8, 8)


def test_other_batches_are_captured_once_they_follow_each_other() -> None:
    grown = [batch(size=10) for _ in range(WARMUP)]
    step = compare([*(batch() for _ in range(WARMUP + 1)), *grown], sgd)
    assert step.captures == 1
    step = compare([*(batch() for _ in range(WARMUP + 1)), *grown, batch(size=10), batch(size=10)], sgd)
    assert step.captures == 2


def test_another_layout_is_not_replayed() -> None:
    images, labels = batch()
    step = compare([*(batch() for _ in range(WARMUP + 1)), (images.contiguous(), labels)], sgd)
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

    assert compare([batch() for _ in range(WARMUP + 3)], lambda model: Lion(model.parameters())).captures == 1


def trained(steps: int = WARMUP + 1, **options: Any) -> tuple[StepOnCPU, nn.Module, torch.optim.SGD]:
    model = made()
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
    kept = loss.clone(), logits.clone()
    step(*batch())
    assert torch.equal(loss, kept[0]) and torch.equal(logits, kept[1])
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

    model = made()
    logits = StepOnCPU(model, sgd(model), loss, autocast=torch.bfloat16)(*batch())[1]
    assert logits.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert StepOnCPU(model, sgd(model), loss)(*batch())[1].dtype == torch.float32
    assert seen == [(True, False), (False, False)]


def refused(match: str, optimizer: Callable[[nn.Module], Any] = sgd, **options: Any) -> None:
    model = made()
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
    model = made()
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


# On a GPU


def on_gpu(arch: str = "resnet18") -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = getattr(resnet_fused, arch)(num_classes=10).cuda()
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def capturable_adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True, **options)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("arch", "choice", "dtype", "make_optimizer"),
    [
        ("resnet18", "auto", torch.bfloat16, sgd),
        ("resnet18", "triton", None, sgd),
        ("resnet18", "triton", torch.bfloat16, capturable_adamw),
        ("resnet18", "triton", torch.float16, sgd),
        ("resnet18", "vendor", torch.bfloat16, sgd),
        ("resnet18", "vendor", torch.float16, capturable_adamw),
        ("resnet50", "triton", torch.bfloat16, sgd),
    ],
)
def test_captured(arch: str, choice: str, dtype: torch.dtype | None, make_optimizer: Any) -> None:
    """Bit for bit: the same kernels on the same numbers. With a schedule, and a last batch that is smaller."""
    model = on_gpu(arch)
    other = copy.deepcopy(model)
    options = {"fused": True} if dtype == torch.float16 else {}
    optimizers = make_optimizer(model, **options), make_optimizer(other, **options)
    enabled = dtype == torch.float16
    scalers = [torch.amp.GradScaler("cuda", init_scale=2.0**10, enabled=enabled) for _ in range(2)]
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7) for optimizer in optimizers]
    sizes = [4] * (WARMUP + 3) + [2, 4, 4]
    with resnet_fused.backend(choice):
        step = GraphedStep(
            model, optimizers[0], F.cross_entropy, autocast=dtype, scaler=scalers[0], warmup=WARMUP
        )
        for index, count in enumerate(sizes):
            images, labels = batch(count, 64, "cuda", 10)
            assert step.is_captured == (index > WARMUP)
            found = step(images, labels)
            expected = eager_step(other, optimizers[1], images, labels, dtype, scalers[1])
            for ours, theirs in zip(found, expected, strict=True):
                assert torch.equal(ours, theirs), index
            assert_same(state_of(model, optimizers[0]), state_of(other, optimizers[1]))
            for schedule in schedules:
                schedule.step()
    assert scalers[0].state_dict() == scalers[1].state_dict()


@pytest.mark.gpu
def test_captured_twice() -> None:
    """At another image size, and beside another graph; with gradients that are clipped."""
    model, second = on_gpu(), on_gpu()
    other = copy.deepcopy(model)
    optimizers = sgd(model), sgd(other), sgd(second)
    for one_model, optimizer in zip((model, other, second), optimizers, strict=True):
        clip = functools.partial(nn.utils.clip_grad_norm_, list(one_model.parameters()), 0.5)
        optimizer.register_step_pre_hook(lambda *_, clip=clip: (clip(), None)[1])
    with resnet_fused.backend("triton"):
        step = GraphedStep(model, optimizers[0], F.cross_entropy, warmup=1)
        beside = GraphedStep(second, optimizers[2], F.cross_entropy, warmup=1)
        for index, size in enumerate([64] * 4 + [96] * 4 + [64] * 4):
            one = batch(4, size, "cuda", 10)
            loss, _ = step(*one)
            assert torch.equal(loss, eager_step(other, optimizers[1], *one)[0]), index
            assert torch.equal(loss, beside(*one)[0]), index
    assert_same(state_of(model, optimizers[0]), state_of(other, optimizers[1]))


@pytest.mark.gpu
def test_captured_while_batches_are_pinned() -> None:
    """A data loader's thread allocates pinned memory at any time."""
    count = 24
    data = torch.utils.data.TensorDataset(torch.randn(4 * count, 3, 64, 64), torch.randint(10, (4 * count,)))
    loader = torch.utils.data.DataLoader(data, 4, num_workers=1, pin_memory=True)
    model = on_gpu()
    with resnet_fused.backend("triton"):
        step = GraphedStep(model, sgd(model), F.cross_entropy)
        losses = [step(*(x.cuda(non_blocking=True) for x in one))[0] for one in loader]
    assert len(losses) == count and step.is_captured
    assert torch.stack(losses).isfinite().all()


@pytest.mark.gpu
def test_launches_of_a_captured_step() -> None:
    """One graph and a few copies, instead of hundreds of kernels."""
    model = on_gpu()
    with resnet_fused.backend("triton"):
        step = GraphedStep(model, sgd(model), F.cross_entropy, warmup=1)
        one = batch(4, 64, "cuda", 10)
        for _ in range(3):
            step(*one)
        torch.cuda.synchronize()
        with torch.profiler.profile() as profile:  # of the CPU and of CUDA's calls
            step(*one)
            torch.cuda.synchronize()
    launched = [event.name for event in profile.events() if event.name.startswith("cu")]
    assert sum("GraphLaunch" in name for name in launched) == 1
    assert sum("LaunchKernel" in name for name in launched) < 16

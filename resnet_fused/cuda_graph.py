"""A training step as one CUDA graph: forward, loss, backward and optimizer, launched by a single call of the driver."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

Loss = Callable[[Tensor, Tensor], Tensor]
#: Loss and logits.
Outputs = tuple[Tensor, Tensor]


class GraphedStep:
    """A training step that is captured as a CUDA graph after a few calls and replayed from then on::

        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
        step = resnet_fused.GraphedStep(model, optimizer, criterion, autocast=torch.bfloat16)
        for images, labels in batches:
            loss, logits = step(images, labels)  # forward, loss, zero_grad, backward, optimizer.step
            scheduler.step()

    Every call is one step of training. The first ``warmup`` calls run it kernel by kernel on a side stream: kernels are
    compiled and measured then, and the optimizer allocates its state. The next call captures the step, which runs
    nothing, and replays it. So neither construction nor capture changes parameters, buffers, the state of optimizer
    and scaler, or a random generator, and no step is lost to warming up.

    A batch of another shape, layout or dtype than the captured one (the last of an epoch, say) runs kernel by kernel.
    So does a step after a change that the captured one does not know: of ``train()`` and ``eval()``, of
    ``requires_grad``, of a parameter's memory, of the optimizer's hyperparameters other than ``lr``. Once ``warmup``
    steps in succession are alike, the next is captured and the old graph is freed. What changes in every step, such as
    the momentum of ``OneCycleLR`` without ``cycle_momentum=False``, is thus right but never captured.
    ``optimizer.load_state_dict`` begins with a warm-up again.

    The learning rate may change between steps: ``param_groups[i]["lr"]`` stays what the user or a scheduler made it, a
    number or a tensor, and its value is copied into a float32 tensor that the captured step reads.

    Replaying runs no Python: of hooks, the kernels that they launched during the capture are replayed and nothing else.
    So gradients can be clipped in ``optimizer.register_step_pre_hook`` (not with a scaler, which unscales them later).
    Modules and parameters must not be replaced by others. The graph keeps the memory of a step's activations.

    Args:
        model: called with the images. Its parameters are on one CUDA device.
        optimizer: one that was made with ``capturable=True``, or ``torch.optim.SGD`` with ``fused=True``.
        loss_fn: called with the model's output and the labels, under autocast; returns a scalar.
        autocast: torch.bfloat16 or torch.float16, in which forward and loss run. By default they run without autocast,
            also where the caller has it on.
        scaler: scales the loss of float16; the optimizer then has to be made with ``fused=True``.
        warmup: steps before a capture, at least 1.

    Raises:
        ValueError: the model is not on one CUDA device, there are several processes (gradients that they sum are not
            captured), or the optimizer, the scaler, ``autocast`` or ``warmup`` is none of the above.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss_fn: Loss,
        *,
        autocast: torch.dtype | None = None,
        scaler: torch.amp.GradScaler | None = None,
        warmup: int = 3,
    ) -> None:
        if warmup < 1:
            raise ValueError(f"warmup must be at least 1, got {warmup}")
        if autocast not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"autocast must be torch.bfloat16, torch.float16 or None, got {autocast}")
        self._model = model
        self._optimizer = optimizer
        self._loss_fn = loss_fn
        self._autocast = autocast
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._warmup = warmup
        self._modules = list(model.modules())
        self._parameters = list(model.parameters())
        _check_optimizer(optimizer, self._scaler is not None)
        self._device = self._check_devices({p.device for p in self._parameters})
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(
                f"a step of {dist.get_world_size()} processes, which sum their gradients, cannot be captured: "
                "run it as it is"
            )
        self._rates: list[Tensor] = []  # one for each parameter group
        self._side_stream: torch.cuda.Stream | None = None
        self.reset()
        this = weakref.ref(self)  # the optimizer is not to keep the graph's memory

        def state_was_replaced(_: Optimizer) -> None:
            step = this()
            if step is not None:
                step.reset()

        optimizer.register_load_state_dict_post_hook(state_was_replaced)

    @property
    def is_captured(self) -> bool:
        """Whether there is a graph, which a call like the captured one replays."""
        return self._graph is not None

    def reset(self) -> None:
        """Frees the graph and its memory; the next calls warm up and capture anew."""
        self._graph: Any = None
        self._captured: Any = None
        self._outputs: Sequence[Tensor] = ()
        self._inputs: Sequence[Tensor] = ()
        self._gradients: list[tuple[Tensor, Tensor | None]] = []
        self._latest: Any = None
        self._alike = 0

    def __call__(self, images: Tensor, labels: Tensor) -> Outputs:
        """One step of training. Each parameter's ``grad`` is then its gradient in this step.

        Args:
            images: the model's input, such as (N, 3, H, W), channels_last or contiguous, on the model's device.
            labels: what ``loss_fn`` takes beside the model's output, on the same device.

        Returns:
            The loss and the model's output, detached; later steps do not overwrite them.

        Raises:
            ValueError: images or labels are on another device or require a gradient.
        """
        for name, x in (("images", images), ("labels", labels)):
            if x.device != self._device:
                raise ValueError(f"{name} must be on {self._device}, the model's device, got {x.device}")
            if x.requires_grad:
                raise ValueError(f"{name} must not require a gradient, which a captured step would not give")
        now = self._signature(images, labels)
        if self._graph is not None and now == self._captured:
            self._latest, self._alike = None, 0
            return self._replay(images, labels)
        if now != self._latest:
            self._latest, self._alike = now, 0
        if self._alike < self._warmup:
            self._alike += 1
            with self._rates_as_tensors(), self._aside():
                return self._step(images, labels)
        self._capture(now, images, labels)
        return self._replay(images, labels)

    def _signature(self, images: Tensor, labels: Tensor) -> list[Any]:
        """All that a captured step holds fast: steps are alike where it is equal."""
        hyperparameters = [name for name in self._optimizer.defaults if name != "lr"]
        return [
            [(x.shape, x.stride(), x.dtype) for x in (images, labels)],
            [module.training for module in self._modules],
            [(p.data_ptr(), p.requires_grad) for p in self._parameters],
            [
                (
                    len(group["params"]),
                    # A tensor is read when the step runs.
                    [id(x) if isinstance(x, Tensor) else x for x in map(group.get, hyperparameters)],
                )
                for group in self._optimizer.param_groups
            ],
        ]

    def _step(self, images: Tensor, labels: Tensor) -> Outputs:
        self._optimizer.zero_grad(set_to_none=True)
        # Weights that autocast has cached from an earlier step would be captured as they are.
        enabled = self._autocast is not None
        with torch.autocast(self._device.type, self._autocast, enabled=enabled, cache_enabled=False):
            logits = self._model(images)
            loss = self._loss_fn(logits, labels)
        if self._scaler is None:
            loss.backward()
            self._optimizer.step()
        else:
            _allocate_momentum(self._optimizer)
            self._scaler.scale(loss).backward()
            self._scaler.step(self._optimizer)
            self._scaler.update()
        return loss.detach(), logits.detach()

    def _capture(self, signature: Any, images: Tensor, labels: Tensor) -> None:
        _check_optimizer(self._optimizer, self._scaler is not None)
        self.reset()
        # Gradients are allocated in the graph's memory only where there are none.
        self._optimizer.zero_grad(set_to_none=True)
        self._inputs = [torch.empty_like(x) for x in (images, labels)]
        with self._rates_as_tensors():
            self._graph, self._outputs = self._record(lambda: self._step(*self._inputs))
        self._captured = signature
        parameters = (p for group in self._optimizer.param_groups for p in group["params"])
        self._gradients = [(p, p.grad) for p in parameters]

    def _replay(self, images: Tensor, labels: Tensor) -> Outputs:
        with torch.no_grad():
            self._copy_rates()
            for own, given in zip(self._inputs, (images, labels), strict=True):
                own.copy_(given)
            self._graph.replay()
            for parameter, gradient in self._gradients:
                parameter.grad = gradient
            loss, logits = self._outputs
            return loss.clone(), logits.clone()

    def _copy_rates(self) -> None:
        groups = self._optimizer.param_groups
        while len(self._rates) < len(groups):
            self._rates.append(torch.empty((), dtype=torch.float32, device=self._device))
        for rate, group in zip(self._rates, groups, strict=False):
            value = group["lr"]
            if isinstance(value, Tensor):
                rate.copy_(value.detach().squeeze())
            else:
                rate.fill_(value)

    @contextmanager
    def _rates_as_tensors(self) -> Iterator[None]:
        """Within, each parameter group has its learning rate as the tensor that the captured step reads."""
        groups = self._optimizer.param_groups
        given = [group["lr"] for group in groups]
        self._copy_rates()
        for group, rate in zip(groups, self._rates, strict=False):
            group["lr"] = rate
        try:
            yield
        finally:
            for group, value in zip(groups, given, strict=True):
                group["lr"] = value

    # What needs a GPU

    def _check_devices(self, devices: set[torch.device]) -> torch.device:
        if len(devices) != 1 or next(iter(devices)).type != "cuda":
            names = ", ".join(sorted(map(str, devices))) or "no device, having no parameters"
            raise ValueError(f"a CUDA graph needs a model on one CUDA device; this one is on {names}")
        return devices.pop()

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Within, kernels go to a side stream, since the default stream cannot be captured."""
        if self._side_stream is None:
            self._side_stream = torch.cuda.Stream(self._device)
        current = torch.cuda.current_stream(self._device)
        self._side_stream.wait_stream(current)
        with torch.cuda.stream(self._side_stream):
            yield
        current.wait_stream(self._side_stream)

    def _record(self, run: Callable[[], Outputs]) -> tuple[Any, Outputs]:
        """A graph of what ``run`` launches, and the tensors that it returns, which each replay fills."""
        graph = torch.cuda.CUDAGraph()
        # A stream of its own: cuBLAS then allocates its workspace in the graph's memory, which lives as long.
        stream = torch.cuda.Stream(self._device)
        # thread_local: a data loader's thread may go on pinning memory. The outer context ends also if a capture fails.
        with (
            torch.cuda.stream(stream),
            torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
        ):
            outputs = run()
        return graph, outputs


def _check_optimizer(optimizer: Optimizer, scaled: bool) -> None:
    """Raises ValueError where a step of the optimizer would wait for the GPU, or not follow its learning rate."""
    name, groups = type(optimizer).__name__, optimizer.param_groups
    if isinstance(optimizer, SGD):
        if not all(group["fused"] for group in groups):
            raise ValueError(f"{name} is captured with fused=True only: make it {name}(..., fused=True)")
    elif not all("capturable" in group for group in groups):
        raise ValueError(
            f"{name} has no option `capturable`, without which it cannot be captured: use one that has it, "
            "such as AdamW(..., capturable=True), or SGD(..., fused=True)"
        )
    elif not all(group["capturable"] for group in groups):
        raise ValueError(
            f"{name} is captured with capturable=True only: make it {name}(..., capturable=True)"
        )
    if not scaled:
        return
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(
            f"GradScaler.step waits for the GPU unless the optimizer is fused: make it {name}(..., fused=True)"
        )
    if isinstance(optimizer, SGD) and any(group["dampening"] for group in groups):
        raise ValueError("SGD with dampening cannot be captured together with a GradScaler: use dampening=0")


def _allocate_momentum(optimizer: Optimizer) -> None:
    """Gives a fused SGD buffers of zeros, with which its first step is the same.

    Left to itself it allocates them in that step without filling them where the scaler finds an infinite gradient.
    """
    if isinstance(optimizer, SGD):
        for group in optimizer.param_groups:
            for p in group["params"] if group["momentum"] else ():
                if p.requires_grad and optimizer.state[p].get("momentum_buffer") is None:
                    optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)

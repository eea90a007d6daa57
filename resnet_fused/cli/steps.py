"""What `bench` runs: the implementations of a training step, and what decides whether they compute the right thing."""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from resnet_fused.cli.learner import AUTOCAST, build_model

OURS, EAGER, COMPILED = "resnet_fused", "eager_channels_last", "compile_default"
CLASSES = 1000
LOSS_SCALE = 2.0**10  # keeps the gradients of fp16 above its smallest number


@dataclass(frozen=True)
class Case:
    """What is trained. `device`: as torch names it."""

    arch: str
    batch: int
    image_size: int
    precision: str
    device: str

    @property
    def dtype(self) -> str:
        """As results files have it: PyTorch's convolutions multiply float32 in TF32 on a GPU, unless told otherwise."""
        tf32 = self.device != "cpu" and self.precision == "fp32" and torch.backends.cudnn.allow_tf32
        return "tf32" if tf32 else self.precision

    def data(self, seed: int, batch: int | None = None) -> tuple[Tensor, Tensor]:
        """Random images (N, 3, H, W), channels_last, and labels (N,)."""
        generator = torch.Generator().manual_seed(seed)
        shape = (batch or self.batch, 3, self.image_size, self.image_size)
        images = torch.randn(shape, generator=generator).to(self.device, memory_format=torch.channels_last)
        return images, torch.randint(CLASSES, shape[:1], generator=generator).to(self.device)

    def model(self, impl: str) -> nn.Module:
        """Freshly initialised, with the same weights whatever `impl` is."""
        torch.manual_seed(0)
        model = build_model(self.arch, "fused" if impl == OURS else "reference", CLASSES)
        model = model.to(self.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        if impl == COMPILED:
            model.compile()
        return model

    def losses(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The cross entropy of each image, (N,); without autocast where the images are float64."""
        cast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.precision in AUTOCAST and images.dtype != torch.float64:
            cast = torch.autocast(images.device.type, AUTOCAST[self.precision])
        with cast:
            logits = model(images)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, labels, reduction="none")

    def step(self, model: nn.Module) -> Callable[[Tensor, Tensor], None]:
        """A training step: forward, cross entropy, backward, SGD with momentum."""
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        kind = torch.device(self.device).type
        scaler = torch.amp.GradScaler(kind, init_scale=LOSS_SCALE, enabled=self.precision == "fp16")

        def step(images: Tensor, labels: Tensor) -> None:
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(self.losses(model, images, labels).mean()).backward()
            scaler.step(optimizer)
            scaler.update()

        return step


def outcome(case: Case, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each image, and the gradient of all parameters as one vector, in float64."""
    losses = case.losses(model, images, labels)
    scale = LOSS_SCALE if case.precision == "fp16" else 1.0
    grads = torch.autograd.grad(losses.mean() * scale, list(model.parameters()))
    return losses.detach().double(), torch.cat([grad.flatten().double() for grad in grads]) / scale


def exactly(model: nn.Module) -> nn.Module:
    """The model in float64. Blocks run forward again in backward: else a GPU would hold twice what eager holds."""
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in layer:  # type: ignore[union-attr]
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return model.double()


def objection(errors: list[tuple[float, float]], eager: list[tuple[float, float]], eps: float) -> str:
    """What is wrong with an implementation, or nothing. Errors are of losses and of gradient, a pair for each draw."""
    if not eager:
        return "not checked: there is no eager result to hold it against"
    for place, what in enumerate(("losses", "gradient")):
        error = statistics.median(pair[place] for pair in errors)
        limit = 1.5 * max(pair[place] for pair in eager) + 4 * eps
        if not (math.isfinite(limit) and error <= limit):
            return f"wrong {what}: the relative error is {error:.2g}, and {limit:.2g} is allowed"
    return ""


def relative_errors(found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """|x - exact| / |exact| of losses and of gradient, Euclidean norms."""
    of_losses, of_gradient = (((x - y).norm() / y.norm()).item() for x, y in zip(found, exact, strict=True))
    return of_losses, of_gradient


def excuse(impl: str, error: Exception) -> str:
    """Why an implementation is left out, in one line: memory has run out, or the compiler does not work here.

    Any other error is raised again.
    """
    if impl != COMPILED and not isinstance(error, torch.OutOfMemoryError):
        raise error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # What the compiler's front raises says in its first line only that its back has raised the next.
    first = next((line for line in lines if not line.endswith("raised:")), "")
    return f"{type(error).__name__}: {first}"[:200]

"""The training step that `bench` and the benchmark suite measure, with the providers that run it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import resnet_fused
from resnet_fused import reference
from resnet_fused.cli.precision import PRECISIONS
from resnet_fused.measure import EXACT, OURS, Case, Results

#: Providers that torch.compile makes of eager PyTorch, with its modes.
COMPILED = {"compile_default": "default", "compile_max_autotune": "max-autotune"}
CLASSES = 1000
LOSS_SCALE = 2.0**10  # keeps the gradients of fp16 above its smallest number


@dataclass(frozen=True)
class TrainingStep:
    """Forward, cross entropy, backward and SGD with momentum, on random images. `device`: as torch names it."""

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

    @property
    def eps(self) -> float:
        """Of the precision. In TF32 float32's: eager's error covers the rest."""
        return PRECISIONS[self.precision].eps

    def case(self, roofline_ms: float | None = None) -> Case:
        """The columns of a results file."""
        shape = f"{self.batch}x3x{self.image_size}x{self.image_size}"
        return Case("model", self.arch, "train", self.dtype, self.batch, shape, roofline_ms)

    def data(self, seed: int, batch: int | None = None) -> tuple[Tensor, Tensor]:
        """Random images (N, 3, H, W), channels_last, and labels (N,)."""
        generator = torch.Generator().manual_seed(seed)
        shape = (batch or self.batch, 3, self.image_size, self.image_size)
        images = torch.randn(shape, generator=generator).to(self.device, memory_format=torch.channels_last)
        return images, torch.randint(CLASSES, shape[:1], generator=generator).to(self.device)

    def model(self, provider: str) -> nn.Module:
        """A new model in training mode. All have the same weights; EXACT is eager PyTorch in float64."""
        torch.manual_seed(0)
        library = resnet_fused if provider == OURS else reference
        model: nn.Module = getattr(library, self.arch)(num_classes=CLASSES)
        model = model.to(self.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        if provider in COMPILED:
            model.compile(mode=COMPILED[provider], dynamic=False)
        return in_float64(model) if provider == EXACT else model

    def losses(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """The cross entropy of each image, (N,); without autocast where the images are float64."""
        exact = images.dtype == torch.float64
        with contextlib.nullcontext() if exact else PRECISIONS[self.precision].autocast(images.device.type):
            logits = model(images)
        return F.cross_entropy(logits if exact else logits.float(), labels, reduction="none")

    def train(self, model: nn.Module) -> Callable[[Tensor, Tensor], None]:
        """A function that trains the model by one step, given images and labels."""
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        kind = torch.device(self.device).type
        scaler = torch.amp.GradScaler(kind, init_scale=LOSS_SCALE, enabled=self.precision == "fp16")

        def step(images: Tensor, labels: Tensor) -> None:
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(self.losses(model, images, labels).mean()).backward()
            scaler.step(optimizer)
            scaler.update()

        return step

    def one_step(self, model: nn.Module, seed: int = 0) -> Callable[[], None]:
        """A function that trains the model by one step, on the data of a seed."""
        return functools.partial(self.train(model), *self.data(seed))

    def loss_and_gradient(self, model: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
        """The loss of each image, and the gradient of all parameters as one vector, in float64."""
        losses = self.losses(model, images, labels)
        scale = LOSS_SCALE if self.precision == "fp16" else 1.0
        grads = torch.autograd.grad(losses.mean() * scale, list(model.parameters()))
        return [losses.detach().double(), torch.cat([grad.flatten().double() for grad in grads]) / scale]

    def draw(self, models: dict[str, nn.Module]) -> Callable[[int], Results]:
        """What `check_accuracy` asks for: losses and gradient of models by provider, EXACT among them."""

        def draw(seed: int) -> Results:
            images, labels = self.data(seed)

            def results(provider: str) -> list[Tensor]:
                begin_step(provider)
                given = images.double() if provider == EXACT else images
                return self.loss_and_gradient(models[provider], given, labels)

            return results

        return draw


def in_float64(model: nn.Module) -> nn.Module:
    """The ResNet in float64, with activation checkpointing: else it would need twice eager's memory."""
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in layer:  # type: ignore[union-attr]
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return model.double()


def begin_step(provider: str) -> None:
    """Marks a new step where torch.compile replays CUDA graphs, whose outputs the next step may overwrite."""
    if provider in COMPILED:
        torch.compiler.cudagraph_mark_step_begin()

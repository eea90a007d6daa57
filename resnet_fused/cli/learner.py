"""One model with its optimizer: a training step, an evaluation, and the state of both."""

import contextlib
import importlib
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from resnet_fused import GraphedStep
from resnet_fused.backend import why_plain
from resnet_fused.cli import checkpoint
from resnet_fused.cli.data import Batch, Source
from resnet_fused.cli.distributed import World
from resnet_fused.cli.errors import UserError
from resnet_fused.cli.metrics import Progress
from resnet_fused.cli.settings import Settings, remembered

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def build_model(arch: str, impl: str, num_classes: int) -> nn.Module:
    """A freshly initialised model; `impl` is `fused` or `reference`."""
    module = importlib.import_module("resnet_fused" if impl == "fused" else "resnet_fused.reference")
    model: nn.Module = getattr(module, arch)(num_classes=num_classes)
    return model


def learning_rate(step: int, total: int, settings: Settings) -> float:
    """Linear warm-up over the first `warmup` of the steps, then a half cosine to zero."""
    warm = max(1, round(settings.warmup * total))
    if step < warm:
        return settings.lr * (step + 1) / warm
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def check_precision(precision: str, device: torch.device) -> None:
    """Tries a convolution, forward and backward.

    Raises:
        UserError: this device cannot train in that precision.
    """
    if precision == "fp32":
        return
    supported = True
    if device.type == "cuda" and precision == "bf16":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    if supported:
        dtype = AUTOCAST[precision]
        image = torch.ones(2, 8, 8, 8, dtype=dtype, device=device, requires_grad=True)
        weight = torch.ones(8, 8, 3, 3, dtype=dtype, device=device, requires_grad=True)
        try:
            F.conv2d(image, weight, padding=1).sum().backward()
        except RuntimeError:  # what torch raises for a dtype without a kernel
            supported = False
    if not supported:
        raise UserError(f"--precision {precision} is not supported on {device}: use --precision fp32")


def why_no_cuda_graph(device: torch.device, world: World) -> str | None:
    """Why a step cannot be captured as a CUDA graph; None where it can."""
    if device.type != "cuda":
        return f"it needs a CUDA GPU, and this run is on {device.type}"
    if world.size > 1:
        return f"gradients that {world.size} processes sum are not captured"
    return None


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss, in float32 whatever the model computes in."""
    return F.cross_entropy(logits.float(), labels)


class Learner:
    """A model in training.

    Attributes:
        name: `fused` or `reference`.
        label: the name to show: `unfused` where nothing of `fused` can run fused.
        model: the bare model; its `state_dict` is what checkpoints hold.
        progress: where it stands.
        captures: whether steps are replayed as a CUDA graph.
    """

    def __init__(
        self, name: str, settings: Settings, source: Source, steps: int, device: torch.device, world: World
    ) -> None:
        self.name = name
        self.label = "unfused" if name == "fused" and why_plain(device.type) is not None else name
        self.settings = settings
        self.source = source
        self.steps_per_epoch = steps
        self.device = device
        self.world = world
        self.progress = Progress()
        torch.manual_seed(settings.seed)
        self.memory_format = torch.channels_last if settings.channels_last else torch.contiguous_format
        model = build_model(settings.arch, name, len(source.classes))
        self.model = model.to(device=device, memory_format=self.memory_format)  # type: ignore[call-overload]
        self._parallel: nn.Module = self.model
        if world.size > 1:
            self._parallel = DistributedDataParallel(
                self.model,
                device_ids=[device.index] if device.type == "cuda" else None,
                process_group=dist.new_group(),  # see `process_group`
            )
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        plain = [p for p in self.model.parameters() if p.ndim <= 1]  # norms and biases
        groups = [
            {"params": decayed, "weight_decay": settings.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        self.captures = settings.cuda_graph and why_no_cuda_graph(device, world) is None
        # Only a fused optimizer can be captured; None leaves the choice to PyTorch.
        fused = True if self.captures else None
        self.optimizer = torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, fused=fused)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self._graphed: GraphedStep | None = None
        if self.captures:
            dtype = AUTOCAST.get(settings.precision)
            self._graphed = GraphedStep(
                self.model, self.optimizer, cross_entropy, autocast=dtype, scaler=self.scaler
            )
        self._mean = torch.tensor(source.mean, device=device).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(source.std, device=device).view(1, 3, 1, 1) * 255
        self._pending: list[Tensor] = []  # of each step not yet counted: [loss, correct answers]

    def leave(self) -> None:
        """Lets go of the process group, which can then end; no step can follow."""
        self._parallel = self.model

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images normalised and in the model's layout, and labels, both on the device."""
        images = batch[0].to(self.device, non_blocking=True).permute(0, 3, 1, 2).float()
        images = (images - self._mean) / self._std
        return images.contiguous(memory_format=self.memory_format), batch[1].to(
            self.device, non_blocking=True
        )

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context that a forward runs in."""
        if self.settings.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, AUTOCAST[self.settings.precision])

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One step of SGD. Its loss is counted by the next `settle`."""
        done = self.progress.epoch * self.steps_per_epoch + self.progress.step
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(done, self.settings.epochs * self.steps_per_epoch, self.settings)
        self._parallel.train()
        if self._graphed is not None:
            loss, logits = self._graphed(images, labels)
        else:
            self.optimizer.zero_grad(set_to_none=True)
            with self.autocast():
                logits = self._parallel(images)
            loss = cross_entropy(logits, labels)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        correct = (logits.detach().argmax(1) == labels).sum()
        self._pending.append(torch.stack([loss.detach().double(), correct.double()]))
        self.progress.step += 1

    def settle(self) -> None:
        """Counts the steps since the last call, over all ranks. Waits for the device.

        Raises:
            UserError: a loss was not finite, on any rank.
        """
        if not self._pending:
            return
        counts = self.world.sum(torch.stack(self._pending).cpu())  # [steps, 2]
        self._pending.clear()
        losses = (counts[:, 0] / self.world.size).tolist()
        bad = next((place for place, loss in enumerate(losses) if not math.isfinite(loss)), None)
        if bad is not None:
            step = self.progress.step - len(losses) + 1 + bad
            instead = "" if self.settings.precision == "fp32" else " or --precision fp32"
            raise UserError(
                f"the loss of the {self.label} model is {losses[bad]} at epoch {self.progress.epoch + 1}, "
                f"step {step}: training stopped, the last checkpoint is untouched; "
                f"try a lower --lr (it is {self.settings.lr:g}){instead}"
            )
        self.progress.count(losses, int(counts[:, 1].sum()), self.settings.batch_size * self.world.size)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch | None]) -> tuple[float, float]:
        """Mean loss and accuracy on the held-out images of all ranks."""
        self.world.share_buffers(self.model)
        self.model.eval()
        total = torch.zeros(3, dtype=torch.float64)  # loss, correct, images
        for batch in batches:
            if batch is None:
                continue
            images, labels = self.prepare(batch)
            with self.autocast():
                logits = self.model(images)
            loss = F.cross_entropy(logits.float(), labels, reduction="sum")
            correct = (logits.argmax(1) == labels).sum()
            total += torch.stack(
                [loss.double(), correct.double(), loss.new_tensor(len(labels)).double()]
            ).cpu()
        loss_sum, correct_sum, seen = self.world.sum(total).tolist()
        return loss_sum / seen, correct_sum / seen

    def state(self) -> dict[str, Any]:
        """All that a checkpoint holds. Call `settle` first, on every rank."""
        self.world.share_buffers(self.model)
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": self.progress.state(),
            "random": checkpoint.random_state(),
            "settings": remembered(self.settings),
            "arch": self.settings.arch,
            "classes": self.source.classes,
            "steps_per_epoch": self.steps_per_epoch,
        }

    def restore(self, state: dict[str, Any], path: str) -> None:
        """Goes on where `state` was taken.

        Raises:
            UserError: it is of another architecture, other classes, or another division into steps.
        """
        if state["arch"] != self.settings.arch:
            raise UserError(
                f"{path} holds a {state['arch']}, not a {self.settings.arch}: give --arch {state['arch']}"
            )
        if state["classes"] != self.source.classes:
            raise UserError(
                f"{path} was trained on {_few(state['classes'])}, "
                f"but --data has {_few(self.source.classes)}: give the data it was trained on"
            )
        progress = Progress.from_state(state["progress"])
        before = (state["steps_per_epoch"], state["settings"]["seed"])
        if progress.step and before != (self.steps_per_epoch, self.settings.seed):
            raise UserError(
                f"{path} stands at step {progress.step} of an epoch of {before[0]} steps, seed {before[1]}; "
                f"now there are {self.steps_per_epoch} steps, seed {self.settings.seed}: "
                "go on with the same data, --batch-size, --seed and number of processes"
            )
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            for (
                group
            ) in self.optimizer.param_groups:  # it may have been fused when the checkpoint was written
                group["fused"] = self.optimizer.defaults["fused"]
            if state["scaler"]:  # empty where the checkpoint was not trained in fp16
                self.scaler.load_state_dict(state["scaler"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{path} does not fit a {self.settings.arch} ({reason}): use another checkpoint"
            ) from error
        checkpoint.set_random_state(state["random"])
        self.progress = progress


def _few(names: list[str]) -> str:
    return f"{len(names)} classes ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"

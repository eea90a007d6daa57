"""One model with its optimizer: a training step, an evaluation, and the state of both."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import resnet_fused
from resnet_fused import GraphedStep, reference
from resnet_fused.backend import why_plain
from resnet_fused.cli import checkpoint
from resnet_fused.cli.data import Batch, Source
from resnet_fused.cli.distributed import World
from resnet_fused.cli.errors import UserError
from resnet_fused.cli.initial_weights import InitialWeights
from resnet_fused.cli.metrics import Progress
from resnet_fused.cli.mixing import dominant, mix
from resnet_fused.cli.normalization import Normalize
from resnet_fused.cli.optimizers import clip_gradients, load_optimizer, make_optimizer, make_schedule
from resnet_fused.cli.precision import PRECISIONS
from resnet_fused.cli.settings import Settings
from resnet_fused.cli.text import abbreviate
from resnet_fused.cli.unfinished import Unfinished


class NotFinite(UserError):
    """A loss or a weight that is not finite: this state is not to be saved."""


LIBRARIES = {"fused": resnet_fused, "reference": reference}


def why_no_cuda_graph(device: torch.device, world: World) -> str | None:
    """Why a step cannot be captured as a CUDA graph; None where it can."""
    if device.type != "cuda":
        return f"it needs a CUDA GPU, and this run is on {device.type}"
    if world.size > 1:
        return f"gradients that {world.size} processes sum are not captured"
    return None


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The loss, in float32 whatever the model computes in."""
    return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)


def set_training(model: nn.Module, settings: Settings) -> None:
    """Training mode; a frozen backbone stays in evaluation mode, so that its running statistics stay too."""
    model.train()
    if settings.freeze_backbone:
        bare = model.module if isinstance(model, DistributedDataParallel) else model
        for name, child in bare.named_children():
            child.train(name == "fc")


class Learner:
    """A model in training.

    Attributes:
        name: `fused` or `reference`.
        label: the name to show: `unfused` where nothing of `fused` can run fused.
        model: the bare model, whose weights are trained.
        progress: counts of steps, epochs and results so far.
        captures: whether steps are replayed as a CUDA graph.
    """

    def __init__(
        self,
        name: str,
        settings: Settings,
        source: Source,
        steps: int,
        device: torch.device,
        world: World,
        initial: InitialWeights | None = None,
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
        model: nn.Module = getattr(LIBRARIES[name], settings.arch)(num_classes=len(source.classes))
        if initial is not None:
            initial.load_into(model)
        if settings.freeze_backbone:
            model.requires_grad_(False).get_submodule("fc").requires_grad_(True)
        self.model = model.to(device=device, memory_format=self.memory_format)  # type: ignore[call-overload]
        self._average: AveragedModel | None = None
        if settings.ema:
            average = get_ema_multi_avg_fn(settings.ema)
            self._average = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
            self._average.requires_grad_(False)
        if settings.compile:  # in place: the keys of the state_dict stay
            for compiled in {id(one): one for one in (self.model, self.evaluated)}.values():
                compiled.compile()
        self._parallel: nn.Module = self.model
        if world.size > 1:
            self._parallel = DistributedDataParallel(
                self.model,
                device_ids=[device.index] if device.type == "cuda" else None,
                process_group=dist.new_group(),  # see `process_group`
            )
        self.captures = settings.cuda_graph and why_no_cuda_graph(device, world) is None
        self.optimizer = make_optimizer(self.model, settings, self.captures)
        self._schedule = make_schedule(self.optimizer, settings, settings.epochs * steps)
        self.precision = PRECISIONS[settings.precision]
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")
        self.criterion = functools.partial(cross_entropy, label_smoothing=settings.label_smoothing)
        self._graphed: GraphedStep | None = None
        if self.captures:
            if settings.clip_grad:  # in the captured step
                norm = settings.clip_grad
                self.optimizer.register_step_pre_hook(lambda optimizer, *_: clip_gradients(optimizer, norm))
            dtype = None if settings.precision == "fp32" else self.precision.dtype
            self._graphed = GraphedStep(
                self.model, self.optimizer, self.criterion, autocast=dtype, scaler=self.scaler
            )
        self._normalize = Normalize(source.mean, source.std, device, self.memory_format)
        self._pending: list[Tensor] = []  # [loss, correct] of each step that `count_steps` has not read yet
        self._unfinished = Unfinished()

    @property
    def steps_done(self) -> int:
        """Since the start of the run."""
        return self.progress.epoch * self.steps_per_epoch + self.progress.step

    @property
    def learning_rate(self) -> float:
        """Of the latest step."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def evaluated(self) -> nn.Module:
        """The model that is evaluated, and is `model` in checkpoints: with --ema the average of those trained."""
        return self.model if self._average is None else self._average.module

    def release_process_group(self) -> None:
        """Releases the process group, which can then be destroyed; no step can follow."""
        self._parallel = self.model

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images normalised and in the model's layout, and labels, both on the device."""
        pixels, labels = batch
        return self._normalize(pixels), labels.to(self.device, non_blocking=True)

    def prepare_training(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """As `prepare`, for the next step: with --mixup or --cutmix mixed, with probabilities instead of labels."""
        images, labels = self.prepare(batch)
        place = f"{self.progress.epoch}/{self.progress.step}/{self.world.rank}"
        return mix(images, labels, len(self.source.classes), self.settings, place)

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Forward and backward of a batch, and after the last one of a group a step of the optimizer.

        Its loss is read by the next `count_steps`.
        """
        if self.steps_done:
            self._advance_schedule(1)
        set_training(self._parallel, self.settings)
        step, size = self.progress.step, self.settings.accumulate
        last = (step + 1) % size == 0 or step + 1 == self.steps_per_epoch
        if step % size == 0:
            self._unfinished.begin(self.model, step)
        if self._graphed is not None:
            self._unfinished.updating = True
            loss, logits = self._graphed(images, labels)
        else:
            loss, logits = self._run(images, labels, first=step % size == 0, last=last)
        if self._average is not None and last:
            self._average.update_parameters(self.model)
        correct = (logits.detach().argmax(1) == dominant(labels)).sum()
        self._pending.append(torch.stack([loss.detach().double(), correct.double()]))
        self.progress.step += 1
        if last:
            self._unfinished.end()

    def _run(self, images: Tensor, labels: Tensor, first: bool, last: bool) -> tuple[Tensor, Tensor]:
        """Kernel by kernel; the batch may be the first and the last one of a group."""
        if first:
            self.optimizer.zero_grad(set_to_none=True)
        parallel = self._parallel
        alone = isinstance(parallel, DistributedDataParallel) and not last
        with parallel.no_sync() if alone else contextlib.nullcontext():  # type: ignore[operator]
            with self.precision.autocast(self.device.type):
                logits = parallel(images)
            loss = self.criterion(logits, labels)
            step, size = self.progress.step, self.settings.accumulate
            group = min(
                size, self.steps_per_epoch - step // size * size
            )  # the last of an epoch may be smaller
            self.scaler.scale(loss / group if group > 1 else loss).backward()
        if last:
            if self.settings.clip_grad:
                self.scaler.unscale_(self.optimizer)
                clip_gradients(self.optimizer, self.settings.clip_grad)
            self._unfinished.updating = True
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return loss, logits

    def _advance_schedule(self, steps: int) -> None:
        with warnings.catch_warnings():
            # GradScaler skips steps whose gradients overflow, and a resumed run has not made its own yet.
            warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step")
            for _ in range(steps):
                self._schedule.step()

    def count_steps(self) -> None:
        """Adds the steps since the last call to the progress, over all ranks. Waits for the device.

        Raises:
            NotFinite: a loss was not finite, on any rank.
        """
        if not self._pending:
            return
        counts = self.world.sum(torch.stack(self._pending).cpu())  # [steps, 2]
        self._pending.clear()
        losses = (counts[:, 0] / self.world.size).tolist()
        bad = next((index for index, loss in enumerate(losses) if not math.isfinite(loss)), None)
        if bad is not None:
            step = self.progress.step - len(losses) + 1 + bad
            raise self._not_finite(f"loss is {losses[bad]} at epoch {self.progress.epoch + 1}, step {step}")
        self.progress.count(losses, int(counts[:, 1].sum()), self.settings.batch_size * self.world.size)

    def _not_finite(self, what: str) -> NotFinite:
        instead = "" if self.settings.precision == "fp32" else " or --precision fp32"
        return NotFinite(
            f"the {self.label} model's {what}: training stopped, the last checkpoint is untouched; "
            f"try a lower --lr (it is {self.settings.lr:g}){instead}"
        )

    def check_finite(self) -> None:
        """Checks the weights: the update after the last loss may have overflowed.

        Raises:
            NotFinite: one is not finite.
        """
        for name, value in self.model.state_dict().items():
            if not value.isfinite().all():
                raise self._not_finite(f"{name} is not finite after step {self.steps_done}")

    def return_to_last_step(self) -> bool:
        """After an error: makes the state that of the last step of the optimizer.

        Returns:
            Whether that was possible: not where the error came while the optimizer changed the weights, nor, with
            several ranks, where steps are not counted yet: that is a collective of all ranks.
        """
        if self._unfinished.updating:
            return False
        start = self._unfinished.start
        if start is not None:
            self._unfinished.undo(self.model)
            del self._pending[len(self._pending) - (self.progress.step - start) :]
            self.progress.step = start
        if self._pending and self.world.size > 1:
            return False
        self.count_steps()
        return True

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch | None]) -> tuple[float, float]:
        """Mean loss and accuracy on the held-out images of all ranks."""
        model = self.evaluated
        self.world.share_buffers(model)
        model.eval()
        total = torch.zeros(3, dtype=torch.float64)  # loss, correct, images
        for batch in batches:
            if batch is None:
                continue
            images, labels = self.prepare(batch)
            with self.precision.autocast(self.device.type):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), labels, reduction="sum").double()
            correct = (logits.argmax(1) == labels).sum().double()
            total += torch.stack([loss, correct, torch.full_like(loss, len(labels))]).cpu()
        loss_sum, correct_sum, count = self.world.sum(total).tolist()
        return loss_sum / count, correct_sum / count

    def share_buffers(self) -> None:
        """Gives every rank the buffers of rank 0, those of which checkpoints hold."""
        self.world.share_buffers(self.model)
        if self._average is not None:
            self.world.share_buffers(self._average.module)

    def state(self) -> dict[str, Any]:
        """All that a checkpoint holds. Call `count_steps` first, on every rank."""
        average: dict[str, Any] = {}
        if self._average is not None:
            average = {"trained": self.model.state_dict(), "n_averaged": int(self._average.n_averaged)}
        return {
            "model": self.evaluated.state_dict(),
            **average,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": self.progress.state(),
            "random": checkpoint.random_state(),
            "settings": vars(self.settings),
            "arch": self.settings.arch,
            "classes": self.source.classes,
            "mean": list(self.source.mean),
            "std": list(self.source.std),
            "steps_per_epoch": self.steps_per_epoch,
        }

    def restore(self, state: dict[str, Any], path: str) -> None:
        """Continues from a checkpoint; the schedule is that of the present settings.

        Raises:
            UserError: it is of another architecture, other classes, or another division into steps, or does not fit.
        """
        if state["arch"] != self.settings.arch:
            raise UserError(
                f"{path} holds a {state['arch']}, not a {self.settings.arch}: give --arch {state['arch']}"
            )
        if state["classes"] != self.source.classes:
            raise UserError(
                f"{path} was trained on {abbreviate(state['classes'])}, "
                f"but --data has {abbreviate(self.source.classes)}: give the data it was trained on"
            )
        progress = Progress.from_state(state["progress"])
        epochs = progress.epoch + bool(progress.step)
        if epochs > self.settings.epochs:
            raise UserError(
                f"{path} stands in epoch {epochs}: give --epochs {epochs} or more, not {self.settings.epochs}"
            )
        before = (state["steps_per_epoch"], state["settings"]["seed"])
        if progress.step and before != (self.steps_per_epoch, self.settings.seed):
            raise UserError(
                f"{path} stands at step {progress.step} of an epoch of {before[0]} steps, seed {before[1]}; "
                f"now there are {self.steps_per_epoch} steps, seed {self.settings.seed}: "
                "go on with the same data, --batch-size, --seed and number of processes"
            )
        if progress.step % self.settings.accumulate and progress.step != self.steps_per_epoch:
            raise UserError(
                f"{path} stands at step {progress.step} of an epoch, which --accumulate {self.settings.accumulate} "
                f"does not divide: go on with --accumulate {state['settings'].get('accumulate', 1)}"
            )
        try:
            self.model.load_state_dict(state.get("trained", state["model"]))
            if self._average is not None:
                self._average.module.load_state_dict(state["model"])
                self._average.n_averaged.fill_(state.get("n_averaged", 0))
            load_optimizer(self.optimizer, state["optimizer"])
            if state["scaler"]:  # empty where the checkpoint was not trained in fp16
                self.scaler.load_state_dict(state["scaler"])
            checkpoint.set_random_state(state["random"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{path} does not fit a {self.settings.arch} ({reason}): use another checkpoint"
            ) from error
        self.progress = progress
        total = self.settings.epochs * self.steps_per_epoch
        self._schedule = make_schedule(self.optimizer, self.settings, total)
        self._advance_schedule(max(0, self.steps_done - 1))

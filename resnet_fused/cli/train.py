"""`python -m resnet_fused train`: sets a run up, trains its epochs, and saves it so that it can be resumed."""

from __future__ import annotations

import json
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from resnet_fused.backend import summary
from resnet_fused.cli import checkpoint, compare
from resnet_fused.cli.data import Batch, Batches, open_source
from resnet_fused.cli.distributed import World, from_environment, pick_device, process_group
from resnet_fused.cli.errors import UserError, require
from resnet_fused.cli.files import make_folder, write_atomically, write_text
from resnet_fused.cli.initial_weights import read_initial_weights
from resnet_fused.cli.learner import Learner, why_no_cuda_graph
from resnet_fused.cli.metrics import describe
from resnet_fused.cli.plots import plot_curves
from resnet_fused.cli.precision import check_precision
from resnet_fused.cli.settings import Invocation, Settings, command_to_resume, make_settings
from resnet_fused.cli.signals import Stopped, StopRequest, stop_request
from resnet_fused.cli.tensorboard import Scalars

LEARNERS = {"fused": ("fused",), "reference": ("reference",), "compare": ("fused", "reference")}
SECONDS_BETWEEN_PLOTS = 30  # plotting takes most of a second
GPU_STEPS_BETWEEN_READS = 10  # reading a loss waits for the GPU


def train(given: dict[str, Any], invocation: Invocation) -> None:
    """Runs the command.

    Args:
        given: the options of `Settings` that are on the command line.
        invocation: the others.

    Raises:
        UserError: something that the user has to put right.
        Stopped: a signal or --max-steps ended the run; it is saved.
    """
    world = from_environment()
    with stop_request() as stop:
        states: dict[str, dict[str, Any]] = {}
        if invocation.resume is not None:
            invocation, states = load_states(invocation, given.get("impl"))
        settings = make_settings(given, next(iter(states.values()))["settings"] if states else {})
        for package in ("numpy", "tqdm", "matplotlib"):
            require(package)  # now, not after an hour
        if settings.tensorboard:
            require("tensorboard", extra="tensorboard")
        device = pick_device(settings.device, world)
        check_precision(settings.precision, device)
        source = open_source(settings.data, settings.image_size, settings.seed, settings.augment)
        on_gpu = device.type == "cuda"
        batches = Batches(source, settings.batch_size, settings.seed, settings.workers, world, pin=on_gpu)
        initial = None
        if not states:  # now: what cannot be loaded must not cost the run that --overwrite replaces
            on_terminal = world.main and sys.stderr.isatty()
            initial = read_initial_weights(settings, len(source.classes), progress=on_terminal)
        if world.main:
            prepare_out(invocation, settings, world)
            if initial is not None:
                print(f"weights: {initial.description}", flush=True)
            reason = why_no_cuda_graph(device, world) if settings.cuda_graph else None
            if reason is not None:
                print(f"resnet_fused: trains without --cuda-graph: {reason}", file=sys.stderr, flush=True)
        if on_gpu:
            torch.backends.cudnn.benchmark = True
        with process_group(world, device):
            names = LEARNERS[settings.impl]
            learners = [
                Learner(name, settings, source, batches.steps, device, world, initial) for name in names
            ]
            try:
                for learner in learners:
                    if learner.name in states:
                        learner.restore(states[learner.name], str(invocation.resume))
                Run(settings, invocation, world, device, batches, learners, stop).start()
            finally:
                for learner in learners:
                    learner.release_process_group()


def last_checkpoint(out: Path, impl: str | None) -> Path:
    """What a run in `out` is resumed from: a file where it can be."""
    compared = impl if impl in LEARNERS["compare"] else "fused"
    candidates = (out / "last.pt", out / str(compared) / "last.pt")
    return next((candidate for candidate in candidates if candidate.is_file()), candidates[0])


def load_states(invocation: Invocation, impl: str | None) -> tuple[Invocation, dict[str, dict[str, Any]]]:
    """The checkpoints to resume from, by implementation, and where the run's files go.

    Raises:
        UserError: there is none, it cannot be read, or two that belong together stand at different steps.
    """
    path = invocation.resume
    assert path is not None
    if path.is_dir():
        path = last_checkpoint(path, impl)
    state = checkpoint.load(path)
    was = state["settings"]["impl"]
    out = path.parent.parent if was == "compare" else path.parent
    if impl == "compare" and was != "compare":
        raise UserError(
            f"{path} is of a run with --impl {was}, which --impl compare cannot go on with: start afresh"
        )
    if was != "compare" or impl not in (None, "compare"):
        out, states = path.parent, {impl or was: state}
    else:
        states = {name: checkpoint.load(out / name / path.name) for name in LEARNERS["compare"]}
        steps = {name: (s["progress"]["epoch"], s["progress"]["step"]) for name, s in states.items()}
        if len(set(steps.values())) > 1:
            raise UserError(
                f"the two checkpoints in {out} stand at different steps ({steps}): start afresh with "
                "--overwrite, or go on with one of them by --impl fused or --impl reference"
            )
    return replace(invocation, resume=path, out=invocation.out or out), states


def prepare_out(invocation: Invocation, settings: Settings, world: World) -> None:
    """Makes the folder and writes `config.json`.

    Raises:
        UserError: it cannot be written, or it holds a run that this one would replace.
    """
    out = invocation.folder
    make_folder(out)
    for old in (out / part / file for part in ("", *LEARNERS["compare"]) for file in ("last.pt", "best.pt")):
        if invocation.resume is None and old.exists():
            if not invocation.overwrite:
                raise UserError(
                    f"{out} already holds a run ({old.name}): "
                    "add --resume or --overwrite, or choose another --out"
                )
            old.unlink()
    versions = {"torch": torch.__version__, "python": platform.python_version(), "processes": world.size}
    config = {"settings": vars(settings), "versions": versions}
    write_text(out / "config.json", json.dumps(config, indent=2) + "\n")


@dataclass
class Run:
    """One or two learners that train through the epochs, step by step with the same batches."""

    settings: Settings
    invocation: Invocation
    world: World
    device: torch.device
    batches: Batches
    learners: Sequence[Learner]
    stop: StopRequest

    def __post_init__(self) -> None:
        self.comparing = len(self.learners) > 1
        self.total = self.settings.epochs * self.batches.steps
        self.warm_up = compare.WARM_UP
        self.scalars: list[Scalars] = []
        self.plotted = time.monotonic()
        reads = 1 if self.comparing or self.device.type == "cpu" else GPU_STEPS_BETWEEN_READS
        # A run stops where losses are read: not between steps of the optimizer, since no checkpoint has gradients.
        self.read_every = -(-reads // self.settings.accumulate) * self.settings.accumulate
        self.limit = self.invocation.max_steps or self.total
        if self.limit < self.total and self.limit <= self.steps_done:
            raise UserError(
                f"--max-steps {self.limit}: the run already stands at step {self.steps_done}; give a larger number"
            )

    @property
    def steps_done(self) -> int:
        """Since the start of the run."""
        return self.learners[0].steps_done

    def folder(self, learner: Learner) -> Path:
        """Of a learner's checkpoints."""
        return self.invocation.folder / learner.name if self.comparing else self.invocation.folder

    def start(self) -> None:
        """Trains to the end.

        Raises:
            UserError: a loss is not finite, an image cannot be read, a file cannot be written.
            Stopped: a signal or --max-steps ended it.
        """
        if self.world.main:
            for learner in self.learners:
                make_folder(self.folder(learner))
                self.copy_best(learner)
            print(self.headline(), flush=True)
            if self.learners[0].name == "fused":
                print(f"resnet_fused {summary(self.device.type)}", flush=True)
        self.bar = require("tqdm").tqdm(
            total=self.total,
            initial=self.steps_done,
            unit="step",
            disable=None if self.world.main else True,  # None: where the output is no terminal
            dynamic_ncols=True,
        )
        if self.settings.tensorboard and self.world.main:
            self.scalars = [
                Scalars(self.folder(one) / "tensorboard", one.steps_done) for one in self.learners
            ]
        try:
            while self.learners[0].progress.epoch < self.settings.epochs:
                self.epoch()
        except Stopped as stopped:
            if stopped.signal or not self.comparing:
                raise
        finally:
            self.bar.close()
            for scalars in self.scalars:
                scalars.close()
        self.finish()

    def copy_best(self, learner: Learner) -> None:
        """Where a run is resumed into another folder, its best checkpoint belongs there too."""
        resume = self.invocation.resume
        if resume is not None:
            folder = resume.parent.parent / learner.name if self.comparing else resume.parent
            old, new = folder / "best.pt", self.folder(learner) / "best.pt"
            if old.is_file() and not new.exists():
                with open(old, "rb") as source:
                    write_atomically(new, lambda file: shutil.copyfileobj(source, file))

    def epoch(self) -> None:
        """The steps left in this epoch, then the held-out images."""
        first = self.learners[0].progress
        self.bar.set_description(f"epoch {first.epoch + 1}/{self.settings.epochs}")
        mark = time.perf_counter()
        for batch in self.batches.training(first.epoch, first.step):
            images, labels = self.learners[0].prepare_training(batch)
            if self.comparing:
                compare.timed_steps(self.learners, images, labels, record=self.warm_up <= 0)
                self.warm_up -= 1
            else:
                self.learners[0].step(images, labels)
            if first.step % self.read_every == 0:
                mark = self.read_losses(mark)
        self.read_losses(mark)
        # A signal may cut evaluations short: no learner ends its epoch before all of them are done.
        results = [learner.evaluate(self.until_stopped(self.batches.held_out())) for learner in self.learners]
        for learner, result in zip(self.learners, results, strict=True):
            better = learner.progress.finish_epoch(learner.learning_rate, *result)
            self.save(learner, better)
            if self.world.main:
                line = describe(learner.progress.history[-1], self.settings.epochs)
                self.bar.write(self.prefix(learner) + line)
        for scalars, learner in zip(self.scalars, self.learners, strict=False):
            scalars.epoch(learner.progress.history[-1])
        if time.monotonic() - self.plotted > SECONDS_BETWEEN_PLOTS or self.steps_done == self.total:
            self.plot()
        self.stop_if_asked()

    def read_losses(self, mark: float) -> float:
        """Reads the losses since the last call, moves the bar, stops where asked to; returns the time."""
        for learner in self.learners:
            learner.count_steps()
        now = time.perf_counter()
        if not self.comparing:
            self.learners[0].progress.seconds += now - mark
        self.bar.update(self.steps_done - self.bar.n)
        for scalars, learner in zip(self.scalars, self.learners, strict=False):
            scalars.steps(learner.progress, learner.learning_rate)
        counts = [learner.progress for learner in self.learners if learner.progress.images]
        if counts:
            self.bar.set_postfix_str(
                f"loss {'/'.join(f'{p.loss / p.images:.4f}' for p in counts)}, "
                f"accuracy {'/'.join(f'{p.correct / p.images:.2%}' for p in counts)}, "
                f"{'/'.join(f'{p.images / max(p.seconds, 1e-9):.0f}' for p in counts)} img/s",
                refresh=False,
            )
        self.stop_if_asked()
        return now

    def until_stopped(self, batches: Iterable[Batch | None]) -> Iterator[Batch | None]:
        """The batches, for as long as nobody asks to stop. Every rank has equally many."""
        for batch in batches:
            self.stop_if_asked()
            yield batch

    def stop_if_asked(self) -> None:
        """Saves and raises `Stopped` where a signal has come, on any rank, or --max-steps is reached."""
        signum = int(self.world.max(torch.tensor([self.stop.signal])))
        limited = self.limit < self.total and self.steps_done >= self.limit
        if not (signum or limited) or (self.steps_done == self.total and not self.learners[0].progress.step):
            return
        for learner in self.learners:
            if learner.progress.step:  # else the end of the epoch has just saved it
                self.save(learner, better=False)
        self.plot()
        self.bar.close()
        if self.world.main:
            print(f"stopped at step {self.steps_done} of {self.total}; to go on:")
            print(f"  {command_to_resume(self.invocation.folder, self.world)}", flush=True)
        raise Stopped(signum)

    def save(self, learner: Learner, better: bool) -> None:
        """Writes `last.pt`, and `best.pt` where it is better, and the metrics. Every rank must call it."""
        state = learner.state()
        if self.world.main:
            folder = self.folder(learner)
            for name in ("last.pt", "best.pt") if better else ("last.pt",):
                checkpoint.save(folder / name, state)
            # The whole file each time, so that it agrees with the checkpoint beside it.
            lines = [json.dumps(record) + "\n" for record in learner.progress.history]
            write_text(folder / "metrics.jsonl", "".join(lines))

    def plot(self) -> None:
        """Plots the curves so far."""
        self.plotted = time.monotonic()
        if self.world.main:
            name = "compare.png" if self.comparing else "curves.png"
            runs = {learner.label: learner.progress for learner in self.learners}
            plot_curves(self.invocation.folder / name, runs, self.headline())

    def finish(self) -> None:
        """Prints how it ended: for a comparison the table."""
        if self.comparing:
            compare.conclude(self.invocation.folder, self.headline(), self.learners, self.batches)
        elif self.world.main:
            progress = self.learners[0].progress
            last = progress.history[-1]["val_accuracy"]
            print(f"held-out accuracy {last:.2%}, best {progress.best:.2%}; see {self.invocation.folder}")
        for learner in self.learners:
            digests = self.world.digests(learner.evaluated)
            if self.world.main and self.world.size > 1:
                weights = ", ".join(f"rank {rank} {digest}" for rank, digest in enumerate(digests))
                print(f"{self.prefix(learner)}sha256 of the weights: {weights}")

    def prefix(self, learner: Learner) -> str:
        """Before a line about one of two learners."""
        return f"{learner.label:<9}  " if self.comparing else ""

    def headline(self) -> str:
        """The run in one line."""
        s, threads = self.settings, f"{torch.get_num_threads()} threads"
        where = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else threads
        parts = [
            s.arch,
            s.impl if self.comparing else self.learners[0].label,
            *([f"from {Path(s.weights).name}"] if s.weights is not None else []),
            *(["backbone frozen"] if s.freeze_backbone else []),
            f"{s.data} at {s.image_size}x{s.image_size}",
            f"batch {s.batch_size}" + (f" x {self.world.size} processes" if self.world.size > 1 else ""),
            s.precision,
            *(["channels_last"] if s.channels_last else []),
            *(["compiled"] if s.compile else []),
            *(["CUDA graph"] if self.learners[0].captures else []),
            f"{self.device.type} ({where})",
        ]
        return ", ".join(parts)

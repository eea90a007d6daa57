"""`python -m resnet_fused train`: sets a run up, trains its epochs, and saves it so that it can be resumed."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resnet_fused.backend import summary
from resnet_fused.cli import checkpoint, compare, run_folder
from resnet_fused.cli.data import Batch, Batches, open_source
from resnet_fused.cli.distributed import World, from_environment, pick_device, process_group
from resnet_fused.cli.errors import UserError, require
from resnet_fused.cli.files import CannotWrite, write_text
from resnet_fused.cli.initial_weights import read_initial_weights
from resnet_fused.cli.learner import Learner, NotFinite, why_no_cuda_graph
from resnet_fused.cli.metrics import describe
from resnet_fused.cli.plots import plot_curves
from resnet_fused.cli.precision import check_precision
from resnet_fused.cli.run_folder import LEARNERS, Resumed
from resnet_fused.cli.settings import Invocation, Settings, command_to_resume, make_settings
from resnet_fused.cli.signals import Stopped, StopRequest, stop_request
from resnet_fused.cli.tensorboard import Scalars
from resnet_fused.cli.text import say

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
    with stop_request() as stop, contextlib.ExitStack() as claims:
        resumed: dict[str, Resumed] = {}
        if invocation.resume is not None:
            invocation, resumed = run_folder.read_checkpoints(invocation, given.get("impl"))
        settings = make_settings(given, next(iter(resumed.values())).state["settings"] if resumed else {})
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
        if not resumed:  # now: what cannot be loaded must not cost the run that --overwrite replaces
            on_terminal = world.main and sys.stderr.isatty()
            initial = read_initial_weights(settings, len(source.classes), progress=on_terminal)
        if world.main:
            claims.enter_context(run_folder.claim(invocation, settings.impl))
            if initial is not None:
                say(f"weights: {initial.description}")
            reason = why_no_cuda_graph(device, world) if settings.cuda_graph else None
            if reason is not None:
                say(f"resnet_fused: trains without --cuda-graph: {reason}", sys.stderr)
        if on_gpu:
            torch.backends.cudnn.benchmark = True
        with process_group(world, device):
            names = LEARNERS[settings.impl]
            learners = [
                Learner(name, settings, source, batches.steps, device, world, initial) for name in names
            ]
            try:
                for learner in learners:
                    if learner.name in resumed:
                        resumed[learner.name].check_is_latest()
                        learner.restore(resumed[learner.name].state, str(resumed[learner.name].path))
                Run(settings, invocation, world, device, batches, learners, stop).start(resumed)
            finally:
                for learner in learners:
                    learner.release_process_group()


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

    def start(self, resumed: Mapping[str, Resumed]) -> None:
        """Trains to the end.

        Args:
            resumed: what learners were restored from, by name.

        Raises:
            UserError: a loss is not finite, an image cannot be read, a file cannot be written.
            Stopped: a signal or --max-steps ended it.
        """
        if self.world.main:
            run_folder.begin(self.invocation, self.settings, self.world.size)
            for learner in self.learners:
                if learner.name in resumed:
                    best = self.folder(learner) / "best.pt"
                    run_folder.restore_best(best, resumed[learner.name], learner.progress)
                    self.write_metrics(learner)
            say(self.headline())
            if self.learners[0].name == "fused":
                say(f"resnet_fused {summary(self.device.type)}")
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
        if self.steps_done == self.total:  # a kill may have come before the plot of the last epoch
            self.plot()
        try:
            while self.learners[0].progress.epoch < self.settings.epochs:
                self.epoch()
        except Stopped as stopped:
            if stopped.signal or not self.comparing:
                raise
        except (NotFinite, CannotWrite):
            raise
        except Exception:
            self.save_after_error()
            raise
        finally:
            self.bar.close()
            for scalars in self.scalars:
                scalars.close()
        self.finish()

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
        better = [
            learner.progress.finish_epoch(learner.learning_rate, *result)
            for learner, result in zip(self.learners, results, strict=True)
        ]
        self.save(better)
        if self.world.main:
            for learner in self.learners:
                line = describe(learner.progress.history[-1], self.settings.epochs)
                with self.bar.external_write_mode():
                    say(self.prefix(learner) + line)
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
        if self.learners[0].progress.step:  # else the end of the epoch has just saved it
            self.save()
        self.plot()
        self.bar.close()
        if self.world.main:
            self.say_how_to_go_on()
        raise Stopped(signum)

    def say_how_to_go_on(self) -> None:
        """After the run was saved before its end."""
        say(f"stopped at step {self.steps_done} of {self.total}; to go on:")
        say(f"  {command_to_resume(self.invocation.folder, self.world)}")

    def save(self, better: Sequence[bool] = ()) -> None:
        """Writes `last.pt` of each learner, `best.pt` of those that are better, and metrics. Every rank must call it.

        Args:
            better: for each learner, where an epoch has ended.
        """
        for learner in self.learners:
            learner.share_buffers()
        self.write(better)

    def save_after_error(self) -> None:
        """Saves the steps of this epoch so far, where it can be done without the other ranks.

        Those may wait for this one in the middle of a step, or may have ended.
        """
        try:
            returned = [learner.return_to_last_step() for learner in self.learners]
            # One of two learners may be a step ahead: a run goes on from checkpoints of the same step alone.
            if not all(returned) or len({learner.steps_done for learner in self.learners}) > 1:
                return
            if self.learners[0].progress.step:
                self.write()
                self.bar.close()
                if self.world.main:
                    self.say_how_to_go_on()
        except Exception as error:  # the one that ends the run is reported too
            say(f"resnet_fused: the steps since the last checkpoint are not saved: {error}", sys.stderr)

    def write(self, better: Sequence[bool] = ()) -> None:
        """As `save`, without the other ranks.

        In this order: `run_folder.restore_best` makes up for what a kill has left out.
        """
        for learner in self.learners:
            learner.check_finite()
        if self.world.main:
            states = {self.folder(learner): learner.state() for learner in self.learners}
            checkpoint.save({folder / "last.pt": state for folder, state in states.items()})
            for (folder, state), is_better in zip(states.items(), better, strict=False):
                if is_better:
                    checkpoint.save({folder / "best.pt": state})
            for learner in self.learners:
                self.write_metrics(learner)

    def write_metrics(self, learner: Learner) -> None:
        """The whole file each time, so that it agrees with the checkpoint beside it."""
        lines = [json.dumps(record) + "\n" for record in learner.progress.history]
        write_text(self.folder(learner) / "metrics.jsonl", "".join(lines))

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
            say(f"held-out accuracy {last:.2%}, best {progress.best:.2%}; see {self.invocation.folder}")
        for learner in self.learners:
            digests = self.world.digests(learner.evaluated)
            if self.world.main and self.world.size > 1:
                weights = ", ".join(f"rank {rank} {digest}" for rank, digest in enumerate(digests))
                say(f"{self.prefix(learner)}sha256 of the weights: {weights}")

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

"""`python -m resnet_fused bench`: speed and memory of a training step beside eager PyTorch's, on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resnet_fused.backend import summary, why_plain
from resnet_fused.cli.distributed import from_environment, pick_device
from resnet_fused.cli.errors import UserError, require
from resnet_fused.cli.files import check_file, make_folder, write_text
from resnet_fused.cli.plots import plot_bench
from resnet_fused.cli.precision import check_precision
from resnet_fused.cli.probe import ProcessFailed, probe
from resnet_fused.cli.settings import SMALLEST_IMAGE
from resnet_fused.cli.signals import Stopped
from resnet_fused.cli.steps import TrainingStep
from resnet_fused.cli.text import shown, table
from resnet_fused.measure import (
    EAGER,
    EXACT,
    OURS,
    Comparison,
    Provider,
    check_accuracy,
    device_name,
    header,
    quantiles,
)

COMPILE = "compile_default"
LABELS = {OURS: "resnet_fused", EAGER: "eager", COMPILE: "torch.compile"}
DEFAULT_BATCH = {"cpu": 16, "cuda": 64}
MIN_ROUNDS, MAX_ROUNDS = 3, 50
TOO_WIDE = 0.25  # of p80 - p20 of the ratios, where 1 lies between them


@dataclass(frozen=True)
class Options:
    """The options of `bench`, named as on the command line."""

    arch: str = "resnet50"
    batch: int = 0
    image_size: int = 224
    precision: str = "fp32"
    device: str = "auto"
    seconds: float = 30.0
    out: Path = Path("runs/bench")
    json: Path | None = None
    compile: bool = True


class Stages:
    """A progress bar in per cent on stderr, where that is a terminal."""

    def __init__(self) -> None:
        look = "{desc:<36} {percentage:3.0f}%|{bar}| {elapsed}"
        self.bar = require("tqdm").tqdm(total=100, disable=None, dynamic_ncols=True, bar_format=look)

    def stage(self, title: str, start: float, end: float) -> Callable[[float, str], None]:
        """A function that moves the bar between two percentages, given a fraction and what is being done."""

        def show(fraction: float, what: str) -> None:
            self.bar.n = start + (end - start) * min(fraction, 1.0)
            self.bar.set_description_str(f"{title}: {LABELS.get(what, what)}")

        return show


def bench(given: dict[str, Any]) -> None:
    """Runs the command.

    Args:
        given: the options of `Options` that are on the command line.

    Raises:
        UserError: something that the user has to put right.
        Stopped: Ctrl-C; nothing is written.
    """
    begin = time.monotonic()
    options = Options(**given)
    step, device = resolve(options)
    names = [OURS, EAGER, *([COMPILE] if options.compile else [])]
    comparison = Comparison(step.case(), [Provider(name) for name in names], device)
    title = headline(step, device)
    print(title)
    print(f"resnet_fused {summary(device.type)}", flush=True)
    stages = Stages()
    try:
        with empty_caches():
            largest = probe_all(comparison, step, stages.stage("first step and memory", 0, 35))
            check(comparison, step, stages.stage("check", 35, 60))
            time_rounds(comparison, options.seconds, stages.stage("time", 60, 100))
    except KeyboardInterrupt:
        raise Stopped(signal.SIGINT) from None
    finally:
        stages.bar.close()
    unfused = why_plain(device.type)
    if unfused is not None:
        notes = (comparison.ours.note, f"plain PyTorch, nothing fused: {unfused}")
        comparison.ours.note = "; ".join(filter(None, notes))
    print(f"{report(comparison, largest)}\n{verdict(comparison, unfused)}")
    rows = [row | {"largest_batch": largest.get(row["impl"])} for row in comparison.rows()]
    results = options.json or options.out / "bench.json"
    payload = {"header": header(device, time.monotonic() - begin), "rows": rows}
    write_text(results, json.dumps(payload, indent=1) + "\n")
    chart = options.out / "bench.png"
    plot_bench(chart, [figures(comparison, provider) for provider in comparison.providers], title)
    print(f"chart: {chart}, results: {results}", flush=True)


def resolve(options: Options) -> tuple[TrainingStep, torch.device]:
    """What is measured and where.

    Raises:
        UserError: an option that cannot be, or a package or a device that is missing.
    """
    if from_environment().size > 1:
        raise UserError("bench measures one process: start it without torchrun")
    for package in ("tqdm", "matplotlib"):
        require(package)
    if options.image_size < SMALLEST_IMAGE:
        raise UserError(f"--image-size {options.image_size} is too small: use at least {SMALLEST_IMAGE}")
    if options.batch == 1:
        raise UserError("--batch 1: batch norm needs at least 2 images")
    device = pick_device(options.device, from_environment())
    check_precision(options.precision, device)
    if options.json is not None:
        check_file("--json", options.json)
    make_folder(options.out)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    batch = options.batch or DEFAULT_BATCH[device.type]
    return TrainingStep(options.arch, batch, options.image_size, options.precision, str(device)), device


@contextlib.contextmanager
def empty_caches() -> Iterator[None]:
    """For compilers and autotuners: a first step takes as long as a user's, and the later ones reuse its results."""
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME")
    before = {name: os.environ[name] for name in names if name in os.environ}
    with tempfile.TemporaryDirectory(prefix="resnet_fused_bench_", ignore_cleanup_errors=True) as folder:
        os.environ.update({name: str(Path(folder, name.lower())) for name in names})
        try:
            yield
        finally:
            for name in names:
                del os.environ[name]
            os.environ.update(before)


def probe_all(
    comparison: Comparison, step: TrainingStep, progress: Callable[[float, str], None]
) -> dict[str, int | None]:
    """Fills in first step and peak memory from fresh processes; returns the largest batches.

    Raises:
        UserError: a process was killed.
    """
    largest: dict[str, int | None] = {}
    for index, provider in enumerate(comparison.providers):
        progress(index / len(comparison.providers), provider.name)
        try:
            cudnn = {"benchmark": True} if step.device != "cpu" else {}
            measured = probe(step, provider.name, largest_batch=True, **cudnn)
        except ProcessFailed as failed:
            if provider.name == COMPILE:
                provider.note = f"its process ended with exit code {failed.code}"
            elif failed.code < 0:
                raise UserError(
                    f"{LABELS[provider.name]} was killed by signal {-failed.code}, as a process is where memory runs "
                    f"out: give a --batch below {step.batch}"
                ) from failed
            else:
                raise
        else:
            provider.note = measured.get("note", "")
            provider.first_step_ms, provider.peak_mb = measured.get("first_step_ms"), measured.get("peak_mb")
            largest[provider.name] = measured.get("largest_batch")
    return largest


def check(comparison: Comparison, step: TrainingStep, progress: Callable[[float, str], None]) -> None:
    """Makes the models of the providers that can run, and holds losses and gradient to the accuracy rule."""
    running = [provider for provider in comparison.providers if not provider.note]
    models = {name: step.model(name) for name in (EXACT, *(provider.name for provider in running))}
    if EAGER not in models:  # eager PyTorch has no memory for this batch
        for provider in running:
            provider.note = "not checked: eager PyTorch failed"
    else:
        wrong = check_accuracy(
            step.draw(models), [provider.name for provider in running], step.eps, progress=progress
        )
        for provider in running:
            provider.note = wrong[provider.name]
    for provider in running:
        provider.run = step.one_step(models[provider.name])


def time_rounds(comparison: Comparison, seconds: float, progress: Callable[[float, str], None]) -> None:
    """One step of each provider per round, on one batch."""
    comparison.warm_up()
    begin = time.monotonic()
    for done in comparison.rounds(MAX_ROUNDS):
        spent = time.monotonic() - begin
        progress(max(done / MAX_ROUNDS, min(spent / seconds, done / MIN_ROUNDS)), f"round {done}")
        if done >= MIN_ROUNDS and spent >= seconds:
            break


# What is written.


def figures(comparison: Comparison, provider: Provider) -> dict[str, Any]:
    """What is shown of a provider; None for what was not measured.

    Quantiles of its milliseconds, of its images a second where its results were accepted, and of how many times as
    fast as eager it is; its peak memory, and that of eager's.
    """
    batch, peak, of_eager = comparison.case.batch, provider.peak_mb, comparison[EAGER].peak_mb
    return {
        "label": LABELS[provider.name],
        "ms": quantiles(provider.times),
        "rate": quantiles([1e3 * batch / ms for ms in provider.times] if provider.checked else []),
        "gain": quantiles(comparison.ratios(provider, comparison[EAGER])),
        "peak_mb": peak,
        "relative_memory": peak / of_eager if peak and of_eager else None,
    }


def headline(step: TrainingStep, device: torch.device) -> str:
    """What is measured, in one line."""
    tf32 = " (TF32 convolutions)" if step.dtype == "tf32" else ""
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return (
        f"{step.arch} in training, batch {step.batch} at {step.image_size}x{step.image_size}, {step.precision}{tf32}, "
        f"channels_last, {device_name(device)}{threads}"
    )


def report(comparison: Comparison, largest: dict[str, int | None]) -> str:
    """The measurements as a table, and a line for each note."""
    columns = ["", "ms a step", "p20 - p80", "img/s", "times eager", "p20 - p80", "peak MB", "of eager's"]
    rows = [[*columns, "first step", *(["largest batch"] if comparison.device.type == "cuda" else [])]]
    for provider in comparison.providers:
        figure, first = figures(comparison, provider), provider.first_step_ms
        median, *times = figure["ms"].values()
        gain, *gains = figure["gain"].values()
        cells = [
            figure["label"],
            shown("{:.1f}", median),
            shown("{:.1f} - {:.1f}", *times),
            shown("{:.1f}", median and 1e3 * comparison.case.batch / median),
            shown("{:.2f}x", gain),
            shown("{:.2f} - {:.2f}", *gains),
            shown("{:.0f}", figure["peak_mb"]),
            shown("{:.2f}x", figure["relative_memory"]),
            shown("{:.1f} s", first and first / 1e3),
            shown("{}", largest.get(provider.name)),
        ]
        rows.append(cells[: len(rows[0])])
    notes = [
        f"{LABELS[provider.name]}: {provider.note}" for provider in comparison.providers if provider.note
    ]
    return "\n".join([table(rows), *notes])


def verdict(comparison: Comparison, unfused: str | None = None) -> str:
    """The result in one sentence. `unfused`: why nothing of resnet_fused could run fused."""
    if unfused is not None:
        return f"No speed-up is claimed: nothing ran fused, because {unfused}."
    arch, figure = comparison.case.name, figures(comparison, comparison.ours)
    memory = "" if figure["relative_memory"] is None else f" in {figure['relative_memory']:.2f}x its memory"
    median, p20, p80 = figure["gain"].values()
    if median is None:
        return "No speed-up is claimed: not both could be run and checked, see above."
    if p20 > 1:
        return f"resnet_fused trains {arch} {median:.2f}x as fast as eager{memory} on this machine."
    if p80 < 1:
        how = f"{median:.2f}x as fast{memory and ','}{memory}"
        return f"resnet_fused trains {arch} slower than eager on this machine: {how}."
    spread = f"{median:.2f}x, {p20:.2f} to {p80:.2f}"
    if p80 - p20 > TOO_WIDE:
        return f"Times vary too much to say which is faster ({spread}): run it while the machine does nothing else."
    return f"resnet_fused trains {arch} about as fast as eager ({spread}){memory} on this machine."

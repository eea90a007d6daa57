"""`python -m resnet_fused bench`: training steps beside plain PyTorch's on this machine, checked, timed and weighed."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resnet_fused.backend import summary, why_plain
from resnet_fused.cli import timing
from resnet_fused.cli.distributed import from_environment, pick_device
from resnet_fused.cli.errors import UserError, require
from resnet_fused.cli.files import make_folder, write_text
from resnet_fused.cli.learner import AUTOCAST, check_precision
from resnet_fused.cli.plots import Bar, plot_bench
from resnet_fused.cli.settings import SMALLEST_IMAGE
from resnet_fused.cli.signals import Stopped
from resnet_fused.cli.steps import (
    COMPILED,
    EAGER,
    OURS,
    Case,
    exactly,
    excuse,
    objection,
    outcome,
    relative_errors,
)
from resnet_fused.cli.timing import device_name, header, milliseconds, quantile

SHOWN = {OURS: "resnet_fused", EAGER: "eager", COMPILED: "torch.compile"}
DEFAULT_BATCH = {"cpu": 16, "cuda": 64}
FEWEST_ROUNDS, MOST_ROUNDS = 3, 50
TOO_WIDE = 0.25  # of a spread of ratios that holds 1, between its percentiles
#: Pixels of all batches that are checked together, and the most batches: see `check`.
CHECKED_PIXELS, MOST_DRAWS = 16 * 224 * 224, 5


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


@dataclass
class Entrant:
    """One implementation. A `note` says why it is not measured, or why what it computes was not accepted.

    `peak_mb` of 1e6 bytes, `first_step_ms` and `largest_batch` are of a fresh process, None where not measured.
    """

    impl: str
    model: nn.Module | None = None
    note: str = ""
    checked: bool = False
    times: list[float] = field(default_factory=list)
    peak_mb: float | None = None
    first_step_ms: float | None = None
    largest_batch: int | None = None

    def leave(self, error: Exception) -> None:
        """Takes part no longer. An error without an excuse is raised again."""
        self.model, self.note, self.checked = None, excuse(self.impl, error), False


class Stages:
    """A bar on stderr, where that is a terminal, that goes through stages."""

    def __init__(self) -> None:
        look = "{desc:<36} {percentage:3.0f}%|{bar}| {elapsed}"
        self._bar = require("tqdm").tqdm(total=100, disable=None, dynamic_ncols=True, bar_format=look)
        self._begun = 0.0

    @contextlib.contextmanager
    def stage(self, name: str, share: float) -> Iterator[Callable[[float, str], None]]:
        """So many per cent of the whole. What it gives is told how much of them is done, from 0 to 1, and of what."""

        def show(done: float, what: str = "") -> None:
            self._bar.n = min(100.0, self._begun + share * min(done, 1.0))
            self._bar.set_description_str(f"{name}{what and ': '}{what}")

        show(0.0)
        yield show
        self._begun += share
        show(0.0)

    def close(self) -> None:
        self._bar.close()


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
    case, device = settle(options)
    impls = [OURS, EAGER, *([COMPILED] if options.compile else [])]
    entrants = [Entrant(impl) for impl in impls]
    print(headline(case, device))
    print(f"resnet_fused {summary(device.type)}", flush=True)
    stages = Stages()
    try:
        with empty_caches():
            probe_all(entrants, case, stages)
            check(entrants, case, stages)
            time_in_turns(entrants, case, device, options.seconds, stages)
    except KeyboardInterrupt:
        raise Stopped(signal.SIGINT) from None
    finally:
        stages.close()
    unfused = why_plain(device.type)
    if unfused is not None:
        ours = entrants[0]
        ours.note = f"{ours.note and f'{ours.note}; '}plain PyTorch, nothing fused: {unfused}"
    rows = make_rows(entrants, case)
    print(f"{table(entrants, case)}\n{verdict(entrants, case, unfused)}")
    head = header(device, time.monotonic() - begin, {})
    results = options.json or options.out / "bench.json"
    write_text(results, json.dumps({"header": head, "rows": rows}, indent=1) + "\n")
    chart = options.out / "bench.png"
    plot_bench(chart, [bar(entrants, entrant, case) for entrant in entrants], headline(case, device))
    print(f"chart: {chart}, results: {results}", flush=True)


def settle(options: Options) -> tuple[Case, torch.device]:
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
    file = options.json
    if file is not None and (file.is_dir() or not os.access(file.parent, os.W_OK | os.X_OK)):
        raise UserError(f"--json {file} cannot be written: name a file in a folder that is there")
    make_folder(options.out)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    batch = options.batch or DEFAULT_BATCH[device.type]
    return Case(options.arch, batch, options.image_size, options.precision, str(device)), device


@contextlib.contextmanager
def empty_caches() -> Iterator[None]:
    """Of compilers and of what was tuned: a first step costs what it costs a user, and what it leaves serves later."""
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


def probe_all(entrants: list[Entrant], case: Case, stages: Stages) -> None:
    """Fills in first step, peak memory and largest batch, each of a fresh process. Finds out what cannot run.

    Raises:
        UserError: a process was killed.
    """
    with stages.stage("first step and memory", 35) as show:
        for index, entrant in enumerate(entrants):
            show(index / len(entrants), SHOWN[entrant.impl])
            request = {"impl": entrant.impl, "case": asdict(case), "threads": torch.get_num_threads()}
            command = [sys.executable, "-m", "resnet_fused.cli.probe", json.dumps(request)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                for name, value in json.loads(done.stdout.splitlines()[-1]).items():
                    setattr(entrant, name, value)
            elif entrant.impl == COMPILED:
                entrant.note = f"its process ended with exit code {done.returncode}"
            elif done.returncode < 0:
                raise UserError(
                    f"{SHOWN[entrant.impl]} was killed by signal {-done.returncode}, as a process is where memory runs "
                    f"out: give a --batch below {case.batch}"
                )
            else:
                raise RuntimeError(f"{SHOWN[entrant.impl]} in a process of its own:\n{done.stderr}")


def check(entrants: list[Entrant], case: Case, stages: Stages) -> None:
    """Makes the models and holds losses and gradient to the accuracy rule: error <= 1.5 * eager's + 4 * eps.

    Errors are relative to eager in float64. In a small batch a single ReLU whose input rounds to the other side of zero
    decides the error of the gradient, eager's as well: then several batches are drawn, and the median of an
    implementation is held against the largest of eager's.
    """
    draws = min(MOST_DRAWS, math.ceil(CHECKED_PIXELS / (case.batch * case.image_size**2)))
    errors: dict[str, list[tuple[float, float]]] = {entrant.impl: [] for entrant in entrants}
    running = [entrant for entrant in entrants if not entrant.note]
    for entrant in running:
        entrant.model = case.model(entrant.impl)
    in_float64 = exactly(case.model(EAGER))
    with stages.stage("check", 20) as show:
        for draw in range(draws):
            show(draw / draws, "float64")
            images, labels = case.data(draw)
            try:
                exact = outcome(case, in_float64, images.double(), labels)
            except torch.OutOfMemoryError:
                for entrant in running:
                    entrant.note = "not checked: there is no memory for float64, try a smaller --batch"
                return
            for place, entrant in enumerate(running, 1):
                show((draw + place / (1 + len(running))) / draws, SHOWN[entrant.impl])
                if entrant.model is not None:
                    try:
                        found = outcome(case, entrant.model, images, labels)
                    except Exception as error:
                        entrant.leave(error)
                    else:
                        errors[entrant.impl].append(relative_errors(found, exact))
    eps = torch.finfo(AUTOCAST.get(case.precision, torch.float32)).eps
    for entrant in running:
        if entrant.model is not None:
            entrant.note = objection(errors[entrant.impl], errors[EAGER], eps)
            entrant.checked = not entrant.note


def time_in_turns(
    entrants: list[Entrant], case: Case, device: torch.device, seconds: float, stages: Stages
) -> None:
    """Rounds of one step each, on one batch; who begins changes from round to round."""
    data = case.data(0)
    steps: dict[str, Callable[[], None]] = {}
    with stages.stage("warm up", 10) as show:
        for index, entrant in enumerate(entrants):
            if entrant.model is None:
                continue
            show(index / len(entrants), SHOWN[entrant.impl])
            step = functools.partial(case.step(entrant.model), *data)
            try:
                step()
            except Exception as error:
                entrant.leave(error)
            else:
                steps[entrant.impl] = step
    running = [entrant for entrant in entrants if entrant.impl in steps]
    begin, rounds, spent = time.monotonic(), 0, 0.0
    with stages.stage("time", 35) as show:
        while running and (rounds < FEWEST_ROUNDS or (spent < seconds and rounds < MOST_ROUNDS)):
            start = rounds % len(running)
            for entrant in running[start:] + running[:start]:
                entrant.times.append(milliseconds(steps[entrant.impl], device))
            rounds, spent = rounds + 1, time.monotonic() - begin
            share = min(spent / seconds, rounds / FEWEST_ROUNDS)
            show(max(rounds / MOST_ROUNDS, share), f"round {rounds}")


# What is written.


def ratios(entrants: list[Entrant], impl: str, to: str) -> dict[str, float | None]:
    """Over the rounds, the time of `to` / that of `impl`: `quantiles`, of nothing unless both are checked."""
    found = {entrant.impl: entrant.times for entrant in entrants if entrant.checked}
    pairs = zip(found.get(impl, []), found.get(to, []), strict=False)
    return quantiles([of / own for own, of in pairs] if impl != to else [])


def quantiles(values: list[float]) -> dict[str, float | None]:
    """Median, 20th and 80th percentile."""
    return timing.quantiles(sorted(values), "median", "p20", "p80")


def make_rows(entrants: list[Entrant], case: Case) -> list[dict[str, Any]]:
    """A row per implementation: as results files of the benchmark suite have them, and `largest_batch`."""
    rows = []
    for entrant in entrants:
        times, against = quantiles(entrant.times), ratios(entrants, OURS, entrant.impl)
        rows.append(
            {
                "layer": "model",
                "name": case.arch,
                "mode": "train",
                "dtype": case.dtype,
                "batch": case.batch,
                "shape": f"{case.batch}x3x{case.image_size}x{case.image_size}",
                "impl": entrant.impl,
                **{f"{name}_ms": value for name, value in times.items()},
                "rounds": len(entrant.times),
                "peak_mb": entrant.peak_mb,
                "first_step_ms": entrant.first_step_ms,
                "roofline_ms": None,
                "checked": entrant.checked and bool(entrant.times),
                "ratio": against["median"],
                "ratio_p20": against["p20"],
                "ratio_p80": against["p80"],
                "note": entrant.note,
                "largest_batch": entrant.largest_batch,
            }
        )
    return rows


def bar(entrants: list[Entrant], entrant: Entrant, case: Case) -> Bar:
    """What the chart shows of it; no speed where its outputs were not accepted."""
    times = sorted(entrant.times) if entrant.checked else []
    median, slow, fast = (1e3 * case.batch / quantile(times, q) if times else 0.0 for q in (0.5, 0.8, 0.2))
    speed = (median, slow, fast) if times else None
    share = share_of_memory(entrants, entrant) if entrant.impl != EAGER else None
    return Bar(
        SHOWN[entrant.impl], speed, ratios(entrants, entrant.impl, EAGER)["median"], entrant.peak_mb, share
    )


def headline(case: Case, device: torch.device) -> str:
    """What is measured, in one line."""
    tf32 = " (TF32 convolutions)" if case.dtype == "tf32" else ""
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return (
        f"{case.arch} in training, batch {case.batch} at {case.image_size}x{case.image_size}, {case.precision}{tf32}, "
        f"channels_last, {device_name(device)}{threads}"
    )


def table(entrants: list[Entrant], case: Case) -> str:
    """The measurements as aligned text, and a line for each note."""
    speed = ("ms a step", "p20 - p80", "img/s", "times eager", "p20 - p80")
    columns = ["", *speed, "peak MB", "of eager's", "first step"]
    on_gpu = case.device != "cpu"
    lines = [[*columns, "largest batch"] if on_gpu else columns]
    for entrant in entrants:
        times, ratio = quantiles(entrant.times), ratios(entrants, entrant.impl, EAGER)
        cells = [
            SHOWN[entrant.impl],
            shown("{:.1f}", times["median"]),
            shown("{:.1f} - {:.1f}", times["p20"], times["p80"]),
            shown("{:.1f}", times["median"] and 1e3 * case.batch / times["median"]),
            shown("{:.2f}x", ratio["median"]),
            shown("{:.2f} - {:.2f}", ratio["p20"], ratio["p80"]),
            shown("{:.0f}", entrant.peak_mb),
            shown("{:.2f}x", share_of_memory(entrants, entrant)),
            shown("{:.1f} s", entrant.first_step_ms and entrant.first_step_ms / 1e3),
        ]
        lines.append([*cells, shown("{}", entrant.largest_batch)] if on_gpu else cells)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    body = [
        "  ".join(
            [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    ]
    rule = "-" * len(body[0])
    notes = [f"{SHOWN[entrant.impl]}: {entrant.note}" for entrant in entrants if entrant.note]
    return "\n".join([rule, body[0], rule, *body[1:], rule, *notes])


def share_of_memory(entrants: list[Entrant], entrant: Entrant) -> float | None:
    """Peak memory / eager's; None unless both are measured."""
    eager = next(found for found in entrants if found.impl == EAGER)
    return entrant.peak_mb / eager.peak_mb if entrant.peak_mb and eager.peak_mb else None


def shown(form: str, *values: float | None) -> str:
    """The values in that form, or a dash where one is missing."""
    return "-" if None in values else form.format(*values)


def verdict(entrants: list[Entrant], case: Case, unfused: str | None = None) -> str:
    """The result in one sentence. `unfused`: why nothing of resnet_fused could run fused."""
    if unfused is not None:
        return f"No speed-up is claimed: nothing ran fused, because {unfused}."
    speed, share = ratios(entrants, OURS, EAGER), share_of_memory(entrants, entrants[0])
    memory = "" if share is None else f" in {share:.2f}x its memory"
    if speed["median"] is None or speed["p20"] is None or speed["p80"] is None:
        return "No speed-up is claimed: not both could be run and checked, see above."
    where = "on this machine"
    if speed["p20"] > 1:
        return f"resnet_fused trains {case.arch} {speed['median']:.2f}x as fast as eager{memory} {where}."
    if speed["p80"] < 1:
        how = f"{speed['median']:.2f}x as fast{memory and ','}{memory}"
        return f"resnet_fused trains {case.arch} slower than eager {where}: {how}."
    spread = f"{speed['median']:.2f}x, {speed['p20']:.2f} to {speed['p80']:.2f}"
    if speed["p80"] - speed["p20"] > TOO_WIDE:
        return f"Times vary too much to say which is faster ({spread}): run it while the machine does nothing else."
    return f"resnet_fused trains {case.arch} about as fast as eager ({spread}){memory} {where}."

"""Training steps of ours beside PyTorch's, checked and timed in turns: ``python -m benchmarks.record --json FILE``.

Every provider is held to the accuracy rule against float64 first. A round is ``STEPS`` steps of each, one after the
other as in training. The file is rewritten after every round, so that little is lost when the run is ended; ours and
eager PyTorch's are timed once before a compiler starts, which takes longest. What other runs have put into the file
stays.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_stages import compilations
from benchmarks.harness import Case, Contest, Entrant, failure
from benchmarks.implementations import begin
from benchmarks.roofline import limit, read_ceilings, step
from resnet_fused.cli.bench import CHECKED_PIXELS, MOST_DRAWS
from resnet_fused.cli.files import write_text
from resnet_fused.cli.learner import AUTOCAST
from resnet_fused.cli.steps import COMPILED, EAGER, OURS, exactly, objection, outcome, relative_errors
from resnet_fused.cli.steps import Case as Training
from resnet_fused.cli.timing import header, milliseconds, quantile

AUTOTUNED = "compile_max_autotune"
PROVIDERS = (OURS, EAGER, COMPILED, AUTOTUNED)
#: Of a round and provider: the processor runs ahead of the GPU as it does in training.
STEPS = 5
#: Losses of each image and the gradient.
Outcome = tuple[Tensor, Tensor]


class Rounds(Contest):
    """A contest whose runs are training steps: ``STEPS`` of them are timed together, the time is one step's."""

    def _run(self, entrant: Entrant) -> float:
        assert entrant.run
        run = entrant.run
        return milliseconds(lambda: [run() for _ in range(STEPS)], self.device) / STEPS


@dataclass
class Record:
    """What is measured of a training step.

    Args:
        save: is called with all that is known after every round.
    """

    training: Training
    rounds: int
    roofline_ms: float | None
    save: Callable[[dict[str, Any]], None]
    clocks: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.device = torch.device(self.training.device)
        self.begun = time.monotonic()
        pixels = self.training.batch * self.training.image_size**2
        self.draws = min(MOST_DRAWS, math.ceil(CHECKED_PIXELS / pixels))
        self.errors: dict[str, list[tuple[float, float]]] = {}
        self.before: list[dict[str, Any]] = []
        self.shown = "no round was finished"

    def run(self, providers: Sequence[str]) -> Rounds:
        """Checks and times; the last contest."""
        exact = self._exact()
        first = [self._entrant(impl, exact) for impl in (EAGER, OURS)]
        others = [impl for impl in providers if impl not in (OURS, EAGER)]
        contest = self._timed(first, max(1, self.rounds // 4) if others else self.rounds)
        if others:
            self.before = contest.rows()
            # Times anew: rounds are those in which everybody takes turns.
            again = [Entrant(e.impl, e.run, e.note) for e in first]
            contest = self._timed([*again, *(self._entrant(impl, exact) for impl in others)], self.rounds)
        return contest

    def _exact(self) -> list[Outcome]:
        """Of each draw, in float64, whose convolutions are too slow to try several algorithms of each."""
        model = exactly(self.training.model(EAGER))
        found = []
        with torch.backends.cudnn.flags(enabled=True, benchmark=False):
            for draw in range(self.draws):
                images, labels = self.training.data(draw)
                found.append(outcome(self.training, model, images.double(), labels))
        del model, images
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return found

    def _entrant(self, impl: str, exact: list[Outcome]) -> Entrant:
        """A provider with what is wrong with it; one that breaks does not run, but ours and eager PyTorch have to."""
        begun = time.monotonic()
        try:
            model = make_model(self.training, impl)
            for draw, truth in enumerate(exact):
                begin(impl)
                found = outcome(self.training, model, *self.training.data(draw))
                self.errors.setdefault(impl, []).append(relative_errors(found, truth))
        except Exception as error:  # whatever a compiler raises
            if impl in (OURS, EAGER):
                raise
            return Entrant(impl, None, failure(error))
        eps = torch.finfo(AUTOCAST.get(self.training.precision, torch.float32)).eps
        note = objection(self.errors[impl], self.errors[EAGER], eps)
        seconds = time.monotonic() - begun
        print(f"{impl}: errors {self.errors[impl]} {note or 'accepted'}, {seconds:.1f} s", flush=True)
        train = functools.partial(self.training.step(model), *self.training.data(0))

        def one() -> None:
            begin(impl)
            train()

        return Entrant(impl, one, note)

    def _timed(self, entrants: list[Entrant], rounds: int) -> Rounds:
        training = self.training
        shape = f"{training.batch}x3x{training.image_size}x{training.image_size}"
        case = Case("model", training.arch, "train", training.dtype, training.batch, shape, self.roofline_ms)
        contest = Rounds(case, entrants, self.device)
        contest.warm_up()
        if self.device.type == "cuda":
            for entrant in filter(lambda entrant: entrant.run, entrants):
                entrant.peak_mb = contest._peak_mb(entrant)
        self._clocks()
        for _ in range(rounds):
            contest.others()
            contest.our_turn()
            self.save(self.found(contest))
            self.shown = line(contest)
        self._clocks()
        self.save(self.found(contest))
        print(self.shown, flush=True)
        return contest

    def _clocks(self) -> None:
        self.clocks.append(header(self.device, 0.0)["clocks"])

    def found(self, contest: Contest) -> dict[str, Any]:
        """As the file has it: rows as results files have them, with img/s and the errors of losses and gradient."""
        rows = contest.rows()
        for row in rows:
            row["img_per_s"] = row["median_ms"] and 1e3 * row["batch"] / row["median_ms"]
            row["errors"] = self.errors.get(row["impl"], [])
        return {
            "seconds": round(time.monotonic() - self.begun, 1),
            "steps_per_round": STEPS,
            "clocks": self.clocks,
            "rows": rows,
            "rows_before_compiling": self.before,
        }


def make_model(training: Training, impl: str) -> nn.Module:
    """Freshly initialised, with the same weights for all."""
    if impl != AUTOTUNED:
        return training.model(impl)
    model = training.model(EAGER)
    model.compile(mode="max-autotune", dynamic=False)
    return model


def line(contest: Contest) -> str:
    """One line: of each its time, img/s, peak memory and how many times as long as ours it takes."""
    parts = []
    for entrant in contest.entrants:
        if not entrant.times:
            parts.append(f"{entrant.impl}: {entrant.note}")
            continue
        times = sorted(entrant.times)
        ms = statistics.median(times)
        text = f"{entrant.impl} {ms:.2f} ms ({quantile(times, 0.2):.2f} - {quantile(times, 0.8):.2f})"
        text += f" {1e3 * contest.case.batch / ms:,.0f} img/s"
        text += f" {entrant.peak_mb / 1e3:.1f} GB" if entrant.peak_mb else ""
        if ratios := contest.ratios(entrant):
            text += f" ours {statistics.median(ratios):.2f}x"
        parts.append(text + (f" ({entrant.note})" if entrant.note else ""))
    return "; ".join(parts)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m benchmarks.record", description=__doc__)
    found.add_argument("--json", type=Path, required=True, help="the file of results")
    found.add_argument("--name", default="record", help="of this run in the file (default: record)")
    found.add_argument("--arch", default="resnet50")
    found.add_argument("--batch", type=int, default=256)
    found.add_argument("--image-size", type=int, default=224)
    found.add_argument("--precision", default="bf16", choices=("fp32", "bf16", "fp16"))
    found.add_argument("--device", default="cuda")
    found.add_argument("--rounds", type=int, default=20, help=f"of {STEPS} steps each (default: 20)")
    found.add_argument("--ceilings", type=Path, help="file of the device's ceilings, for the roofline")
    default = [OURS, EAGER, COMPILED]
    found.add_argument(
        "--providers", nargs="+", default=default, choices=PROVIDERS, help="(default: first 3)"
    )
    return found


def main(arguments: Sequence[str]) -> int:
    options = parser().parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            print("record needs a CUDA device and this machine has none: try --device cpu", file=sys.stderr)
            return 2
        torch.backends.cudnn.benchmark = True
    training = Training(options.arch, options.batch, options.image_size, options.precision, str(device))
    ceilings = read_ceilings(options.ceilings, training.dtype)
    roofline_ms = None
    if ceilings:
        kernels = step(options.arch, options.batch, options.image_size, training.dtype, "folded", whole=True)
        roofline_ms = limit(kernels, ceilings) * 1e3
    head = header(device, 0.0)

    def save(found: dict[str, Any]) -> None:
        known = json.loads(options.json.read_text()) if options.json.exists() else {}
        write_text(
            options.json, json.dumps(known | {options.name: {"header": head, **found}}, indent=1) + "\n"
        )

    record = Record(training, options.rounds, roofline_ms, save)
    with compilations() if device.type == "cuda" else nullcontext(str) as compiled:
        status = _status(record, options.providers)
        # The last line is what a runner shows.
        print("; ".join(part for part in (record.shown, compiled()) if part), flush=True)
    return status


def _status(record: Record, providers: Sequence[str]) -> int:
    """Of the process: 1 where ours is wrong, 130 where it was interrupted."""
    try:
        return int(not record.run(providers).ours.checked)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

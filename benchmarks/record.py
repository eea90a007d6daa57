"""Training steps of ours beside PyTorch's, checked and timed in turns: ``python -m benchmarks.record --json FILE``.

Every provider is held to the accuracy rule against float64 first. A round is ``STEPS`` steps of each, one after the
other as in training. The file is rewritten after every round, so that little is lost when the run is stopped; ours and
eager PyTorch are timed once before torch.compile starts, which takes longest. Other runs in the file stay.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_stages import compilations
from benchmarks.roofline import limit, read_ceilings, step
from resnet_fused.cli.files import write_text
from resnet_fused.cli.steps import COMPILED, TrainingStep, begin_step
from resnet_fused.cli.text import shown
from resnet_fused.measure import (
    EAGER,
    EXACT,
    OURS,
    SEEDS,
    Comparison,
    Provider,
    Results,
    check_accuracy,
    failure,
    header,
    quantiles,
)

PROVIDERS = (OURS, EAGER, *COMPILED)
#: Per round and provider: the processor runs ahead of the GPU as it does in training.
STEPS = 5


class Record:
    """What is measured of a training step.

    Args:
        save: called with all results so far after every round.
    """

    def __init__(
        self,
        training: TrainingStep,
        rounds: int,
        roofline_ms: float | None,
        save: Callable[[dict[str, Any]], None],
    ) -> None:
        self.training, self.rounds, self.roofline_ms, self.save = training, rounds, roofline_ms, save
        self.device = torch.device(training.device)
        self.begun = time.monotonic()
        self.clocks: list[Any] = []
        self.before_compiling: list[dict[str, Any]] = []
        self.summary = "no round was finished"

    def run(self, names: Sequence[str]) -> Comparison:
        """Checks and times; the last comparison."""
        results = self.exact_results()
        first = self.providers((OURS, EAGER), results)
        others = [name for name in names if name not in (OURS, EAGER)]
        comparison = self.timed(first, max(1, self.rounds // 4) if others else self.rounds)
        if others:
            self.before_compiling = comparison.rows()
            # Only rounds in which all providers take turns count.
            again = [Provider(provider.name, provider.run, provider.note) for provider in first]
            comparison = self.timed([*again, *self.providers(others, results)], self.rounds)
        return comparison

    def exact_results(self) -> dict[int, list[Tensor]]:
        """By seed. Float64 convolutions are too slow to try several algorithms of each."""
        draw = self.training.draw({EXACT: self.training.model(EXACT)})
        with torch.backends.cudnn.flags(enabled=True, benchmark=False):
            results = {seed: list(draw(seed)(EXACT)) for seed in SEEDS}
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return results

    def providers(self, names: Sequence[str], exact: dict[int, list[Tensor]]) -> list[Provider]:
        """Those of the names, with what is wrong with each."""
        models: dict[str, nn.Module] = {}
        providers: list[Provider] = []
        for name in dict.fromkeys((EAGER, *names)):
            try:
                models[name] = self.training.model(name)
            except Exception as error:  # whatever a compiler raises
                providers.append(Provider(name, note=failure(name, error)))
        draw = self.training.draw(models)

        def drawn(seed: int) -> Results:
            results = draw(seed)
            return lambda name: exact[seed] if name == EXACT else results(name)

        notes = check_accuracy(drawn, models, self.training.eps)
        for name, model in models.items():
            print(f"{name}: {notes[name] or 'accepted'}", flush=True)
            providers.append(Provider(name, self.one_step(name, model), notes[name]))
        return [provider for provider in providers if provider.name in names]

    def one_step(self, name: str, model: nn.Module) -> Callable[[], None]:
        train = functools.partial(self.training.train(model), *self.training.data(0))

        def run() -> None:
            begin_step(name)
            train()

        return run

    def timed(self, providers: list[Provider], rounds: int) -> Comparison:
        """The providers' comparison, saved after every round."""
        comparison = Comparison(self.training.case(self.roofline_ms), providers, self.device, repeats=STEPS)
        comparison.warm_up(measure_peak=True)
        self.clocks.append(header(self.device, 0.0)["clocks"])
        for _ in comparison.rounds(rounds):
            self.save(self.results_so_far(comparison))
            self.summary = line(comparison)
        self.clocks.append(header(self.device, 0.0)["clocks"])
        self.save(self.results_so_far(comparison))
        print(self.summary, flush=True)
        return comparison

    def results_so_far(self, comparison: Comparison) -> dict[str, Any]:
        """As the file has it: rows of results files, with img/s."""
        rows = comparison.rows()
        for row in rows:
            row["img_per_s"] = row["median_ms"] and 1e3 * row["batch"] / row["median_ms"]
        return {
            "seconds": round(time.monotonic() - self.begun, 1),
            "steps_per_round": STEPS,
            "clocks": self.clocks,
            "rows": rows,
            "rows_before_compiling": self.before_compiling,
        }


def line(comparison: Comparison) -> str:
    """One line: for each provider its time, img/s, peak memory, and its time / ours."""
    parts = []
    for provider in comparison.providers:
        times = quantiles(provider.times, "median", "p20", "p80")
        ratio = quantiles(comparison.ratios(comparison.ours, provider), "median", "p20", "p80")["median"]
        speed = times["median"] and 1e3 * comparison.case.batch / times["median"]
        cells = [
            provider.name,
            shown("{:.2f} ms ({:.2f} - {:.2f})", *times.values()),
            shown("{:,.0f} img/s", speed),
            shown("{:.1f} GB", provider.peak_mb and provider.peak_mb / 1e3),
            shown("{:.2f}x ours", ratio),
            f"({provider.note})" if provider.note else "-",
        ]
        parts.append(" ".join(cell for cell in cells if cell != "-"))
    return "; ".join(parts)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m benchmarks.record", description=__doc__)
    add = options.add_argument
    add("--json", type=Path, required=True, help="the file of results")
    add("--name", default="record", help="of this run in the file (default: record)")
    add("--arch", default="resnet50")
    add("--batch", type=int, default=256)
    add("--image-size", type=int, default=224)
    add("--precision", default="bf16", choices=("fp32", "bf16", "fp16"))
    add("--device", default="cuda")
    add("--rounds", type=int, default=20, help=f"of {STEPS} steps each (default: 20)")
    add("--ceilings", type=Path, help="file of the device's ceilings, for the roofline")
    add("--providers", nargs="+", default=PROVIDERS[:3], choices=PROVIDERS, help="(default: first 3)")
    return options


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code: 1 where ours is wrong, 2 without a GPU, 130 where it was interrupted."""
    options = parser().parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            print("record needs a CUDA device and this machine has none: try --device cpu", file=sys.stderr)
            return 2
        torch.backends.cudnn.benchmark = True
    training = TrainingStep(options.arch, options.batch, options.image_size, options.precision, str(device))
    ceilings = read_ceilings(options.ceilings, training.dtype)
    roofline_ms = None
    if ceilings:
        kernels = step(options.arch, options.batch, options.image_size, training.dtype, "folded", whole=True)
        roofline_ms = limit(kernels, ceilings) * 1e3
    head = header(device, 0.0)

    def save(results: dict[str, Any]) -> None:
        known = json.loads(options.json.read_text()) if options.json.exists() else {}
        known[options.name] = {"header": head, **results}
        write_text(options.json, json.dumps(known, indent=1) + "\n")

    record = Record(training, options.rounds, roofline_ms, save)
    with compilations() if device.type == "cuda" else nullcontext(str) as compiled:
        try:
            status = int(not record.run(options.providers).ours.checked)
        except KeyboardInterrupt:
            status = 130
        # A runner shows the last line.
        print("; ".join(part for part in (record.summary, compiled()) if part), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

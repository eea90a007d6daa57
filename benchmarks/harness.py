"""Implementations of one thing, timed in turns in one process; what was not checked has no ratio."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import torch

from resnet_fused.cli.timing import header, milliseconds, quantile, quantiles

#: Images of a batch; a GPU wants more than a CPU has time for.
BATCH = int(os.environ.get("RESNET_FUSED_BENCH_BATCH", "16"))
OURS = "resnet_fused"
#: Written before a run, so that it finds nothing in a GPU's cache: more than the L2 of any.
COLD_BYTES = 256 << 20
#: Cycles, about 5 ms, in which the processor gets ahead of the GPU: launching then costs no time measured.
HEAD_START = 10_000_000


@dataclass(frozen=True)
class Case:
    """What is implemented.

    ``shape``: of the input, NxCxHxW. ``roofline_ms``: the least that any implementation needs.
    """

    layer: str
    name: str
    mode: str
    dtype: str
    batch: int
    shape: str
    roofline_ms: float | None = None


@dataclass
class Entrant:
    """One implementation of a case.

    ``run`` is None where it is missing. A ``note`` says why it is, or why what it computes was not accepted; one that
    runs and has no note was checked. ``peak_mb``: the most memory held at once, in 1e6 bytes; ``first_step_ms``: of a
    fresh process.
    """

    impl: str
    run: Callable[[], object] | None
    note: str = ""
    peak_mb: float | None = None
    first_step_ms: float | None = None
    times: list[float] = field(default_factory=list)

    @property
    def checked(self) -> bool:
        return self.run is not None and not self.note


@dataclass
class Contest:
    """A case and who takes part in it; one of them is ours."""

    case: Case
    entrants: list[Entrant]
    device: torch.device
    rounds: int = 0

    @property
    def ours(self) -> Entrant:
        return next(entrant for entrant in self.entrants if entrant.impl == OURS)

    def warm_up(self) -> None:
        """A run of each. Another's that fails is left out with a note; ours has to run."""
        for entrant in filter(lambda entrant: entrant.run, self.entrants):
            try:
                self._run(entrant)
            except Exception as error:  # whatever another library raises
                if entrant is self.ours:
                    raise
                entrant.run, entrant.note = None, failure(error)
            else:
                if self.device.type == "cuda" and self.case.layer != "model":
                    entrant.peak_mb = self._peak_mb(entrant)

    def others(self) -> None:
        """Times all but ours once; who begins changes from round to round."""
        running = [e for e in self.entrants if e is not self.ours and e.run]
        start = self.rounds % max(1, len(running))
        for entrant in running[start:] + running[:start]:
            entrant.times.append(self._run(entrant))

    def our_turn(self) -> None:
        """Times ours once, which ends a round."""
        self.ours.times.append(self._run(self.ours))
        self.rounds += 1

    def _run(self, entrant: Entrant) -> float:
        assert entrant.run
        if self.device.type == "cuda" and self.case.layer != "model":
            torch.empty(COLD_BYTES, dtype=torch.uint8, device=self.device).zero_()
            torch.cuda._sleep(HEAD_START)
        return milliseconds(entrant.run, self.device)

    def _peak_mb(self, entrant: Entrant) -> float:
        """Above what was there before a run: the inputs and weights of all entrants."""
        assert entrant.run
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        entrant.run()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 1e6

    def ratios(self, entrant: Entrant) -> list[float]:
        """Its time / ours of each round, ascending: how many times as fast ours is. Empty for the unchecked."""
        if entrant is self.ours or not (entrant.checked and self.ours.checked):
            return []
        return sorted(other / own for other, own in zip(entrant.times, self.ours.times, strict=True))

    def rows(self) -> list[dict[str, Any]]:
        """One row per entrant, as results files hold them."""
        return [
            {
                **asdict(self.case),
                "impl": entrant.impl,
                **quantiles(sorted(entrant.times), "median_ms", "p20_ms", "p80_ms"),
                "rounds": len(entrant.times),
                "peak_mb": entrant.peak_mb,
                "first_step_ms": entrant.first_step_ms,
                "checked": entrant.checked and bool(entrant.times),
                **quantiles(self.ratios(entrant), "ratio", "ratio_p20", "ratio_p80"),
                "note": entrant.note,
            }
            for entrant in self.entrants
        ]


def failure(error: Exception) -> str:
    """One line of what went wrong."""
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first}"[:200]


def write_results(
    path: Path, device: torch.device, contests: list[Contest], seconds: float, ceilings: dict[str, Any]
) -> None:
    """One JSON file: the header and a row per implementation. ``ceilings``: benchmarks.roofline.Ceilings by dtype."""
    rows = [row for contest in contests for row in contest.rows()]
    head = header(device, seconds, {dtype: asdict(found) for dtype, found in ceilings.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"header": head, "rows": rows}, indent=1) + "\n")


def table(contests: list[Contest]) -> str:
    """The contests as aligned text: our time, and how many times as fast as each other we are, with p20 - p80."""
    impls = list(dict.fromkeys(e.impl for c in contests for e in c.entrants if e.impl != OURS and e.times))
    lines = [f"{'':46}{'shape':>18}{'ours ms':>10}" + "".join(f"{impl:>24}" for impl in impls)]
    families: dict[str, list[dict[str, float]]] = {}
    notes: dict[str, None] = {}
    for contest in contests:
        case = contest.case
        ratios = {e.impl: contest.ratios(e) for e in contest.entrants if e.impl != OURS}
        cells = [
            f"{median(r):8.2f}x{f'{quantile(r, 0.2):.2f} - {quantile(r, 0.8):.2f}':>15}"
            if r
            else f"{'-':>24}"
            for r in (ratios.get(impl, []) for impl in impls)
        ]
        label = f"{case.name} {case.mode} {case.dtype}"
        lines.append(f"{label:46}{case.shape:>18}{median(contest.ours.times):10.2f}{''.join(cells)}")
        family = f"{case.name.split()[0]} {case.layer}s {case.mode} {case.dtype}"
        families.setdefault(family, []).append({impl: median(r) for impl, r in ratios.items() if r})
        notes |= {f"{e.impl}, {case.layer} {case.dtype}: {e.note}": None for e in contest.entrants if e.note}
    for family, members in families.items():
        columns = [[medians[impl] for medians in members if impl in medians] for impl in impls]
        cells = [
            f"{geometric_mean(c):8.2f}x{'worst':>8}{min(c):6.2f}x" if c else f"{'-':>24}" for c in columns
        ]
        if len(members) > 1:
            lines.append(f"{family:46}{'geometric mean':>18}{'':10}{''.join(cells)}")
    return "\n".join([*lines, *notes])

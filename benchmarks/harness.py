"""What the benchmark suite prints and writes of its comparisons."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import torch

from resnet_fused.cli.text import columns, shown
from resnet_fused.measure import OURS, Comparison, header, quantiles

#: Images per batch; a GPU wants more than a CPU has time for.
BATCH = int(os.environ.get("RESNET_FUSED_BENCH_BATCH", "16"))


def write_results(
    path: Path, device: torch.device, comparisons: list[Comparison], seconds: float, ceilings: dict[str, Any]
) -> None:
    """One JSON file: the header and a row per provider. ``ceilings``: benchmarks.roofline.Ceilings by dtype."""
    rows = [row for comparison in comparisons for row in comparison.rows()]
    head = header(device, seconds, {dtype: asdict(of_dtype) for dtype, of_dtype in ceilings.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"header": head, "rows": rows}, indent=1) + "\n")


def table(comparisons: list[Comparison]) -> str:
    """The comparisons as text: our time, how many times as fast as each other provider we are, and the notes."""
    names = list(
        dict.fromkeys(p.name for c in comparisons for p in c.providers if p.name != OURS and p.times)
    )
    rows = [["", "shape", "ours ms", *names]]
    families: dict[str, list[dict[str, float]]] = {}
    notes: dict[str, None] = {}
    for comparison in comparisons:
        case = comparison.case
        ratios = {p.name: comparison.ratios(comparison.ours, p) for p in comparison.providers}
        spreads = [quantiles(ratios.get(name, []), "median", "p20", "p80").values() for name in names]
        cells = [shown("{:.2f}x  {:.2f} - {:.2f}", *spread) for spread in spreads]
        time = f"{median(comparison.ours.times):.2f}"
        rows.append([f"{case.name} {case.mode} {case.dtype}", case.shape, time, *cells])
        family = f"{case.name.split()[0]} {case.layer}s {case.mode} {case.dtype}"
        families.setdefault(family, []).append({name: median(r) for name, r in ratios.items() if r})
        notes |= {
            f"{p.name}, {case.layer} {case.dtype}: {p.note}": None for p in comparison.providers if p.note
        }
    for family, members in families.items():
        medians = [[of[name] for of in members if name in of] for name in names]
        cells = [f"{geometric_mean(m):.2f}x  worst {min(m):.2f}x" if m else "-" for m in medians]
        if len(members) > 1:
            rows.append([family, "geometric mean", "", *cells])
    return "\n".join([*columns(rows, numbers=True), *notes])

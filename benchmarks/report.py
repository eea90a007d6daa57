"""Puts the figures of a results file into README, between its markers: ``python -m benchmarks.report [--check]``.

No number in the table is typed by hand; ``--check`` only compares, and fails where README says something else.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
START, END = "<!-- results: start -->", "<!-- results: end -->"
MODES = {
    "fwd_bwd": "forward + backward",
    "bwd": "backward",
    "train": "training step",
    "first_step": "first step",
}
BASELINES = {"eager_channels_last": "", "compile_default": ", against `torch.compile`"}
LAYERS = ["model", "block", "op"]


def newest_results() -> Path:
    """The results file whose header has the latest date.

    Raises:
        FileNotFoundError: benchmarks/results holds none.
    """
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    if not files:
        raise FileNotFoundError(
            "benchmarks/results is empty: run `make bench RESULTS=benchmarks/results/NAME.json`"
        )
    return max(files, key=lambda path: json.loads(path.read_text())["header"]["date"])


def markdown(results: dict[str, Any]) -> str:
    """The table: one line per op or architecture's blocks (geometric mean over all) or model, mode and dtype."""
    header, rows = results["header"], results["rows"]
    lines = [
        f"{header['device']}, {header['threads']} threads, torch {header['torch']}, {header['date'][:10]};"
        " batch 16, channels_last, times interleaved in one process, outputs checked in the same run."
        " Ratios are medians of pairs, with their 20th and 80th percentile, or geometric means over the shapes.",
        "",
        "| what | dtype | eager ms | fused ms | eager / fused |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    groups: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        baseline = row["impl"] if row["impl"] != "resnet_fused" else row.get("against", "eager_channels_last")
        name = row["name"].partition(" ")[0] + " blocks" if row["layer"] == "block" else row["name"]
        groups.setdefault((name, row["mode"], row["dtype"], baseline), []).append(row)
    order = sorted(
        groups,
        key=lambda key: (
            LAYERS.index(groups[key][0]["layer"]),
            list(MODES).index(key[1]),
            list(BASELINES).index(key[3]),
        ),
    )
    for key in order:
        name, mode, dtype, baseline = key
        fused = [row for row in groups[key] if row["impl"] == "resnet_fused"]
        base = sum(row["median_ms"] for row in groups[key] if row["impl"] == baseline)
        ratio = f"{statistics.geometric_mean(row['ratio'] for row in fused):.2f}x"
        if len(fused) > 1:
            ratio += f" (worst {min(row['ratio'] for row in fused):.2f}x)"
        else:
            ratio += f" ({fused[0]['ratio_p20']:.2f} to {fused[0]['ratio_p80']:.2f})"
        what = f"{name}, {MODES[mode]}{BASELINES[baseline]}" + (
            f", all {len(fused)}" if len(fused) > 1 else ""
        )
        ours = sum(row["median_ms"] for row in fused)
        lines.append(f"| {what} | {dtype} | {base:.1f} | {ours:.1f} | {ratio} |")
    return "\n".join(lines)


def with_table(readme: str, table: str) -> str:
    """README's text with the table between the markers.

    Raises:
        ValueError: the markers are missing.
    """
    if START not in readme or END not in readme:
        raise ValueError(f"README.md must hold the markers {START} and {END}")
    before, _, rest = readme.partition(START)
    return f"{before}{START}\n{table}\n{END}{rest.partition(END)[2]}"


def main(arguments: list[str]) -> int:
    readme = ROOT / "README.md"
    now = readme.read_text()
    updated = with_table(now, markdown(json.loads(newest_results().read_text())))
    if "--check" in arguments:
        if now != updated:
            print("README.md does not show the newest results: run `make report`", file=sys.stderr)
        return int(now != updated)
    readme.write_text(updated)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

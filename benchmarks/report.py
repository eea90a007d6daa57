"""Figures of benchmarks/results/*.json as tables and charts: ``python -m benchmarks.report [--check] [--root DIR]``.

Writes benchmarks/RESULTS.md, benchmarks/results/charts/*.svg and README.md's tables between its markers, from the
newest file of each device and layer; no number is typed by hand. ``--check`` only compares: 1 where one differs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import geometric_mean

from benchmarks.page import with_tables
from benchmarks.report_charts import rounded
from benchmarks.report_files import (
    CHARTS,
    DTYPES,
    LAYERS,
    MODES,
    OURS,
    Case,
    Device,
    Key,
    Spread,
    grouped,
    newest,
    read,
)

ROOT = Path(__file__).parent.parent
README, RESULTS = Path("README.md"), Path("benchmarks/RESULTS.md")
EAGER = "eager_channels_last"
#: What README compares with, and its head there.
BASELINES = {
    EAGER: "eager / fused",
    "compile_default": "`torch.compile` / fused",
    "compile_max_autotune": "`torch.compile` max-autotune / fused",
}
#: What the project wants of a training step: times as fast as these, and at most this share of eager's memory.
AIMS, MEMORY_AIM = {EAGER: 2.0, "compile_max_autotune": 1.5}, 0.55
#: NVIDIA's MLPerf v4.0 figure, images per second on one H100.
MLPERF, MLPERF_SOURCE = 7158, "NVIDIA's MLPerf v4.0 figure per H100 (fp16, batch 400, closed MXNet)"


def ms(value: float) -> str:
    return f"{value:,.1f}" if value >= 1 else f"{value:.3f}"


def times(value: float) -> str:
    return f"{value:.2f}x"


def spread(found: Spread | None, written: Callable[[float], str]) -> str:
    """The median, and the 20th and 80th percentile; empty for nothing."""
    if not found:
        return ""
    middle, low, high = map(written, found)
    return f"{middle} [{low.rstrip('x')}-{high.rstrip('x')}]"


def mean_and_worst(cases: list[Case], impl: str) -> str:
    """The geometric mean of the ratios and the least of them, how many have one; of a single case its ratio."""
    ratios = [found[0] for case in cases if (found := case.ratio(impl))]
    if not ratios:
        return next((word for case in cases if (word := case.why_not(impl))), "")
    if len(cases) == 1:
        return spread(cases[0].ratio(impl), times)
    some = f", {len(ratios)} of {len(cases)}" if len(ratios) < len(cases) else ""
    return f"{times(geometric_mean(ratios))} (worst {times(min(ratios))}{some})"


def missing(case: Case, impl: str) -> str:
    """That it has no figures, and why, in words that a table can hold; empty where it has some."""
    word, note = case.why_not(impl), " ".join(case.rows[impl]["note"].split()) if impl in case.rows else ""
    note = note.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return f"{word}: {note}" if word and note else word


def share_of_limit(case: Case, impl: str) -> str:
    row = case.accepted(impl)
    if row is None or row["roofline_ms"] is None:
        return ""
    share = row["roofline_ms"] / row["median_ms"]
    return f"{share:.0%}{'*' if share < 0.5 else ''}"


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Lines of Markdown; a head that ends in a colon is of a right-aligned column. Empty columns are left out."""
    columns = [column for column in zip(heads, *rows, strict=True) if any(column[1:])]
    lines = zip(
        *((head.rstrip(":"), "---:" if head[-1] == ":" else "---", *cells) for head, *cells in columns),
        strict=True,
    )
    return ["", *(f"| {' | '.join(line)} |" for line in lines)] if columns else []


def provenance(device: Device) -> list[str]:
    """A line per file: what was measured, on what, with what and when."""
    lines = []
    for file, layers in device.sources:
        head, clocks = file.header, file.header["clocks"]
        versions = {"CUDA": "cuda", "cuDNN": "cudnn", "Python": "python"}
        ceilings = [
            f"{dtype} {head['ceilings'][dtype]['bandwidth'] / 1e9:,.0f} GB/s and"
            f" {head['ceilings'][dtype]['flops'] / 1e9:,.0f} GFLOP/s"
            for dtype in DTYPES
            if dtype in head["ceilings"]
        ]
        facts = [
            device.title,
            head["driver"] and f"driver {head['driver']}",
            f"clocks {clocks['sm_mhz']} MHz, memory {clocks['memory_mhz']} MHz" if clocks else "",
            *(f"{name} {head[name]}" for name in ("torch", "triton") if head[name]),
            *(f"{name} {head[key]}" for name, key in versions.items() if head[key]),
            f"{file.date:%Y-%m-%d %H:%M} UTC",
            file.commit,
            f"ran for {head['seconds']:,.0f} s",
            f"limits of the device: {', '.join(ceilings)}" if ceilings else "",
        ]
        link = f"[{file.path.name}](results/{file.path.name})"
        lines.append(
            f"- {', '.join(LAYERS[layer] for layer in layers)} ({link}): {'; '.join(filter(None, facts))}"
        )
    return lines


def models_tables(device: Device) -> list[str]:
    """A table per mode, dtype and input."""
    heads = [
        "model",
        "implementation",
        "ms:",
        "img/s:",
        "its ms / fused ms:",
        "peak MB:",
        "fused MB / its MB:",
    ]
    heads += ["first step ms:", "of the limit:", "note"]
    lines: list[str] = []
    for key, cases in grouped(
        device.cases("model"), lambda case: (MODES[case.mode], case.dtype, case.shape)
    ).items():
        rows = []
        for case in cases:
            for impl in (impl for impl in device.impls if impl in case.rows):
                row, rate, memory = case.rows[impl], case.rate(impl), case.memory(impl)
                cells = (
                    spread(case.time(impl), ms),
                    rounded(rate[0]) if rate else "",
                    spread(case.ratio(impl), times),
                    rounded(row["peak_mb"]) if row["peak_mb"] else "",
                    times(memory) if memory and impl != OURS else "",
                    ms(row["first_step_ms"]) if row["first_step_ms"] else "",
                    share_of_limit(case, impl),
                    missing(case, impl),
                )
                rows.append((case.name, impl, *cells))
        lines += ["", f"#### {', '.join(key)}", *table(heads, rows)]
    return lines


def aims(device: Device) -> list[str]:
    """What the project wants of training steps on a GPU, and on an H100 the fastest published figure."""
    if device.newest["model"].header["device_type"] == "cpu":
        return []
    rows, rates = [], []
    for case in device.cases("model", "train"):
        found = {impl: case.ratio(impl) for impl in AIMS}
        cells = [reached(case, impl, ratio and ratio[0], AIMS[impl]) for impl, ratio in found.items()]
        rows.append(
            (case.name, case.dtype, *cells, reached(case, EAGER, case.memory(EAGER), MEMORY_AIM, least=False))
        )
        if case.name == "resnet50" and (rate := case.rate(OURS)):
            rates.append(
                f"{rounded(rate[0])} in {case.dtype} at batch {case.batch} ({times(rate[0] / MLPERF)})"
            )
    heads = ["model", "dtype", *(f"at least {aim:.1f}x {impl}" for impl, aim in AIMS.items())]
    lines = table([*heads, f"at most {times(MEMORY_AIM)} of {EAGER}'s memory"], rows)
    if rates and "H100" in device.title:
        lines += ["", f"resnet50's training, img/s: {', '.join(rates)}, beside {MLPERF:,}, {MLPERF_SOURCE}."]
    return ["", "#### aims of a training step", *lines] if rows else []


def reached(case: Case, impl: str, value: float | None, aim: float, least: bool = True) -> str:
    """Whether an aim is, and by how much; ``least``: more is better."""
    if value is None:
        return case.why_not(impl) or case.why_not(OURS) or "not measured"
    well = value >= aim if least else value <= aim
    return f"{times(value)}: {'reached' if well else 'missed'} by {times(abs(value - aim))}"


def contest_tables(device: Device, layer: str) -> list[str]:
    """Blocks: a table per architecture and dtype; ops: one per dtype, with a mean for each op."""
    lines: list[str] = []

    def key(case: Case) -> Key:
        return (
            case.family if layer == "block" else "all ops",
            MODES[case.mode],
            case.dtype,
            f"batch {case.batch}",
        )

    for title, cases in grouped(device.cases(layer), key).items():
        notes: dict[str, int] = {}
        first, *others = [
            impl for impl in device.impls if impl == OURS or any(case.time(impl) for case in cases)
        ]
        rows: list[Iterable[str]] = []
        for (family,), members in grouped(cases, lambda case: (case.family,)).items():
            for case in members:
                ours, *theirs = (contest_cell(case, impl, notes) for impl in (first, *others))
                label = case.name.partition(" ")[2] or case.name
                rows.append((label, case.shape, ours, share_of_limit(case, OURS), *theirs))
            if len(members) > 1:
                means = [mean_and_worst(members, impl) for impl in others]
                rows.append((f"**{family}, geometric mean**", "", "", "", *means))
        heads = [layer, "shape", f"{OURS}:", "of the limit:", *(f"{impl}:" for impl in others)]
        lines += ["", f"#### {', '.join(title)}", *table(heads, rows)]
        absent = [(impl, case) for case in cases for impl in case.rows if impl not in (OURS, *others)]
        below = [*(f"<sup>{number}</sup> {text}" for text, number in notes.items())]
        below += dict.fromkeys(f"{impl} {missing(case, impl)}" for impl, case in absent)
        lines += [line for text in below for line in ("", text)]
    return lines


def contest_cell(case: Case, impl: str, notes: dict[str, int]) -> str:
    """Time and ratio; without one, a mark whose note is added to the numbered ones."""
    time, text = case.time(impl), missing(case, impl)
    cell = ", ".join(filter(None, [ms(time[0]) if time else "", spread(case.ratio(impl), times)]))
    return f"{cell or '-'} <sup>{notes.setdefault(f'{impl} {text}', len(notes) + 1)}</sup>" if text else cell


INTRODUCTION = f"""# Results

Written by `make report`, like the tables in [README](../README.md), from the newest file of each device and layer in
`results/`. All implementations take turns in one process; times are medians over the rounds, with the 20th and the
80th percentile in brackets. A ratio is the median of an implementation's time over that of {OURS} in the same
round: above 1x {OURS} is faster. Only what agreed with the reference in the same run has one. For blocks and ops
a cell is milliseconds, then the ratio. MB are 1e6 bytes, the most that was held at once. The limit is the least time
that any implementation needs on the device (`python -m benchmarks.roofline`), here as a share of the measured time;
`*` is below half."""


def results_page(devices: list[Device], charts: Iterable[Path]) -> str:
    lines = [INTRODUCTION]
    for device in devices:
        lines += ["", f"## {device.title}", "", *provenance(device)]
        for layer in device.newest:
            lines += ["", f"### {LAYERS[layer]}"]
            if (chart := device.chart(layer)) in charts:
                place = chart.relative_to(RESULTS.parent).as_posix()
                lines += ["", f"![{LAYERS[layer]} on {device.title}, as bars]({place})"]
            lines += (
                [*aims(device), *models_tables(device)] if layer == "model" else contest_tables(device, layer)
            )
    return "\n".join(lines) + "\n"


def readme_tables(devices: list[Device]) -> str:
    lines = [
        "Times and ratios are medians, with the 20th and the 80th percentile, or geometric means over as many cases",
        "as the line says; above 1x fused is faster. Charts, other implementations and how near each is to the",
        f"limit of the device: [{RESULTS.as_posix()}]({RESULTS.as_posix()}).",
    ]
    for device in devices:
        sources = [
            f"{', '.join(LAYERS[layer].lower() for layer in layers)} {file.date:%Y-%m-%d},"
            f" torch {file.header['torch']}, {file.commit}"
            for file, layers in device.sources
        ]
        lines += [
            "",
            f"**{device.title}** ({'; '.join(sources)})",
            *readme_models(device),
            *readme_families(device),
        ]
    return "\n".join(lines)


def readme_models(device: Device) -> list[str]:
    rows = []
    for case in device.cases("model", "train"):
        time, rate, memory = case.time(OURS), case.rate(OURS), case.memory(EAGER)
        ours = (spread(time, ms), rounded(rate[0])) if rate else (case.why_not(OURS), "")
        ratios = [spread(case.ratio(impl), times) or case.why_not(impl) for impl in BASELINES]
        rows.append(
            (f"{case.name}, batch {case.batch}", case.dtype, *ours, *ratios, times(memory) if memory else "")
        )
    heads = ["training step", "dtype", "fused ms:", "img/s:", *(f"{head}:" for head in BASELINES.values())]
    return table([*heads, "memory, fused / eager:"], rows)


def readme_families(device: Device) -> list[str]:
    """A line for an architecture's blocks in each dtype, and for each op in all."""
    blocks = grouped(device.cases("block"), lambda case: (f"{case.family} blocks", case.dtype))
    ops = grouped(device.cases("op"), lambda case: (case.name,))
    rows = []
    for (name, *_), cases in (*blocks.items(), *ops.items()):
        dtypes = dict.fromkeys(case.dtype for case in cases)
        means = [mean_and_worst(cases, impl) for impl in BASELINES]
        rows.append((f"{name}, {len(cases)}", ", ".join(dtypes), *means))
    return table([MODES["fwd_bwd"], "dtype", *(f"{head}:" for head in BASELINES.values())], rows)


def differences(root: Path, wanted: dict[Path, str]) -> str:
    """Which files differ from what is wanted, are missing, or are charts of nothing any more; empty for none."""
    lacking = [path for path in wanted if not (root / path).exists()]
    stale = [
        path for path in wanted if path not in lacking and (root / path).read_bytes() != wanted[path].encode()
    ]
    kinds = {"not what the results say": stale, "missing": lacking, "of no results": abandoned(root, wanted)}
    text = "; ".join(f"{kind}: {', '.join(map(str, paths))}" for kind, paths in kinds.items() if paths)
    here = importlib.metadata.version("matplotlib")
    pinned = re.search(
        r"^matplotlib==(\S+)", (root / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE
    )
    if pinned and pinned[1] != here and any(path.suffix == ".svg" for path in stale):
        text += f" (charts perhaps only because matplotlib is {here} here and {pinned[1]} in constraints.txt)"
    return text


def abandoned(root: Path, wanted: dict[Path, str]) -> list[Path]:
    charts = (CHARTS / file.name for file in (root / CHARTS).glob("*.svg"))
    return sorted(chart for chart in charts if chart not in wanted)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="only compare; exit status 1 where a file differs"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout (default: where this file is)")
    options = parser.parse_args(arguments)
    root: Path = options.root
    try:
        devices = newest(read(path) for path in sorted((root / CHARTS.parent).glob("*.json")))
        if not devices:
            raise ValueError(
                f"{root / CHARTS.parent} is empty: run `make bench RESULTS={CHARTS.parent}/NAME.json`"
            )
        readme = with_tables((root / README).read_text(encoding="utf-8"), {"results": readme_tables(devices)})
    except ValueError as error:
        parser.error(str(error))
    drawn = {device.chart(layer): device.drawn(layer) for device in devices for layer in device.newest}
    charts = {path: svg for path, svg in drawn.items() if svg}
    wanted = {README: readme, RESULTS: results_page(devices, charts), **charts}
    if options.check:
        if found := differences(root, wanted):
            print(f"{found}: run `make report`", file=sys.stderr)
        return int(bool(found))
    for path in abandoned(root, wanted):
        (root / path).unlink()
    for path, text in wanted.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(text.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

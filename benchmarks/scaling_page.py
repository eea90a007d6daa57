"""Tables and picture of docs/scaling.md, from the latest file in benchmarks/results/scaling and the model."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

from benchmarks.page import show
from benchmarks.roofline import Ceilings
from benchmarks.roofline_model import held_bytes
from benchmarks.scaling import ALONE, DDP, LARGE, SMALL, SYNC
from benchmarks.scaling_model import (
    BATCHES,
    GPUS,
    Cluster,
    Prediction,
    Training,
    cluster_table,
    doubt_table,
    predict,
)
from resnet_fused.measure import EAGER, OURS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "scaling"
PAGE = ROOT / "docs" / "scaling.md"
CHART = ROOT / "docs" / "scaling.svg"
AXES = {"batch": "images", "image_size": "pixels of a side", "depth": "layers"}
LOOKS = {OURS: ("resnet_fused", "#0072b2"), EAGER: ("eager", "#999999")}

Row = dict[str, Any]


class Found:
    """A results file.

    Raises:
        ValueError: the file is no such file.
    """

    def __init__(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text())
            self.header: Row = content["header"]
            self.rows: list[Row] = content["curves"]
            self.collectives: list[Row] = content["collectives"]
            self.calls: dict[str, int] = content["calls"]
            self.date: str = self.header["date"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is no file of `python -m benchmarks.scaling --json` ({error!r})"
            ) from error

    def accepted(self, curve: str, impl: str, variant: str = ALONE) -> dict[int, Row]:
        """Checked rows by what they are drawn over."""
        return {
            row["x"]: row
            for row in self.rows
            if (row["curve"], row["impl"], row["variant"]) == (curve, impl, variant) and row["checked"]
        }

    def seconds(self, ranks: int, op: str, size: int) -> float:
        """Of a collective, the median."""
        return next(
            row["median_ms"] / 1e3
            for row in self.collectives
            if (row["ranks"], row["op"], row["bytes"]) == (ranks, op, size)
        )


def latest(folder: Path = RESULTS) -> Found:
    """The results of the latest run.

    Raises:
        ValueError: there are none.
    """
    files = [Found(path) for path in sorted(folder.glob("*.json"))]
    if not files:
        raise ValueError(
            f"{folder} has no results: run `python -m benchmarks.scaling --json {folder}/NAME.json`"
        )
    return max(files, key=lambda found: found.date)


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Markdown; all columns but the first are numbers."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(found: Found) -> str:
    """Where the figures are from, in a paragraph."""
    head = found.header
    base = next(iter(found.accepted("depth", EAGER).values()))
    of_rank = next(row for row in found.rows if row["curve"] == "ranks")
    return (
        f"{head['device']}, {head['threads']} threads, torch {head['torch']}, {head['date'][:10]}, {base['dtype']};"
        f" batch {base['batch']} at {base['image_size']}x{base['image_size']} and resnet50 where nothing else is said;"
        f" ranks: one thread each, batch {of_rank['batch']} each at"
        f" {of_rank['image_size']}x{of_rank['image_size']}."
    )


def curves_table(found: Found) -> str:
    """A row for each point of the curves that one process measures."""
    rows = []
    for curve, unit in AXES.items():
        fused, eager = found.accepted(curve, OURS), found.accepted(curve, EAGER)
        for x in sorted(fused.keys() & eager.keys()):
            a, b = fused[x], eager[x]
            ratio = f"{b['ratio']:.2f}x ({b['ratio_p20']:.2f} to {b['ratio_p80']:.2f})"
            rows.append([f"{x} {unit}", spread(a), spread(b), ratio, *memory(a, b)])
    return table(["", "fused ms", "eager ms", "eager / fused", "fused MB", "eager MB", "fused / eager"], rows)


def spread(row: Row) -> str:
    return f"{row['median_ms']:,.0f} ({row['p20_ms']:,.0f} to {row['p80_ms']:,.0f})"


def memory(fused: Row, eager: Row) -> list[str]:
    if fused["peak_mb"] is None or eager["peak_mb"] is None:
        return ["-"] * 3
    return [
        f"{fused['peak_mb']:,.0f}",
        f"{eager['peak_mb']:,.0f}",
        f"{fused['peak_mb'] / eager['peak_mb']:.2f}x",
    ]


def line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Slope and intercept by least squares of (x, y)."""
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return slope, mean_y - slope * mean_x


def growth_table(found: Found) -> str:
    """Exponents of time, and the straight line of memory over batch beside what the model says is held."""
    rows = []
    for impl, (name, _) in LOOKS.items():
        batches = found.accepted("batch", impl)
        if min(len(found.accepted(curve, impl)) for curve in ("batch", "image_size")) < 2:
            continue  # no line through one point
        exponents = []
        for curve in ("batch", "image_size"):
            points = [(math.log(x), math.log(r["median_ms"])) for x, r in found.accepted(curve, impl).items()]
            exponents.append(f"{line(points)[0]:.2f}")
        slope, intercept = line([(x, r["peak_mb"]) for x, r in batches.items() if r["peak_mb"] is not None])
        row = next(iter(batches.values()))
        held = [
            held_bytes(row["arch"], batch, row["image_size"], row["dtype"], way_of(impl, found))
            for batch in (1, 2)
        ]
        rows.append(
            [name, *exponents, f"{slope:.1f}", f"{(held[1] - held[0]) / 1e6:.1f}", f"{intercept:,.0f}"]
        )
    heads = [
        "",
        "time ~ batch^",
        "time ~ side^",
        "peak MB an image",
        "held MB an image, counted",
        "MB without images",
    ]
    return table(heads, rows)


def way_of(impl: str, found: Found) -> str:
    """How the roofline's model knows an implementation."""
    if impl == EAGER:
        return "eager"
    return "folded" if found.header["device_type"] == "cuda" else "vendor"


def collectives_table(found: Found) -> str:
    """Measured sums, and what they say about hops and bandwidth."""
    rows = []
    for ranks in sorted({row["ranks"] for row in found.collectives}):
        cluster = cluster_of(found, ranks)
        times = [found.seconds(ranks, "all_reduce", size) * 1e6 for size in (SMALL, LARGE)]
        rows.append(
            [
                str(ranks),
                *(f"{t:,.0f}" for t in times),
                f"{cluster.node_latency * 1e6:,.0f}",
                f"{cluster.node_bandwidth / 1e9:.2f}",
            ]
        )
    small, large = f"{SMALL} B", f"{LARGE >> 20} MiB"
    heads = [f"all-reduce us, {small}", f"all-reduce us, {large}"]
    return table(["ranks", *heads, "hop us", "GB/s"], rows)


def cluster_of(found: Found, ranks: int) -> Cluster:
    small, large = (found.seconds(ranks, "all_reduce", size) for size in (SMALL, LARGE))
    return Cluster.measured(ranks, small, large, LARGE)


def confronted_table(found: Found) -> str:
    """The formula beside what was measured, with its error; see `predictions`."""
    rows = []
    for ranks, impl, variant, measured, guesses in predictions(found):
        cells = [f"{guess:,.0f} ({guess / measured - 1:+.0%})" for guess in guesses] + ["-"] * (
            3 - len(guesses)
        )
        what = {DDP: "gradients summed", SYNC: "SyncBatchNorm"}[variant]
        rows.append([f"{ranks} ranks, {LOOKS[impl][0]}, {what}", f"{measured:,.0f}", *cells])
    heads = [
        "",
        "measured ms",
        "from one rank's step",
        "from all ranks' step",
        "from all ranks' step, nothing hidden",
    ]
    return table(heads, rows)


def predictions(found: Found) -> list[tuple[int, str, str, float, list[float]]]:
    """(ranks, impl, variant, measured ms, predicted ms by three ways; SyncBatchNorm has nothing to hide, so by two).

    From the step of one rank alone, which knows nothing of ranks that share memory and caches, with stragglers of the
    spread measured there; from the step of as many ranks at once that do not talk; and from that, nothing overlapped.
    """
    rows = []
    for ranks in sorted({row["ranks"] for row in found.collectives}):
        for variant in (DDP, SYNC):
            for impl in LOOKS:
                alone = found.accepted("ranks", impl)
                measured = found.accepted("ranks", impl, variant).get(ranks)
                if measured is None or 1 not in alone or ranks not in alone:
                    continue
                one, every = (predicted(found, alone[x], ranks, variant) for x in (1, ranks))
                base, exposed = 1e3 * (every.compute + every.sync), 1e3 * every.all_reduce
                hidden = 1e3 * (every.exposed if variant == DDP else 0.0)
                first = 1e3 * (one.step - (0.0 if variant == DDP else one.exposed))
                guesses = [first, base + hidden, *([base + exposed] if variant == DDP else [])]
                rows.append((ranks, impl, variant, measured["median_ms"], guesses))
    return rows


def predicted(found: Found, row: Row, ranks: int, variant: str) -> Prediction:
    """By the formula, from the measured step of ``row``."""
    width = (
        2 * 0.8416
    )  # standard deviations between the 20th and the 80th percentile of a normal distribution
    training = Training(
        arch=row["arch"],
        batch=row["batch"],
        image_size=row["image_size"],
        dtype=row["dtype"],
        way=way_of(row["impl"], found),
        ceilings=Ceilings(**found.header["ceilings"][row["dtype"]]),
        step_seconds=row["median_ms"] / 1e3,
        variation=(row["p80_ms"] - row["p20_ms"]) / row["median_ms"] / width,
        sync_batch_norm=variant == SYNC,
    )
    return predict(ranks, training, cluster_of(found, ranks))


def tables(found: Found) -> dict[str, str]:
    """All tables of the page by their markers."""
    layers, calls = "", found.calls
    if calls:
        layers = f"Counted in a step: {calls['all_reduce']} all-reduces."
    made = {
        "machine": machine(found),
        "curves": curves_table(found),
        "growth": growth_table(found),
        "calls": layers,
        "collectives": collectives_table(found),
        "confronted": confronted_table(found),
    }
    made |= {f"cluster {batch}": cluster_table(Training(batch=batch), Cluster()) for batch in BATCHES}
    return made | {"doubts": doubt_table(Training(batch=min(BATCHES)), Cluster())}


# The picture.


def chart(found: Found) -> str:
    """The curves as the text of an SVG: the same bytes for the same figures."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever a matplotlibrc says
        matplotlib.rcParams.update({"svg.hashsalt": "resnet_fused", "svg.fonttype": "none", "font.size": 8})
        figure = Figure(figsize=(11, 5.6), facecolor="white", layout="constrained")
        axes = figure.subplots(2, 4)
        for column, (curve, unit) in enumerate(AXES.items()):
            for place, key, label in ((0, "median_ms", "ms a step"), (1, "peak_mb", "peak memory, MB")):
                draw(axes[place, column], found, curve, key)
                axes[place, column].set(xlabel=f"{curve.replace('_', ' ')}, {unit}", ylabel=label)
        draw_ranks(axes[0, 3], found)
        draw_model(axes[1, 3])
        for each in axes.flat:
            each.grid(alpha=0.3)
            each.set_ylim(bottom=0)
            each.spines[["top", "right"]].set_visible(False)
            each.legend(frameon=False, fontsize=7)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def draw(axes: Any, found: Found, curve: str, key: str) -> None:
    """One quantity of both implementations; of times also the 20th to 80th percentile."""
    for impl, (name, colour) in LOOKS.items():
        rows = {x: row for x, row in sorted(found.accepted(curve, impl).items()) if row[key] is not None}
        axes.plot(list(rows), [row[key] for row in rows.values()], "o-", ms=3, color=colour, label=name)
        if key == "median_ms":
            low, high = ([row[q] for row in rows.values()] for q in ("p20_ms", "p80_ms"))
            axes.fill_between(list(rows), low, high, color=colour, alpha=0.2, linewidth=0)


def draw_ranks(axes: Any, found: Found) -> None:
    styles = {ALONE: (":", "alone"), DDP: ("-", "gradients summed"), SYNC: ("--", "SyncBatchNorm")}
    for impl, (name, colour) in LOOKS.items():
        for variant, (style, what) in styles.items():
            several = found.accepted("ranks", impl, variant)
            one = {x: row for x, row in found.accepted("ranks", impl).items() if x == 1}
            rows = sorted((one | several).items())
            if several:
                values = [row["median_ms"] for _, row in rows]
                label = f"{name}, {what}"
                axes.plot([x for x, _ in rows], values, style, marker="o", ms=3, color=colour, label=label)
    axes.set(xlabel="ranks", ylabel="ms a step")
    axes.set_xticks(sorted(found.accepted("ranks", OURS)))


def draw_model(axes: Any) -> None:
    for batch, colour in zip(BATCHES, ("#009e73", "#d55e00"), strict=True):
        for sync, style in ((False, "-"), (True, "--")):
            training = Training(batch=batch, sync_batch_norm=sync)
            values = [100 * predict(gpus, training, Cluster()).efficiency for gpus in GPUS]
            label = f"batch {batch}{', SyncBatchNorm' if sync else ''}"
            axes.plot(GPUS, values, style, marker="o", ms=3, color=colour, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(GPUS, [str(gpus) for gpus in GPUS])
    axes.set(xlabel="H100s, by the model", ylabel="efficiency, %")


def write() -> int:
    """Prints the tables and writes page and picture; an exit code."""
    found = latest()
    CHART.write_text(chart(found))
    return show(tables(found), PAGE, write=True)

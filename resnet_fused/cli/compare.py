"""What `--impl compare` measures: paired step times, memory held for backward, and the table at the end."""

import copy
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.backend import why_plain
from resnet_fused.cli.data import Batches
from resnet_fused.cli.files import write_text

if TYPE_CHECKING:
    from resnet_fused.cli.learner import Learner

TYPICAL_SIZE = 224  # pixels; activations of smaller images move less memory
WARM_UP = 5  # steps at the start of the program that are not timed


def timed_steps(learners: "Sequence[Learner]", images: Tensor, labels: Tensor, keep: bool) -> None:
    """One step of each on the same batch; who goes first alternates.

    `keep` puts the two durations into `progress.step_seconds`, where equal places are pairs.
    """
    turn = learners if learners[0].progress.step % 2 == 0 else learners[::-1]
    for learner in turn:
        synchronize(learner.device)
        start = time.perf_counter()
        learner.step(images, labels)
        synchronize(learner.device)
        seconds = time.perf_counter() - start
        learner.progress.seconds += seconds
        if keep:
            learner.progress.step_seconds.append(seconds)


def synchronize(device: torch.device) -> None:
    """Waits for a GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory(learner: "Learner", images: Tensor, labels: Tensor) -> tuple[int, int | None]:
    """Bytes that a forward keeps for its backward, and on a GPU the peak of a step above the model at rest.

    The first counts each storage that autograd saves once, parameters and buffers not. Measured on a copy, so
    the model's running statistics stay as they are.
    """
    model = copy.deepcopy(learner.model).train()
    own = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return value

    on_gpu = learner.device.type == "cuda"
    before = torch.cuda.memory_allocated(learner.device) if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(learner.device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value), learner.autocast():
        logits = model(images)
    loss = F.cross_entropy(logits.float(), labels)
    if not on_gpu:
        return sum(saved.values()), None
    loss.backward()
    return sum(saved.values()), torch.cuda.max_memory_allocated(learner.device) - before


def conclude(out: Path, title: str, learners: "Sequence[Learner]", batches: Batches) -> None:
    """Evaluates where that is not done, prints the table, and writes it as `compare.json`.

    Every rank must call it.
    """
    rows = {learner.name: measure(learner, batches) for learner in learners}
    fused, reference = (learner.progress.step_seconds for learner in learners)
    summary: dict[str, Any] = {
        "title": title,
        "why_not_fused": why_plain(learners[0].device.type),
        "image_size": learners[0].settings.image_size,
        "timed_steps": len(fused),
        **rows,
    }
    if fused:
        ratios = [r / f for f, r in zip(fused, reference, strict=True)]
        summary["speedup"] = spread(ratios)
        summary["speedup_of_medians"] = statistics.median(reference) / statistics.median(fused)
    if learners[0].world.main:
        write_text(out / "compare.json", json.dumps(summary, indent=2) + "\n")
        print(table(summary))
        print(f"curves: {out / 'compare.png'}, table: {out / 'compare.json'}")
        print(conclusion(summary), flush=True)


def measure(learner: "Learner", batches: Batches) -> dict[str, Any]:
    """The row of one implementation."""
    progress, settings = learner.progress, learner.settings
    whole = bool(progress.history) and not progress.step
    accuracy = progress.history[-1]["val_accuracy"] if whole else learner.evaluate(batches.held_out())[1]
    shape = (settings.batch_size, settings.image_size, settings.image_size, 3)
    labels = torch.arange(settings.batch_size) % len(learner.source.classes)
    held, peak = memory(learner, *learner.prepare((torch.zeros(shape, dtype=torch.uint8), labels)))
    images = settings.batch_size * learner.world.size
    return {
        "label": learner.label,
        "images_per_second": spread([images / seconds for seconds in progress.step_seconds]),
        "held_for_backward_bytes": held,
        "peak_step_bytes": peak,
        "held_out_accuracy": accuracy,
        "held_out_images": len(learner.source.held_out),
    }


def spread(values: list[float]) -> dict[str, float] | None:
    """Median and the 20th and 80th percentiles; None for no values."""
    if not values:
        return None
    fifths = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
    return {"median": statistics.median(values), "p20": fifths[0], "p80": fifths[3]}


def table(summary: dict[str, Any]) -> str:
    """The summary as text."""
    fused, reference = summary["fused"], summary["reference"]
    labels = fused["label"], reference["label"]
    lines: list[tuple[str, ...]] = [("", *labels, " against ".join(labels))]
    size = f"{summary['image_size']}x{summary['image_size']}"
    speed = [row["images_per_second"] for row in (fused, reference)]
    if summary["timed_steps"]:
        gain = summary["speedup"]
        lines.append(
            (
                f"img/s at {size}, median of steps",
                *(f"{s['median']:.1f}" for s in speed),
                f"{gain['median']:.3f}x (paired steps)",
            )
        )
        lines.append(
            (
                "  20 % to 80 % of steps",
                *(f"{s['p20']:.1f} to {s['p80']:.1f}" for s in speed),
                f"{gain['p20']:.3f}x to {gain['p80']:.3f}x",
            )
        )
    else:
        lines.append((f"img/s at {size}", "-", "-", f"the first {WARM_UP} steps are not timed"))
    for key, label in (
        ("held_for_backward_bytes", "memory held for backward"),
        ("peak_step_bytes", "peak memory of a step"),
    ):
        if fused[key] is not None:
            ours, theirs = fused[key], reference[key]
            lines.append((label, f"{ours / 1e6:.1f} MB", f"{theirs / 1e6:.1f} MB", f"{ours / theirs:.3f}x"))
    ours, theirs = fused["held_out_accuracy"], reference["held_out_accuracy"]
    lines.append(
        ("held-out accuracy", f"{ours:.2%}", f"{theirs:.2%}", f"{100 * (ours - theirs):+.2f} points")
    )
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    body = [
        "  ".join(
            [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    ]
    rule = "-" * len(body[0])
    counts = f"{summary['timed_steps']} timed steps, {fused['held_out_images']} held-out images"
    head = f"{summary['title']}\n{counts}"
    return "\n".join([head, rule, body[0], rule, *body[1:], rule])


def conclusion(summary: dict[str, Any]) -> str:
    """What was shown, in words."""
    if summary["why_not_fused"] is not None:
        return f"Nothing ran fused, both columns are plain PyTorch: {summary['why_not_fused']}."
    fused, reference = summary["fused"], summary["reference"]
    ours, theirs = fused["held_out_accuracy"], reference["held_out_accuracy"]
    images = fused["held_out_images"]
    error = math.sqrt(
        (ours * (1 - ours) + theirs * (1 - theirs)) / images
    )  # standard error of the difference
    same = abs(ours - theirs) <= 2 * error
    share = fused["held_for_backward_bytes"] / reference["held_for_backward_bytes"]
    words = (
        f"Shown: trained on the same batches, fused reaches {'the same' if same else 'another'} accuracy "
        f"{'as' if same else 'than'} plain PyTorch ({ours:.2%} and {theirs:.2%} of {images} held-out images, "
        f"{'within' if same else 'more than'} two standard errors{'' if same else ' apart'}), and holds {share:.2f}x "
        "the memory for backward"
    )
    size = summary["image_size"]
    if summary["timed_steps"]:
        words += f", at {summary['speedup']['median']:.2f}x the speed on images of {size}x{size}"
    if size < TYPICAL_SIZE:
        words += (
            f". So small, their activations stay in the cache and fusion saves little time: for speed at "
            f"{TYPICAL_SIZE}x{TYPICAL_SIZE} run `python -m resnet_fused bench`"
        )
    return f"{words}."

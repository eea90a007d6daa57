"""`train --impl compare`: both implementations on the same batches, and the table at the end."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_fused.backend import why_plain
from resnet_fused.cli.data import Batches
from resnet_fused.cli.files import write_text
from resnet_fused.cli.learner import Learner, set_training
from resnet_fused.cli.text import say, shown, table
from resnet_fused.measure import Memory, milliseconds, quantiles, saved_storages

TYPICAL_SIZE = 224  # pixels; activations of smaller images move less memory
WARM_UP = 5  # steps at the start of the program that are not timed


def timed_steps(learners: Sequence[Learner], images: Tensor, labels: Tensor, record: bool) -> None:
    """One step of each on the same batch; the order alternates.

    With `record` the two durations go into `progress.step_seconds`, where equal indices are pairs.
    """
    for learner in learners if learners[0].progress.step % 2 == 0 else learners[::-1]:
        seconds = milliseconds(functools.partial(learner.step, images, labels), learner.device) / 1e3
        learner.progress.seconds += seconds
        if record:
            learner.progress.step_seconds.append(seconds)


def memory(learner: Learner, images: Tensor, labels: Tensor) -> tuple[int, int | None]:
    """Bytes that a forward saves for backward, and on a GPU the peak of a step above the idle model.

    Measured on a copy, so that the model's running statistics stay as they are.
    """
    model = copy.deepcopy(learner.model)
    if learner.settings.compile:
        model.compile()
    set_training(model, learner.settings)
    on_gpu = learner.device.type == "cuda"
    peak = Memory(learner.device) if on_gpu else None
    if peak is not None:
        peak.start()
    known = (*model.parameters(), *model.buffers())
    with saved_storages(*known) as saved, learner.precision.autocast(learner.device.type):
        logits = model(images)
    loss = learner.criterion(logits, labels)
    if peak is None:
        return sum(saved.values()), None
    loss.backward()
    return sum(saved.values()), round(1e6 * (peak.peak_mb() or 0))


def conclude(out: Path, title: str, learners: Sequence[Learner], batches: Batches) -> None:
    """Evaluates where that has not been done, prints the table, and writes it as `compare.json`.

    Every rank must call it.
    """
    fused, reference = (learner.progress.step_seconds for learner in learners)
    summary: dict[str, Any] = {
        "title": title,
        "why_not_fused": why_plain(learners[0].device.type),
        "image_size": learners[0].settings.image_size,
        "timed_steps": len(fused),
        "speedup": quantiles([r / f for f, r in zip(fused, reference, strict=True)]),
        **{learner.name: measure(learner, batches) for learner in learners},
    }
    if learners[0].world.main:
        write_text(out / "compare.json", json.dumps(summary, indent=2) + "\n")
        say(report(summary))
        say(f"curves: {out / 'compare.png'}, table: {out / 'compare.json'}")
        say(conclusion(summary))


def measure(learner: Learner, batches: Batches) -> dict[str, Any]:
    """The row of one implementation."""
    progress, settings = learner.progress, learner.settings
    whole = bool(progress.history) and not progress.step
    accuracy = progress.history[-1]["val_accuracy"] if whole else learner.evaluate(batches.held_out())[1]
    shape = (settings.batch_size, settings.image_size, settings.image_size, 3)
    labels = torch.arange(settings.batch_size) % len(learner.source.classes)
    saved, peak = memory(learner, *learner.prepare((torch.zeros(shape, dtype=torch.uint8), labels)))
    images = settings.batch_size * learner.world.size
    return {
        "label": learner.label,
        "images_per_second": quantiles([images / seconds for seconds in progress.step_seconds]),
        "saved_for_backward_bytes": saved,
        "peak_step_bytes": peak,
        "held_out_accuracy": accuracy,
        "held_out_images": len(learner.source.held_out),
    }


def report(summary: dict[str, Any]) -> str:
    """The summary as a table."""
    fused, reference = summary["fused"], summary["reference"]
    labels = fused["label"], reference["label"]
    size = f"{summary['image_size']}x{summary['image_size']}"
    speed, gain = [row["images_per_second"] for row in (fused, reference)], summary["speedup"]
    timed = (
        f"{gain['median']:.3f}x (paired steps)"
        if summary["timed_steps"]
        else f"the first {WARM_UP} steps are not timed"
    )
    rows = [
        ("", *labels, " against ".join(labels)),
        (f"img/s at {size}, median of steps", *(shown("{:.1f}", s["median"]) for s in speed), timed),
    ]
    if summary["timed_steps"]:
        spreads = [shown("{:.1f} to {:.1f}", s["p20"], s["p80"]) for s in speed]
        rows.append(
            ("  20 % to 80 % of steps", *spreads, shown("{:.3f}x to {:.3f}x", gain["p20"], gain["p80"]))
        )
    for key, label in (
        ("saved_for_backward_bytes", "memory saved for backward"),
        ("peak_step_bytes", "peak memory of a step"),
    ):
        if fused[key] is not None:
            ours, other = fused[key], reference[key]
            rows.append((label, f"{ours / 1e6:.1f} MB", f"{other / 1e6:.1f} MB", f"{ours / other:.3f}x"))
    ours, other = fused["held_out_accuracy"], reference["held_out_accuracy"]
    rows.append(("held-out accuracy", f"{ours:.2%}", f"{other:.2%}", f"{100 * (ours - other):+.2f} points"))
    counts = f"{summary['timed_steps']} timed steps, {fused['held_out_images']} held-out images"
    return f"{summary['title']}\n{counts}\n{table(rows)}"


def conclusion(summary: dict[str, Any]) -> str:
    """What was shown, in words."""
    if summary["why_not_fused"] is not None:
        return f"Nothing ran fused, both columns are eager PyTorch: {summary['why_not_fused']}."
    fused, reference = summary["fused"], summary["reference"]
    ours, other = fused["held_out_accuracy"], reference["held_out_accuracy"]
    images = fused["held_out_images"]
    standard_error = math.sqrt((ours * (1 - ours) + other * (1 - other)) / images)  # of the difference
    same = abs(ours - other) <= 2 * standard_error
    saved = fused["saved_for_backward_bytes"] / reference["saved_for_backward_bytes"]
    words = (
        f"Shown: trained on the same batches, fused reaches {'the same' if same else 'another'} accuracy "
        f"{'as' if same else 'than'} eager PyTorch ({ours:.2%} and {other:.2%} of {images} held-out images, "
        f"{'within' if same else 'more than'} two standard errors{'' if same else ' apart'}), and autograd saves "
        f"{saved:.2f}x as many bytes for backward"
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

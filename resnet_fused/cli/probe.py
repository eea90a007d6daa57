"""First step, peak memory and largest batch of a training step, each measured in a fresh process."""

from __future__ import annotations

import functools
import gc
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from resnet_fused.cli.steps import COMPILED, TrainingStep
from resnet_fused.measure import Memory, failure, milliseconds

LARGEST_BATCH_SECONDS = 60


class ProcessFailed(RuntimeError):
    """The process ended with an error; the message is what it wrote. `code`: its exit code, negative for a signal."""

    def __init__(self, provider: str, code: int, stderr: str) -> None:
        super().__init__(f"{provider} in a process of its own ended with exit code {code}:\n{stderr}")
        self.code = code


def probe(step: TrainingStep, provider: str, largest_batch: bool = False, **cudnn: bool) -> dict[str, Any]:
    """`first_step_ms`, `peak_mb` and, on a GPU if asked, `largest_batch`; or a `note`: see `measure.failure`.

    Args:
        cudnn: flags of torch.backends.cudnn.

    Raises:
        ProcessFailed: any other error there.
    """
    if step.device != "cpu":
        torch.cuda.empty_cache()  # the other process needs the memory
    request = {
        "provider": provider,
        "step": asdict(step),
        "threads": torch.get_num_threads(),
        "largest_batch": largest_batch,
        "cudnn": cudnn,
    }
    command = [sys.executable, "-m", "resnet_fused.cli.probe", json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ProcessFailed(provider, done.returncode, done.stderr)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def main() -> None:
    """The program: prints what it measured as JSON on the last line."""
    request = json.loads(sys.argv[1])
    provider, step = request["provider"], TrainingStep(**request["step"])
    torch.set_num_threads(request["threads"])
    for name, value in request["cudnn"].items():
        setattr(torch.backends.cudnn, name, value)
    if step.device != "cpu":
        torch.cuda.set_device(step.device)
    measured: dict[str, object] = {}
    try:
        measured["first_step_ms"], measured["peak_mb"] = two_steps(step, provider)
        gc.collect()
        # torch.compile would compile for every size that is tried.
        if request["largest_batch"] and step.device != "cpu" and provider not in COMPILED:
            measured["largest_batch"] = largest_batch_of(step, provider)
    except Exception as error:
        measured["note"] = failure(provider, error)
    print(json.dumps(measured))


def two_steps(step: TrainingStep, provider: str) -> tuple[float, float | None]:
    """Milliseconds of the first step, and the peak of the second above what was in use before the model, in 1e6 bytes.

    The first step loads its libraries. The compiler's are loaded before the model is made, so that its code does not
    count as the model's memory, and the time for that is added.
    """
    device = torch.device(step.device)
    data = step.data(0)
    loading = 0.0
    if provider in COMPILED:
        loading = milliseconds(lambda: importlib.import_module("torch._inductor.compile_fx"), device)
    memory = Memory(device)
    run = functools.partial(step.train(step.model(provider)), *data)
    first = milliseconds(run, device)
    memory.start()
    run()
    return loading + first, memory.peak_mb()


def largest_batch_of(step: TrainingStep, provider: str) -> int | None:
    """The largest batch that the GPU's memory holds in training; None where there was no time to find it."""
    model = step.model(provider)
    train = step.train(model)
    deadline = time.monotonic() + LARGEST_BATCH_SECONDS

    def fits(batch: int) -> bool:
        if time.monotonic() > deadline:
            raise TimeoutError
        fitted = True
        try:
            train(*step.data(0, batch))
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            fitted = False
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        return fitted

    try:
        return search(fits, step.batch)
    except TimeoutError:
        return None


def search(fits: Callable[[int], bool], start: int) -> int | None:
    """The largest batch that fits, to 5 %: by doubling, then bisection. None where not even 2 images fit."""
    low, high = 1, start
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 20):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low if low > 1 else None


if __name__ == "__main__":
    main()

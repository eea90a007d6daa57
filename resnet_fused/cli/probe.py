"""What `bench` measures in a process of its own: the first step, peak memory, and on a GPU the largest batch.

It is started with a request in JSON as its argument, and prints what it found as the last line.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import sys
import time
from collections.abc import Callable

import torch

from resnet_fused.cli.steps import COMPILED, Case, excuse
from resnet_fused.cli.timing import Memory, milliseconds

LARGEST_BATCH_SECONDS = 60


def main() -> None:
    """The program: trains two steps and prints what they took."""
    request = json.loads(sys.argv[1])
    impl, case = request["impl"], Case(**request["case"])
    torch.set_num_threads(request["threads"])
    if case.device != "cpu":
        torch.cuda.set_device(case.device)
        torch.backends.cudnn.benchmark = True
    found: dict[str, object] = {}
    try:
        found["first_step_ms"], found["peak_mb"] = two_steps(case, impl)
        gc.collect()
        if case.device != "cpu" and impl != COMPILED:  # which would compile for every size that is tried
            found["largest_batch"] = largest_batch_of(case, impl)
    except Exception as error:
        found["note"] = excuse(impl, error)
    print(json.dumps(found))


def two_steps(case: Case, impl: str) -> tuple[float, float | None]:
    """Milliseconds of the first step, and the peak of the second above what there was before the model, in 1e6 bytes.

    On a GPU of what PyTorch allocates, on a CPU of the process as Linux counts it, so that what the C library holds
    back in holes of its heap counts too. The first step loads its libraries; the compiler's are loaded before the model
    is made, so that its code does not count as the model's memory, and its time is added.
    """
    device = torch.device(case.device)
    data = case.data(0)
    loading = 0.0
    if impl == COMPILED:
        loading = milliseconds(lambda: importlib.import_module("torch._inductor.compile_fx"), device)
    memory = Memory(device)
    run = functools.partial(case.step(case.model(impl)), *data)
    first = milliseconds(run, device)
    memory.start()
    run()
    return loading + first, memory.peak_mb()


def largest_batch_of(case: Case, impl: str) -> int | None:
    """The largest batch that the GPU's memory holds in training; None where there was no time to find it."""
    model = case.model(impl)
    step = case.step(model)
    deadline = time.monotonic() + LARGEST_BATCH_SECONDS

    def fits(batch: int) -> bool:
        if time.monotonic() > deadline:
            raise TimeoutError
        fitted = True
        try:
            step(*case.data(0, batch))
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            fitted = False
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        return fitted

    try:
        return search(fits, case.batch)
    except TimeoutError:
        return None


def search(fits: Callable[[int], bool], start: int) -> int | None:
    """The largest batch that fits, to 5 %: by doubling, then halving the interval. None where not even 2 images fit."""
    low, high = 1, start
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 20):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low if low > 1 else None


if __name__ == "__main__":
    main()

"""The first training step of an implementation and the peak of its memory, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict

import torch

from resnet_fused.cli.steps import Case

_PROGRAM = """
import json, sys, torch
from resnet_fused.cli.probe import two_steps
from resnet_fused.cli.steps import Case
request = json.loads(sys.argv[1])
torch.set_num_threads(request["threads"])
for name, value in request["cudnn"].items():
    setattr(torch.backends.cudnn, name, value)
print(json.dumps(two_steps(Case(**request["case"]), request["impl"])))
"""


class ProcessFailed(RuntimeError):
    """The process ended with an error; the message is what it wrote."""


def two_steps_apart(case: Case, impl: str, **cudnn: bool) -> tuple[float, float | None]:
    """Milliseconds of the first step, and the peak of the second in 1e6 bytes: `resnet_fused.cli.probe.two_steps`.

    Args:
        cudnn: switches of torch.backends.cudnn.

    Raises:
        ProcessFailed: an error there, such as too little memory.
    """
    if case.device != "cpu":
        torch.cuda.empty_cache()  # the other process needs the memory
    request = {"impl": impl, "case": asdict(case), "threads": torch.get_num_threads(), "cudnn": cudnn}
    command = [sys.executable, "-c", _PROGRAM, json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ProcessFailed(f"{impl} in a process of its own:\n{done.stderr}")
    first_step_ms, peak_mb = json.loads(done.stdout.splitlines()[-1])
    return first_step_ms, peak_mb

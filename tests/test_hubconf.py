"""torch.hub finds the ten constructors in a clone, from a process that has not imported the package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

import hubconf
from resnet_fused import reference

ROOT = Path(__file__).parent.parent
PROGRAM = """
import json, sys, torch
path, weights = sys.argv[1:]
random = torch.hub.load(path, "resnet34", source="local", weights=None)
model = torch.hub.load(path, "resnet18", source="local", weights=weights, num_classes=3)
print(json.dumps([len(random.layer1), model.conv1.weight.sum().item(), sys.modules["resnet_fused"].__file__]))
"""


def test_the_ten_constructors() -> None:
    """torch.hub lists what can be called and has no underscore, and checks that the dependencies can be imported."""
    listed = {name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")}
    assert listed == {*reference.ARCHITECTURES} and sorted(hubconf.__all__) == sorted(listed)
    assert hubconf.dependencies == ["torch"]


def test_local(tmp_path: Path) -> None:
    state = reference.resnet18(num_classes=3).state_dict()
    state["conv1.weight"].fill_(0.5)
    torch.save(state, tmp_path / "weights.pt")
    command = [sys.executable, "-c", PROGRAM, str(ROOT), str(tmp_path / "weights.pt")]
    done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True, timeout=60)
    blocks, total, file = json.loads(done.stdout.splitlines()[-1])
    assert blocks == 3 and total == 0.5 * state["conv1.weight"].numel()
    assert Path(file) == ROOT / "resnet_fused" / "__init__.py"

"""Weights at URLs of this machine in the place of torchvision's."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from torch import Tensor

from resnet_fused import weights


def publish(
    states: Mapping[str, Mapping[str, Tensor]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """Makes states the versions of resnet18's published weights, and torch.hub's folder an empty one.

    Returns:
        The names of their files in ``folder / "served"``, by version.
    """
    served, names = folder / "served", {}
    served.mkdir()
    for version, state in states.items():
        torch.save(state, served / version)
        names[version] = f"{version}-{sha256((served / version).read_bytes()).hexdigest()[:8]}.pth"
        (served / version).rename(served / names[version])
    monkeypatch.setenv("TORCH_HOME", str(folder / "torch"))
    monkeypatch.setattr(weights, "URL", f"file://{served}/")
    monkeypatch.setitem(weights.PUBLISHED, "resnet18", weights.Published("ResNet18_Weights", names))
    return names

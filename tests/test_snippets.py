"""The Python code of README and docs runs, without a network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests import torchvision_ops  # noqa: F401

ROOT = Path(__file__).parent.parent
PAGES = [
    path
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if "```python" in path.read_text()
]


def snippets(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", path.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_snippets_run(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One after the other, as on the page; what needs a GPU only there."""
    for package in ("torchvision", "timm", "onnxscript"):
        pytest.importorskip(package)
    # Pretrained weights are not downloaded: models keep their random ones.
    for download in ("torch.hub", "torchvision.models._api"):
        monkeypatch.setattr(f"{download}.load_state_dict_from_url", lambda *_, **__: {})
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *_, **__: None)
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": path.stem}
    for count, code in enumerate(snippets(path), 1):
        if code.startswith("# needs a GPU") and not torch.cuda.is_available():
            compile(code, f"{path.name} {count}", "exec")
        else:
            exec(compile(code, f"{path.name} {count}", "exec"), names)


def test_pages_with_snippets() -> None:
    assert {"README.md", "recipes.md"} <= {path.name for path in PAGES}

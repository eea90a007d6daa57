"""docs/architecture.md names the files between a model and its first kernel: a traced call goes through the same."""

from __future__ import annotations

import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_fused
from resnet_fused.ops.dispatch import IMPLEMENTATIONS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "resnet_fused"
TEXT = (ROOT / "docs/architecture.md").read_text()


def listed(start: str, end: str) -> list[str]:
    """The numbered files between two phrases of the page."""
    part = TEXT.partition(start)[2].partition(end)[0]
    return re.findall(r"\d\. `([^`]+)`", part)


def files_on_the_stack() -> list[str]:
    """Those of the package, outermost first, each once."""
    names = [Path(frame.filename) for frame in traceback.extract_stack()]
    inside = [str(name.relative_to(PACKAGE)) for name in names if name.is_relative_to(PACKAGE)]
    return list(dict.fromkeys(inside))


class Composed(TorchDispatchMode):
    """Runs the implementations of composed ops, of meta tensors too, and notes where the first native op is called."""

    native_op = ""
    files: Sequence[str] = ()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "resnet_fused":
            implementations = IMPLEMENTATIONS.get(name)
            composed = implementations.composed if implementations is not None else None
            if composed is not None:
                with self:
                    return composed(*args)
            if not self.native_op:
                self.native_op, self.files = name, files_on_the_stack()
        return func(*args, **(kwargs or {}))


def test_path_on_a_cpu() -> None:
    block = resnet_fused.resnet50().layer1[0].to(memory_format=torch.channels_last)
    first = Composed()
    with torch.no_grad(), first:
        block(torch.randn(2, 64, 8, 8).to(memory_format=torch.channels_last))
    *python, bindings, kernel = listed("On a **CPU**:", "On a GPU")
    assert [*first.files] == python
    assert first.native_op in (ROOT / bindings).read_text()
    assert (ROOT / kernel).name == f"{first.native_op}.cpp"
    assert len(python) + 2 <= 7


def test_path_with_triton() -> None:
    pytest.importorskip("triton")
    from resnet_fused.kernels.launch import Launch, observe_launches

    stacks: list[list[str]] = []

    def note(launch: Launch) -> None:
        stacks.append(files_on_the_stack())

    with torch.device("meta"), torch.no_grad(), observe_launches(note), Composed():
        block = resnet_fused.resnet50().layer1[0].to(memory_format=torch.channels_last)
        block(torch.empty(2, 64, 8, 8).to(memory_format=torch.channels_last))
    files = listed("On a GPU, with **Triton**:", "Backward starts")
    assert stacks[0] == files
    assert len(files) <= 8

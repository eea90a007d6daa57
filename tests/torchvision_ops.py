"""torchvision for tests, also where its extension does not load, as PyPI's does not with a torch without CUDA.

Import this before torchvision, timm and all that imports them. torchvision 0.28 fails to import without its extension,
because it describes operators that then do not exist. Here they are defined, and nms, which detection models call, is
implemented in plain PyTorch; roi_align has a plain implementation of torchvision's own.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

_library = torch.library.Library("torchvision", "FRAGMENT")


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes that are kept, by falling score."""
    from torchvision.ops import box_iou

    overlaps = box_iou(boxes, boxes) > iou_threshold
    kept: list[int] = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        if not overlaps[i, kept].any():
            kept.append(i)
    return torch.tensor(kept, dtype=torch.long, device=boxes.device)


def _define_operators() -> None:
    for name in ("nms", "qnms"):
        _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.impl("nms", _nms, "CPU")
    import torchvision.ops

    torchvision.extension._has_ops = lambda: True
    plain = sys.modules["torchvision.ops.roi_align"]
    plain._roi_align = plain._roi_align.__wrapped__  # type: ignore[attr-defined]  # else torch.compile compiles it


_spec = find_spec("torchvision")
if _spec is not None and _spec.origin is not None:
    try:
        torch.ops.load_library(str(Path(_spec.origin).with_name("_C.so")))
    except OSError:
        _define_operators()

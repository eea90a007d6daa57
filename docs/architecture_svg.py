"""Draws docs/architecture.svg: ``python docs/architecture_svg.py``."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

WIDTH, ROW, BOX, LEFT = 920, 92, 60, 190
FILLS = {"python": ("#dbeafe", "#2563eb"), "native": ("#dcfce7", "#16a34a"), "other": ("#f1f5f9", "#94a3b8")}


@dataclass(frozen=True)
class Box:
    """One box of a layer: a name, what is in it, its part of the width, and a color."""

    name: str
    text: str
    width: float
    kind: str = "python"


#: From the top: what a layer is called, and its boxes. A layer imports from those under it.
LAYERS = (
    ("programs", (Box("cli/", "train, eval, predict, export, bench, info", 1.0),)),
    ("public API", (
        Box("models.py, fuse.py", "our ResNets; those of others", 0.3),
        Box("blocks.py, modules.py", "modules to operands", 0.27),
        Box("functional.py", "small fused ops", 0.22),
        Box("cuda_graph.py", "GraphedStep", 0.21),
    )),
    ("residual block", (Box("ops/residual_block.py", "block_forward.py, block_backward.py", 1.0),)),
    ("convolutions", (
        Box("ops/conv_bn.py", "convolution, statistics, gradients", 0.5),
        Box("ops/folded_conv_bn.py, fold_algebra.py", "1x1 convolutions folded with their BN", 0.5),
    )),
    ("small ops", (
        Box("ops/bn_*.py, masked_grad.py", "BN, add, ReLU, max-pool", 0.5),
        Box("ops/vendor_gemm.py", "GEMMs in cache-sized chunks", 0.5),
    )),
    ("dispatch", (Box("ops/registry.py, ops/dispatch.py", "which implementations exist, and which one runs", 1.0),)),
    ("implementations", (
        Box("kernels/, kernels/autotune/", "Triton", 0.34),
        Box("csrc/cpu, csrc/cuda", "native, bound by csrc/bindings.cpp", 0.36, "native"),
        Box("PyTorch's aten ops", "oneDNN, cuDNN, cuBLAS", 0.3, "other"),
    )),
    ("operands", (
        Box("types.py", "ConvBN, Activation, Gradient, BatchStats", 0.5),
        Box("layout.py", "memory format, masks", 0.27),
        Box("backend.py", "what is available", 0.23),
    )),
)  # fmt: skip
SIDE = Box("reference/", "plain PyTorch: ground truth of the tests, fallback of ops and models", 1.0, "other")


def text(x: float, y: float, content: str, size: int, bold: bool = False, anchor: str = "middle") -> str:
    weight = ' font-weight="bold"' if bold else ""
    color = "#1f2933" if bold else "#52606d"
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}" text-anchor="{anchor}"{weight}>'
        f"{escape(content)}</text>"
    )


def box(x: float, y: float, width: float, shown: Box) -> list[str]:
    fill, stroke = FILLS[shown.kind]
    center = x + width / 2
    return [
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{BOX}" rx="6" fill="{fill}" stroke="{stroke}"'
        ' stroke-width="1.5"/>',
        text(center, y + 26, shown.name, 14, bold=True),
        text(center, y + 45, shown.text, 12),
    ]


def draw() -> str:
    height = 30 + ROW * (len(LAYERS) + 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"'
        ' font-family="Helvetica, Arial, sans-serif">',
        "<title>The layers of resnet_fused: each imports from those under it</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    inner = WIDTH - LEFT - 20
    for index, (layer, boxes) in enumerate(LAYERS):
        y, x = 20 + index * ROW, float(LEFT)
        parts.append(text(20, y + 36, layer, 15, bold=True, anchor="start"))
        for shown in boxes:
            width = inner * shown.width - (10 if shown is not boxes[-1] else 0)
            parts += box(x, y, width, shown)
            x += inner * shown.width
        if index + 1 < len(LAYERS):
            center, top = LEFT + inner / 2, y + BOX
            parts += [
                f'<line x1="{center:g}" y1="{top + 3}" x2="{center:g}" y2="{top + ROW - BOX - 10}" stroke="#52606d"'
                ' stroke-width="1.5"/>',
                f'<path d="M{center - 5:g},{top + ROW - BOX - 11} h10 l-5,8 Z" fill="#52606d"/>',
            ]
    y = 20 + len(LAYERS) * ROW
    parts.append(text(20, y + 36, "beside them", 15, bold=True, anchor="start"))
    parts += box(LEFT, y, inner, SIDE)
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_suffix("").with_name("architecture.svg").write_text(draw(), encoding="utf-8")

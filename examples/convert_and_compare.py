"""Converts a plain ResNet with resnet_fused.fuse and compares outputs and gradients.

    python examples/convert_and_compare.py --arch resnet50

The plain model is torchvision's where torchvision is installed, and else the one of ``resnet_fused.reference``, which
has the same modules. Both run forward and backward in training mode; the same computation in float64 shows how accurate
each of them is.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused


def plain_model(arch: str) -> nn.Module:
    """torchvision's model or the reference's, freshly initialised."""
    has_torchvision = importlib.util.find_spec("torchvision") is not None
    source = "torchvision.models" if has_torchvision else "resnet_fused.reference"
    print(f"plain model: {source}.{arch}")
    model: nn.Module = getattr(importlib.import_module(source), arch)()
    return model


def results(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Logits, the images' gradient and all parameters' gradients, by name."""
    images = images.clone(memory_format=torch.preserve_format).requires_grad_()
    logits = model(images)
    F.cross_entropy(logits, labels).backward()
    assert images.grad is not None
    gradients = {f"d {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), "d images": images.grad, **gradients}


def relative_error(x: Tensor, exact: Tensor) -> float:
    """|x - exact| / |exact|, in Euclidean norms."""
    return float((x.double() - exact).norm() / exact.norm())


def compare(arch: str, batch: int, image_size: int, checkpoint: Path | None, seed: int) -> dict[str, float]:
    """Prints a table of errors against float64 and returns the fused model's."""
    torch.manual_seed(seed)
    plain = plain_model(arch)
    if checkpoint is not None:
        plain.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True))
    fused = resnet_fused.fuse(copy.deepcopy(plain))
    exact_model = copy.deepcopy(plain).double()
    for model in (plain, fused):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    images = torch.randn(batch, 3, image_size, image_size).to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (batch,))
    print(f"explain(fused, images): {resnet_fused.explain(fused, images)}")

    exact = results(exact_model, images.double(), labels)
    by_plain, by_fused = results(plain, images, labels), results(fused, images, labels)
    errors = {name: relative_error(by_fused[name], exact[name]) for name in exact}
    worst = max((name for name in exact if name not in ("logits", "d images")), key=errors.__getitem__)
    print(f"\n{'error against float64':40} {'plain':>9} {'fused':>9}")
    for name in ("logits", "d images", "d conv1.weight", "d fc.weight", worst):
        label = f"{name} (largest)" if name == worst else name
        print(f"{label:40} {relative_error(by_plain[name], exact[name]):9.1e} {errors[name]:9.1e}")
    print(
        "\nWhere the input of a ReLU is almost 0, rounding decides whether the gradient passes: one such element"
    )
    print("of a late layer explains an error of 1e-2, in either column.")
    return errors


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compares a plain ResNet with a fused copy of it.")
    parser.add_argument("--arch", choices=("resnet18", "resnet50"), default="resnet18")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument(
        "--checkpoint", type=Path, help="a state_dict of torchvision (default: random weights)"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if arguments.checkpoint is not None and not arguments.checkpoint.is_file():
        parser.error(f"--checkpoint {arguments.checkpoint} is not a file")
    if arguments.batch < 2 or arguments.image_size < 32:
        parser.error("batch norm needs --batch of at least 2, and --image-size must be at least 32")
    compare(arguments.arch, arguments.batch, arguments.image_size, arguments.checkpoint, arguments.seed)


if __name__ == "__main__":
    main()

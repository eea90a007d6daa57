"""Fine-tunes a ResNet on a folder of images: ``python examples/finetune_folder.py FOLDER --weights DEFAULT``.

FOLDER holds train/ and val/, each with one folder of JPEG or PNG images per class. Without FOLDER the script draws a
small data set of its own, so it runs anywhere. It needs pillow. ``python -m resnet_fused train`` is the complete
trainer, with data-parallel training, mixed precision and exact resumption.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import resnet_fused

ARCHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
SUFFIXES = (".jpg", ".jpeg", ".png")
# Of ImageNet: what pretrained weights were trained with.
MEAN, STD = torch.tensor([[[[0.485]], [[0.456]], [[0.406]]], [[[0.229]], [[0.224]], [[0.225]]]])


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """The images of ``root/CLASS/*``, resized to a square and normalized.

    Args:
        root: the folder of the classes.
        classes: their names; the index of a name is the label.
        size: height and width of the images in pixels.
        augment: whether to flip images at random.
    """

    def __init__(self, root: Path, classes: list[str], size: int, augment: bool) -> None:
        self.size, self.augment = size, augment
        self.files = [
            (file, label)
            for label, name in enumerate(classes)
            for file in sorted((root / name).glob("*"))
            if file.suffix.lower() in SUFFIXES
        ]
        if not self.files:
            raise SystemExit(f"{root} has no {', '.join(SUFFIXES)} files in {', '.join(classes)}")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        with Image.open(path) as file:
            image = file.convert("RGB").resize((self.size, self.size))
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        x = pixels.view(self.size, self.size, 3).permute(2, 0, 1).float() / 255
        if self.augment and random.random() < 0.5:
            x = x.flip(-1)
        return (x - MEAN) / STD, label


def draw_images(root: Path, train: int = 24, val: int = 8, size: int = 64) -> None:
    """Writes noisy horizontal, vertical and diagonal stripes as the classes of a small data set."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    for name, across in (("horizontal", y), ("vertical", x), ("diagonal", x + y)):
        for part, count in (("train", train), ("val", val)):
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                period, phase = 6 + 10 * torch.rand(2, generator=generator)
                stripes = 0.5 + 0.3 * torch.sin(2 * math.pi * across / period + phase)
                noisy = stripes + 0.1 * torch.randn(3, size, size, generator=generator)
                pixels = (255 * noisy.clamp(0, 1)).to(torch.uint8).permute(1, 2, 0).contiguous()
                data = bytes(pixels.flatten().tolist())
                Image.frombytes("RGB", (size, size), data).save(folder / f"{index}.png")


def evaluate(model: nn.Module, loader: DataLoader[tuple[Tensor, int]], device: torch.device) -> float:
    """The fraction of images whose class is predicted."""
    model.eval()
    correct = total = 0
    with torch.no_grad():
        for images, labels in loader:
            images = images.to(device, memory_format=torch.channels_last)
            correct += int((model(images).argmax(1) == labels.to(device)).sum())
            total += len(labels)
    return correct / total


def finetune(arguments: argparse.Namespace, folder: Path) -> nn.Module:
    """Trains and returns the model; prints one line per epoch."""
    for part in ("train", "val"):
        if not (folder / part).is_dir():
            raise SystemExit(
                f"{folder} has no folder {part}/: it needs train/CLASS/*.png and val/CLASS/*.png"
            )
    classes = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
    if len(classes) < 2:
        raise SystemExit(f"{folder}/train has {len(classes)} class folders: at least two are needed")

    torch.manual_seed(arguments.seed)
    random.seed(arguments.seed)
    device = torch.device(arguments.device)
    train_set = ImageFolder(folder / "train", classes, arguments.image_size, augment=arguments.flip)
    val_set = ImageFolder(folder / "val", classes, arguments.image_size, augment=False)
    # A last batch of one image would leave batch norm without statistics at the smallest image sizes.
    train_loader = DataLoader(train_set, arguments.batch_size, shuffle=True, drop_last=True)
    val_loader = DataLoader(val_set, arguments.batch_size)
    if len(train_loader) == 0:
        raise SystemExit(
            f"{len(train_set)} training images are fewer than one batch of {arguments.batch_size}"
        )

    model = resnet_fused.get_model(arguments.arch, weights=arguments.weights)
    model.fc = nn.Linear(model.fc.in_features, len(classes))
    # Blocks run as one fused op on channels_last input; on contiguous input they take a slower path.
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = next(iter(val_loader))[0].to(device, memory_format=torch.channels_last)
    for block, reason in resnet_fused.explain(model, images).items():
        print(f"not fused: {block or 'stem'}: {reason}")

    optimizer = torch.optim.SGD(model.parameters(), lr=arguments.lr, momentum=0.9, weight_decay=1e-4)
    for epoch in range(arguments.epochs):
        model.train()
        losses = []
        for images, labels in train_loader:
            images = images.to(device, memory_format=torch.channels_last)
            loss = F.cross_entropy(model(images), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        accuracy = evaluate(model, val_loader, device)
        mean = sum(losses) / len(losses)
        print(f"epoch {epoch + 1}: loss {mean:.3f}, validation accuracy {accuracy:.1%}", flush=True)
    return model


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Fine-tunes a ResNet on a folder of images.")
    parser.add_argument(
        "folder", nargs="?", type=Path, help="with train/ and val/ (default: images drawn here)"
    )
    parser.add_argument("--arch", choices=ARCHS, default="resnet18")
    parser.add_argument(
        "--weights",
        help="pretrained on ImageNet: DEFAULT, or the path of a state_dict (default: random ones)",
    )
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--flip", action="store_true", help="flip training images at random")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="save the trained state_dict to this file")
    arguments = parser.parse_args(argv)

    if arguments.folder is not None:
        model = finetune(arguments, arguments.folder)
    else:
        with tempfile.TemporaryDirectory() as folder:
            draw_images(Path(folder))
            model = finetune(arguments, Path(folder))
    if arguments.out is not None:
        torch.save(model.state_dict(), arguments.out)
        print(f"saved {arguments.out}: torchvision's {arguments.arch} loads it as well")


if __name__ == "__main__":
    main()

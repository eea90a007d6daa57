"""`python -m resnet_fused eval`: loss and accuracy of a trained model on the images of a folder, or on the digits."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_fused.backend import summary
from resnet_fused.cli.data import Digits, Folder, collate, good, open_source
from resnet_fused.cli.errors import UserError, require
from resnet_fused.cli.files import check_file, write_text
from resnet_fused.cli.image_files import class_files, class_names
from resnet_fused.cli.settings import BY_DATA, Settings
from resnet_fused.cli.text import abbreviate, table
from resnet_fused.cli.trained import FOR_FOLDERS, Trained, make_loader, open_trained

TOP = 5
WORDNET = re.compile(r"n\d{8}")  # the names of ImageNet's folders, in the order of its classes


def evaluate(given: dict[str, Any]) -> None:
    """Runs the command.

    Args:
        given: the options that are on the command line.

    Raises:
        UserError: something that the user has to put right.
    """
    for package in ("numpy", "tqdm"):
        require(package)
    file: Path | None = given.get("json")
    if file is not None:
        check_file("--json", file)
    trained = open_trained(given)
    data = given.get("data", trained.settings.get("data"))
    if data is None:
        raise UserError("--weights need --data: the folder to evaluate on")
    split = given.get("split", "val")
    dataset, places = _images(trained, data, split)
    device, precision = trained.device_and_precision(given)
    batch = given.get("batch_size", trained.settings.get("batch_size", Settings.batch_size))
    workers = given.get("workers", BY_DATA["workers"][0 if data == "digits" else FOR_FOLDERS])
    size = f"{trained.image_size}x{trained.image_size}"
    print(f"{trained.arch}, {trained.origin}, {data} {split} at {size}, batch {batch}, {precision}, {device}")
    print(f"resnet_fused {summary(device.type)}", flush=True)
    began = time.perf_counter()
    loader = make_loader(dataset, collate, batch, workers, device)
    loss, top1, top5 = _measure(trained, loader, places, precision, device)
    seconds, count = time.perf_counter() - began, len(dataset)
    head = ("images", "loss", "top-1", f"top-{TOP}", "img/s")
    shown = "-" if top5 is None else f"{top5:.2%}"
    print(table([head, (str(count), f"{loss:.4f}", f"{top1:.2%}", shown, f"{count / seconds:.0f}")]))
    if file is not None:
        results = {
            "arch": trained.arch,
            "model": trained.origin,
            "data": str(data),
            "split": split,
            "image_size": trained.image_size,
            "precision": precision,
            "device": str(device),
            "images": count,
            "loss": loss,
            "top1": top1,
            "top5": top5,
            "seconds": seconds,
        }
        write_text(file, json.dumps(results, indent=1) + "\n")


@torch.no_grad()
def _measure(
    trained: Trained, loader: Any, places: Tensor, precision: str, device: torch.device
) -> tuple[float, float, float | None]:
    """Mean loss and accuracies; the second accuracy is None where the model has too few classes for it.

    Args:
        places: int64 [classes of the data], which output of the model each is.
    """
    classifier = trained.classifier(device, precision)
    top = min(TOP, len(trained.classes))
    total = torch.zeros(4, dtype=torch.float64)  # loss, first, among the first, images
    for batch in require("tqdm").tqdm(loader, unit="batch", disable=None, dynamic_ncols=True):
        pixels, labels = good(batch)
        logits, labels = classifier(pixels), places[labels].to(device)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        hits = logits.topk(top).indices == labels[:, None]
        counts = [loss, hits[:, 0].sum(), hits.sum(), torch.full_like(loss, len(labels))]
        total += torch.stack([count.double() for count in counts]).cpu()
    loss_sum, first, among, images_seen = total.tolist()
    top5 = among / images_seen if len(trained.classes) > TOP else None
    return loss_sum / images_seen, first / images_seen, top5


def _images(trained: Trained, data: str, split: str) -> tuple[Digits | Folder, Tensor]:
    """The images, none augmented, and which output of the model each class of theirs is.

    Raises:
        UserError: there are none, or the model doesn't know their classes.
    """
    if data == "digits":
        if split not in ("train", "val"):
            raise UserError(f"--split {split}: the digits have train and val")
        source = open_source("digits", trained.image_size, 0)
        dataset = source.held_out
        if split == "train":
            assert isinstance(source.train, Digits)
            dataset = Digits(source.train.images, torch.tensor(source.train.labels), 0, augment="none")
        return dataset, torch.tensor(_match(trained, source.classes, "the digits"))
    require("PIL.Image")
    part = Path(data) / split
    if not part.is_dir():
        raise UserError(
            f"{part}: no such folder; give --data a folder and --split a folder in it ('.' for itself)"
        )
    classes = class_names(part, least=1)
    places = _match(trained, classes, str(part))
    files = class_files(part, classes)
    return Folder(files, trained.image_size, 0, augment="none"), torch.tensor(places)


def _match(trained: Trained, classes: Sequence[str], where: str) -> list[int]:
    """For each class of the data the model's output of that name.

    Published weights also match ImageNet's folders, and weights without names as many folders as they have
    outputs, both in sorted order.

    Raises:
        UserError: the model doesn't know a class.
    """
    outputs = {name: index for index, name in reversed([*enumerate(trained.classes)])}
    if trained.named and all(name in outputs for name in classes):
        return [outputs[name] for name in classes]
    in_order = all(map(WORDNET.fullmatch, classes)) if trained.published else not trained.named
    if in_order and len(classes) == len(trained.classes):
        return [*range(len(classes))]
    if trained.named and not in_order:
        unknown = [name for name in classes if name not in outputs]
        raise UserError(
            f"{where} has {abbreviate(unknown)} that {trained.origin} doesn't know: it knows "
            f"{abbreviate(trained.classes)}; rename or move those folders"
        )
    raise UserError(
        f"{where} has {abbreviate(classes)}, and {trained.origin} has {len(trained.classes)} outputs without names: "
        "give all of their folders, in the order of the outputs"
    )

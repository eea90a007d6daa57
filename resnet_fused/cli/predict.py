"""`python -m resnet_fused predict`: the most probable classes of images."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_fused.cli.data import CROP, BadImage, Folder, Sample
from resnet_fused.cli.errors import UserError, require
from resnet_fused.cli.files import check_file, write_text
from resnet_fused.cli.image_files import image_files
from resnet_fused.cli.settings import BY_DATA, Settings
from resnet_fused.cli.trained import FOR_FOLDERS, Trained, make_loader, open_trained

TOP = 5
FEW_IMAGES = 64  # take less time than starting a worker does

Prediction = dict[str, Any]  # "image", with "classes" or "error"


def predict(given: dict[str, Any]) -> None:
    """Runs the command.

    Args:
        given: the options that are on the command line.

    Raises:
        UserError: something that the user has to put right; at the end, where an image could not be read.
    """
    for package in ("numpy", "tqdm", "PIL.Image"):
        require(package)
    files = {option: given[option] for option in ("json", "csv") if option in given}
    for option, file in files.items():
        check_file(f"--{option}", file)
    paths: list[str] = given["paths"]
    if "weights" not in given:
        given, paths = given | {"checkpoint": Path(paths[0])}, paths[1:]
    if not paths:
        raise UserError("give images, or folders of images, after the checkpoint")
    trained = open_trained(given)
    device, precision = trained.device_and_precision(given)
    if trained.published and not trained.named:
        print(
            "resnet_fused: classes are shown as numbers: torchvision has their names",
            file=sys.stderr,
            flush=True,
        )
    top = min(given.get("top", TOP), len(trained.classes))
    images = [image for path in paths for image in _images(path)]
    dataset = Folder(
        [(image, 0) for image in images],
        trained.image_size,
        0,
        augment="none",
        crop=1 if trained.whole else CROP,
    )
    workers = given.get("workers", BY_DATA["workers"][FOR_FOLDERS] if len(images) > FEW_IMAGES else 0)
    loader = make_loader(
        dataset, _with_bad_ones, given.get("batch_size", Settings.batch_size), workers, device
    )
    results: list[Prediction] = []
    for sample in _probabilities(trained, loader, precision, device):
        result = _prediction(images[len(results)], sample, trained.classes, top)
        results.append(result)
        print(_line(result), file=sys.stderr if "error" in result else sys.stdout, flush=True)
    if "json" in files:
        write_text(files["json"], json.dumps(results, indent=1) + "\n")
    if "csv" in files:
        write_text(files["csv"], _csv(results))
    bad = sum("error" in result for result in results)
    if bad:
        raise UserError(f"{bad} of {len(results)} images could not be read")


def _images(path: str) -> Iterator[str]:
    """The path of an image, as it is; the images in a folder and in those below it, sorted.

    Raises:
        UserError: a folder has none.
    """
    if os.path.isdir(path):
        yield from image_files(path)
    else:
        yield path


def _with_bad_ones(samples: list[Sample]) -> list[Sample]:
    """For a DataLoader: the samples as they are, so that one that is bad leaves the others."""
    return samples


@torch.no_grad()
def _probabilities(
    trained: Trained, loader: Any, precision: str, device: torch.device
) -> Iterator[Tensor | BadImage]:
    """Of each image in order: float32 [classes], on the CPU."""
    classifier = trained.classifier(device, precision)
    samples: list[Sample]
    for samples in loader:
        pixels = [sample[0] for sample in samples if not isinstance(sample, BadImage)]
        probabilities: Iterator[Tensor] = iter(())
        if pixels:
            probabilities = iter(classifier(torch.stack(pixels)).softmax(1).cpu())
        for sample in samples:
            yield sample if isinstance(sample, BadImage) else next(probabilities)


def _prediction(image: str, sample: Tensor | BadImage, classes: Sequence[str], top: int) -> Prediction:
    if isinstance(sample, BadImage):
        return {"image": image, "error": sample.reason}
    values, indices = (x.tolist() for x in sample.topk(top))
    found = [
        {"class": classes[index], "index": index, "probability": value}
        for value, index in zip(values, indices, strict=True)
    ]
    return {"image": image, "classes": found}


def _line(result: Prediction) -> str:
    if "error" in result:
        return f"resnet_fused: cannot read the image {result['image']} ({' '.join(result['error'].split())})"
    return f"{result['image']}: " + ", ".join(
        f"{found['class']} {found['probability']:.2%}" for found in result["classes"]
    )


def _csv(results: Sequence[Prediction]) -> str:
    text = io.StringIO()
    columns = ("image", "rank", "class", "index", "probability", "error")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for result in results:
        if "error" in result:
            writer.writerow(result)
        for rank, found in enumerate(result.get("classes", []), 1):
            writer.writerow({"image": result["image"], "rank": rank, **found})
    return text.getvalue()

"""`predict`: what the model finds in images, and in which of them it cannot look."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import resnet_fused
import tests.torchvision_ops  # noqa: F401
from resnet_fused import weights
from resnet_fused.cli.data import Folder
from tests.cli.conftest import Cli, load, make_images
from tests.cli.test_bad_input import assert_refused
from tests.cli.test_initial_weights import save_weights


def probabilities(checkpoint: Path, images: list[Path]) -> Tensor:
    """[images, classes], by the model and the evaluation of a folder."""
    state = load(checkpoint)
    model = resnet_fused.resnet18(num_classes=len(state["classes"]))
    model.load_state_dict(state["model"])
    folder = Folder([(str(image), 0) for image in images], 16, 0, augment="none")
    pixels = torch.stack([folder[0, index][0] for index in range(len(images))])  # type: ignore[misc]
    mean, std = (torch.tensor(state[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        return model.eval()((pixels.permute(0, 3, 1, 2) / 255 - mean) / std).softmax(1)


@pytest.mark.parametrize("workers", [0, 1])
def test_files_and_folders(workers: int, begun: Path, images: Path, cli: Cli, tmp_path: Path) -> None:
    one, folder = images / "train" / "bright" / "2.JPEG", images / "val"
    results, table = tmp_path / "results.json", tmp_path / "results.csv"
    where = ("--json", results, "--csv", table, "--workers", workers, "--batch-size", 4, "--device", "cpu")
    result = cli("predict", begun, one, folder, *where)
    assert (result.code, result.err) == (0, "")
    paths = [one, *sorted(folder.rglob("*.*"))]
    assert len(paths) == 10
    found = json.loads(results.read_text())
    assert [entry["image"] for entry in found] == [str(path) for path in paths]
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert len(rows) == 20
    expected = probabilities(begun, paths)
    for number, (entry, line, values) in enumerate(
        zip(found, result.out.splitlines(), expected, strict=True)
    ):
        assert line.startswith(f"{entry['image']}: ")
        order = values.argsort(descending=True).tolist()
        for rank, (one_class, index) in enumerate(zip(entry["classes"], order, strict=True), 1):
            assert (one_class["index"], one_class["class"]) == (index, ["bright", "dark"][index])
            assert one_class["probability"] == pytest.approx(float(values[index]), abs=1e-4)
            assert f"{one_class['class']} {one_class['probability']:.2%}" in line
            row = rows[2 * number + rank - 1]
            assert (row["image"], row["rank"], row["class"]) == (
                entry["image"],
                str(rank),
                one_class["class"],
            )
            assert float(row["probability"]) == one_class["probability"] and row["error"] == ""


def test_top(begun: Path, images: Path, cli: Cli) -> None:
    result = cli("predict", begun, images / "val", "--top", 1)
    assert result.code == 0 and all(line.count("%") == 1 for line in result.out.splitlines())


def test_unreadable_images_leave_the_others(begun: Path, cli: Cli, tmp_path: Path) -> None:
    folder = make_images(tmp_path / "data") / "val" / "dark"
    (folder / "1.png").write_bytes(b"not an image at all")
    results, table = tmp_path / "results.json", tmp_path / "results.csv"
    result = cli("predict", begun, folder, tmp_path / "no.png", "--json", results, "--csv", table)
    assert result.code == 2
    assert len(result.out.splitlines()) == 4
    first, second, last = result.err.splitlines()
    assert first.startswith(f"resnet_fused: cannot read the image {folder / '1.png'} (")
    assert second.startswith(f"resnet_fused: cannot read the image {tmp_path / 'no.png'} (")
    assert last == "resnet_fused: error: 2 of 6 images could not be read"
    entries = json.loads(results.read_text())
    assert ["error" in entry for entry in entries] == [False, True, False, False, False, True]
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["image"] for row in rows if row["error"]] == [str(folder / "1.png"), str(tmp_path / "no.png")]


def test_no_image_can_be_read(begun: Path, cli: Cli, tmp_path: Path) -> None:
    result = cli("predict", begun, tmp_path / "no.png")
    assert (result.code, result.out) == (2, "") and "1 of 1 images" in result.err


def test_digits_are_seen_whole(
    begun: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in training, whose digits fill their images."""
    seen: list[float] = []
    whole = Folder.__init__
    monkeypatch.setattr(
        Folder, "__init__", lambda self, *a, **k: (whole(self, *a, **k), seen.append(self.crop))[0]
    )
    state = load(begun)
    Image.new("L", (20, 20)).save(tmp_path / "image.png")
    for data in ("digits", str(tmp_path)):
        torch.save(state | {"settings": state["settings"] | {"data": data}}, begun)
        assert cli("predict", begun, tmp_path / "image.png").code == 0
    assert seen == [1, 7 / 8]


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Named weights of a resnet18 that finds class 285 in every image, and an image."""
    state = save_weights(tmp_path / "file", classes=1000)
    state["fc.bias"].zero_()[285] = 1e6
    torch.save(state, tmp_path / "file")
    name = f"resnet18-{hashlib.sha256((tmp_path / 'file').read_bytes()).hexdigest()[:8]}.pth"
    (tmp_path / "file").rename(tmp_path / name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(weights, "URL", f"file://{tmp_path}/")
    monkeypatch.setitem(
        weights.PUBLISHED, "resnet18", weights.Published("ResNet18_Weights", {"IMAGENET1K_V1": name})
    )
    Image.new("RGB", (60, 40), (90, 30, 10)).save(tmp_path / "image.webp")
    return tmp_path / "image.webp"


GIVEN = ("--weights", "DEFAULT", "--arch", "resnet18", "--image-size", 32, "--top", 2, "--device", "cpu")


def test_published_weights(published: Path, cli: Cli) -> None:
    pytest.importorskip("torchvision")
    result = cli("predict", published, *GIVEN)
    assert result.code == 0 and "numbers" not in result.err
    assert result.out.startswith(f"{published}: Egyptian cat 100.00%, ")


def test_published_weights_without_torchvision(
    published: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    for loaded in [key for key in sys.modules if key.split(".")[0] == "torchvision"]:
        monkeypatch.setitem(sys.modules, loaded, None)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    result = cli("predict", published, *GIVEN)
    assert result.code == 0
    assert result.err.endswith("\nresnet_fused: classes are shown as numbers: torchvision has their names\n")
    assert result.out.startswith(f"{published}: 285 100.00%, ")


def test_published_weights_know_the_folders_of_imagenet(published: Path, cli: Cli, tmp_path: Path) -> None:
    """A thousand folders with names of WordNet, in the order of the classes."""
    shutil.rmtree(tmp_path / "torch", ignore_errors=True)
    for index in range(1000):
        folder = tmp_path / "val" / f"n{2 * index:08d}"
        folder.mkdir(parents=True)
        if index != 285:
            (folder / "x.png").symlink_to(tmp_path / "dark.png")
    Image.new("RGB", (20, 20)).save(tmp_path / "dark.png")
    shutil.copy(tmp_path / "dark.png", tmp_path / "val" / f"n{2 * 285:08d}" / "x.png")
    given = ("--weights", "DEFAULT", "--arch", "resnet18", "--image-size", 16, "--batch-size", 500)
    file = tmp_path / "results.json"
    result = cli("eval", *given, "--data", tmp_path, "--workers", 0, "--device", "cpu", "--json", file)
    assert result.code == 0, result.err
    assert json.loads(file.read_text())["top1"] == 0.001


def mistakes(begun: Path) -> list[tuple[tuple[Any, ...], list[str]]]:
    return [
        ((), ["PATH", "--help"]),
        ((begun,), ["give images", "after the checkpoint"]),
        ((begun, "empty"), ["empty holds no images", ".png"]),
        (("empty", "image.png"), ["no checkpoint at empty/best.pt"]),
        ((begun, "image.png", "--top", 0), ["--top", "above 0"]),
        ((begun, "image.png", "--csv", "no/file.csv"), ["--csv no/file.csv cannot be written"]),
        (("image.png", "--weights", "DEFAULT"), ["--weights needs the --arch"]),
        ((begun, "image.png", "--device", "tpu-ish"), ["tpu-ish", "cuda:N"]),
    ]


@pytest.mark.parametrize("mistake", range(len(mistakes(Path()))))
def test_mistakes(
    mistake: int, begun: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    arguments, words = mistakes(begun)[mistake]
    result = cli("predict", *arguments)
    assert_refused(result, *words)
    assert result.out == ""

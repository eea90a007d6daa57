"""`export`: what a file computes in the program that reads it, for any batch, and what it says about itself."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import resnet_fused
from resnet_fused import reference
from resnet_fused.cli import export as exporting
from tests.cli.conftest import Cli, load
from tests.cli.test_bad_input import assert_refused
from tests.cli.test_initial_weights import save_weights

METADATA = {
    "arch": "resnet18",
    "classes": ["bright", "dark"],
    "image_size": 16,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}
Loaded = tuple[Callable[[Tensor], Tensor], dict[str, str]]


def load_onnx(path: Path) -> Loaded:
    import onnx
    from onnx.reference import ReferenceEvaluator

    loaded = onnx.load(path)
    onnx.checker.check_model(loaded, full_check=True)
    assert {node.domain for node in loaded.graph.node} <= {"", "ai.onnx"}
    assert [i.name for i in loaded.graph.input] == ["images"]
    assert [o.name for o in loaded.graph.output] == ["logits"]
    run = ReferenceEvaluator(loaded).run
    found = {entry.key: entry.value for entry in loaded.metadata_props}
    return lambda x: torch.from_numpy(np.array(run(None, {"images": x.numpy()})[0])), found


def load_torchscript(path: Path) -> Loaded:
    files = dict.fromkeys(METADATA, "")
    loaded = torch.jit.load(path, _extra_files=files)
    return loaded, {name: value.decode() for name, value in files.items()}


def load_exported_program(path: Path) -> Loaded:
    files = dict.fromkeys(METADATA, "")
    program = torch.export.load(path, extra_files=files)
    assert not any("resnet_fused" in str(node.target) for node in program.graph.nodes)
    return program.module(), files


def load_state_dict(path: Path) -> Loaded:
    model = reference.resnet18(num_classes=2)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval(), {name: json.dumps(value) for name, value in METADATA.items()}


LOADERS = {
    "onnx": load_onnx,
    "torchscript": load_torchscript,
    "exported-program": load_exported_program,
    "state_dict": load_state_dict,
}


@pytest.mark.parametrize("format", LOADERS)
def test_formats(format: str, begun: Path, cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "exported"
    result = cli("export", begun, "--format", format, "--out", file)
    assert result.code == 0, result.err
    assert "input: float32 [batch, 3, 16, 16], RGB between 0 and 1, minus (0.485, 0.456, 0.406)" in result.out
    assert "output: float32 [batch, 2], logits (bright, dark, ...)" in result.out
    run, found = LOADERS[format](file)
    own = {name: json.loads(value) for name, value in found.items() if name in METADATA}
    assert own == METADATA
    model = resnet_fused.resnet18(num_classes=2)
    model.load_state_dict(load(begun)["model"])
    model.eval()
    for batch in (1, 5):
        images = torch.randn(batch, 3, 16, 16)
        with torch.no_grad():
            torch.testing.assert_close(run(images), model(images), rtol=1e-3, atol=1e-4)


def test_weights_at_another_size(cli: Cli, tmp_path: Path) -> None:
    """A file of weights has no names of classes."""
    save_weights(tmp_path / "mine.pt", classes=3, arch="resnet34")
    given = ("--weights", tmp_path / "mine.pt", "--arch", "resnet34", "--image-size", 40)
    file = tmp_path / "mine.pt2"
    result = cli("export", *given, "--format", "exported-program", "--out", file)
    assert result.code == 0, result.err
    assert "[batch, 3, 40, 40]" in result.out and "[batch, 3], logits\n" in result.out
    files = dict.fromkeys(METADATA, "")
    torch.export.load(file, extra_files=files)
    assert (files["arch"], files["image_size"], files["classes"]) == ('"resnet34"', "40", "")


@pytest.mark.parametrize("runner", ["onnxruntime", "onnx.reference"])
def test_who_runs_onnx(
    runner: str, begun: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if runner == "onnxruntime":
        pytest.importorskip("onnxruntime")
    else:
        present = find_spec
        monkeypatch.setattr(
            exporting, "find_spec", lambda name: None if name == "onnxruntime" else present(name)
        )
    result = cli("export", begun, "--format", "onnx", "--out", tmp_path / "model.onnx")
    assert result.code == 0, result.err
    assert f"checked: {runner} differs from the model by " in result.out


def test_a_file_that_computes_something_else_is_not_written(
    begun: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model"
    file.write_text("old")
    whole = exporting.FORMATS["torchscript"]

    def wrong(model: torch.nn.Module, *rest: object) -> exporting.Exported:
        with torch.no_grad():
            model.get_parameter("fc.weight").mul_(1.001)
        return whole(model, *rest)  # type: ignore[arg-type]

    monkeypatch.setitem(exporting.FORMATS, "torchscript", wrong)
    result = cli("export", begun, "--format", "torchscript", "--out", file)
    assert_refused(result, "the torchscript of", "differs from the model by", "nothing is written")
    assert file.read_text() == "old"


def test_weights_that_are_not_finite(begun: Path, cli: Cli, tmp_path: Path) -> None:
    state = load(begun)
    state["model"]["fc.bias"].fill_(float("nan"))
    torch.save(state, begun)
    file = tmp_path / "model"
    assert_refused(cli("export", begun, "--format", "state_dict", "--out", file), "fc.bias is not finite")
    assert not file.exists()


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_package(
    package: str, begun: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, package, raising=False)
    present = find_spec
    monkeypatch.setattr(exporting, "find_spec", lambda name: None if name == package else present(name))
    result = cli("export", begun, "--format", "onnx", "--out", tmp_path / "model.onnx")
    assert_refused(result, f"--format onnx needs {package}", "pip install onnxscript")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ["--format", "--out"]),
        (("out/last.pt", "--out", "model"), ["--format"]),
        (("out/last.pt", "--out", "model", "--format", "tflite"), ["tflite", "onnx", "exported-program"]),
        (("out/last.pt", "--out", "no/model", "--format", "onnx"), ["--out no/model cannot be written"]),
        (("--out", "model", "--format", "onnx"), ["give a checkpoint"]),
    ],
)
def test_mistakes(
    arguments: tuple[str, ...],
    words: list[str],
    begun: Path,
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli("export", *arguments)
    assert_refused(result, *words)
    assert result.out == "" and not (tmp_path / "model").exists()

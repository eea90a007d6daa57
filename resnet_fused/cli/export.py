"""`python -m resnet_fused export`: a trained model as a file that needs no resnet_fused, compared with the model."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from resnet_fused import reference, unfuse
from resnet_fused.cli.errors import UserError
from resnet_fused.cli.files import check_file, write_atomically
from resnet_fused.cli.trained import Trained, open_trained

TRACED_BATCH, CHECKED_BATCH = 2, 3  # unequal: a batch size that was traced as a constant fails
#: Of the difference to the norm of the output. Float32 in another order of sums is nearer by far, another graph is not.
TOLERANCE = 1e-4

Metadata = dict[str, str]


class Exported(NamedTuple):
    """A file's bytes, and who ran them.

    Attributes:
        run: loads the bytes and computes logits.
        runner: what does so.
    """

    content: bytes
    run: Callable[[Tensor], Tensor]
    runner: str


def export(given: dict[str, Any]) -> None:
    """Runs the command.

    Args:
        given: the options that are on the command line.

    Raises:
        UserError: something that the user has to put right, or the file doesn't compute what the model does.
    """
    file: Path = given["out"]
    check_file("--out", file)
    trained = open_trained(given)
    side = trained.image_size
    images = torch.randn(CHECKED_BATCH, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = trained.model(images)
    model = unfuse(trained.model).requires_grad_(False)
    exported = FORMATS[given["format"]](model, images[:TRACED_BATCH], trained)
    with torch.inference_mode():
        difference = float((exported.run(images) - expected).norm() / expected.norm())
    if not difference < TOLERANCE:
        raise UserError(
            f"the {given['format']} of {trained.origin} differs from the model by {difference:.1e} of its output in "
            f"{exported.runner}: nothing is written"
        )
    write_atomically(file, lambda opened: opened.write(exported.content))
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (trained.mean, trained.std))
    print(f"{file}: {trained.arch} as {given['format']}, {len(exported.content) / 1e6:.1f} MB")
    print(f"input: float32 [batch, 3, {side}, {side}], RGB between 0 and 1, minus ({mean}), over ({std})")
    named = f" ({', '.join(trained.classes[:3])}, ...)" if trained.named else ""
    print(f"output: float32 [batch, {len(trained.classes)}], logits{named}")
    print(f"checked: {exported.runner} differs from the model by {difference:.1e} of its output", flush=True)


def metadata(trained: Trained) -> Metadata:
    """What a user of the file has to know, each value as JSON."""
    values = {
        "arch": trained.arch,
        "classes": trained.classes if trained.named else None,
        "image_size": trained.image_size,
        "mean": list(trained.mean),
        "std": list(trained.std),
    }
    return {name: json.dumps(value) for name, value in values.items() if value is not None}


def _onnx(model: nn.Module, images: Tensor, trained: Trained) -> Exported:
    for package in ("onnx", "onnxscript"):
        if find_spec(package) is None:
            raise UserError(f"--format onnx needs {package}: run pip install onnxscript")
    with warnings.catch_warnings():
        # torch.onnx copies what torch.export made, in a way that torch has deprecated.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    assert program is not None
    proto = program.model_proto
    for name, value in metadata(trained).items():
        proto.metadata_props.add(key=name, value=value)
    content: bytes = proto.SerializeToString()
    if find_spec("onnxruntime") is not None:
        import onnxruntime

        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        run, runner = session.run, "onnxruntime"
    else:
        from onnx.reference import ReferenceEvaluator

        run, runner = ReferenceEvaluator(content).run, "onnx.reference"
    return Exported(content, lambda x: torch.from_numpy(run(None, {"images": x.numpy()})[0]), runner)


def _torchscript(model: nn.Module, images: Tensor, trained: Trained) -> Exported:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file, _extra_files=metadata(trained))
    content = file.getvalue()
    return Exported(content, lambda x: torch.jit.load(io.BytesIO(content))(x), "torch.jit.load")


def _exported_program(model: nn.Module, images: Tensor, trained: Trained) -> Exported:
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    file = io.BytesIO()
    torch.export.save(program, file, extra_files=metadata(trained))
    content = file.getvalue()
    return Exported(
        content, lambda x: torch.export.load(io.BytesIO(content)).module()(x), "torch.export.load"
    )


def _state_dict(model: nn.Module, images: Tensor, trained: Trained) -> Exported:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)

    def run(x: Tensor) -> Tensor:
        file.seek(0)
        loaded: nn.Module = getattr(reference, trained.arch)(num_classes=len(trained.classes))
        loaded.load_state_dict(torch.load(file, weights_only=True))
        out: Tensor = loaded.eval()(x)
        return out

    return Exported(file.getvalue(), run, "load_state_dict of a model in plain PyTorch")


FORMATS: dict[str, Callable[[nn.Module, Tensor, Trained], Exported]] = {
    "onnx": _onnx,
    "torchscript": _torchscript,
    "exported-program": _exported_program,
    "state_dict": _state_dict,
}

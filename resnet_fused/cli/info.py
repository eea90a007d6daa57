"""`python -m resnet_fused info`: what is installed, what this machine has, and what serves which op."""

import importlib
import importlib.util
import platform

import torch

from resnet_fused.cli.errors import UserError
from resnet_fused.cli.text import columns


def info() -> None:
    """Prints versions, devices, and the rows of `resnet_fused.backend.status()`."""
    print("\n".join(columns([*versions(), *devices()])))
    rows = importlib.import_module("resnet_fused.backend").status()
    head = ("op", "device", "implementation", "reason")
    print()
    print("\n".join(columns([head, *([str(row[key] or "") for key in head] for row in rows)])))


def plan(arch: str, batch: int = 256, image_size: int = 224, precision: str = "bf16") -> None:
    """Prints the launches of a training step on a GPU by kernel, with the bytes that they move.

    Raises:
        UserError: an argument out of range, or triton is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        raise UserError("--plan runs the launchers of the Triton kernels: run pip install triton")
    module = importlib.import_module("resnet_fused.plan")
    try:
        planned = module.plan(arch, batch, precision, image_size)
    except ValueError as error:
        raise UserError(str(error)) from error
    print(
        f"{arch}, batch {batch}, {image_size}x{image_size}, {precision}: stem and blocks, forward and backward"
    )
    print(module.table(planned, batch))


def versions() -> list[tuple[str, str]]:
    """Name and version of everything that matters."""
    triton = "missing"
    if importlib.util.find_spec("triton"):
        triton = importlib.import_module("triton").__version__
    package = importlib.import_module("resnet_fused")
    return [
        ("resnet_fused", package.__version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("triton", triton),
        ("CUDA of torch", torch.version.cuda or "none"),
        ("extension", importlib.import_module("resnet_fused.native").summary()),
    ]


def devices() -> list[tuple[str, str]]:
    """The CPU and every GPU."""
    rows = [
        ("system", f"{platform.system()} {platform.machine()}"),
        ("CPU capability", torch.backends.cpu.get_cpu_capability()),
        ("CPU threads", str(torch.get_num_threads())),
        ("oneDNN", "yes" if torch.backends.mkldnn.is_available() else "no"),
    ]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        rows.append(
            (f"GPU {index}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB")
        )
    return rows if torch.cuda.device_count() else [*rows, ("GPU", "none that torch sees")]

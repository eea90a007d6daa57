"""`python -m resnet_fused info`: what is installed, what this machine has, and which implementation runs each op."""

import platform

import torch

from resnet_fused import __version__, native
from resnet_fused.cli.errors import UserError
from resnet_fused.cli.text import columns
from resnet_fused.measure import triton_version
from resnet_fused.ops.dispatch import status


def info() -> None:
    """Prints versions, devices, and which implementation runs each op."""
    print("\n".join(columns([*versions(), *devices()])))
    rows = status()
    head = ("op", "device", "implementation", "reason")
    print()
    print("\n".join(columns([head, *([str(row[key] or "") for key in head] for row in rows)])))


def plan(arch: str, batch: int = 256, image_size: int = 224, precision: str = "bf16") -> None:
    """Prints the launches of a training step on a GPU by kernel, with the bytes that they move.

    Raises:
        UserError: an argument out of range, or triton is not installed.
    """
    if triton_version() is None:
        raise UserError("--plan runs the launchers of the Triton kernels: run pip install triton")
    from resnet_fused import plan as planning

    try:
        planned = planning.plan(arch, batch, precision, image_size)
    except ValueError as error:
        raise UserError(str(error)) from error
    print(
        f"{arch}, batch {batch}, {image_size}x{image_size}, {precision}: stem and blocks, forward and backward"
    )
    print(planning.table(planned, batch))


def versions() -> list[tuple[str, str]]:
    """Name and version of everything that matters."""
    return [
        ("resnet_fused", __version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("triton", triton_version() or "missing"),
        ("CUDA of torch", torch.version.cuda or "none"),
        ("extension", native.summary()),
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

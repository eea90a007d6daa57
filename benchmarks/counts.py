"""Counts that do not vary from run to run, beside a committed table: ``python -m benchmarks.counts [--write]``.

What a training step launches on a GPU, the tensors that it makes and saves on a CPU, and the registers and shared
memory of its Triton kernels. Without ``--write`` it only compares, and exits with 1 where something differs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resnet_fused import models, reference
from resnet_fused.kernels.launch import Launch
from resnet_fused.measure import saved_storages
from resnet_fused.ops import conv3x3
from resnet_fused.plan import composition, launches, plan
from tools.kernel_resources import Resources, Specialisation, compile_all, specialisation

TABLE = Path(__file__).with_name("counts.json")
ADVICE = "if it is meant: python -m benchmarks.counts --write"
ARCHS = ("resnet18", "resnet50")
#: Of the launches.
PLANNED_BATCH, PLANNED_DTYPES = 256, ("bf16", "fp32")
#: Of what runs on the CPU: so small that the third stage of ResNet-50, which folds at 224x224, does not.
BATCH, SIZE = 8, 96
#: Bytes of a tensor that counts: half of the smallest activation between two convolutions in float32.
LARGE = BATCH * 512 * (SIZE // 32) ** 2 * 4 // 2
Counts = dict[str, Any]
#: Models, dtype and architectures.
Builds = tuple[tuple[tuple[str, ...], str, tuple[int, ...]], ...]
#: What tests compile kernels for: bf16 is what is trained in, and sm_80 has the instructions of all architectures
#: without wgmma. `tools.kernel_resources` compiles everything.
BUILDS: Builds = (
    (("resnet50",), "bf16", (90,)),
    (("resnet18",), "bf16", (90,)),
)
#: Of these, to save time, each kernel once, with its largest tile.
SAMPLES: Builds = (
    (("resnet50",), "bf16", (80, 86, 89, 100, 120)),
    (("resnet50",), "fp16", (90,)),
    (("resnet50",), "tf32", (80, 90)),
)


def launch_counts() -> Counts:
    """Launches of a training step by kernel, and the bytes that all of them move per image."""
    counts = {}
    for arch, dtype in itertools.product(ARCHS, PLANNED_DTYPES):
        planned = plan(arch, PLANNED_BATCH, dtype)
        counts[f"{arch} {dtype}"] = {
            "passes": sum(p.is_pass for p in planned),
            "all": len(planned),
            "bytes an image": sum(p.bytes for p in planned) // PLANNED_BATCH,
            "by kernel": dict(sorted(Counter(p.kernel for p in planned).items())),
        }
    return counts


def memory_counts() -> Counts:
    """Bytes that autograd saves in float32 and under bfloat16 autocast, and large tensors made in float32."""
    counts: Counts = {}
    # With kernels and folding as for large batches on a processor that was measured.
    block = sys.modules["resnet_fused.ops.residual_block"]
    with (
        mock.patch.object(conv3x3, "is_faster", lambda *_: True),
        mock.patch.multiple(block, FOLD_BYTES=0, RECOMPUTE_BYTES=0),
        # Fused, though so few small images train faster as PyTorch's operators.
        mock.patch("resnet_fused.blocks.why_faster_plain", lambda *_: None),
    ):
        for arch, (name, library) in itertools.product(ARCHS, (("fused", models), ("eager", reference))):
            torch.manual_seed(0)
            model = getattr(library, arch)(num_classes=10).to(memory_format=torch.channels_last)
            forward, backward = large_tensors(model)
            counts[f"{arch} {name}"] = {
                "saved bytes fp32": saved_bytes(model, torch.float32),
                "saved bytes bf16": saved_bytes(model, torch.bfloat16),
                "large tensors in forward": forward,
                "large tensors in backward": backward,
            }
    return counts


def saved_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the storages, other than the model's own and the input's, that a forward pass saves for backward."""
    x = _images()
    known = (x, *model.parameters(), *model.buffers())
    with saved_storages(*known) as saved, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out = model(x)
    assert out.grad_fn is not None  # which keeps the storages alive, and so their addresses distinct
    return sum(saved.values())


def large_tensors(model: nn.Module) -> tuple[int, int]:
    """Activations and their gradients, of at least LARGE bytes, that operators make in forward, and in backward."""
    with _LargeResults() as forward:
        out = model(_images())
    grad = torch.ones_like(out)
    with _LargeResults() as backward:
        out.backward(grad)
    model.zero_grad(set_to_none=True)
    return forward.count, backward.count


class _LargeResults(TorchDispatchMode):
    """Counts large results of operators that share no storage with an argument.

    What a library allocates while it computes is left out: that differs between processors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if composed := composition(func, args):
            with self:  # counts the operators that it is composed of
                return composed()
        result = func(*args, **(kwargs or {}))
        given = {_address(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        new = [x for x in tree_leaves(result) if isinstance(x, Tensor) and _address(x) not in given]
        activations = [x for x in new if x.dim() == 4 and len(x) == BATCH]  # not weights and covariances
        self.count += sum(x.untyped_storage().nbytes() >= LARGE for x in activations)
        return result


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _images() -> Tensor:
    return torch.zeros(BATCH, 3, SIZE, SIZE).to(memory_format=torch.channels_last)


def resource_counts(built: Iterable[tuple[Specialisation, int, Resources | str]]) -> Counts:
    """For each architecture and kernel the most registers, spilled and shared bytes, of what compiles.

    And how many are serialized: ptxas has every wgmma of them wait for the one before it.
    """
    counts: Counts = {}
    for what, arch, resources in built:
        if isinstance(resources, str):
            continue
        most = counts.setdefault(f"sm_{arch}", {}).setdefault(what.name, Counter())
        for name in ("registers", "spill_bytes", "shared_bytes"):
            most[name] = max(most[name], getattr(resources, name))
        most["serialized"] += resources.serialized
    return {
        arch: {name: dict(kernels[name]) for name in sorted(kernels)}
        for arch, kernels in sorted(counts.items())
    }


def step_launches(builds: Builds, samples: Builds) -> Iterator[tuple[Launch, int]]:
    """All launches of the steps of ``builds``, and of ``samples`` one of each kernel, each with an architecture."""
    for group, is_sample in ((builds, False), (samples, True)):
        for names, dtype, archs in group:
            for arch, name in itertools.product(archs, names):
                planned: Iterable[Launch] = launches(name, PLANNED_BATCH, dtype, capability=arch)
                if is_sample:
                    by_tile = sorted(planned, key=lambda x: x.config.block_m * x.config.block_n)
                    planned = {x.name: x for x in by_tile}.values()
                yield from ((x, arch) for x in planned)


def compile_steps() -> list[tuple[Specialisation, int, Resources | str]]:
    """The kernels of BUILDS and SAMPLES; takes minutes when Triton's cache is empty."""
    return list(
        compile_all({(specialisation(launch, arch), arch) for launch, arch in step_launches(BUILDS, SAMPLES)})
    )


def compiler() -> str:
    """What registers depend on beside the kernels."""
    return f"triton {importlib.metadata.version('triton')}"


def differences(table: Counts, now: Counts) -> list[str]:
    """A line for each count that is not the table's; in all of them less is better."""
    before, after = dict(_flat(table)), dict(_flat(now))
    lines = []
    for name in dict.fromkeys((*before, *after)):
        old, new = before.get(name, "nothing"), after.get(name, "nothing")
        if old != new:
            verdict = ""
            if isinstance(old, int) and isinstance(new, int):
                verdict = " (worse)" if new > old else " (better)"
            lines.append(f"{name}: {old} in the table, {new} now{verdict}")
    return lines


def _flat(counts: Counts, path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in counts.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{path}{name}, ")
        else:
            yield f"{path}{name}", value


def read() -> Counts:
    table: Counts = json.loads(TABLE.read_text())
    return table


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counts", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the table")
    options = parser.parse_args(arguments)
    now = {
        "launches": launch_counts(),
        "memory": memory_counts(),
        "compiler": compiler(),
        "resources": resource_counts(compile_steps()),
    }
    changed = differences(read(), now)
    print("\n".join(changed) or "as in the table")
    if options.write:
        TABLE.write_text(json.dumps(now, indent=1) + "\n")
    elif changed:
        print(ADVICE, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The kernels that a training step launches on a GPU, listed without one: the model runs on meta tensors.

The same code runs as in training; kernels are recorded instead of started.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resnet_fused import models
from resnet_fused.backend import why_not_triton
from resnet_fused.kernels.launch import Launch, observe_launches
from resnet_fused.ops.block_forward import SAMPLE
from resnet_fused.ops.dispatch import IMPLEMENTATIONS, clear_cache
from resnet_fused.reference.resnet import ARCHITECTURES

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
#: Triton kernels that read activations; the others merge their partial sums, or read weights and vectors.
PASSES = (
    "conv_bn_stats",
    "dgrad",
    "wgrad",
    "input_covariance",
    "conv1x1_bn_add_relu",
    "folded_wgrad",
    "folded_dgrad",
)
#: Native ops that start a second, small kernel, which merges partial sums.
_MERGING = ("batch_norm_stats", "backward_reduce")


@dataclass(frozen=True)
class Planned:
    """One launch of a step.

    Args:
        block: stem, layer1.0, ...
        kernel: the name of a Triton kernel, of a native op, or of an ATen operator.
        source: triton, native or aten.
        is_pass: whether it reads or writes activations; else weights, vectors and partial sums alone.
        bytes: read and written, each tensor once.
        flops, config, launch: of a Triton kernel.
    """

    block: str
    kernel: str
    source: str
    is_pass: bool
    bytes: int
    flops: int = 0
    config: str = ""
    launch: Launch | None = None


class _Recorder(TorchDispatchMode):
    """Records everything that would start a kernel."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch, self.block = batch, ""
        self.weights: set[torch.Size] = set()
        self.planned: list[Planned] = []

    def is_activation(self, x: Tensor) -> bool:
        """Of more pixels than pooling leaves and than a mean is estimated from."""
        is_large = x.dim() == 4 and x[0, 0].numel() > SAMPLE * SAMPLE
        return is_large and len(x) == self.batch and x.shape not in self.weights

    def record_launch(self, launch: Launch) -> None:
        is_pass = launch.name in PASSES
        self.planned.append(
            Planned(
                self.block,
                launch.name,
                "triton",
                is_pass,
                launch.bytes,
                launch.flops,
                str(launch.config),
                launch,
            )
        )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if composed := composition(func, args):
            with self:
                return composed()
        result = func(*args, **(kwargs or {}))
        namespace, _, name = func._schema.name.partition("::")
        native = namespace == "resnet_fused"
        if _is_free(func, name):
            return result
        tensors = {id(x): x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)}
        moved = sum(x.numel() * x.element_size() for x in tensors.values())
        is_pass = any(self.is_activation(x) for x in tensors.values())
        source = "native" if native else "aten"
        self.planned.append(Planned(self.block, name, source, is_pass, moved))
        if native and name.endswith(_MERGING):
            self.planned.append(Planned(self.block, f"{name} merge", source, False, 0))
        return result


def composition(func: Any, args: Sequence[Any]) -> Callable[[], Any] | None:
    """A call of an op of ours as one of the operators that it is composed of; None for other operators."""
    namespace, _, name = func._schema.name.partition("::")
    implementations = IMPLEMENTATIONS.get(name) if namespace == "resnet_fused" else None
    composed = implementations.composed if implementations is not None else None
    if composed is None:
        return None
    defaults = (a.default_value for a in func._schema.arguments[len(args) :])
    return functools.partial(composed, *args, *defaults)


def _is_free(func: Any, name: str) -> bool:
    """Whether an operator starts no kernel: it returns a view or uninitialized memory."""
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    return views or name.startswith(("empty", "new_empty", "fresh_like", "detach", "_unsafe_view"))


def plan(arch: str, batch: int, dtype: str = "bf16", image_size: int = 224) -> list[Planned]:
    """Kernels of a training step, forward and backward of stem and blocks, in channels_last, block by block.

    Weights are in ``dtype`` already. Configurations are the defaults, as without autotuning.

    Raises:
        ValueError: an argument out of range, or Triton kernels do not run (backend.why_not_triton).
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}: choose one of {', '.join(ARCHITECTURES)}")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    if batch < 2 or image_size < 32:
        raise ValueError("a plan needs a batch of at least 2 and images of at least 32 pixels")
    if reason := why_not_triton("meta"):
        raise ValueError(f"a plan needs Triton kernels: {reason}")
    recorder = _Recorder(batch)
    with torch.device("meta"), torch.backends.cudnn.flags(enabled=True, allow_tf32=dtype == "tf32"):
        model = getattr(models, arch)().to(DTYPES[dtype], memory_format=torch.channels_last)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.float()
        x = torch.empty(batch, 3, image_size, image_size, dtype=DTYPES[dtype])
        x = x.to(memory_format=torch.channels_last)
        parts = [("stem", model._stem)]
        stages = ("layer1", "layer2", "layer3", "layer4")
        parts += [(f"{s}.{i}", block) for s in stages for i, block in enumerate(getattr(model, s))]
        recorder.weights = {p.shape for p in model.parameters()}
        with observe_launches(recorder.record_launch):
            for recorder.block, part in parts:
                x = _step(recorder, part, x)
    return recorder.planned


def _step(recorder: _Recorder, part: Any, x: Tensor) -> Tensor:
    """Forward and backward of one part of a model; returns its output, the next one's input."""
    x = x.requires_grad_(recorder.block != "stem")
    with recorder:
        out: Tensor = part(x)
    # autograd.grad, not backward: a first step's writes to .grad are left out.
    module = getattr(part, "__self__", part)
    wanted = [p for p in (x, *module.parameters()) if p.requires_grad]
    grad = torch.empty_like(out)
    with recorder:
        torch.autograd.grad(out, wanted, grad, allow_unused=True)
    # Convolutions of meta tensors return contiguous ones, on a GPU the layout of their input.
    return out.detach().contiguous(memory_format=torch.channels_last)


def launches(arch: str, batch: int, dtype: str, image_size: int = 224, capability: int = 90) -> list[Launch]:
    """The Triton launches of a plan, as on a GPU of a compute capability (90: sm_90)."""
    from resnet_fused.kernels.autotune import heuristics

    with heuristics.assume_architecture(capability):
        clear_cache()
        planned = plan(arch, batch, dtype, image_size)
    clear_cache()
    return [p.launch for p in planned if p.launch is not None]


def candidates(
    arch: str, batch: int, dtype: str, image_size: int = 224, capability: int = 90
) -> list[Launch]:
    """As ``launches``, with those of every configuration that autotuning would try on such a GPU."""
    from resnet_fused.kernels.autotune import search

    with search.collect_candidates() as collected:
        return launches(arch, batch, dtype, image_size, capability) + collected


def table(planned: Sequence[Planned], batch: int) -> str:
    """Launches by kernel, those that read activations first, with their bytes per image."""
    lines = [f"{'kernel':34}{'source':8}{'launches':>9}{'MB/image':>10}{'GFLOP/image':>13}"]

    def add(name: str, source: str, group: Sequence[Planned]) -> None:
        moved, flops = sum(p.bytes for p in group) / batch, sum(p.flops for p in group) / batch
        lines.append(f"{name:34}{source:8}{len(group):9}{moved / 1e6:10.2f}{flops / 1e9:13.2f}")

    for is_pass, title in ((True, "passes over activations"), (False, "partial sums, weights and vectors")):
        chosen = [p for p in planned if p.is_pass == is_pass]
        lines.append(f"{title}:")
        for key in dict.fromkeys((p.kernel, p.source) for p in chosen):
            add(f"  {key[0]}", key[1], [p for p in chosen if (p.kernel, p.source) == key])
        add("  all", "", chosen)
    add("all", "", planned)
    return "\n".join(lines)

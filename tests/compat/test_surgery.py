"""What is done to the modules of a model: hooks, replaced and changed modules, copies, averages, conversions."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fusion, parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.overrides import TorchFunctionMode

import resnet_fused
import tests.torchvision_ops  # noqa: F401  # before torchvision
from tests.accuracy import Results, assert_accurate
from tests.compat.small_models import NHWC, every_case, every_kind, images, small_model, small_pair
from tests.model_pairs import assert_equal, draw_away_from_kinks, nodes, results

both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
Change = Callable[[nn.Module], nn.Module | None]


def assert_same_after(
    change: Change, kind: str, layout: torch.memory_format, training: bool = True, **options: Any
) -> dict[str, str]:
    """Changes a model and its reference, compares their results, and returns what ``explain`` says of the modules.

    In evaluation also those of a first call without gradients, which folds norms into weights, and of another after.
    """
    x, found = images(layout), []
    changed: list[nn.Module] = []
    for model in small_pair(kind, layout, training, **options):
        torch.manual_seed(7)  # of what a change draws
        changed.append(change(model) or model)
        if not training:
            with torch.no_grad():
                outputs = {"before": changed[-1](x)}
        found.append(results(changed[-1], x))
        if not training:
            with torch.no_grad():
                found[-1] |= outputs | {"after": changed[-1](x)}
    assert_equal(*found)
    return resnet_fused.explain(changed[0], x if layout is NHWC else None)


AROUND = "fused ops around the convolutions instead of one for the block"


def convs_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d))


# Hooks


@every_case
def test_backward_hooks(kind: str, layout: torch.memory_format) -> None:
    """Backward hooks and backward pre-hooks on convolutions, blocks and stages"""
    x, found = images(layout), []
    for model in small_pair(kind, layout):
        seen: dict[str, Tensor] = {}

        def keep(name: str, seen: dict[str, Tensor], *gradients: Any) -> None:
            seen.update({f"{name} {i}": g[0] for i, g in enumerate(gradients) if g[0] is not None})

        hooked = [*convs_of(model), ("layer1", model.layer1), ("layer2.0", model.layer2[0])]
        for name, module in hooked:
            module.register_full_backward_hook(lambda _, *g, n=name, s=seen: keep(f"{n} gradient", s, *g))
            module.register_full_backward_pre_hook(lambda _, *g, n=name, s=seen: keep(f"{n} before", s, *g))
        found.append(results(model, x) | seen)
        assert len(seen) >= 2 * len(hooked)
    assert_equal(*found)


@every_case
def test_forward_hooks_that_change_outputs(kind: str, layout: torch.memory_format) -> None:
    """Forward hooks that replace the output of a convolution, a norm or a block"""

    def change(model: nn.Module) -> None:
        for module in (model.layer1[0], model.layer2[0].conv2, model.layer2[0].bn1, model.conv1):
            module.register_forward_hook(lambda _, args, out: 0.5 * out)

    assert assert_same_after(change, kind, layout) == {"layer2.0": "bn1 has hooks"}


@every_case
def test_grad_cam_by_hooks(kind: str, layout: torch.memory_format) -> None:
    """Grad-CAM by a forward hook and a tensor hook"""
    x, found = images(layout), []
    for model in small_pair(kind, layout, training=False):
        kept: dict[str, Tensor] = {}

        def keep(_: nn.Module, args: Any, out: Tensor, kept: dict[str, Tensor] = kept) -> None:
            kept["activation"] = out.detach()
            out.register_hook(lambda g: kept.update(gradient=g))

        model.layer2[0].register_forward_hook(keep)
        model(x)[:, 3].sum().backward()
        weights = kept["gradient"].mean((2, 3), keepdim=True)
        found.append({**kept, "map": F.relu((weights * kept["activation"]).sum(1))})
    assert_equal(*found)


@every_case
def test_captum(kind: str, layout: torch.memory_format) -> None:
    """captum: LayerGradCam and IntegratedGradients"""
    attr = pytest.importorskip("captum.attr")
    x, found = images(layout), []
    for model in small_pair(kind, layout, training=False):
        by_cam = attr.LayerGradCam(model, model.layer2[0].conv2).attribute(x, target=3)
        by_path = attr.IntegratedGradients(model).attribute(x, target=3, n_steps=3)
        found.append({"cam": by_cam.detach(), "path": by_path.detach()})
    assert_equal(*found)


class Halved(TorchFunctionMode):
    """Halves the outputs of convolutions, and lists what else is called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.called.append(function.__name__)
        out = function(*args, **(kwargs or {}))
        return 0.5 * out if function is F.conv2d or function is torch.conv2d else out


@every_case
@both_modes
def test_torch_function_modes(kind: str, layout: torch.memory_format, training: bool) -> None:
    """A TorchFunctionMode that replaces functions"""
    x, found, called = images(layout), [], []
    for model in small_pair(kind, layout, training):
        with Halved() as mode:
            found.append(results(model, x))
            explained = resnet_fused.explain(model, x)
        called.append(
            [name for name in mode.called if name in ("conv2d", "batch_norm", "relu", "max_pool2d")]
        )
        if isinstance(model, resnet_fused.ResNet):
            assert {*explained.values()} == {"a TorchFunctionMode is active, which may replace functions"}
    assert_equal(*found)
    assert called[0] == called[1] != []


@every_case
def test_default_device(kind: str, layout: torch.memory_format) -> None:
    """torch.set_default_device, with torch.device: fused"""
    x, (fused, eager) = images(layout), small_pair(kind, layout)
    with torch.device("cpu"):
        assert "_BnReluMaxpoolBackward" in nodes(copy.deepcopy(fused)(x))
        assert_equal(results(fused, x), results(eager, x))


# Other modules in place of a model's, and changed weights


class LowRank(nn.Module):
    """A frozen convolution and a trained product of two small ones, as LoRA adds it."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv.requires_grad_(False)
        options = {"bias": False, "dtype": conv.weight.dtype}
        self.down = nn.Conv2d(conv.in_channels, 4, conv.kernel_size, conv.stride, conv.padding, **options)  # type: ignore[arg-type]
        self.up = nn.Conv2d(4, conv.out_channels, 1, **options)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x) + self.up(self.down(x))
        return out


@every_case
@both_modes
def test_lora(kind: str, layout: torch.memory_format, training: bool) -> None:
    """LoRA: convolutions replaced by modules"""

    def change(model: nn.Module) -> None:
        model.layer2[0].conv2 = LowRank(model.layer2[0].conv2)
        model.layer2[0].downsample[0] = LowRank(model.layer2[0].downsample[0])

    explained = assert_same_after(change, kind, layout, training)
    assert explained == {"layer2.0": f"conv2 is a LowRank: {AROUND}"}


@every_case
@both_modes
@pytest.mark.parametrize(
    "normalize",
    [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.spectral_norm],
    ids=["weight_norm", "spectral_norm", "spectral_norm by hook"],
)
def test_normalized_weights(
    kind: str, layout: torch.memory_format, training: bool, normalize: Callable[[nn.Module], nn.Module]
) -> None:
    """Parametrized convolutions: weight_norm, spectral_norm"""

    def change(model: nn.Module) -> None:
        for conv in (model.conv1, model.layer2[0].conv1):
            normalize(conv)

    explained = assert_same_after(change, kind, layout, training)
    assert list(explained) == ["layer2.0"] and explained["layer2.0"].endswith(AROUND)


@every_case
@both_modes
def test_weights_that_are_results(kind: str, layout: torch.memory_format, training: bool) -> None:
    """Hypernetworks: weights that are computed from other tensors, and gradients w.r.t. those"""
    x, found = images(layout), []
    for model in small_pair(kind, layout, training):
        factor = torch.full((1,), 0.7, dtype=torch.float64, requires_grad=True)
        for module in (model.layer2[0].conv1, model.layer1[0].bn1, model.layer2[0].downsample[0]):
            weight = module.weight.detach()
            del module.weight
            module.weight = weight * factor
        with torch.no_grad():
            out = model(x)
        found.append({"before": out} | results(model, x) | {"factor": factor.grad})
    assert_equal(*found)


@every_case
def test_tensor_subclasses(kind: str, layout: torch.memory_format) -> None:
    """Inputs of a subclass of Tensor: torchvision's tv_tensors.Image"""
    from torchvision.tv_tensors import Image

    fused, eager = small_pair(kind, layout)
    x = Image(images(layout))
    by_fused, by_eager = fused(x), eager(x)
    assert type(by_fused) is type(by_eager)
    assert_equal({"output": by_fused.detach()}, {"output": by_eager.detach()})
    with torch.no_grad():
        by_fused, by_eager = fused.eval()(x), eager.eval()(x)
    assert_equal({"output": by_fused}, {"output": by_eager})


@every_case
def test_evaluation_in_threads(kind: str, layout: torch.memory_format) -> None:
    """One model evaluated by several threads at once"""
    fused, eager = small_pair(kind, layout, training=False)
    inputs = [images(layout, 1 + i % 3) for i in range(12)]

    def evaluate(x: Tensor) -> Tensor:
        with torch.no_grad():  # of each thread
            out: Tensor = fused(x)
        return out

    with ThreadPoolExecutor(4) as pool, torch.no_grad():
        for x, out in zip(inputs, pool.map(evaluate, inputs), strict=True):
            assert_equal({"output": out}, {"output": eager(x)})


@every_kind
@both_modes
@pytest.mark.parametrize("removed", [False, True], ids=["masked", "removed"])
def test_pruning(kind: str, training: bool, removed: bool) -> None:
    """torch.nn.utils.prune: masks, and weights after remove"""

    def change(model: nn.Module) -> None:
        # Its masks of weights in channels_last fail in PyTorch.
        model.to(memory_format=torch.contiguous_format)
        pruned = [(model.layer1[0].conv2, "weight"), (model.layer2[0].conv1, "weight")]
        pruned += [(model.layer2[0].bn1, "weight")]
        prune.global_unstructured(pruned, prune.L1Unstructured, amount=0.3)
        if removed:
            for module, name in pruned:
                prune.remove(module, name)

    explained = assert_same_after(change, kind, NHWC, training)
    masked = {"layer1.0": f"conv2 has hooks: {AROUND}", "layer2.0": "bn1 has hooks"}
    assert explained == ({} if removed else masked)


@every_case
def test_fuse_conv_bn_eval(kind: str, layout: torch.memory_format) -> None:
    """torch.nn.utils.fusion.fuse_conv_bn_eval"""

    def change(model: nn.Module) -> None:
        block = model.layer2[0]
        block.conv1, block.bn1 = fusion.fuse_conv_bn_eval(block.conv1, block.bn1), nn.Identity()

    explained = assert_same_after(change, kind, layout, training=False)
    assert explained == {"layer2.0": "bn1 is a Identity"}


@every_case
@both_modes
def test_frozen_batch_norm_of_torchvision(kind: str, layout: torch.memory_format, training: bool) -> None:
    """torchvision.ops.FrozenBatchNorm2d as norm_layer: fused"""
    from torchvision.ops import FrozenBatchNorm2d

    def change(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, FrozenBatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
                nn.init.normal_(module.running_mean, std=0.2)
                nn.init.uniform_(module.running_var, 0.5, 2.0)

    explained = assert_same_after(change, kind, layout, training, norm_layer=FrozenBatchNorm2d)
    assert explained == {}


@every_case
def test_intermediate_layer_getter(kind: str, layout: torch.memory_format) -> None:
    """A backbone by torchvision's IntermediateLayerGetter"""
    from torchvision.models._utils import IntermediateLayerGetter

    x, found = images(layout), []
    for model in small_pair(kind, layout):
        features = IntermediateLayerGetter(model, {"layer1": "low", "layer2": "high"})(x)
        sum(f.sin().sum() for f in features.values()).backward()
        gradients = {f"{name} gradient": p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({name: f.detach() for name, f in features.items()} | gradients)
    assert_equal(*found)


@every_case
def test_frozen_in_the_middle_of_training(kind: str, layout: torch.memory_format) -> None:
    """Norms frozen in the middle of training (eval(), requires_grad_(False)), and trained again"""
    batches, found = [images(layout) for _ in range(4)], []
    for model in small_pair(kind, layout):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        for i, x in enumerate(batches):
            frozen = i in (1, 2)
            for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
                norm.train(not frozen).requires_grad_(not frozen)
            optimizer.zero_grad()
            F.cross_entropy(model(x), torch.arange(len(x))).backward()
            optimizer.step()
        found.append({name: t.double() for name, t in model.state_dict().items()})
    assert_equal(*found)


@every_case
@both_modes
@pytest.mark.parametrize("trained", ["fc", "bn1", "layer1.0.conv1.weight", "layer2.0.bn2", "downsample"])
def test_frozen_but_for(kind: str, layout: torch.memory_format, training: bool, trained: str) -> None:
    """All parameters frozen but some: a linear probe, norms alone, one convolution"""

    def change(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained in name)

    assert assert_same_after(change, kind, layout, training) == {}


@every_kind
def test_convert_sync_batchnorm(kind: str) -> None:
    """SyncBatchNorm.convert_sync_batchnorm, without other processes"""
    x = images(NHWC)
    fused, eager = small_pair(kind, NHWC)
    fused = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    assert isinstance(fused.layer1[0].bn1, nn.SyncBatchNorm) and resnet_fused.explain(fused, x) == {}
    assert_equal(results(fused, x), results(eager, x))


# Averages and copies


@every_case
@pytest.mark.parametrize("averaging", ["ema", "swa"])
def test_averaged_models(kind: str, layout: torch.memory_format, averaging: str) -> None:
    """swa_utils: AveragedModel (SWA and EMA), evaluated after each step, and update_bn"""
    batches, found = [images(layout) for _ in range(3)], []
    options: dict[str, Any] = {"use_buffers": True}
    if averaging == "ema":
        options = {"multi_avg_fn": get_ema_multi_avg_fn(0.5)}
    for model in small_pair(kind, layout):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        averaged = AveragedModel(model, **options).eval()
        outputs = {}
        for i, x in enumerate(batches):
            optimizer.zero_grad()
            F.cross_entropy(model(x), torch.arange(len(x))).backward()
            optimizer.step()
            averaged.update_parameters(model)
            with torch.no_grad():
                outputs[f"output {i}"] = averaged(batches[0])
        update_bn(batches, averaged)
        with torch.no_grad():
            outputs["last output"] = averaged(batches[0])
        found.append(outputs | {name: t.double() for name, t in averaged.state_dict().items()})
    assert_equal(*found)


def through_file(model: nn.Module, folder: Path) -> nn.Module:
    torch.save(model, folder / "model.pt")
    loaded: nn.Module = torch.load(folder / "model.pt", weights_only=False)
    return loaded


COPIES: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "pickle": lambda model, _: pickle.loads(pickle.dumps(model)),
    "torch.save": through_file,
}


@every_case
@pytest.mark.parametrize("way", COPIES)
def test_copies(kind: str, layout: torch.memory_format, way: str, tmp_path: Path) -> None:
    """A whole model through deepcopy, pickle and torch.save, in training and after an evaluation"""
    model, _ = small_pair(kind, layout)
    x = images(layout)
    for training in (True, False):
        with torch.no_grad():
            model.train(training)(x)
        copied = COPIES[way](model, tmp_path)
        with torch.no_grad():
            assert torch.equal(copied(x), model(x))
        nn.init.zeros_(copied.fc.weight)
        assert model.fc.weight.count_nonzero() > 0
        assert resnet_fused.explain(copied, x.to(memory_format=NHWC)) == {}


@every_case
@both_modes
def test_share_memory(kind: str, layout: torch.memory_format, training: bool) -> None:
    """share_memory"""
    assert assert_same_after(lambda model: model.share_memory(), kind, layout, training) == {}


@every_case
@both_modes
def test_data_parallel(kind: str, layout: torch.memory_format, training: bool) -> None:
    """nn.DataParallel without a GPU"""
    assert assert_same_after(nn.DataParallel, kind, layout, training) == {}


@every_case
@both_modes
def test_load_by_assignment(kind: str, layout: torch.memory_format, training: bool) -> None:
    """load_state_dict(assign=True), after an evaluation"""

    def change(model: nn.Module) -> None:
        values = {name: t + 0.1 if t.is_floating_point() else t for name, t in model.state_dict().items()}
        with torch.no_grad():
            model.eval()(images(layout))
        model.train(training).load_state_dict(values, assign=True)

    assert assert_same_after(change, kind, layout, training) == {}


# How models are made, dtypes and batches


@every_case
@both_modes
def test_empty_batch(kind: str, layout: torch.memory_format, training: bool) -> None:
    """Empty batches, as a rank of DistributedDataParallel may get one: no gradient, and statistics as they were"""
    found = []
    for model in small_pair(kind, layout, training):
        before = {name: b.clone() for name, b in model.named_buffers() if b.is_floating_point()}
        out = model(images(layout, 0))
        assert out.shape == (0, 7)
        out.sum().backward()
        assert all(p.grad is not None and p.grad.count_nonzero() == 0 for p in model.parameters())
        assert all(torch.equal(b, before[name]) for name, b in model.named_buffers() if name in before)
        found.append([int(b) for name, b in model.named_buffers() if name not in before])
    assert found[0] == found[1]


@every_case
@pytest.mark.parametrize("way", ["to_empty", "assign"])
def test_made_on_meta(kind: str, layout: torch.memory_format, way: str) -> None:
    """Made on the meta device, run there, and given weights: by to_empty, by load_state_dict(assign=True)"""
    _, eager = small_pair(kind, layout)
    x = images(layout)
    with torch.device("meta"):
        fused = resnet_fused.resnet18() if kind == "basic" else resnet_fused.resnet50()
        assert fused(x.to("meta", torch.float32)).shape == (len(x), 1000)
    fused.layer1, fused.layer2 = fused.layer1[:1], fused.layer2[:1]
    fused.layer3 = fused.layer4 = nn.Identity()
    fused.fc = nn.Linear(eager.fc.in_features, 7, device="meta")
    if way == "to_empty":
        fused.to_empty(device="cpu").to(torch.float64, memory_format=layout)
    # A copy: what is assigned would be trained twice.
    fused.load_state_dict(copy.deepcopy(eager.state_dict()), assign=way == "assign")
    assert_equal(results(fused, x), results(eager, x))


@every_case
def test_default_dtype(kind: str, layout: torch.memory_format) -> None:
    """torch.set_default_dtype(torch.float64)"""
    _, eager = small_pair(kind, layout)
    torch.set_default_dtype(torch.float64)
    try:
        fused = small_model(resnet_fused, kind).to(memory_format=layout)
        fused.load_state_dict(eager.state_dict())
        x = images(layout)
        assert_equal(results(fused, x), results(eager, x))
        assert resnet_fused.explain(fused, x.to(memory_format=NHWC)) == {}
    finally:
        torch.set_default_dtype(torch.float32)


@every_kind
@pytest.mark.parametrize(
    ("dtype", "norms"),
    [(torch.bfloat16, "all"), (torch.bfloat16, "float32 norms"), (torch.float16, "float32 norms")],
    ids=["bf16", "bf16-float32 norms", "fp16-float32 norms"],
)
def test_low_precision_parameters(kind: str, dtype: torch.dtype, norms: str) -> None:
    """Parameters in 16 bits, without autocast: all of them, or all but those of norms"""

    def draw() -> tuple[Results, Results, Results]:
        fused, eager = (m.float() for m in small_pair(kind, NHWC))
        x = draw_away_from_kinks(eager, (3, 3, 32, 32)).to(dtype, memory_format=NHWC)
        for model in (fused, eager):
            model.to(dtype)
            for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
                norm.to(torch.float32 if norms == "float32 norms" else dtype)
        fused.load_state_dict(eager.state_dict())
        exact = results(copy.deepcopy(eager).double(), x.double())
        return joined(results(fused, x)), joined(results(eager, x)), joined(exact)

    def joined(values: dict[str, Tensor]) -> Results:
        """All gradients as one vector: a single one is noise in eight bits of mantissa."""
        whole = torch.cat([t.flatten().double() for name, t in values.items() if "gradient" in name])
        return {"output": values["output"], "gradients": whole.to(values["output"].dtype)}

    assert_accurate(draw)

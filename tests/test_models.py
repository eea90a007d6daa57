"""The ten fused models: torchvision's names and shapes, and the reference's answers within the accuracy rule."""

from __future__ import annotations

import copy
import json
import pickle
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import resnet_fused
from resnet_fused import reference
from tests.accuracy import assert_as_accurate, element_error, relative_error

TORCHVISION: dict[str, Any] = json.loads((Path(__file__).parent / "torchvision_resnets.json").read_text())
FUSED_NODES = {"_BnReluBackward", "_BnAddReluBackward", "_BnBnAddReluBackward", "_BnReluMaxpoolBackward"}


def nodes(out: Tensor) -> list[str]:
    """Names of all autograd nodes behind a tensor."""
    seen, todo = set(), [out.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return [node.name() for node in seen]


def pair(arch: str, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """The fused model and its reference with equal random weights and statistics.

    Biases keep most activations well away from zero, on either side: where a ReLU sits within rounding of zero, float32
    itself decides the gradient, and the two models may decide differently.
    """
    eager = getattr(reference, arch)(**kwargs)
    for name, module in eager.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, 3.0, 4.0)
            if name.endswith("bn1") or (
                name.endswith("bn2") and isinstance(eager.layer1[0], reference.Bottleneck)
            ):
                module.bias.data *= torch.randn_like(module.bias).sign()
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    fused = getattr(resnet_fused, arch)(**kwargs)
    fused.load_state_dict(eager.state_dict(), strict=True)
    return fused, eager


def results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients of input and parameters, and running statistics after one pass."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = model(x)
    # A loss whose gradient is neither constant nor tiny.
    F.cross_entropy(out, torch.arange(len(x)) % out.shape[1]).backward()
    found = {"output": out.detach(), "input gradient": x.grad}
    found |= {f"{name} gradient": p.grad for name, p in model.named_parameters() if p.grad is not None}
    found |= {name: b for name, b in model.named_buffers() if b.is_floating_point()}
    return found


def kind_of(name: str) -> str:
    """layer1.0.bn1.weight gradient -> norm weight gradient."""
    module, _, result = name.rpartition(".")
    for kind, parts in {"norm": ("bn", "downsample.1"), "conv": ("conv", "downsample.0")}.items():
        if any(part in module for part in parts):
            return f"{kind} {result}"
    return name


def by_kind(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """All results of one kind as one vector.

    A bias whose ReLUs are all open has no gradient, because the next batch norm takes it away: by itself it has no
    relative error.
    """
    kinds: dict[str, list[Tensor]] = {}
    for name, tensor in found.items():
        kinds.setdefault(kind_of(name), []).append(tensor.flatten())
    return {kind: torch.cat(tensors) for kind, tensors in kinds.items()}


def assert_equal(fused: dict[str, Tensor], eager: dict[str, Tensor]) -> None:
    """Equal up to the rounding of float64: every tensor, beside the largest of its kind."""
    assert fused.keys() == eager.keys()
    largest: dict[str, float] = {}
    for name, tensor in eager.items():
        largest[kind_of(name)] = max(largest.get(kind_of(name), 0.0), float(tensor.norm()))
    for name, expected in eager.items():
        assert float((fused[name] - expected).norm()) <= 1e-9 * largest[kind_of(name)], name


@pytest.mark.parametrize("arch", TORCHVISION)
def test_torchvision_names_and_shapes(arch: str) -> None:
    with torch.device("meta"):
        model = getattr(resnet_fused, arch)()
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == TORCHVISION[arch]["state_dict"]
    assert list(shapes) == list(TORCHVISION[arch]["state_dict"])
    assert sum(p.numel() for p in model.parameters()) == TORCHVISION[arch]["parameters"]


def test_same_seed_same_weights() -> None:
    models = []
    for library in (resnet_fused, reference):
        torch.manual_seed(7)
        models.append(library.resnet18(zero_init_residual=True).state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[1])


DRAWS = 3
ACCURACY_CASES = [
    ("resnet18", {}),
    ("resnet50", {}),
    ("resnext50_32x4d", {}),
    ("wide_resnet50_2", {}),
    ("resnet50", {"replace_stride_with_dilation": [False, True, True]}),
]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("shape", [(4, 3, 64, 64), (2, 3, 65, 49)], ids=["64x64", "65x49"])
@pytest.mark.parametrize(
    ("arch", "kwargs"), ACCURACY_CASES, ids=["resnet18", "resnet50", "resnext50", "wide50", "dilated50"]
)
def test_accuracy(arch: str, kwargs: dict[str, Any], shape: tuple[int, ...], training: bool) -> None:
    """The accuracy rule, asked of the median of several draws of each kind of result.

    One ReLU or one maximum of the pooling that rounding decides the other way moves a gradient by orders of magnitude
    in a single draw, for eager as for fused.
    """
    draws: dict[str, list[tuple[float, ...]]] = {}
    for _ in range(DRAWS):
        fused, eager = pair(arch, num_classes=10, **kwargs)
        x = torch.randn(shape).to(memory_format=torch.channels_last)
        if not training:
            adopt_statistics(eager, x)
            fused.load_state_dict(eager.state_dict())
        found = []
        for model in (fused, eager, copy.deepcopy(eager).double()):
            model.train(training).to(memory_format=torch.channels_last)
            found.append(by_kind(results(model, x.to(next(model.parameters()).dtype))))
        for kind, exact in found[2].items():
            errors = [
                measure(f[kind], exact) for measure in (relative_error, element_error) for f in found[:2]
            ]
            draws.setdefault(kind, []).append(tuple(errors))
    assert not FUSED_NODES.difference(nodes(fused(x))), "the model did not run fused"
    for kind, errors_of_draws in draws.items():
        whole, eager_whole, elements, eager_elements = map(
            statistics.median, zip(*errors_of_draws, strict=True)
        )
        tolerance = 4 * torch.finfo(torch.float32).eps
        assert whole <= 1.5 * eager_whole + tolerance, f"{kind}: eager {eager_whole}"
        assert elements <= 1.5 * eager_elements + tolerance, f"{kind}, by element: eager {eager_elements}"


def adopt_statistics(model: nn.Module, x: Tensor) -> None:
    """Makes the batch's statistics the running ones, as training does in time."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    for norm in norms:
        norm.momentum = 0.1


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("arch", ["resnet18", "resnext50_32x4d"])
def test_float64_equals_reference(arch: str, training: bool, layout: torch.memory_format) -> None:
    fused, eager = (m.double().train(training).to(memory_format=layout) for m in pair(arch, num_classes=7))
    x = torch.randn(4, 3, 65, 47, dtype=torch.float64).to(memory_format=layout)
    by_fused, by_eager = results(fused, x), results(eager, x)
    assert_equal(by_fused, by_eager)


def test_frozen_batch_norm_takes_gradients_in_training() -> None:
    """Eval-mode batch norms inside a training model, as in detection fine-tuning."""
    fused, eager = (m.double().train() for m in pair("resnet18", num_classes=7))
    for model in (fused, eager):
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        model.layer1.requires_grad_(False)
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    found = []
    for model in (fused, eager):
        F.cross_entropy(model(x), torch.arange(4)).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_equal(*found)


def test_one_frozen_of_two_batch_norms_in_a_downsample_block() -> None:
    fused, eager = (m.double().train() for m in pair("resnet50", num_classes=7))
    for model in (fused, eager):
        model.layer2[0].downsample[1].eval()
        model.layer3[0].bn3.eval()
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    by_fused, by_eager = results(fused, x), results(eager, x)
    assert_equal(by_fused, by_eager)


MODES: dict[str, dict[str, Any]] = {
    "momentum None": {"momentum": None},
    "momentum 0.3": {"momentum": 0.3},
    "not affine": {"affine": False},
    "no running statistics": {"track_running_stats": False},
    "eps": {"eps": 1e-2},
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kwargs", MODES.values(), ids=MODES.keys())
def test_batch_norm_modes(kwargs: dict[str, Any], training: bool) -> None:
    def norm_layer(channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels, **kwargs)

    models = []
    for library in (resnet_fused, reference):
        torch.manual_seed(3)
        models.append(library.resnet18(num_classes=7, norm_layer=norm_layer).double().train(training))
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    for _ in range(3):  # the cumulative average differs from the third batch on
        by_fused, by_eager = (results(model, x) for model in models)
    assert_equal(by_fused, by_eager)
    for (name, ours), theirs in zip(models[0].named_buffers(), models[1].buffers(), strict=True):
        if "num_batches" in name:
            assert torch.equal(ours, theirs), name


def test_one_value_per_channel_in_training_is_refused_as_by_batch_norm() -> None:
    fused, eager = (m.train() for m in pair("resnet18"))
    messages = []
    for model in (fused, eager):
        with pytest.raises(
            ValueError, match="Expected more than 1 value per channel when training"
        ) as caught:
            model(torch.randn(1, 3, 32, 32))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_empty_batch() -> None:
    fused, _ = pair("resnet18")
    assert fused.eval()(torch.randn(0, 3, 64, 64)).shape == (0, 1000)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        fused.train()(torch.randn(0, 3, 64, 64))


@pytest.mark.parametrize(
    ("x", "error"),
    [
        (torch.randn(2, 4, 64, 64), RuntimeError),
        (torch.randn(2, 3, 64), RuntimeError),
        (torch.zeros(2, 3, 64, 64, dtype=torch.int64), RuntimeError),
        (torch.randn(2, 3, 64, 64, dtype=torch.float64), RuntimeError),
        (torch.randn(2, 3, 64, 64, device="meta"), RuntimeError),
    ],
    ids=["channels", "rank", "integers", "another dtype", "another device"],
)
def test_bad_input_fails_as_in_the_reference(x: Tensor, error: type[Exception]) -> None:
    for model in pair("resnet18"):
        with pytest.raises(error):
            model(x)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_counts_a_batch_once(use_reentrant: bool) -> None:
    fused, eager = (m.double() for m in pair("resnet18", num_classes=7))
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    expected = results(eager, x)
    x = x.requires_grad_()
    out = checkpoint(fused, x, use_reentrant=use_reentrant)
    F.cross_entropy(out, torch.arange(4)).backward()
    assert fused.bn1.num_batches_tracked == 1
    found = {"output": out.detach(), "input gradient": x.grad}
    found |= {f"{name} gradient": p.grad for name, p in fused.named_parameters()}
    assert_equal(found | {name: b for name, b in fused.named_buffers() if b.is_floating_point()}, expected)


def test_called_twice_before_backward() -> None:
    fused, eager = (m.double() for m in pair("resnet18", num_classes=7))
    first, second = (torch.randn(4, 3, 64, 64, dtype=torch.float64) for _ in range(2))
    found = []
    for model in (fused, eager):
        (model(first).square().sum() + model(second).sum()).backward()
        found.append(
            {n: p.grad for n, p in model.named_parameters()}
            | {n: b.double() for n, b in model.named_buffers()}
        )
    assert_equal(*found)


def test_double_backward() -> None:
    fused, eager = (m.double() for m in pair("resnet18", num_classes=7))
    x = torch.randn(3, 3, 40, 40, dtype=torch.float64)
    found = []
    for model in (fused, eager):
        inputs = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(inputs).square().sum(), inputs, create_graph=True)
        slope.square().sum().backward()
        found.append(
            {"input": inputs.grad} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        )
    assert_equal(*found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    fused, eager = (m.to(memory_format=torch.channels_last) for m in pair("resnet18", num_classes=7))
    x = torch.randn(4, 3, 64, 64).to(memory_format=torch.channels_last)
    exact = results(copy.deepcopy(eager).double(), x.double())
    with torch.autocast("cpu", dtype=dtype):
        by_fused, by_eager = results(fused, x), results(eager, x)
    assert by_fused["output"].dtype == by_eager["output"].dtype == dtype
    for name in ("output", "bn1.running_mean", "layer1.0.bn1.running_var"):
        assert_as_accurate(name, by_fused[name], by_eager[name], exact[name])
    # Deep gradients of an untrained net are noise in 8 bits of mantissa; as a whole the fused one may not be worse.
    whole = [
        torch.cat([g[k].double().flatten() for k in g if k.endswith("gradient")])
        for g in (by_fused, by_eager, exact)
    ]
    assert (
        relative_error(whole[0], whole[2])
        <= 1.5 * relative_error(whole[1], whole[2]) + 4 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_give_the_same_answers(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, _ = pair("resnet18")
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(copied(model)(x), model(x))


def test_functional_call_and_func_grad() -> None:
    fused, eager = (m.double() for m in pair("resnet18", num_classes=7))
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in eager.named_parameters()}

    def slopes(model: nn.Module) -> dict[str, Tensor]:
        def loss(values: dict[str, Tensor]) -> Tensor:
            buffers = {name: b.clone() for name, b in model.named_buffers()}
            return F.cross_entropy(
                torch.func.functional_call(model, (values, buffers), (x,)), torch.arange(3)
            )

        return torch.func.grad(loss)(parameters)

    assert_equal(slopes(fused), slopes(eager))


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    fused, eager = pair("resnet18")
    torch.save(fused.state_dict(), tmp_path / "model.pt")
    eager.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), strict=True)
    with pytest.raises(RuntimeError, match=r"size mismatch for fc\.weight"):
        resnet_fused.resnet18(num_classes=3).load_state_dict(eager.state_dict())


def test_does_not_depend_on_the_number_of_threads() -> None:
    y = torch.randn(3, 37, 33, 31)
    norm = (torch.zeros(37), torch.ones(37), torch.rand(37), torch.randn(37), True)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            x = y.clone().requires_grad_()
            out = resnet_fused.functional.bn_relu(x, *norm)
            out.square().sum().backward()
            found.append((out.detach(), x.grad))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def hook_a_norm(model: nn.Module) -> str:
    model.layer1[0].bn1.register_forward_hook(lambda *_: None)
    return "bn1 has hooks"


def hook_before_a_norm(model: nn.Module) -> str:
    model.layer1[0].bn2.register_forward_pre_hook(lambda *_: None)
    return "bn2 has hooks"


def swap_a_norm(model: nn.Module) -> str:
    model.layer1[0].bn1 = nn.GroupNorm(8, 64).double()
    return "bn1 is a GroupNorm"


def swap_the_relu(model: nn.Module) -> str:
    model.layer1[0].relu = nn.GELU()
    return "relu is a GELU"


def parametrize_a_norm(model: nn.Module) -> str:
    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    nn.utils.parametrize.register_parametrization(model.layer1[0].bn1, "weight", Twice())
    return "bn1 is a ParametrizedBatchNorm2d"


def replace_a_forward(model: nn.Module) -> str:
    model.layer1[0].bn1.forward = lambda x: x
    return "bn1 has a forward of its own"


CHANGES = [hook_a_norm, hook_before_a_norm, swap_a_norm, swap_the_relu, parametrize_a_norm, replace_a_forward]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_changed_block_runs_plain_and_says_so(change: Callable[[nn.Module], str]) -> None:
    fused, eager = (m.double() for m in pair("resnet18", num_classes=7))
    assert resnet_fused.explain(fused) == {}
    reason = change(fused)
    change(eager)
    assert resnet_fused.explain(fused) == {"layer1.0": reason}
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    by_fused, by_eager = results(fused, x), results(eager, x)
    assert_equal(by_fused, by_eager)


def test_hooks_on_blocks_and_convs_leave_them_fused() -> None:
    model, _ = pair("resnet18")
    calls: list[str] = []
    model.layer1[0].register_forward_hook(lambda *_: calls.append("block"))
    model.layer1[0].conv1.register_forward_hook(lambda *_: calls.append("conv"))
    assert resnet_fused.explain(model) == {}
    model(torch.randn(2, 3, 64, 64))
    assert calls == ["conv", "block"]


def test_a_model_without_max_pool_keeps_its_fused_norm() -> None:
    fused, eager = (m.double() for m in pair("resnet18", num_classes=7))
    for model in (fused, eager):
        model.maxpool = nn.Identity()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    by_fused, by_eager = results(fused, x), results(eager, x)
    assert_equal(by_fused, by_eager)


def test_forced_reference_gives_the_same_answers() -> None:
    model, _ = pair("resnet18", num_classes=7)
    model.double()
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    by_native = results(copy.deepcopy(model), x)
    with resnet_fused.backend("reference"):
        by_reference = results(copy.deepcopy(model), x)
    assert_equal(by_native, by_reference)


def test_symbolic_tracing_sees_the_plain_composition() -> None:
    model, _ = pair("resnet18")
    model.eval()
    traced = torch.fx.symbolic_trace(model)
    x = torch.randn(2, 3, 64, 64)
    assert relative_error(traced(x), model(x)) < 1e-5

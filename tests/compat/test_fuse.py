"""Models of torchvision and timm, by fuse"""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import resnet_fused
from resnet_fused import reference
from resnet_fused.blocks import FusedBlock
from resnet_fused.fuse import _KNOWN
from tests import torchvision_ops  # noqa: F401
from tests.model_pairs import assert_equal, nodes, results

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")
TORCHVISION = [name for name in resnet_fused.__all__ if "resne" in name and hasattr(torchvision.models, name)]
#: Run fused as a whole: deep stems (c, s, t), average-pool downsample (d), groups, both kinds of block.
TIMM = [
    "resnet10t", "resnet18", "resnet18d", "resnet26", "resnet26d", "resnet26t", "resnet50c", "resnet50s", "resnet101d",
    "resnext50d_32x4d", "wide_resnet50_2",
]  # fmt: skip
#: Blocks of each stage: enough for every kind of them.
LAYERS = [1, 2, 1, 1]


@pytest.fixture(autouse=True)
def _fused() -> Iterator[None]:
    """However few images: on a CPU small ones train as PyTorch's operators otherwise."""
    with resnet_fused.backend("vendor"):
        yield


def make_torchvision(arch: str, **options: Any) -> nn.Module:
    """A model of torchvision by its own constructor, but with fewer blocks."""
    library = torchvision.models.resnet
    original = library._resnet

    def shallow(block: type[nn.Module], layers: list[int], *rest: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = original(block, LAYERS, *rest, **kwargs)
        return model

    with mock.patch.object(library, "_resnet", shallow):
        model: nn.Module = torchvision.models.get_model(arch, weights=None, **options)
    return model


def make_timm(arch: str, **options: Any) -> nn.Module:
    """A model of timm by its own constructor, but with fewer blocks."""
    options = {"zero_init_last": False} | options
    model: nn.Module = timm.create_model(arch, layers=LAYERS, num_classes=7, **options)
    return model


def images(count: int = 3, size: int = 64) -> Tensor:
    return torch.randn(count, 3, size, size, dtype=torch.float64).to(memory_format=torch.channels_last)


def prepared(model: nn.Module) -> nn.Module:
    """In float64 and channels_last, with random norms, and biases that keep most activations away from zero."""
    for module in model.modules():
        if type(module).__name__ in ("BatchNorm2d", "FrozenBatchNorm2d"):
            for name, low, high in (("weight", 0.5, 1.5), ("bias", 1.0, 2.0), ("running_var", 0.5, 2.0)):
                nn.init.uniform_(getattr(module, name), low, high)
    return model.double().to(memory_format=torch.channels_last)


def objects(model: nn.Module) -> dict[str, int]:
    named = (*model.named_modules(), *model.named_parameters(), *model.named_buffers())
    return {f"{type(value).__name__} {name}": id(value) for name, value in named}


def fused_and_plain(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A fused model and a plain copy. Fusing changes neither its objects nor what it looks like."""
    model = prepared(model)
    plain = copy.deepcopy(model)
    before = objects(model), repr(model), list(model.state_dict())
    assert resnet_fused.fuse(model) is model
    assert (objects(model), repr(model), list(model.state_dict())) == before
    return model, plain


def assert_same_results(fused: nn.Module, plain: nn.Module, x: Tensor) -> None:
    """Outputs, gradients and statistics, in training and in evaluation, and outputs without gradients."""
    for training in (True, False):
        found = []
        for model in (fused, plain):
            model.train(training).zero_grad()
            found.append(results(model, x))
        assert_equal(*found)
    assert_same_outputs(fused, plain, x)


def assert_same_outputs(fused: nn.Module, plain: nn.Module, x: Any) -> None:
    """Without gradients; of a tensor, or of several."""
    found = []
    for model in (fused, plain):
        with torch.no_grad():
            out = model(x)
        named = out if isinstance(out, dict) else dict(enumerate([out] if isinstance(out, Tensor) else out))
        found.append({str(name): value for name, value in named.items()})
    assert_equal(*found)


@pytest.mark.parametrize("arch", TORCHVISION)
def test_torchvision(arch: str) -> None:
    """torchvision's ten ResNets: outputs, gradients, statistics, evaluation"""
    fused, plain = fused_and_plain(make_torchvision(arch, num_classes=7))
    assert_same_results(fused, plain, images())
    assert resnet_fused.explain(fused, images()) == {}
    assert isinstance(fused, torchvision.models.ResNet)


@pytest.mark.parametrize("arch", TIMM)
def test_timm(arch: str) -> None:
    """timm's ResNets: deep stems, average-pool downsample, groups"""
    fused, plain = fused_and_plain(make_timm(arch))
    assert_same_results(fused, plain, images())
    assert resnet_fused.explain(fused, images()) == {}
    assert "_ResidualBlockBackward" in nodes(fused(images()))


#: A timm ResNet and its options: some of what explain says of its stem and blocks.
PLAIN: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "seresnet18": ({}, {"layer1.0": "se is a SEModule"}),
    "ecaresnet26t": ({}, {"layer1.0": "se is a EcaModule"}),
    "resnetblur18": ({}, {"layer2.0": "aa is a BlurPool2d"}),
    "resnetaa50": ({}, {"": "maxpool is a AvgPool2d: bn1 and relu are fused without it"}),
    "resnetrs50": ({}, {"": "maxpool is a Sequential: bn1 and relu are fused without it"}),
    "resnet50_gn": ({}, {"": "bn1 is a GroupNorm", "layer1.0": "bn1 is a GroupNorm"}),
    "resnet18": ({"act_layer": "silu"}, {"": "act1 is a SiLU", "layer1.0": "act1 is a SiLU"}),
    "resnet34": ({"drop_path_rate": 0.5}, {"layer4.0": "drop_path is a DropPath"}),
    "resnet26": ({"drop_block_rate": 0.5}, {"layer4.0": "drop_block is a DropBlock2d"}),
}


@pytest.mark.parametrize("arch", PLAIN)
def test_blocks_that_stay_plain(arch: str) -> None:
    """timm's blocks that stay plain, beside fused ones: SE, ECA, anti-aliasing, GroupNorm, SiLU, DropPath, DropBlock"""
    options, expected = PLAIN[arch]
    fused, plain = fused_and_plain(make_timm(arch, **options))
    x, found = images(), []
    explained = resnet_fused.explain(fused, x)
    assert explained | expected == explained
    for model in (fused, plain):
        torch.manual_seed(0)
        found.append(results(model, x))
    assert_equal(*found)


def losses_and_gradients(model: nn.Module, x: list[Tensor]) -> dict[str, Tensor]:
    """Of a detection model, which draws random numbers."""
    model.train().zero_grad()
    torch.manual_seed(0)
    target = {"boxes": torch.tensor([[5.0, 5, 60, 60]]).double(), "labels": torch.tensor([1])}
    losses = model(x, [target, target])
    sum(losses.values()).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()} | found


def test_detection() -> None:
    """Detection: a backbone with FrozenBatchNorm2d and frozen stages in Faster R-CNN"""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    norm = torchvision.ops.FrozenBatchNorm2d
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=norm, trainable_layers=3
    )
    options = {"min_size": 64, "max_size": 96, "box_batch_size_per_image": 16}
    options |= {f"rpn_{when}_nms_top_n_{mode}": 30 for when in ("pre", "post") for mode in ("train", "test")}
    fused, plain = fused_and_plain(FasterRCNN(backbone, 5, **options))
    for model in (fused, plain):
        for module in model.modules():
            if isinstance(module, norm):
                module.weight *= 0.3  # activations neither vanish nor grow
                module.eps = 0.0
    x = [torch.rand(3, 70, 80).double(), torch.rand(3, 64, 90).double()]
    by_fused, by_plain = losses_and_gradients(fused, x), losses_and_gradients(plain, x)
    assert by_fused.keys() == by_plain.keys() and len(by_plain) > 30
    for name, expected in by_plain.items():
        assert float((by_fused[name] - expected).norm()) <= 1e-9 * float(expected.norm()), name
    assert resnet_fused.explain(fused.eval(), x) == {}
    with torch.no_grad():
        for ours, theirs in zip(fused(x), plain.eval()(x), strict=True):
            assert all(torch.allclose(ours[name], theirs[name], 1e-9, 1e-9) for name in theirs)


@pytest.mark.parametrize("arch", ["fcn_resnet50", "deeplabv3_resnet50"])
def test_segmentation(arch: str) -> None:
    """Segmentation: FCN and DeepLabV3, with dilated stages"""
    model = make_torchvision(arch, weights_backbone=None, num_classes=5, aux_loss=True)
    fused, plain = fused_and_plain(model)
    x, found = images(2), []
    for model in (fused, plain):
        torch.manual_seed(0)  # dropout
        out = model(x)
        (out["out"].square().mean() + out["aux"].square().mean()).backward()
        found.append({"output": out["out"].detach()} | {n: p.grad for n, p in model.named_parameters()})
        found[-1] |= {name: b for name, b in model.named_buffers() if b.is_floating_point()}
    assert_equal(*found)
    assert resnet_fused.explain(fused, x) == {}


@pytest.mark.parametrize("layer", ["relu", "maxpool"])
def test_layers_of_the_stem_that_are_returned(layer: str) -> None:
    """torchvision's IntermediateLayerGetter, also of layers within the stem"""
    from torchvision.models._utils import IntermediateLayerGetter

    model = IntermediateLayerGetter(torchvision.models.resnet18(), {layer: "stem", "layer1": "first"})
    fused, plain = fused_and_plain(model)
    x = images()
    assert_same_outputs(fused, plain, x)
    stays = {"": "returns what is computed within the stem"} if layer == "relu" else {}
    assert resnet_fused.explain(fused, x) == stays
    fused.return_layers = plain.return_layers = {"bn1": "stem", "layer1": "first"}
    assert_same_outputs(fused, plain, x)


def test_features_of_timm() -> None:
    """timm's features_only and forward_intermediates"""
    x = images()
    fused, plain = fused_and_plain(timm.create_model("resnet18", features_only=True))
    assert_same_outputs(fused, plain, x)
    assert resnet_fused.explain(fused, x) == {}
    fused, plain = fused_and_plain(timm.create_model("resnet18"))
    with torch.no_grad():
        found = [
            dict(zip("01234", model.forward_intermediates(x)[1], strict=True)) for model in (fused, plain)
        ]
    assert_equal(*found)


def test_double_backward() -> None:
    """Double backward through an average-pool downsample"""
    fused, plain = fused_and_plain(make_timm("resnet26d"))
    x, found = images(), []
    for model in (fused, plain):
        inputs = x.clone(memory_format=torch.preserve_format).requires_grad_()
        (slope,) = torch.autograd.grad(model(inputs).square().sum(), inputs, create_graph=True)
        slope.square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert_equal(*found)


def test_checkpointing_of_timm() -> None:
    """timm's set_grad_checkpointing"""
    fused, plain = fused_and_plain(make_timm("resnet26d"))
    for model in (fused, plain):
        model.set_grad_checkpointing()
    x = images()
    assert_equal(results(fused, x), results(plain, x))


def small(library: Any = torchvision.models.resnet, block: str = "BasicBlock") -> nn.Module:
    model: nn.Module = library.ResNet(getattr(library, block), LAYERS, num_classes=7)
    return model


def test_an_optimizer_and_hooks_made_before() -> None:
    """An optimizer and hooks made before fuse"""
    model = prepared(small())
    plain = copy.deepcopy(model)
    calls: list[str] = []
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, plain)]
    model.layer1[0].register_forward_hook(lambda *_: calls.append("block"))
    model.register_forward_hook(lambda *_: calls.append("model"))
    resnet_fused.fuse(model)
    x = images()
    for m, optimizer in zip((model, plain), optimizers, strict=True):
        for _ in range(2):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
    assert calls == ["block", "model"] * 2
    found = [{name: p.detach() for name, p in m.named_parameters()} for m in (model, plain)]
    assert_equal(*found)


def test_fusing_again_and_unfusing() -> None:
    """Fusing again, unfuse"""
    model = small()
    plain = [type(module) for module in model.modules()]
    classes = [type(module) for module in resnet_fused.fuse(model).modules()]
    assert classes != plain
    assert [type(module) for module in resnet_fused.fuse(model).modules()] == classes
    assert [type(module) for module in resnet_fused.fuse(small()).modules()] == classes
    assert resnet_fused.unfuse(model) is model and [type(module) for module in model.modules()] == plain
    assert resnet_fused.unfuse(model) is model


def test_models_of_this_package() -> None:
    """fuse and unfuse of models of this package"""
    model = resnet_fused.unfuse(resnet_fused.resnet18())
    assert type(model) is reference.ResNet and type(model.layer1[0]) is reference.BasicBlock
    assert type(resnet_fused.fuse(model)) is resnet_fused.ResNet
    assert type(model.layer1[0]) is resnet_fused.BasicBlock and resnet_fused.explain(model) == {}


BOTH = pytest.mark.parametrize(
    "library", [torchvision.models.resnet, timm.models.resnet], ids=["torchvision", "timm"]
)


@BOTH
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "copy", "pickle"],
)
def test_copies_are_fused(library: Any, copied: Callable[[nn.Module], nn.Module]) -> None:
    """copy, deepcopy and pickle of a fused model"""
    model = resnet_fused.fuse(prepared(small(library))).eval()
    other, x = copied(model), images()
    assert type(other) is type(model) and type(other.layer1[0]) is type(model.layer1[0])
    assert torch.equal(other(x), model(x))


class OwnForward(torchvision.models.resnet.BasicBlock):  # type: ignore[misc,name-defined]
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class OwnInit(torchvision.models.resnet.BasicBlock):  # type: ignore[misc,name-defined]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.extra = nn.Identity()


def test_subclasses() -> None:
    """Subclasses of torchvision's blocks, with a forward of their own or without"""
    models = []
    for block in (OwnForward, OwnInit):
        fused, plain = fused_and_plain(torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=7))
        assert_same_results(fused, plain, images())
        assert isinstance(fused.layer1[0], block)
        models.append(fused)
    expected = "is a OwnForward with a forward of its own"
    assert set(resnet_fused.explain(models[0], images()).values()) == {expected}
    assert resnet_fused.explain(models[1], images()) == {}


def test_a_forward_of_a_block_is_kept() -> None:
    """A forward assigned to a block"""
    model = small()
    model.layer1[0].forward = lambda x: x
    resnet_fused.fuse(model)
    model.layer3[0].forward = lambda x: x
    expected = dict.fromkeys(("layer1.0", "layer3.0"), "has a forward of its own")
    assert resnet_fused.explain(model) == expected


def test_other_versions_stay_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version of a library whose forward differs"""
    known = [k._replace(names=k.names | {"layer_scale"}) if k.name == "BasicBlock" else k for k in _KNOWN]
    monkeypatch.setattr(sys.modules["resnet_fused.fuse"], "_KNOWN", known)
    explained = resnet_fused.explain(resnet_fused.fuse(small()))
    assert len(explained) == 5
    assert set(explained.values()) == {"is of a version of torchvision that fuse doesn't know"}


def test_errors() -> None:
    """Errors of fuse and unfuse"""
    with pytest.raises(ValueError, match="VGG has no residual block that fuse can convert"):
        resnet_fused.fuse(torchvision.models.vgg11(init_weights=False))
    for function in (resnet_fused.fuse, resnet_fused.unfuse):
        with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module, got dict"):
            function({})
    model = resnet_fused.fuse(small())
    model.layer1[0].__class__ = type("Wrapped", (type(model.layer1[0]),), {})
    with pytest.raises(ValueError, match=r"layer1\.0 is a Wrapped, which is derived from a fused class"):
        resnet_fused.unfuse(model)
    assert isinstance(model.layer2[0], FusedBlock)


@pytest.mark.parametrize(
    ("library", "training"),
    [(torchvision.models.resnet, True), (timm.models.resnet, False)],
    ids=["torchvision-train", "timm-eval"],
)
def test_compile(library: Any, training: bool) -> None:
    """torch.compile(fullgraph=True) of a fused model"""
    fused, plain = fused_and_plain(small(library, "Bottleneck"))
    x = images()
    compiled = torch.compile(fused.train(training), fullgraph=True, backend="aot_eager")
    found = {name.removeprefix("_orig_mod."): value for name, value in results(compiled, x).items()}
    assert_equal(found, results(plain.train(training), x))


def test_script_trace_and_symbolic_trace() -> None:
    """torch.jit.script and trace, torch.fx, torch.export of a fused model"""
    fused, plain = fused_and_plain(small())
    x = images()
    expected = {"output": plain.eval()(x).detach()}
    for program in (
        torch.jit.script(fused.eval()),
        torch.jit.trace(fused, x),
        torch.fx.symbolic_trace(fused),
        torch.export.export(fused, (x,)).module(),
    ):
        assert_equal({"output": program(x).detach()}, expected)
    assert isinstance(fused.layer1[0], FusedBlock)


def test_models_registered_with_timm() -> None:
    """timm.create_model by the names that resnet_fused.timm registers"""
    import resnet_fused.timm

    names = resnet_fused.timm.NAMES
    assert {"resnet18_fused", "resnet50d_fused", "resnext50_32x4d_fused", "wide_resnet50_2_fused"} <= {*names}
    assert {*timm.list_models("*_fused")} == {*names}
    tagged = timm.list_models("resnet50_fused*", pretrained=True)
    plain = timm.list_models("resnet50.*", pretrained=True)
    assert tagged == [name.replace("resnet50", "resnet50_fused") for name in plain] and len(plain) > 5
    model = timm.create_model("resnet50_fused.a1_in1k", num_classes=7, layers=LAYERS)
    assert isinstance(model, timm.models.ResNet) and model.num_classes == 7
    assert model.pretrained_cfg["url"] == timm.get_pretrained_cfg("resnet50.a1_in1k").url
    model = model.to(memory_format=torch.channels_last)
    assert resnet_fused.explain(model, images().float()) == {}
    with torch.device("meta"):
        assert all(resnet_fused.explain(timm.create_model(name)) == {} for name in names)

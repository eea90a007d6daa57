"""Names, shapes, initialisation, arguments and errors of the models, fused and reference, are torchvision's."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fused
from resnet_fused import reference
from resnet_fused.reference.resnet import BLOCKS, build

TORCHVISION: dict[str, Any] = json.loads((Path(__file__).parents[1] / "torchvision_resnets.json").read_text())


@pytest.fixture(params=[resnet_fused, reference], ids=["fused", "reference"])
def library(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("name", TORCHVISION)
def test_names_shapes_and_parameter_count(name: str, library: Any) -> None:
    with torch.device("meta"):
        model = getattr(library, name)()
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert shapes == TORCHVISION[name]["state_dict"]
    assert list(shapes) == list(TORCHVISION[name]["state_dict"])
    assert sum(p.numel() for p in model.parameters()) == TORCHVISION[name]["parameters"]


def test_the_table_and_the_constructors_are_the_same_ten(library: Any) -> None:
    assert list(reference.ARCHITECTURES) == list(TORCHVISION)
    for name in TORCHVISION:
        constructor = getattr(library, name)
        assert constructor.__name__ == name
        signature = inspect.signature(constructor)
        parameters = signature.parameters
        assert (
            "weights: None for random" in constructor.__doc__
            and signature.return_annotation is library.ResNet
        )
        of_model = {*list(inspect.signature(library.ResNet).parameters)[2:]}
        assert {*parameters} == {"weights", "progress"} | of_model - {*reference.ARCHITECTURES[name].fixed}
        assert {n: p.default for n, p in list(parameters.items())[:2]} == {"weights": None, "progress": True}
        assert {p.kind for p in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}


def test_positional_order_of_the_arguments(library: Any) -> None:
    model = "block layers num_classes zero_init_residual groups width_per_group replace_stride_with_dilation norm_layer"
    block = "inplanes planes stride downsample groups base_width dilation norm_layer"
    expected = {"ResNet": model, "BasicBlock": block, "Bottleneck": block}
    for name, parameters in expected.items():
        assert list(inspect.signature(getattr(library, name)).parameters) == parameters.split()


def test_modules_and_attributes(library: Any) -> None:
    with torch.device("meta"):
        model: Any = library.resnext50_32x4d()
    names = "conv1 bn1 relu maxpool layer1 layer2 layer3 layer4 avgpool fc"
    assert [name for name, _ in model.named_children()] == names.split()
    assert (model.inplanes, model.dilation, model.groups, model.base_width) == (2048, 1, 32, 4)
    assert model.relu.inplace
    block: Any = model.layer2[0]
    assert " ".join(n for n, _ in block.named_children()) == "conv1 bn1 conv2 bn2 conv3 bn3 relu downsample"
    assert [type(m) for m in block.downsample] == [nn.Conv2d, nn.BatchNorm2d]
    assert (block.stride, model.layer2[1].stride, model.layer2[1].downsample) == (2, 1, None)
    # The stride sits on the 3x3.
    assert [m.stride[0] for m in (block.conv1, block.conv2, block.conv3)] == [1, 2, 1]
    assert (library.BasicBlock.expansion, library.Bottleneck.expansion) == (1, 4)


def test_initialization_is_drawn_in_torchvisions_order(library: Any) -> None:
    """Recomputed from the shapes alone: what the layers draw when made, then a normal for every convolution."""
    torch.manual_seed(11)
    model = library.resnet18(num_classes=5)
    found = model.state_dict()

    torch.manual_seed(11)
    convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    # A block's downsample comes after it among the modules, but is made before it.
    made = sorted(convolutions, key=lambda n: (n.split(".")[:2], "downsample" not in n))
    assert made[0] == "conv1" and made.index("layer2.0.downsample.0") < made.index("layer2.0.conv1")
    for name in made:
        fan_in = found[f"{name}.weight"][0].numel()
        torch.empty_like(found[f"{name}.weight"]).uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
    bound = 1 / math.sqrt(512)
    assert torch.equal(found["fc.weight"], torch.empty(5, 512).uniform_(-bound, bound))
    assert torch.equal(found["fc.bias"], torch.empty(5).uniform_(-bound, bound))
    for name in convolutions:
        weight = found[f"{name}.weight"]
        fan_out = weight.shape[0] * weight.shape[2] * weight.shape[3]
        assert torch.equal(weight, torch.empty_like(weight).normal_(0, math.sqrt(2 / fan_out))), name
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all(), name


@pytest.mark.parametrize(("name", "last"), [("resnet18", "bn2"), ("resnet50", "bn3")])
def test_zero_init_residual(name: str, last: str, library: Any) -> None:
    model = getattr(library, name)(zero_init_residual=True)
    for module_name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            is_last = module_name.startswith("layer") and module_name.endswith(f".{last}")
            assert (module.weight == (0 if is_last else 1)).all(), module_name


def test_dilation_replaces_strides(library: Any) -> None:
    with torch.device("meta"):
        model: Any = library.resnet50(replace_stride_with_dilation=[False, True, True])
    assert model.dilation == 4
    dilations = {
        f"{n}.{i}": b.conv2.dilation[0] for n in ("layer3", "layer4") for i, b in enumerate(getattr(model, n))
    }
    assert [dilations[f"layer3.{i}"] for i in range(6)] == [1, 2, 2, 2, 2, 2]
    assert [dilations[f"layer4.{i}"] for i in range(3)] == [2, 4, 4]
    assert all(m.stride == (1, 1) for n, m in model.layer4.named_modules() if isinstance(m, nn.Conv2d))
    features = nn.Sequential(
        model.conv1, model.maxpool, model.layer1, model.layer2, model.layer3, model.layer4
    )
    assert features(torch.empty(1, 3, 97, 65, device="meta")).shape == (1, 2048, 13, 9)


def test_another_norm_layer(library: Any) -> None:
    model: Any = library.resnet18(num_classes=4, norm_layer=lambda channels: nn.GroupNorm(8, channels))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert isinstance(model.layer2[0].downsample[1], nn.GroupNorm)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 4)
    zeroed: Any = library.resnet18(
        zero_init_residual=True, norm_layer=lambda channels: nn.GroupNorm(8, channels)
    )
    assert (zeroed.layer1[0].bn2.weight == 0).all()


def test_batch_norm_without_parameters(library: Any) -> None:
    def norm_layer(channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels, affine=False)

    model = library.resnet18(num_classes=4, zero_init_residual=True, norm_layer=norm_layer)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 4)


def test_a_block_is_what_the_paper_says() -> None:
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut), by functions."""
    model: Any = reference.resnet18()
    block = model.layer2[0].double()
    x = torch.randn(2, 64, 9, 7, dtype=torch.float64)

    def norm(y: Tensor) -> Tensor:
        centred = y - y.mean((0, 2, 3), keepdim=True)
        return centred / (centred.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()

    out = norm(nn.functional.conv2d(x, block.conv1.weight, stride=2, padding=1)).relu()
    out = norm(nn.functional.conv2d(out, block.conv2.weight, padding=1))
    out = out + norm(nn.functional.conv2d(x, block.downsample[0].weight, stride=2))
    torch.testing.assert_close(block(x), out.relu(), rtol=1e-11, atol=1e-11)


BASIC = "BasicBlock only supports groups=1 and base_width=64"
THREE = r"replace_stride_with_dilation should be None or a 3-element tuple, got \[True\]"
DILATED = [False, True, True]


@pytest.mark.parametrize(
    ("name", "kwargs", "error", "message"),
    [
        ("resnet50", {"replace_stride_with_dilation": [True]}, ValueError, THREE),
        ("resnet18", {"groups": 2}, ValueError, BASIC),
        ("resnet34", {"width_per_group": 128}, ValueError, BASIC),
        (
            "resnet18",
            {"replace_stride_with_dilation": DILATED},
            NotImplementedError,
            "Dilation > 1 not supported",
        ),
        ("resnext50_32x4d", {"groups": 4}, ValueError, "'groups' expected value 32 but got 4 instead"),
        (
            "wide_resnet50_2",
            {"width_per_group": 64},
            ValueError,
            "'width_per_group' expected value 128 but got 64",
        ),
        ("resnet50", {"classes": 10}, TypeError, "unexpected keyword argument 'classes'"),
        (
            "resnet50",
            {"weights": "IMAGENET1K_V3"},
            ValueError,
            "no weights 'IMAGENET1K_V3': use DEFAULT, IMAGENET1K_V1",
        ),
    ],
)
def test_bad_arguments(
    name: str, kwargs: dict[str, Any], error: type[Exception], message: str, library: Any
) -> None:
    with torch.device("meta"), pytest.raises(error, match=message):
        getattr(library, name)(**kwargs)


def test_arguments_without_effect(library: Any) -> None:
    with torch.device("meta"):
        library.resnext50_32x4d(weights=None, progress=False, groups=32, width_per_group=4)


def test_subclasses_are_built_from_the_same_table() -> None:
    class Model(reference.ResNet):
        pass

    class Block(reference.Bottleneck):
        pass

    with torch.device("meta"):
        model: Any = build(
            "resnext50_32x4d", Model, {**BLOCKS, "bottleneck": Block}, None, {"num_classes": 3}
        )
    assert type(model) is Model and type(model.layer1[0]) is Block
    assert model.layer1[0].conv2.groups == 32

"""What code written for torchvision's ResNets does to them: arguments, subclasses, attributes set after the fact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused
from resnet_fused import reference
from tests.model_pairs import assert_equal, block_pair, pair, results

LAYOUTS = [torch.contiguous_format, torch.channels_last]
both_layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
both_libraries = pytest.mark.parametrize("library", [resnet_fused, reference], ids=["fused", "reference"])


@both_libraries
def test_legacy_arguments(library: Any) -> None:
    with pytest.warns(UserWarning, match="'pretrained' is deprecated"):
        assert library.resnet18(pretrained=False, num_classes=3).fc.out_features == 3
    with pytest.warns(UserWarning, match="give 'weights' by name"):
        library.resnet18(None)
    with pytest.warns(UserWarning, match="give 'progress' by name"):
        library.resnet18(False, True)
    with pytest.raises(TypeError, match="'weights' or 'pretrained', got both"):
        library.resnet18(weights=None, pretrained=False)
    with pytest.raises(TypeError, match="at most 2 positional arguments"):
        library.resnet18(None, True, 10)
    with pytest.raises(TypeError, match="multiple values for argument 'weights'"):
        library.resnet18(None, weights=None)
    assert library.resnet18.__name__ == "resnet18"


@both_libraries
def test_a_block_whose_parameters_have_other_names(library: Any) -> None:
    """torchvision passes the first eight by position to a stage's first block."""

    class Foreign(library.BasicBlock):
        def __init__(self, a: int, b: int, c: int = 1, d: Any = None, *rest: Any, **options: Any) -> None:
            assert len(rest) in (0, 4) and len(options) in (0, 4)
            super().__init__(a, b, c, d, *rest, **options)

    model = library.ResNet(Foreign, [2, 1, 1, 1], num_classes=5)
    assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 5)


def test_subclasses_have_their_names_to_themselves() -> None:
    class Block(resnet_fused.BasicBlock):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.norms = nn.ModuleList([nn.Identity()])
            self.convs = nn.ModuleList([nn.Identity()])
            self.last_norm = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.last_norm(self.norms[0](self.convs[0](super().forward(x))))

    class Net(resnet_fused.ResNet):
        def __init__(self) -> None:
            super().__init__(Block, [1, 1, 1, 1], num_classes=5, zero_init_residual=True)
            self.norms = nn.ModuleList()
            self.stem = nn.Identity()

    model = Net().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    assert model(x).shape == (2, 5) and resnet_fused.explain(model, x) == {}


def keep_resolution(model: nn.Module) -> None:
    model.layer4[0].conv2.stride = 1
    model.layer4[0].downsample[0].stride = 1


def dilate(model: nn.Module) -> None:
    for block in model.layer3:
        block.conv2.dilation = 2
        block.conv2.padding = 2


def with_lists(model: nn.Module) -> None:
    model.layer1[0].conv2.padding = (1,)
    model.layer1[0].conv1.stride = [1]
    model.layer1[1].conv2.padding = [1, 1]


@both_layouts
@pytest.mark.parametrize("change", [keep_resolution, dilate, with_lists], ids=lambda f: f.__name__)
def test_geometry_set_after_the_fact(
    change: Callable[[nn.Module], None], layout: torch.memory_format
) -> None:
    """As re-identification and segmentation code does, with numbers and sequences of one."""
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64).to(memory_format=layout)
    found = []
    for model in (m.double().to(memory_format=layout) for m in pair("bottleneck")):
        change(model)
        found.append(results(model, x))
        if layout is torch.channels_last and isinstance(model, resnet_fused.ResNet):
            assert resnet_fused.explain(model, x) == {}
    assert_equal(*found)


@both_layouts
@pytest.mark.parametrize("downsample", [False, True])
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_a_shortcut_that_is_broadcast(kind: str, downsample: bool, layout: torch.memory_format) -> None:
    """A 1x1 shortcut, as of a pooled one, is added to every pixel; any other size is refused with eager's words."""
    found, messages = [], []
    x = torch.randn(3, 64, 1, 1, dtype=torch.float64).to(memory_format=layout)
    for block in block_pair(kind, layout, training=True, downsample=downsample):
        block.conv1.padding = 2
        inputs = x.clone(memory_format=torch.preserve_format).requires_grad_()
        out = block(inputs)
        assert out.shape[2] > 1
        leaves = [inputs, *block.parameters()]
        grads = torch.autograd.grad(out.sin().sum(), leaves)
        found.append({"output": out.detach()} | {str(i): grad for i, grad in enumerate(grads)})
        with pytest.raises(RuntimeError) as caught:
            block(torch.ones(3, 64, 2, 3, dtype=torch.float64).cumsum(2).to(memory_format=layout))
        messages.append(str(caught.value))
    assert_equal(*found)
    assert messages[0] == messages[1]


def set_in(path: str, name: str, value: object, training: bool = True) -> Callable[[nn.Module], None]:
    """A change that sets an attribute of a submodule, and the mode."""
    return lambda model: setattr(model.train(training).get_submodule(path), name, value)


WRONG = {
    "stride zero": set_in("layer2.0.conv1", "stride", 0),
    "negative padding": set_in("layer2.0.downsample.0", "padding", (-1, 0)),
    "no running mean": set_in("layer1.0.bn1", "running_mean", None, training=False),
    "no running variance": set_in("bn1", "running_var", None, training=False),
    "half of the statistics": set_in("layer1.0.bn2", "running_var", None),
    "eps zero": set_in("layer1.0.bn1", "eps", 0.0),
    "negative eps": set_in("layer1.0.bn1", "eps", -1.0, training=False),
    "another number of channels": set_in("layer1.0", "bn1", nn.BatchNorm2d(3)),
    "too few in evaluation": set_in("layer1.1", "bn2", nn.BatchNorm2d(3), training=False),
    "too few after the shortcut": set_in("layer2.0.downsample", "1", nn.BatchNorm2d(3, affine=False)),
    "a short bias": set_in("layer2.0.downsample.1", "bias", nn.Parameter(torch.zeros(3))),
}
IMAGES = torch.randn(2, 3, 64, 64)
WRONG_INPUTS = {
    "one value per channel": IMAGES[:1, :, :32, :32],
    "channels": torch.randn(2, 4, 64, 64),
    "no batch": IMAGES[0],
    "three dimensions": IMAGES[..., 0],
    "five dimensions": IMAGES[None],
    "integers": IMAGES.long(),
    "another dtype": IMAGES.double(),
}


def error_of(model: nn.Module, x: Tensor) -> tuple[type[Exception], str]:
    with pytest.raises((RuntimeError, ValueError)) as caught:
        model(x)
    return caught.type, str(caught.value)


@pytest.mark.parametrize(
    ("arch", "layout"),
    [("basic", torch.contiguous_format), ("basic", torch.channels_last), ("bottleneck", torch.channels_last)],
    ids=["basic-nchw", "basic-nhwc", "bottleneck-nhwc"],
)
@pytest.mark.parametrize("change", WRONG)
def test_errors_of_wrong_modules_are_eagers(arch: str, change: str, layout: torch.memory_format) -> None:
    fused, eager = pair(arch)
    for model in (fused, eager):
        WRONG[change](model)
    x = IMAGES.to(memory_format=layout)
    assert error_of(fused, x) == error_of(eager, x)


@both_layouts
@pytest.mark.parametrize("name", WRONG_INPUTS)
def test_errors_of_wrong_inputs_are_eagers(name: str, layout: torch.memory_format) -> None:
    x = WRONG_INPUTS[name]
    x = x.to(memory_format=layout) if x.dim() == 4 else x
    fused, eager = pair("basic")
    assert error_of(fused, x) == error_of(eager, x)


@both_layouts
def test_eps_zero_in_evaluation(layout: torch.memory_format) -> None:
    """Where F.batch_norm takes it: torch 2.11 refuses it there too."""
    found, x = [], torch.ones(1, 1, 1, 1)
    try:
        F.batch_norm(x, x.flatten(), x.flatten(), eps=0.0)
    except ValueError:
        pytest.skip("F.batch_norm refuses eps 0 in this version of torch")
    for model in (m.eval().double() for m in pair("basic")):
        model.layer1[0].bn1.eps = 0.0
        found.append(
            results(model, torch.ones(2, 3, 64, 64, dtype=torch.float64).cumsum(2).to(memory_format=layout))
        )
    assert_equal(*found)

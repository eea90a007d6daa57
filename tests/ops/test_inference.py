"""Blocks in evaluation without gradients on the CPU: accuracy, and when what was folded into weights is folded anew."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fused
from resnet_fused import models, native
from resnet_fused.ops import conv3x3, inference
from tests.accuracy import HOSTILE_CASES, Results, assert_accurate, relative_error
from tests.model_pairs import block_pair
from tests.ops.convolutions import SIDES, widths_for
from tests.ops.test_residual_block import BLOCKS, fused, make_case, plain

pytestmark = pytest.mark.skipif(not native.is_loaded, reason="needs the extension")

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The weights that were folded, one for each time."""
    weights, fold = [], inference._Folded.__init__

    def noting(self: Any, conv: Any, signature: Any) -> None:
        weights.append(conv.weight)
        fold(self, conv, signature)

    monkeypatch.setattr(inference._Folded, "__init__", noting)
    yield weights


def check(name: str, hostile: str, dtype: torch.dtype) -> None:
    def draw() -> tuple[Results, Results, Results]:
        case = make_case(name, hostile, dtype)
        with torch.no_grad():
            outputs = [fused(case, False), plain(case, False), plain(case.to(torch.float64), False)]
        by_fused, by_eager, exact = ({"output": out} for out in outputs)
        return by_fused, by_eager, exact

    assert_accurate(draw, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("hostile", HOSTILE_CASES)
@pytest.mark.parametrize("name", BLOCKS)
def test_accuracy(name: str, hostile: str, dtype: torch.dtype, folds: list[Tensor]) -> None:
    check(name, hostile, dtype)
    assert folds


@pytest.mark.parametrize("is_faster", [True, False], ids=["native", "vendor"])
@pytest.mark.parametrize("name", ["bottleneck", "basic_block", "basic_block_stride"])
def test_accuracy_of_each_convolution(name: str, is_faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv3x3, "is_faster", lambda *_: is_faster)
    check(name, "plain", torch.float32)


@pytest.mark.parametrize("height", SIDES)
def test_every_size(height: int) -> None:
    """Of the convolution, with channels that fill no vector; with a residual and without."""
    weight, bias = torch.randn(11, 6, 3, 3) / 3, torch.randn(11)
    filters = conv3x3.conv3x3_filters(weight)

    def draw(width: int) -> tuple[Results, Results, Results]:
        x, added = (
            torch.randn(3, channels, height, width).to(memory_format=torch.channels_last)
            for channels in (6, 11)
        )

        def eager(dtype: torch.dtype) -> dict[str, Tensor]:
            y = torch.conv2d(x.to(dtype), weight.to(dtype), bias.to(dtype), padding=1)
            return {"out": y.relu(), "with_residual": (y + added).relu()}

        ours = {
            "out": conv3x3.conv3x3_inference(x, filters, bias, None),
            "with_residual": conv3x3.conv3x3_inference(x, filters, bias, added),
        }
        return ours, eager(torch.float32), eager(torch.float64)

    for width in widths_for(height):
        assert_accurate(lambda: draw(width))  # noqa: B023


def test_nan_passes_the_relu() -> None:
    x = torch.randn(1, 16, 6, 6).to(memory_format=torch.channels_last)
    x[0, 3, 2, 2] = torch.nan
    filters = conv3x3.conv3x3_filters(torch.ones(16, 16, 3, 3))
    assert conv3x3.conv3x3_inference(x, filters, torch.zeros(16), None)[:, :, 1:4, 1:4].isnan().all()


def test_filters_of_another_weight_are_refused() -> None:
    filters = conv3x3.conv3x3_filters(torch.randn(64, 32, 3, 3))
    with pytest.raises(RuntimeError, match=r"filters must be those of a weight \(64, 64, 3, 3\)"):
        conv3x3.conv3x3_inference(
            torch.randn(1, 64, 6, 6).to(memory_format=torch.channels_last), filters, torch.zeros(64), None
        )


class Pair:
    """A block and its reference in evaluation, with equal weights."""

    def __init__(self) -> None:
        self.fused, self.eager = (
            block.float().eval() for block in block_pair("bottleneck", torch.channels_last)
        )
        self.x = torch.randn(2, 64, 9, 7).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def outputs(self) -> tuple[Tensor, Tensor]:
        return self.fused(self.x), self.eager(self.x)

    def check(self) -> Tensor:
        ours, theirs = self.outputs()
        assert relative_error(ours, theirs.double()) < 1e-5
        return ours


def _train(block: nn.Module) -> None:
    optimizer = torch.optim.SGD(block.parameters(), 0.1)
    block.train()
    torch.manual_seed(1)
    block(torch.randn(2, 64, 9, 7).to(memory_format=torch.channels_last)).square().mean().backward()
    optimizer.step()
    block.eval()


@torch.no_grad()
def _statistics(block: Any) -> None:
    block.bn2.running_var *= 2


def _load(block: nn.Module) -> None:
    block.load_state_dict({n: t * 1.25 for n, t in block.state_dict().items()})


def _parameter(block: Any) -> None:
    block.conv2.weight = nn.Parameter(block.conv2.weight.detach() * 2)


def _eps(block: Any) -> None:
    block.bn1.eps = 0.5


def _data_in_place(block: Any) -> None:
    block.conv1.weight.data.mul_(2)


def _data(block: Any) -> None:
    block.bn3.bias.data = block.bn3.bias.data + 1


@torch.no_grad()
def _moving_average(block: Any) -> None:
    for p in block.parameters():
        p.data = p.data * 0.5


@torch.no_grad()
def _foreach(block: Any) -> None:
    torch._foreach_mul_([*block.parameters()], 1.5)


CHANGES = (_train, _statistics, _load, _parameter, _eps, _data_in_place, _data, _moving_average, _foreach)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_folds_anew_after(change: Callable[[nn.Module], None]) -> None:
    pair = Pair()
    before = pair.check()
    for _ in range(3):  # memory that was freed may be used again
        change(pair.fused)
        change(pair.eager)
        after = pair.check()
        assert relative_error(after, before.double()) > 1e-3
        if change in (_parameter, _eps):
            break


def test_folds_once(folds: list[Tensor]) -> None:
    pair = Pair()
    for _ in range(3):
        pair.check()
    assert len(folds) == sum(isinstance(m, nn.Conv2d) for m in pair.fused.modules())


def test_other_dtypes_and_sizes() -> None:
    pair = Pair()
    pair.check()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = pair.outputs()
        assert ours.dtype == torch.bfloat16 and relative_error(ours, theirs.double()) < 0.02
    pair.check()
    pair.x = torch.randn(5, 64, 24, 12).to(memory_format=torch.channels_last)
    pair.check()
    pair.fused.to(torch.bfloat16)
    pair.eager.to(torch.bfloat16)
    pair.x = pair.x.bfloat16()
    ours, theirs = pair.outputs()
    assert relative_error(ours, theirs.double()) < 0.02


def test_gradients_are_computed_where_they_are_needed(folds: list[Tensor]) -> None:
    pair = Pair()
    pair.fused(pair.x).sum().backward()
    pair.eager(pair.x).sum().backward()
    for ours, theirs in zip(pair.fused.parameters(), pair.eager.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert relative_error(ours.grad, theirs.grad.double()) < 1e-4
    assert not folds
    for p in pair.fused.parameters():
        p.requires_grad_(False)
    assert not pair.fused(pair.x).requires_grad
    assert folds


def test_weights_on_another_device_are_refused() -> None:
    block = models.BasicBlock(64, 64).eval().to(memory_format=torch.channels_last)
    block.conv2.to("meta")
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError), match="device"):
        block(torch.randn(1, 64, 6, 6).to(memory_format=torch.channels_last))


def test_inference_mode() -> None:
    pair = Pair()
    with torch.inference_mode():
        ours = pair.fused(pair.x)
        theirs = pair.eager(pair.x)
        made_here = models.Bottleneck(64, 16).eval()  # its parameters have no version counters
        assert torch.isfinite(made_here(pair.x)).all()
    assert relative_error(ours, theirs.double()) < 1e-5
    pair.check()


def test_the_input_stays_as_it_is() -> None:
    pair = Pair()
    before = pair.x.clone()
    pair.check()
    assert torch.equal(pair.x, before)


def test_images_by_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair()
    pair.x = torch.randn(7, 64, 9, 7).to(memory_format=torch.channels_last)
    whole = pair.check()
    monkeypatch.setattr(inference, "CHUNK_BYTES", {"cpu": 2 * whole[0].numel() * 4})
    chunked = pair.check()
    assert relative_error(chunked, whole.double()) < 1e-6


def test_copies_and_pickles_have_no_folded_weights() -> None:
    pair, sizes = Pair(), []
    for _ in range(2):
        buffer = io.BytesIO()
        torch.save(pair.fused, buffer)
        sizes.append(buffer.tell())
        pair.check()
    assert sizes[0] == sizes[1]
    pair.fused = copy.deepcopy(pair.fused)
    pair.check()


def test_memory_is_freed_when_training_goes_on_and_with_the_model() -> None:
    def held(block: nn.Module) -> int:
        return sum(isinstance(m, nn.Conv2d) and m.weight in inference._folded for m in block.modules())

    pair = Pair()
    pair.check()
    assert held(pair.fused) == 4
    _train(pair.fused)
    assert held(pair.fused) == 0
    before = len(inference._folded)
    pair.outputs()
    assert len(inference._folded) == before + 4
    del pair
    assert len(inference._folded) == before


def test_whole_model() -> None:
    fused, eager = (
        library.resnet18().eval().to(memory_format=torch.channels_last)
        for library in (resnet_fused, resnet_fused.reference)
    )
    fused.load_state_dict(eager.state_dict())
    x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert relative_error(fused(x), eager(x).double()) < 1e-5


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
def test_stem_by_chunks(layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = resnet_fused.resnet18().eval().to(memory_format=layout)
    eager: Any = resnet_fused.reference.resnet18().eval().to(memory_format=layout)
    eager.load_state_dict(model.state_dict())
    x = torch.randn(5, 3, 32, 32).contiguous(memory_format=layout)
    sizes: list[int] = []
    monkeypatch.setattr(inference, "CHUNK_BYTES", {"cpu": 2 * 64 * 16 * 16 * 4})
    with torch.no_grad():
        stem, expected = model._stem(x), eager._stem(x)
        assert stem.stride() == expected.stride()
        assert relative_error(stem, expected.double()) < 1e-6
        model.conv1.register_forward_hook(lambda module, inputs, out: sizes.append(len(out)))
        model._stem(x)
    assert sizes == [5]  # a hook sees the batch


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("where", ["pixel", "weight", "running_var"])
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_nan_is_not_hidden(kind: str, where: str, dtype: torch.dtype, folds: list[Tensor]) -> None:
    """oneDNN's ReLU makes zero of it: a diverged model would look well."""
    block, reference = block_pair(kind, torch.channels_last, training=False, downsample=False)
    x = torch.randn(2, 64, 6, 6, dtype=dtype).to(memory_format=torch.channels_last)
    if where == "pixel":
        x[0, 0, 3, 3] = torch.nan
    for each in (block, reference):
        each.to(dtype)
        if where != "pixel":
            tensor = each.conv1.weight if where == "weight" else each.bn2.running_var
            tensor.data[0] = torch.nan
    with torch.no_grad():
        out, expected = block(x), reference(x)
    assert folds and expected.isnan().any()
    assert torch.equal(out.isnan(), expected.isnan())

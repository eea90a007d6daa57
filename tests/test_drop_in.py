"""What users do to a ResNet: checkpoints, hooks, swapped modules. tests/compat has more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

import resnet_fused
from tests.model_pairs import assert_equal, pair, results

FORMAT = {"now": torch.contiguous_format}


@pytest.fixture(autouse=True, params=[torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def _both_layouts(request: pytest.FixtureRequest) -> None:
    """Blocks run as one op in channels_last and as several otherwise."""
    FORMAT["now"] = request.param


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype).to(memory_format=FORMAT["now"])


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    fused, eager = pair("basic")
    torch.save(fused.state_dict(), tmp_path / "model.pt")
    eager.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True), strict=True)
    with pytest.raises(RuntimeError, match=r"size mismatch for fc\.weight"):
        pair("basic", num_classes=3)[0].load_state_dict(eager.state_dict())


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


#: Changes of a block, by what ``explain`` says of them.
CHANGES: dict[str, Callable[[Any], object]] = {
    "bn1 has hooks": lambda block: block.bn1.register_forward_hook(lambda *_: None),
    "bn2 has hooks": lambda block: block.bn2.register_forward_pre_hook(lambda *_: None),
    "bn1 is a GroupNorm": lambda block: setattr(block, "bn1", nn.GroupNorm(8, 64).double()),
    "relu is a GELU": lambda block: setattr(block, "relu", nn.GELU()),
    "bn1 is a ParametrizedBatchNorm2d": lambda block: register_parametrization(block.bn1, "weight", Twice()),
    "bn1 has a forward of its own": lambda block: setattr(block.bn1, "forward", lambda x: x),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_a_changed_block_runs_plain_and_says_so(reason: str) -> None:
    fused, eager = (m.double() for m in pair("basic"))
    assert resnet_fused.explain(fused) == {}
    for model in (fused, eager):
        CHANGES[reason](model.layer1[0])
    assert resnet_fused.explain(fused) == {"layer1.0": reason}
    x = images(3, 3, 32, 32, dtype=torch.float64)
    assert_equal(results(fused, x), results(eager, x))


def test_hooks_on_blocks_and_convs() -> None:
    """A block with a hook is still one op; a convolution with one is called as a module, amid fused ops."""
    fused, eager = (m.double() for m in pair("basic"))
    calls: list[str] = []
    for model in (fused, eager):
        model.layer1[0].register_forward_hook(lambda *_: calls.append("block"))
        model.layer1[1].conv1.register_forward_hook(lambda *_: calls.append("conv"))
    explained = resnet_fused.explain(fused)
    assert list(explained) == ["layer1.1"] and "conv1 has hooks: fused ops around" in explained["layer1.1"]
    x = images(3, 3, 32, 32, dtype=torch.float64)
    by_fused, by_eager = results(fused, x), results(eager, x)
    assert calls == ["block", "conv"] * 2
    assert_equal(by_fused, by_eager)


def test_a_model_without_max_pool_keeps_its_fused_norm() -> None:
    fused, eager = (m.double() for m in pair("basic"))
    for model in (fused, eager):
        model.maxpool = nn.Identity()
    x = images(3, 3, 32, 32, dtype=torch.float64)
    assert_equal(results(fused, x), results(eager, x))

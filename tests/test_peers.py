"""Other libraries as the benchmarks run them: which runs where, and that modules have the weights they are given."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers import PEERS, Missing, peer_module, peer_op, with_norms
from resnet_fused import reference

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MODULES = {"torchvision": "torchvision", "timm": "timm", "cudnn_frontend": "cudnn", "apex": "apex"}
WITH_MODELS = ["torchvision", "timm"]
WITH_NORMS = ["cudnn_frontend", "apex"]


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = reference.resnet18()
    for bn in model.modules():
        if isinstance(bn, nn.BatchNorm2d):
            nn.init.uniform_(bn.weight, 0.5, 1.5)
            nn.init.uniform_(bn.bias, -0.5, 0.5)
    return model


def results(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, all gradients and all buffers."""
    x = x.clone().requires_grad_()
    out = model(x)
    grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad(out, [x, *model.parameters()], grad), *model.buffers()]


class NormReLU(nn.BatchNorm2d):
    def forward(self, y: Tensor, residual: Tensor | None = None) -> Tensor:
        out = super().forward(y)
        return F.relu(out if residual is None else out + residual)

    @classmethod
    def adopt(cls, bn: nn.BatchNorm2d) -> nn.Module:
        bn.__class__ = cls
        return bn


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_a_model_with_other_norms_computes_what_the_reference_does(arch: str) -> None:
    model = getattr(reference, arch)(num_classes=5).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = with_norms(model, NormReLU.adopt)
    blocks = {
        kind for kind in map(type, other.modules()) if kind in (reference.BasicBlock, reference.Bottleneck)
    }
    assert not blocks and sum(isinstance(m, NormReLU) for m in other.modules()) > 16
    assert [name for name, _ in other.named_parameters()] == [name for name, _ in model.named_parameters()]
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    found = results(other, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for one, expected in zip(found, results(model, x), strict=True):
        torch.testing.assert_close(one, expected)


@pytest.mark.parametrize("peer", WITH_MODELS)
@pytest.mark.parametrize("block", ["", "layer2.0"])
def test_a_library_with_models_gets_the_weights(peer: str, block: str) -> None:
    pytest.importorskip(MODULES[peer])
    eager = make_model().double().get_submodule(block)
    found = peer_module(peer, "resnet18", block, eager, torch.float32, CPU)
    assert isinstance(found, nn.Module), found
    found = found.double()
    assert found is not eager and list(found.state_dict()) == list(eager.state_dict())
    x = torch.randn(
        3, 64 if block else 3, 64, 64, dtype=torch.float64
    )  # smaller, norms of few values amplify rounding
    for one, expected in zip(results(found, x), results(eager, x), strict=True):
        torch.testing.assert_close(one, expected)


@pytest.mark.parametrize("peer", PEERS)
def test_a_package_that_is_not_installed(peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in {MODULES[peer], *(m for m in sys.modules if m.split(".")[0] == MODULES[peer])}:
        monkeypatch.setitem(sys.modules, name, None)
    found = peer_module(peer, "resnet18", "", make_model(), torch.float16, CUDA)
    assert isinstance(found, Missing)
    assert f"{peer} could not be imported (" in found.reason and MODULES[peer] in found.reason
    assert PEERS[peer].install in found.reason


@pytest.mark.parametrize("error", [OSError("libx.so: cannot open"), RuntimeError("a bug of theirs")])
def test_only_failures_to_import_are_caught(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise error

    monkeypatch.setattr("benchmarks.peers.import_module", broken)
    if isinstance(error, RuntimeError):
        with pytest.raises(RuntimeError, match="a bug of theirs"):
            peer_op("apex", "bn_relu", torch.float16, 8, CUDA)
    else:
        found = peer_op("apex", "bn_relu", torch.float16, 8, CUDA)
        assert isinstance(found, Missing) and "libx.so" in found.reason


@pytest.mark.parametrize(
    ("peer", "op", "dtype", "channels", "device", "reason"),
    [
        ("apex", "bn_relu", torch.float16, 8, CPU, "apex needs a CUDA device, not cpu"),
        ("apex", "bn_relu", torch.bfloat16, 64, CUDA, "apex does not take bfloat16"),
        ("apex", "bn_relu", torch.float16, 6, CUDA, "multiples of 4 channels in float16, not [6]"),
        ("cudnn_frontend", "bn_add_relu", torch.bfloat16, 12, CUDA, "multiples of 8 channels in bfloat16"),
        (
            "cudnn_frontend",
            "bn_relu_maxpool",
            torch.float32,
            8,
            CUDA,
            "cudnn_frontend has no bn_relu_maxpool",
        ),
        ("timm", "bn_relu", torch.float32, 8, CUDA, "timm has no bn_relu"),
    ],
)
def test_what_a_peer_cannot_run(
    peer: str, op: str, dtype: torch.dtype, channels: int, device: torch.device, reason: str
) -> None:
    found = peer_op(peer, op, dtype, channels, device)
    assert isinstance(found, Missing) and reason in found.reason


def test_no_peer_is_imported_before_it_is_asked_for() -> None:
    names = list(MODULES.values())
    code = f"import sys, benchmarks.peers; print([name for name in {names} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.gpu
@pytest.mark.parametrize("peer", WITH_NORMS)
@pytest.mark.parametrize("op", ["bn_relu", "bn_add_relu"])
def test_an_op_on_a_gpu(peer: str, op: str) -> None:
    pytest.importorskip(MODULES[peer])
    function = peer_op(peer, op, torch.float16, 8, CUDA)
    assert not isinstance(function, Missing), function
    y, residual = (torch.randn(4, 8, 6, 6, device="cuda", dtype=torch.float16) for _ in range(2))
    y, residual = (x.to(memory_format=torch.channels_last).requires_grad_() for x in (y, residual))
    vectors = [torch.randn(8, device="cuda", requires_grad=True) for _ in range(2)]
    inputs = [y, *vectors, *([residual] if op == "bn_add_relu" else [])]
    out = F.batch_norm(y.float(), None, None, *vectors, training=True)
    expected = F.relu(out + residual.float() if op == "bn_add_relu" else out)
    torch.testing.assert_close(function(*inputs).float(), expected, rtol=1e-2, atol=1e-2)

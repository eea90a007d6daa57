"""Other libraries as the benchmarks run them, with stand-ins of the same signatures that compute in plain PyTorch."""

from __future__ import annotations

import copy
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import peer_cudnn, peers
from benchmarks.peers import PEERS, Missing, peer_model, peer_op
from resnet_fused import reference
from tests.accuracy import relative_error

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
#: The modules that are imported for each peer, the last one for its names.
MODULES = {
    "cudnn_frontend": ["cudnn"],
    "apex": ["apex", "apex.contrib", "apex.contrib.groupbn", "apex.contrib.groupbn.batch_norm"],
    "inplace_abn": ["inplace_abn", "inplace_abn.functions"],
    "attorch": ["attorch"],
}
#: What each peer is asked for, float32 if not here. Models are run in float64, in which no ReLU's sign is luck.
DTYPES = {"apex": torch.float16}
CHANNELS = 8
TOLERANCE = 1e-5
PIXELS = (0, 2, 3)


def centred(grad: Tensor, xhat: Tensor) -> Tensor:
    """A gradient as batch statistics let it through."""
    return grad - grad.mean(PIXELS, keepdim=True) - xhat * (grad * xhat).mean(PIXELS, keepdim=True)


class NHWCNorm(torch.autograd.Function):
    """relu(bn(x) + z) of (N, H, W, C), which reads and writes memory as that, whatever the strides."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor, weight: Tensor, bias: Tensor, norm: Any) -> Tensor:
        given = [x.permute(0, 3, 1, 2), weight, bias, z.permute(0, 3, 1, 2)]
        ctx.given = [tensor.detach().requires_grad_() for tensor in given]
        with torch.enable_grad():
            y, weight, bias, residual = ctx.given
            stats = (norm.running_mean, norm.running_var)
            ctx.out = F.relu(
                F.batch_norm(y, *stats, weight, bias, norm.training, norm.momentum, norm.eps) + residual
            )
        return ctx.out.detach().permute(0, 2, 3, 1).contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, h, w, c = grad.shape
        raw = grad.as_strided(grad.shape, (h * w * c, w * c, c, 1))
        dx, dweight, dbias, dz = torch.autograd.grad(ctx.out, ctx.given, raw.permute(0, 3, 1, 2))
        return dx.permute(0, 2, 3, 1), dz.permute(0, 2, 3, 1), dweight, dbias, None


class ApexNorm(nn.modules.batchnorm._BatchNorm):
    def __init__(
        self,
        num_features: int,
        fuse_relu: bool = False,
        bn_group: int = 1,
        max_cta_per_sm: int = 2,
        cta_launch_margin: int = 12,
        multi_stream: bool = False,
    ) -> None:
        super().__init__(num_features)
        assert fuse_relu

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        assert x.is_contiguous() and (z is None or z.is_contiguous())
        return NHWCNorm.apply(x, torch.zeros_like(x) if z is None else z, self.weight, self.bias, self)


class InPlaceNorm(torch.autograd.Function):
    """x <- xhat * (|weight| + eps) + bias, and xhat found again from that in backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float
    ) -> Tensor:
        scale = weight.abs() + eps
        x.copy_(F.batch_norm(x, mean, var, scale, bias, False, 0.0, eps))
        ctx.mark_dirty(x)
        ctx.save_for_backward(x, scale, bias, torch.rsqrt(var + eps))
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out, scale, bias, invstd = ctx.saved_tensors
        scale, bias, invstd = (vector.view(-1, 1, 1) for vector in (scale, bias, invstd))
        xhat = (out - bias) / scale
        dx = scale * invstd * centred(grad, xhat)
        return dx, (grad * xhat).sum(PIXELS), grad.sum(PIXELS), None, None, None


def inplace_abn(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-05,
    activation: str = "leaky_relu",
    activation_param: float = 0.01,
) -> Tensor:
    assert activation == "identity" and training
    with torch.no_grad():
        var, mean = torch.var_mean(x, PIXELS, correction=0)
        count = x.numel() / x.shape[1]
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * count / (count - 1), momentum)
    return InPlaceNorm.apply(x, weight, bias, mean, var, eps)


class AttorchNorm(nn.BatchNorm2d):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        act_func: str | None = None,
        device: Any = "cuda",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        assert act_func == "relu"

    def forward(self, input: Tensor, pre_act_add: Tensor | None = None) -> Tensor:
        assert input.is_contiguous() and (pre_act_add is None or pre_act_add.is_contiguous())
        stats = (self.running_mean, self.running_var)
        out = F.batch_norm(input, *stats, self.weight, self.bias, True, self.momentum, self.eps)
        return F.relu(out if pre_act_add is None else out + pre_act_add)


class CudnnTensor:
    """A node's result, or what is to be given; ``compute`` takes what was given."""

    def __init__(self, compute: Any, stride: tuple[int, ...] = ()) -> None:
        self.compute, self.stride, self.output, self.type = compute, stride, False, ""

    def set_output(self, output: bool) -> CudnnTensor:
        self.output = output
        return self

    def set_data_type(self, data_type: str) -> CudnnTensor:
        self.type = data_type
        return self


class CudnnGraph:
    """cudnn.pygraph: nodes in float64 on what lies in memory in the strides that were declared."""

    def __init__(
        self, *, io_data_type: str, intermediate_data_type: str, compute_data_type: str, handle: str
    ) -> None:
        assert (io_data_type, intermediate_data_type, compute_data_type) == ("FLOAT",) * 3
        assert handle == "handle"
        self.inputs: list[CudnnTensor] = []
        self.steps: list[str] = []

    def tensor(
        self,
        dim: list[int],
        stride: list[int],
        data_type: str,
        is_pass_by_value: bool = False,
        name: str = "",
    ) -> CudnnTensor:
        def read(given: dict[CudnnTensor, Tensor]) -> Tensor:
            x = given[tensor]
            if data_type == "BOOLEAN":
                x = (x.view(-1, 1) >> torch.arange(8)) & 1
            return x.double().as_strided(dim, stride)

        tensor = CudnnTensor(read, tuple(stride))
        self.inputs.append(tensor)
        return tensor

    def node(self, function: Any, *inputs: CudnnTensor) -> CudnnTensor:
        return CudnnTensor(lambda given: function(*(tensor.compute(given) for tensor in inputs)))

    def batchnorm(self, name: str, **given: CudnnTensor) -> list[CudnnTensor]:
        names = ("input", "scale", "bias", "in_running_mean", "in_running_var", "epsilon", "momentum")
        x, w, b, running_mean, running_var, eps, momentum = (given.pop(key) for key in names)
        assert not given
        mean = self.node(lambda x: x.mean(PIXELS, keepdim=True), x)
        var = self.node(lambda x: x.var(PIXELS, correction=0, keepdim=True), x)
        unbiased = self.node(lambda x: x.var(PIXELS, keepdim=True), x)
        invstd = self.node(lambda var, eps: (var + eps).rsqrt(), var, eps)
        next_mean, next_var = (
            self.node(torch.lerp, old, new, momentum)
            for old, new in ((running_mean, mean), (running_var, unbiased))
        )
        out = self.batchnorm_inference(name, input=x, mean=mean, inv_variance=invstd, scale=w, bias=b)
        return [out, mean, invstd, next_mean, next_var]

    def batchnorm_inference(self, name: str, **given: CudnnTensor) -> CudnnTensor:
        names = ("input", "mean", "inv_variance", "scale", "bias")
        inputs = [given.pop(key) for key in names]
        assert not given
        return self.node(lambda x, m, i, w, b: (x - m) * i * w + b, *inputs)

    def batchnorm_backward(self, name: str, **given: CudnnTensor) -> list[CudnnTensor]:
        names = ("grad", "input", "scale", "mean", "inv_variance")
        inputs = [given.pop(key) for key in names]
        assert not given

        def dx(g: Tensor, x: Tensor, w: Tensor, m: Tensor, i: Tensor) -> Tensor:
            return w * i * centred(g, (x - m) * i)

        dscale = self.node(lambda g, x, _, m, i: (g * (x - m) * i).sum(PIXELS), *inputs)
        return [self.node(dx, *inputs), dscale, self.node(lambda g: g.sum(PIXELS), inputs[0])]

    def add(self, a: CudnnTensor, b: CudnnTensor, name: str) -> CudnnTensor:
        return self.node(torch.add, a, b)

    def scale(self, input: CudnnTensor, scale: CudnnTensor, name: str) -> CudnnTensor:
        return self.node(torch.mul, input, scale)

    def relu(self, input: CudnnTensor, name: str) -> CudnnTensor:
        return self.node(torch.relu, input)

    def relu_backward(self, loss: CudnnTensor, input: CudnnTensor, name: str) -> CudnnTensor:
        return self.node(lambda g, x: g * (x > 0), loss, input)

    def cmp_gt(self, input: CudnnTensor, comparison: CudnnTensor, name: str) -> CudnnTensor:
        return self.node(torch.gt, input, comparison)

    def __getattr__(self, step: str) -> Any:
        return lambda *_: self.steps.append(step)

    def get_workspace_size(self) -> int:
        return 0

    def execute(self, pack: dict[CudnnTensor, Tensor], workspace: Tensor, handle: str) -> None:
        steps = [
            "validate",
            "build_operation_graph",
            "create_execution_plans",
            "check_support",
            "build_plans",
        ]
        assert self.steps == steps and workspace.numel() > 0 and handle == "handle"
        assert all(tensor in pack for tensor in self.inputs)
        results = {
            tensor: tensor.compute(pack) for tensor in pack if tensor.output and tensor not in self.inputs
        }
        for tensor, result in results.items():
            if tensor.type == "BOOLEAN":
                bits = result.permute(0, 2, 3, 1).reshape(-1, 8)
                result = (bits << torch.arange(8)).sum(1)
            pack[tensor].copy_(result.reshape(pack[tensor].shape))


CONTENTS = {
    "cudnn_frontend": {
        "pygraph": CudnnGraph,
        "data_type": SimpleNamespace(FLOAT="FLOAT", HALF="HALF", BFLOAT16="BFLOAT16", BOOLEAN="BOOLEAN"),
        "heur_mode": SimpleNamespace(A="A", FALLBACK="FALLBACK"),
    },
    "apex": {"BatchNorm2d_NHWC": ApexNorm},
    "inplace_abn": {"inplace_abn": inplace_abn},
    "attorch": {"BatchNorm2d": AttorchNorm},
}


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    for peer, names in MODULES.items():
        for name in names:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[names[-1]]).update(CONTENTS[peer])
    monkeypatch.setattr(peers, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(peer_cudnn, "_handle", lambda *_: "handle")
    monkeypatch.setitem(peer_cudnn._IO_TYPES, torch.float64, "FLOAT")


def dtype_of(peer: str) -> torch.dtype:
    return DTYPES.get(peer, torch.float32)


def activation(channels: int, size: int = 6) -> Tensor:
    return torch.randn(3, channels, size, size).double().to(memory_format=torch.channels_last)


def eager(y: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    out = F.batch_norm(y, None, None, weight, bias, True)
    return F.relu(out if residual is None else out + residual)


@pytest.mark.parametrize("op", ["bn_relu", "bn_add_relu"])
@pytest.mark.parametrize("peer", [peer for peer in PEERS if peer != "inplace_abn"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_op_computes_what_eager_does(
    stand_ins: None, peer: str, op: str, layout: torch.memory_format
) -> None:
    function = peer_op(peer, op, dtype_of(peer), CHANNELS, CPU)
    assert not isinstance(function, Missing), function
    for _ in range(2):
        inputs = [activation(CHANNELS).float(), *torch.randn(2, CHANNELS)]
        inputs += [activation(CHANNELS).float()] if op == "bn_add_relu" else []
        grad = activation(CHANNELS).float().contiguous(memory_format=layout)
        given = [x.clone().requires_grad_() for x in inputs]
        exact = [x.double().requires_grad_() for x in inputs]
        out, expected = function(*given), eager(*exact)
        found = [out, *torch.autograd.grad(out, given, grad)]
        for x, y in zip(found, [expected, *torch.autograd.grad(expected, exact, grad.double())], strict=True):
            assert relative_error(x, y) < TOLERANCE
        assert all(torch.equal(x, y) for x, y in zip(given, inputs, strict=True))


def test_op_is_missing_where_it_would_not_be_fair(stand_ins: None) -> None:
    found = peer_op("inplace_abn", "bn_relu", torch.float32, CHANNELS, CPU)
    assert isinstance(found, Missing) and "writes over its input" in found.reason


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("op", ["bn_bn_add_relu", "bn_relu_maxpool"])
def test_op_that_no_peer_has(stand_ins: None, peer: str, op: str) -> None:
    assert peer_op(peer, op, dtype_of(peer), CHANNELS, CPU) == Missing(f"{peer} has no {op}")


def make_block(kind: str) -> nn.Module:
    """With weights that show which is whose."""
    if kind == "resnet":
        model: nn.Module = reference.ResNet(reference.BasicBlock, [1, 1, 1, 1], num_classes=5)
    elif kind == "bottleneck":
        model = reference.Bottleneck(32, 8)
    else:
        downsample = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
        model = reference.BasicBlock(8, 16, 2, downsample)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            module.eps, module.momentum = 2**-10, 0.25
    return model.double().to(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["basic", "bottleneck", "resnet"])
@pytest.mark.parametrize("peer", PEERS)
def test_model_computes_what_the_reference_does(stand_ins: None, peer: str, kind: str) -> None:
    model = make_block(kind)
    before = copy.deepcopy(model.state_dict())
    exact = copy.deepcopy(model)
    found = peer_model(peer, model, dtype_of(peer), CPU)
    assert isinstance(found, nn.Module), found
    assert [name for name, _ in found.named_parameters()] == [name for name, _ in exact.named_parameters()]
    assert list(found.state_dict()) == list(before)
    assert all(torch.equal(x, before[name]) for name, x in found.state_dict().items())
    layout = torch.contiguous_format if peer in peers.CONTIGUOUS else torch.channels_last
    assert all(x.is_contiguous(memory_format=layout) for x in found.parameters() if x.dim() == 4)

    x = activation({"basic": 8, "bottleneck": 32, "resnet": 3}[kind], 40 if kind == "resnet" else 6)
    results = []
    for module, given in ((found, x.clone()), (exact, x.clone())):
        out = module(given.requires_grad_())
        grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        results.append([out, *torch.autograd.grad(out, [given, *module.parameters()], grad)])
    for by_peer, expected in zip(*results, strict=True):
        assert relative_error(by_peer, expected) < TOLERANCE
    for (name, by_peer), expected in zip(found.named_buffers(), exact.buffers(), strict=True):
        if not name.endswith("num_batches_tracked"):
            assert relative_error(by_peer, expected) < TOLERANCE, name
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_model_of_another_kind(stand_ins: None) -> None:
    with pytest.raises(ValueError, match="BasicBlock, Bottleneck, ResNet, got Linear"):
        peer_model("apex", nn.Linear(2, 2), torch.float16, CPU)


def test_cudnn_compiles_a_graph_once_and_does_not_evaluate(
    stand_ins: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    compile_graph = peer_cudnn.Graph.compile
    monkeypatch.setattr(
        peer_cudnn.Graph, "compile", lambda graph: compiled.append(graph) or compile_graph(graph)
    )
    block = peer_model("cudnn_frontend", make_block("bottleneck"), torch.float32, CPU)
    assert isinstance(block, nn.Module)
    for _ in range(2):
        block(activation(32).requires_grad_()).sum().backward()
    assert len(compiled) == 4  # two inner norms of one shape and the last one, forward and backward
    with pytest.raises(NotImplementedError, match="no engine"):
        block.eval()(activation(32))


@pytest.mark.parametrize("peer", PEERS)
def test_a_package_that_is_not_installed(peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MODULES[peer]:
        monkeypatch.setitem(sys.modules, name, None)
    package = {"cudnn_frontend": "nvidia-cudnn-frontend", "inplace_abn": "inplace-abn"}.get(peer, peer)
    found = peer_model(peer, make_block("basic"), dtype_of(peer), CUDA)
    assert isinstance(found, Missing)
    assert package in found.reason and "could not be imported (import of" in found.reason


def test_only_failures_to_import_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(error: Exception) -> Any:
        def load(_: str) -> ModuleType:
            raise error

        return load

    monkeypatch.setattr(peers, "import_module", broken(OSError("libx.so: cannot open")))
    found = peer_op("attorch", "bn_relu", torch.float32, CHANNELS, CUDA)
    assert isinstance(found, Missing) and "libx.so: cannot open" in found.reason
    monkeypatch.setattr(peers, "import_module", broken(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        peer_op("attorch", "bn_relu", torch.float32, CHANNELS, CUDA)


@pytest.mark.parametrize("peer", PEERS)
def test_a_cpu(peer: str) -> None:
    expected = Missing(f"{peer} needs a CUDA device, not cpu")
    assert peer_model(peer, make_block("basic"), dtype_of(peer), CPU) == expected
    if peer != "inplace_abn":
        assert peer_op(peer, "bn_relu", dtype_of(peer), CHANNELS, CPU) == expected


@pytest.mark.parametrize(
    ("peer", "dtype", "channels", "reason"),
    [
        ("apex", torch.bfloat16, 64, "apex takes float16, not bfloat16"),
        ("apex", torch.float16, 6, "multiples of 4 channels in float16"),
        ("cudnn_frontend", torch.bfloat16, 12, "multiples of 8 channels in bfloat16"),
        ("attorch", torch.float64, 8, "not float64"),
    ],
)
def test_what_a_peer_does_not_support(peer: str, dtype: torch.dtype, channels: int, reason: str) -> None:
    found = peer_op(peer, "bn_add_relu", dtype, channels, CUDA)
    assert isinstance(found, Missing) and reason in found.reason


def test_inplace_abn_has_no_bfloat16() -> None:
    found = peer_model("inplace_abn", make_block("basic"), torch.bfloat16, CUDA)
    assert found == Missing("inplace_abn takes float32, float16, not bfloat16")


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=f"{', '.join(PEERS)}, got 'oneflow'"):
        peer_op("oneflow", "bn_relu", torch.float32, CHANNELS, CPU)
    with pytest.raises(ValueError, match=f"{', '.join(PEERS)}, got 'oneflow'"):
        peer_model("oneflow", make_block("basic"), torch.float32, CPU)
    with pytest.raises(ValueError, match=r"bn_relu, bn_add_relu, .*, got 'relu'"):
        peer_op("apex", "relu", torch.float32, CHANNELS, CPU)


def test_no_peer_is_imported_before_it_is_asked_for() -> None:
    names = sorted({name.partition(".")[0] for modules in MODULES.values() for name in modules})
    code = f"import sys, benchmarks.peers; print([name for name in {names} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"

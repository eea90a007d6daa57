"""relu(bn(y)) and relu(bn(y) + residual) in training, forward and backward each one graph of cuDNN.

Activations are channels_last in float32, bfloat16 or float16; statistics and all between the nodes are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]
_IO_TYPES = {torch.float32: "FLOAT", torch.bfloat16: "BFLOAT16", torch.float16: "HALF"}


class Graph:
    """Nodes on activations of one shape and dtype, and its inputs and outputs by name.

    Args:
        cudnn: the module of nvidia-cudnn-frontend.
        options: of cudnn.pygraph, such as ``handle``.
    """

    def __init__(self, cudnn: ModuleType, dtype: torch.dtype, shape: Shape, **options: object) -> None:
        types = cudnn.data_type
        self.io, self.float, self.boolean = getattr(types, _IO_TYPES[dtype]), types.FLOAT, types.BOOLEAN
        self.nodes = cudnn.pygraph(
            io_data_type=self.io, intermediate_data_type=self.float, compute_data_type=self.float, **options
        )
        self._modes = [cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK]
        self._shape = shape
        self._tensors: dict[str, Any] = {}

    def activation(self, name: str) -> Any:
        return self._input(name, self._shape, self.io)

    def mask(self, name: str) -> Any:
        return self._input(name, self._shape, self.boolean)

    def vector(self, name: str) -> Any:
        return self._input(name, (1, self._shape[1], 1, 1), self.float)

    def scalar(self, name: str) -> Any:
        """Read from the host's memory."""
        return self._input(name, (1, 1, 1, 1), self.float, is_pass_by_value=True)

    def _input(self, name: str, shape: Shape, data_type: object, **options: object) -> Any:
        _, c, h, w = shape
        strides = [c * h * w, 1, c * w, c]
        tensor = self.nodes.tensor(name=name, dim=list(shape), stride=strides, data_type=data_type, **options)
        self._tensors[name] = tensor
        return tensor

    def store(self, data_type: object, **tensors: Any) -> None:
        """Makes these the outputs, under their names."""
        for name, tensor in tensors.items():
            tensor.set_output(True).set_data_type(data_type)
            self._tensors[name] = tensor

    def compile(self) -> Graph:
        """Raises cudnn.cudnnGraphNotSupportedError where cuDNN has no engine for it."""
        self.nodes.validate()
        self.nodes.build_operation_graph()
        self.nodes.create_execution_plans(self._modes)
        self.nodes.check_support()
        self.nodes.build_plans()
        return self

    def run(self, handle: object, device: torch.device, given: dict[str, Tensor]) -> None:
        """Reads and writes the tensors, one for each name."""
        workspace = torch.empty(max(1, self.nodes.get_workspace_size()), dtype=torch.uint8, device=device)
        pack = {self._tensors[name]: x.detach() for name, x in given.items()}
        self.nodes.execute(pack, workspace, handle=handle)


def forward_graph(graph: Graph, with_residual: bool) -> Graph:
    """``out`` and the statistics; with a residual also ``mask``, which says where ``out`` is above zero."""
    z, mean, invstd, next_mean, next_var = graph.nodes.batchnorm(
        name="bn",
        input=graph.activation("y"),
        scale=graph.vector("weight"),
        bias=graph.vector("bias"),
        in_running_mean=graph.vector("running_mean"),
        in_running_var=graph.vector("running_var"),
        epsilon=graph.scalar("eps"),
        momentum=graph.scalar("momentum"),
    )
    if with_residual:
        z = graph.nodes.add(name="add", a=z, b=graph.activation("residual"))
    out = graph.nodes.relu(name="relu", input=z)
    graph.store(graph.io, out=out)
    graph.store(graph.float, mean=mean, invstd=invstd, next_mean=next_mean, next_var=next_var)
    if with_residual:
        mask = graph.nodes.cmp_gt(name="above_zero", input=out, comparison=graph.scalar("zero"))
        graph.store(graph.boolean, mask=mask)
    return graph


def backward_graph(graph: Graph, with_residual: bool) -> Graph:
    """Without a residual z is computed again for its sign; after an addition cuDNN has an engine only for a mask."""
    y, grad = graph.activation("y"), graph.activation("grad")
    weight, mean, invstd = graph.vector("weight"), graph.vector("mean"), graph.vector("invstd")
    if with_residual:
        dz = graph.nodes.scale(name="drelu", input=grad, scale=graph.mask("mask"))
        graph.store(graph.io, dresidual=dz)
    else:
        bias = graph.vector("bias")
        z = graph.nodes.batchnorm_inference(
            name="bn", input=y, mean=mean, inv_variance=invstd, scale=weight, bias=bias
        )
        dz = graph.nodes.relu_backward(name="drelu", loss=grad, input=z)
        dz.set_data_type(graph.io)
    dy, dweight, dbias = graph.nodes.batchnorm_backward(
        name="dbn", grad=dz, input=y, scale=weight, mean=mean, inv_variance=invstd
    )
    graph.store(graph.io, dy=dy)
    graph.store(graph.float, dweight=dweight, dbias=dbias)
    return graph


def norm_class(cudnn: ModuleType) -> Any:
    """A batch norm whose forward is relu(bn(y)) or relu(bn(y) + residual), in training."""

    class NormReLU(nn.BatchNorm2d):
        def forward(self, y: Tensor, residual: Tensor | None = None) -> Tensor:
            if not self.training:
                raise NotImplementedError("cuDNN has no engine for batch norm and ReLU in evaluation")
            out: Tensor = _NormReLU.apply(y, self.weight, self.bias, residual, self, cudnn)
            return out

        @classmethod
        def adopt(cls, bn: nn.BatchNorm2d) -> nn.Module:
            """The batch norm itself, with this forward."""
            bn.__class__ = cls
            return bn

    return NormReLU


class _NormReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        norm: Any,
        cudnn: ModuleType,
    ) -> Tensor:
        y = _channels_last(y)
        out, mean, invstd = torch.empty_like(y), torch.empty_like(weight), torch.empty_like(weight)
        given = {"y": y, "weight": weight, "bias": bias, "out": out, "mean": mean, "invstd": invstd}
        # Running statistics are updated in place.
        given |= {"running_mean": norm.running_mean, "next_mean": norm.running_mean}
        given |= {"running_var": norm.running_var, "next_var": norm.running_var}
        given |= {"eps": _scalar(norm.eps), "momentum": _scalar(norm.momentum)}
        mask = None
        if residual is not None:
            mask = y.new_empty(y.numel() // 8, dtype=torch.uint8)  # eight BOOLEAN to a byte
            given |= {"residual": _channels_last(residual), "zero": _scalar(0.0), "mask": mask}
        _run(forward_graph, cudnn, residual is not None, given)
        ctx.save_for_backward(y, weight, bias, mean, invstd, mask)
        ctx.cudnn = cudnn
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, bias, mean, invstd, mask = ctx.saved_tensors
        dy, dweight, dbias = torch.empty_like(y), torch.empty_like(weight), torch.empty_like(bias)
        given = {"y": y, "grad": _channels_last(grad), "weight": weight, "mean": mean, "invstd": invstd}
        given |= {"dy": dy, "dweight": dweight, "dbias": dbias}
        dresidual = None
        if mask is None:
            given |= {"bias": bias}
        else:
            dresidual = torch.empty_like(y)
            given |= {"mask": mask, "dresidual": dresidual}
        _run(backward_graph, ctx.cudnn, mask is not None, given)
        return dy, dweight, dbias, dresidual, None, None


Build = Callable[[Graph, bool], Graph]


def _run(build: Build, cudnn: ModuleType, with_residual: bool, given: dict[str, Tensor]) -> None:
    """Runs a graph on the current stream, with a tensor ``given`` for each name, "y" among them."""
    y = given["y"]
    handle = _handle(cudnn, y.device)
    graph = _compiled(build, cudnn, y.device, y.dtype, tuple(y.shape), with_residual)
    graph.run(handle, y.device, given)


def _handle(cudnn: ModuleType, device: torch.device) -> Any:
    handle = _handle_on(cudnn, device)
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
    return handle


@cache
def _handle_on(cudnn: ModuleType, device: torch.device) -> Any:
    with torch.cuda.device(device):
        return cudnn.create_handle()


@cache  # to compile one takes far longer than to run it
def _compiled(
    build: Build,
    cudnn: ModuleType,
    device: torch.device,
    dtype: torch.dtype,
    shape: Shape,
    with_residual: bool,
) -> Graph:
    graph = Graph(cudnn, dtype, shape, handle=_handle(cudnn, device))
    return build(graph, with_residual).compile()


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _scalar(value: float) -> Tensor:
    return torch.full((1, 1, 1, 1), value)

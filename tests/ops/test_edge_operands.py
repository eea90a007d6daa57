"""Operands at the edge of what fits: no elements or channels, bytes and strides of the caller's, too little memory.

And inputs and biases of blocks that are infinite or expanded.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resnet_fused import models
from resnet_fused.ops.dispatch import IMPLEMENTATIONS
from resnet_fused.ops.registry import register_op
from resnet_fused.types import ConvGeometry, Gradient
from tests.accuracy import relative_error
from tests.model_pairs import block_pair
from tests.ops import operands
from tests.ops.operands import (
    CASES,
    NATIVE,
    OPS,
    SIZES,
    Maker,
    assert_equals_reference,
    assert_fakes_are_exact,
    channels_last,
    contiguous,
    native_arguments,
    op_of,
    tensors,
)

BOTH_LAYOUTS = pytest.mark.parametrize("layout", [contiguous, channels_last], ids=lambda f: f.__name__)


def run(script: str) -> str:
    """What a script prints; a test fails where its process does not end as it should."""
    start = "import torch, resnet_fused\nfrom torch import empty, rand, zeros\nOPS = torch.ops.resnet_fused\n"
    command = [sys.executable, "-c", start + textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@BOTH_LAYOUTS
@pytest.mark.parametrize("name", NATIVE)
def test_without_elements(name: str, layout: Any, affine: bool) -> None:
    """Results are empty, sums and statistics zero, whichever dimension has no size."""
    for shape in ((0, 3, 5, 4), (2, 0, 5, 4), (2, 3, 0, 4), (2, 3, 5, 0), (0, 0, 0, 0), (1, 0, 1, 1)):
        assert_equals_reference(name, native_arguments(name, layout, torch.float64, affine, shape))


@BOTH_LAYOUTS
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 13), (3, 4), (6, 6)])
@pytest.mark.parametrize("name", ["bn_relu_maxpool_backward_reduce", "bn_relu_maxpool_backward"])
def test_pooling_indices_of_any_byte(name: str, size: tuple[int, int], layout: Any) -> None:
    """An index that names no pixel, because its window is cut off there or has no such element, has no gradient."""
    args = native_arguments(name, layout, torch.float64, True, (5, 11, *size))
    indices = args[1]
    for values in (torch.randint(0, 10, indices.shape), torch.randint(0, 256, indices.shape)):
        indices.copy_(values)
        assert_equals_reference(name, args)


def test_what_may_end_a_process() -> None:
    """A division by zero channels; window element 0 of the first pixels, which lies before y, if it is read."""
    printed = run("""
        print(*resnet_fused.functional.bn_relu(empty(1, 0, 1, 1), empty(0), empty(0)).shape)
        try:  # as F.max_pool2d does
            resnet_fused.functional.bn_relu_maxpool(empty(1, 0, 1, 1), empty(0), empty(0))
        except RuntimeError:
            print("refused")
        print(*resnet_fused.functional.bn_add_relu(empty(1, 0, 1, 1), empty(1, 0, 1, 1), empty(0), empty(0)).shape)
        y, grad, vector = rand(5, 31, 2, 13), rand(5, 31, 1, 7), rand(31)
        for _ in range(50):
            sums = OPS.bn_relu_maxpool_backward_reduce(grad, zeros(5, 31, 1, 7, dtype=torch.uint8), y, vector, vector)
        print(*(x.abs().max().item() for x in sums))
    """)
    assert printed.split() == ["1", "0", "1", "1", "refused", "1", "0", "1", "1", "0.0", "0.0"]


@BOTH_LAYOUTS
@pytest.mark.parametrize("name", NATIVE)
def test_vectors_that_are_not_contiguous(name: str, layout: Any) -> None:
    """Those of stacked ensembles are slices."""
    args = native_arguments(name, layout, torch.float64, True)
    sliced = tuple(
        torch.stack([x, x + 1], -1)[..., 0]
        if isinstance(x, Tensor) and x.dim() == 1 and name != "masked_grad"
        else x
        for x in args
    )
    ours, theirs = tensors(getattr(OPS, name)(*sliced)), tensors(getattr(OPS, name)(*args))
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2**40, 2**40), "more bytes than an address counts"),
        ((2**62, 2), "more bytes than an address counts"),
        ((-1, 1), "must not be negative"),
        ((0, -(2**62)), "must not be negative"),
    ],
)
def test_fresh_like_checks_sizes(sizes: tuple[int, int], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        OPS.fresh_like(torch.empty(1, 1, 1, 1), *sizes)


def test_failed_allocations_say_so() -> None:
    """What a caller that frees memory and tries again looks for: the word memory, and how much was asked for."""
    printed = run("""
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
        y, vector = rand(1, 8, 4, 4), rand(8)
        large = rand(1).expand(1 << 14, 8, 128, 128)
        for call in (
            lambda: OPS.fresh_like(y, 1 << 20, 1 << 12, 1, 1),
            lambda: OPS.bn_relu(large, vector, vector, None, None, None),
            lambda: OPS.batch_norm_stats(large, 0.0),
        ):
            try:
                call()
            except RuntimeError as error:
                print(str(error).splitlines()[0])
        print("still works", OPS.bn_relu(y, vector, vector, None, None, None).numel())
    """)
    *errors, last = printed.splitlines()
    assert last == "still works 128"
    for error, op, size in zip(
        errors, ("fresh_like", "bn_relu", "batch_norm_stats"), (34, 33, 33), strict=True
    ):
        assert error.startswith(f"{op}: out of memory: tried to allocate {1 << size} bytes")


def test_scratch_memory_that_is_missing() -> None:
    """A kernel's own buffers, here of three lines of an image for each thread, are allocated in its threads."""
    printed = run("""
        import resource
        width = 1 << 24
        y, vector = zeros(4, 1, 1, width, dtype=torch.float16), zeros(1)
        grad, indices = zeros(4, 1, 1, width // 2, dtype=torch.float16), zeros(4, 1, 1, width // 2, dtype=torch.uint8)
        torch.set_num_threads(2)
        zeros(1 << 20).add_(1)  # starts the threads
        with open("/proc/self/statm") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        # The result fits into this, a buffer beside it does not.
        limit = mapped + y.numel() * 2 + 12 * width // 2
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            OPS.bn_relu_maxpool_backward(grad, indices, y, vector, vector, None, None, None)
        except RuntimeError as error:
            print(error)
    """)
    assert printed.splitlines()[0] == "bn_relu_maxpool_backward: out of memory"


class OnGpu(Tensor):
    """Says that it is on a GPU."""

    is_cuda = property(lambda self: True)  # type: ignore[assignment]


@pytest.mark.parametrize("kind", [Tensor, OnGpu])
def test_memory_of_a_gpu_that_is_missing(kind: type[Tensor]) -> None:
    """What a native op says becomes the error that torch itself raises on a GPU, by whose type callers catch it."""
    message = "lacks_memory: out of memory: tried to allocate 8 bytes. CUDA out of memory."

    def fail(x: Tensor) -> Tensor:
        raise RuntimeError(message)

    if not hasattr(torch.ops.resnet_fused, "lacks_memory"):
        test_memory_of_a_gpu_that_is_missing.op = register_op("lacks_memory(Tensor x) -> Tensor", fail, fail)  # type: ignore
        del IMPLEMENTATIONS["lacks_memory"]
    with pytest.raises(RuntimeError, match=message) as error:
        test_memory_of_a_gpu_that_is_missing.op(torch.ones(2).as_subclass(kind))  # type: ignore[attr-defined]
    assert isinstance(error.value, torch.OutOfMemoryError) == (kind is OnGpu)


@pytest.mark.parametrize("case", CASES)
def test_ops_without_images(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operands, "IMAGES", 0)
    arguments = CASES[case](Maker(torch.float64))
    assert_equals_reference(op_of(case), arguments)
    assert_fakes_are_exact(op_of(case), arguments)


@pytest.mark.parametrize("size", ["odd", "one_pixel", "one_row"])
@pytest.mark.parametrize("case", [case for case in CASES if case != "conv_bn_stats-groups"])
def test_ops_with_one_output(case: str, size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mask has a row for each plane."""
    monkeypatch.setattr(operands, "OUTPUTS", 1)
    arguments = CASES[case](Maker(torch.float64, SIZES[size]))
    assert_equals_reference(op_of(case), arguments)
    assert_fakes_are_exact(op_of(case), arguments)


@pytest.mark.parametrize("name", ["bn_relu", "bn_relu_backward_reduce", "batch_norm_stats"])
def test_meta_tensors_beside_real_ones(name: str) -> None:
    """One meta tensor is enough for the fake to run, whose result on the CPU nobody would have written."""
    args = list(native_arguments(name, contiguous, torch.float32, True))
    if name != "batch_norm_stats":
        args[-1] = args[-1].to("meta")
        with pytest.raises(ValueError, match=f"{name}: operands must be on one device, got cpu, meta"):
            getattr(OPS, name)(*args)
    args = [x.to("meta") if isinstance(x, Tensor) else x for x in args]
    assert all(x.is_meta for x in tensors(getattr(OPS, name)(*args)))


def test_a_meta_tensor_beside_a_missing_activation() -> None:
    with pytest.raises(TypeError, match="input_covariance: expected tensors as operands"):
        OPS.input_covariance([None] * 5 + [torch.empty(8, device="meta"), None], [1, 1])


@pytest.mark.parametrize("stride", [(1, 2**15), (2**31 - 1, 1)])
def test_strides_that_end_a_process_in_onednn(stride: tuple[int, int]) -> None:
    m = Maker(torch.float32, (1, 1))
    a, weight, geometry = (
        m.plain(),
        m.weight(operands.OUTPUTS, operands.INPUTS, 3),
        (stride, (1, 1), (1, 1), 1),
    )
    with pytest.raises(ValueError, match="conv_bn_stats: stride must be of fewer than 262144 elements"):
        OPS.conv_bn_stats(a, weight, *geometry, 1e-5, True, None, None, False)
    dy = [m.activation(operands.OUTPUTS, (1, 1))]
    with pytest.raises(ValueError, match="conv_backward: stride must be of fewer than 262144 elements"):
        OPS.conv_backward(dy, a, weight, *geometry, None, None, (1, 1), [True, True])


@pytest.mark.timeout(60)
def test_padding_of_2_to_the_31() -> None:
    """Where an image is smaller than the kernel, not every output is gone through to find the taps that see a pixel."""
    m, geometry = Maker(torch.float64, (1, 5)), ((1, 1), (2**31 - 1, 1), (1, 1), 1)
    weight = m.weight(operands.OUTPUTS, operands.INPUTS, 3)
    with pytest.raises(RuntimeError, match="Output size is too small"):
        OPS.conv_bn_stats(m.plain(), weight, *geometry, 1e-5, True, None, None, False)


@pytest.mark.parametrize(("width", "stride"), [(1, 2), (1, 3), (2, 3)])
def test_images_narrower_than_the_stride(width: int, stride: int) -> None:
    """In bfloat16 oneDNN makes their weight gradients of memory that nobody has written; it often holds NaN here."""
    m, geometry = Maker(torch.bfloat16, (4, width)), ConvGeometry((stride, stride), (1, 1))
    weight = m.weight(operands.OUTPUTS, operands.INPUTS, 3)
    dy = m.activation(operands.OUTPUTS, geometry.out_size(m.activation(1), weight))
    args = [*Gradient(dy)], m.plain(), weight, *geometry, None, None, (1, 1), [False, True]
    exact = operands.reference_of("conv_backward")(*operands.in_float64(args))[-1]
    for _ in range(50):
        freed = [torch.full((1 << n,), torch.nan) for n in range(4, 16) for _ in range(4)]
        del freed
        assert float((OPS.conv_backward(*args)[-1] - exact).norm() / exact.norm()) < 0.01


# Blocks


def test_an_infinite_pixel_that_a_stride_skips() -> None:
    """The statistics of a folded shortcut stay finite: it is centered by pixels that it sees."""
    shortcut = nn.Sequential(nn.Conv2d(16, 32, 1, stride=2, bias=False), nn.BatchNorm2d(32))
    block = models.Bottleneck(16, 8, 2, shortcut).double()
    x = torch.randn(2, 16, 16, 16, dtype=torch.float64).to(memory_format=torch.channels_last)
    x[:, :, 1::2] = torch.inf
    x[:, :, :, 1::2] = torch.inf
    block(x)
    assert all(buffer.isfinite().all() for buffer in shortcut.buffers())


def test_an_expanded_input_under_autocast() -> None:
    """Channels are innermost in it, also once it is dense and of autocast's dtype."""
    fused, eager = (block.float() for block in block_pair("basic", torch.channels_last))
    x = torch.randn(2, 9, 1, 64).permute(0, 3, 1, 2).expand(2, 64, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(fused(x), eager(x)) < 0.02


def test_a_bias_of_minus_infinity() -> None:
    """It makes zeros of a channel, also before a folded convolution."""
    fused, eager = block_pair("bottleneck", torch.channels_last)
    x = torch.randn(2, 64, 24, 24, dtype=torch.float64).to(memory_format=torch.channels_last)
    for block in (fused, eager):
        block.get_parameter("bn2.bias").data[3] = -torch.inf
    assert relative_error(fused(x), eager(x)) < 1e-10

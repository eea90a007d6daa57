"""What the functions of resnet_fused.functional refuse, and what they leave alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from resnet_fused import functional
from resnet_fused.types import BatchNorm
from tests.accuracy import LAYOUTS

C = 5
Y = torch.randn(2, C, 4, 4)
BUFFERS = (torch.zeros(C), torch.ones(C))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (Y.int(), *BUFFERS),
            TypeError,
            "expected a float32, float64, bfloat16 or float16 tensor, got torch.int32",
        ),
        (([1.0], *BUFFERS), TypeError, "got list"),
        ((Y[0], *BUFFERS), ValueError, r"expected 4D input \(got 3D input\)"),
        (
            (Y[:1, :, :1, :1], *BUFFERS, None, None, True),
            ValueError,
            "Expected more than 1 value per channel",
        ),
        ((Y, None, None), RuntimeError, "running_mean must be defined in evaluation mode"),
        ((Y, BUFFERS[0], None), RuntimeError, "running_var must be defined in evaluation mode"),
        ((Y, None, BUFFERS[1], None, None, True), ValueError, "must either both be None or neither be None"),
        (
            (Y, *BUFFERS, None, None, True, 0.1, 0.0),
            ValueError,
            "batch_norm eps must be positive",
        ),
        ((Y, *BUFFERS, None, None, False, 0.1, -1.0), ValueError, "batch_norm eps must be .*, but got -1.0"),
        ((Y, [0.0] * C, BUFFERS[1]), TypeError, "running_mean must be a tensor or None, got list"),
        ((Y, torch.zeros(3), torch.ones(3)), RuntimeError, "running_mean should contain 5 elements not 3"),
        ((Y, *BUFFERS, torch.ones(4)), RuntimeError, "weight should contain 5 elements not 4"),
        (
            (Y, torch.zeros(C, dtype=torch.complex64), BUFFERS[1], None, None, True),
            RuntimeError,
            "running_mean should be of a floating-point dtype not torch.complex64",
        ),
        (
            (Y, *BUFFERS, torch.ones(C, device="meta")),
            ValueError,
            "weight is on meta but the activation on cpu",
        ),
    ],
)
@pytest.mark.parametrize("name", ["bn_relu", "bn_relu_maxpool"])
def test_bad_input(name: str, arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(functional, name)(*arguments)


@pytest.mark.parametrize(
    ("other", "error", "message"),
    [
        (Y.double(), TypeError, "must have the activation's dtype torch.float32, got torch.float64"),
        (Y[:, :, :3], ValueError, r"must have the activation's shape \(2, 5, 4, 4\), got \(2, 5, 3, 4\)"),
        (Y.to("meta"), ValueError, "is on meta but the activation on cpu"),
        (1.0, TypeError, "must have the activation's dtype torch.float32, got float"),
    ],
)
def test_bad_partner(other: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"residual {message}"):
        functional.bn_add_relu(Y, other, *BUFFERS)
    norm = BatchNorm(*BUFFERS, None, None, False, 0.1, 1e-5)
    with pytest.raises(error, match=f"skip {message}"):
        functional.bn_bn_add_relu(Y, other, norm, norm)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "shape", [(0, C, 4, 4), (2, C, 0, 4), (2, 0, 4, 4)], ids=["batch", "height", "channels"]
)
def test_empty_activations(shape: tuple[int, ...], training: bool) -> None:
    y = torch.empty(shape, requires_grad=True)
    weight = torch.ones(shape[1], requires_grad=True) if shape[1] else None
    buffers = torch.zeros(shape[1]), torch.ones(shape[1])
    functional.bn_relu(y, *buffers, weight, None, training).sum().backward()
    assert y.grad is not None and y.grad.shape == shape
    assert weight is None or (weight.grad is not None and weight.grad.count_nonzero() == 0)
    assert not buffers[0].any() and (buffers[1] == 1).all()


def test_empty_activations_without_running_statistics() -> None:
    """In evaluation F.batch_norm refuses that only where there is something to normalize."""
    y = torch.empty(0, C, 4, 4)
    assert functional.bn_relu(y, None, None).shape == y.shape
    assert functional.bn_add_relu(y, y, None, None).shape == y.shape


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_infinite_weights(training: bool) -> None:
    """What is centred first is infinite or zero; eager on a CPU subtracts two infinities, which is NaN."""
    weight, mean = torch.full((C,), torch.inf), Y.mean((0, 2, 3))
    out = functional.bn_relu(Y, mean, torch.ones(C), weight, None, training, 0.0)
    centred = Y - mean.view(-1, 1, 1)
    assert torch.equal(out, torch.where(centred > 0, torch.inf, 0.0))


def test_pixels_that_are_no_maximum() -> None:
    """Infinite ones add nothing to a weight's gradient; in eager zero times infinity is NaN."""
    y, weight = Y.clone(), torch.ones(C, requires_grad=True)
    y[0, 1, 2, 2] = -torch.inf
    functional.bn_relu_maxpool(y, *BUFFERS, weight).sum().backward()
    assert weight.grad is not None and weight.grad.isfinite().all()


def test_half_precision_parameters() -> None:
    """A model cast as a whole to bfloat16 has parameters and buffers of that dtype too."""
    y = Y.bfloat16().requires_grad_()
    weight = torch.ones(C, dtype=torch.bfloat16, requires_grad=True)
    buffers = [b.bfloat16() for b in BUFFERS]
    functional.bn_relu(y, *buffers, weight, None, True).sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16
    assert buffers[0].dtype == torch.bfloat16 and not torch.equal(buffers[0], BUFFERS[0].bfloat16())


def test_backend_choice_is_checked() -> None:
    import resnet_fused

    with (
        pytest.raises(ValueError, match="backend must be one of auto, triton, vendor, reference, got 'fast'"),
        resnet_fused.backend("fast"),
    ):
        pass


@pytest.mark.parametrize("channels", [11, 70])
def test_relu_at_zero(channels: int, layout: str) -> None:
    """A ReLU has no gradient at zero, as in PyTorch: a mask has no bit there."""
    y = torch.randint(-1, 2, (2, channels, 6, 5)).float().contiguous(memory_format=LAYOUTS[layout])
    zeros, ones = torch.zeros(channels), torch.ones(channels)
    norm = BatchNorm(zeros, ones, ones, zeros, False, 0.1, 1e-5)
    bn = lambda y: F.batch_norm(y, *norm[:7])  # noqa: E731
    for fused, eager in (
        (lambda y: functional.bn_relu(y, *norm[:7]), lambda y: F.relu(bn(y))),
        (lambda y: functional.bn_add_relu(y, 0 * y, *norm[:7]), lambda y: F.relu(bn(y) + 0 * y)),
        (lambda y: functional.bn_bn_add_relu(y, 0 * y, norm, norm), lambda y: F.relu(bn(y) + bn(0 * y))),
        (
            lambda y: functional.bn_relu_maxpool(y, *norm[:7]),
            lambda y: F.max_pool2d(F.relu(bn(y)), 3, 2, 1),
        ),
    ):
        grads = []
        for op in (fused, eager):
            x = y.clone().requires_grad_()
            grads.append(torch.autograd.grad(op(x).sum(), x)[0])
        torch.testing.assert_close(*grads)

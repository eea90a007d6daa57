"""Verification of a configuration before it is timed: the accuracy rule, and the same result in each run."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_fused import accuracy
from resnet_fused.kernels.autotune.tunable import TuningKey
from resnet_fused.kernels.launch import Config

#: Runs whose results have to be equal bit for bit.
RUNS = 3
#: What a rejection begins with: the kernel does not compile or start, its results break the accuracy rule, or they
#: differ from run to run.
REASONS = COMPILE, WRONG, UNSTABLE = "compile error", "wrong result", "unstable result"
#: By the dtype of a tuning key.
EPS = {
    "bf16": torch.finfo(torch.bfloat16).eps,
    "fp16": torch.finfo(torch.float16).eps,
    "fp32": torch.finfo(torch.float32).eps,
    "tf32": accuracy.TF32_EPS,
}
_ALLOCATE = {
    f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
}
_log = logging.getLogger("resnet_fused")


class Rejected(Exception):
    """A configuration must not be chosen."""


class Unverifiable(Exception):
    """Nothing can be verified now: with these operands, or in the memory that is left."""


class PoisonedMemory(TorchDispatchMode):
    """A context in which new tensors are filled with NaN, or with all bits set: reading them unwritten shows."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name in _ALLOCATE:
            if result.is_floating_point():
                result.fill_(math.nan)
            else:
                result.fill_(255 if result.dtype == torch.uint8 else -1)
        return result


class Rejections(dict[Config | None, str]):
    """Why configurations of a tuning key must not be chosen."""

    def __init__(self, key: TuningKey, device: torch.device) -> None:
        self.key, self.device = key, device

    @contextmanager
    def catch(self, config: Config | None) -> Iterator[None]:
        """A context whose errors reject ``config``; those of the vendor's implementation, None, are raised.

        Raises:
            RuntimeError: CUDA reports an error after which the device can't be used; it says which configuration ran.
        """
        try:
            yield
            return
        except torch.OutOfMemoryError:
            raise
        except (Rejected, triton.TritonError, RuntimeError) as error:
            if config is None:
                raise
            if isinstance(error, RuntimeError) and _is_device_error(error, self.device):
                state = f"left {self.device} in an error state, in which no result can be trusted"
                raise RuntimeError(f"{config} of {self.key} {state}: {error}") from error
            is_rejected = isinstance(error, Rejected)
            self[config] = str(error) if is_rejected else f"{COMPILE}: {type(error).__name__}: {error}"[:400]
        _log.warning("%s is rejected for %s: %s", config, self.key, self[config])


def _is_device_error(error: RuntimeError, device: torch.device) -> bool:
    if isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error):
        return True
    try:
        wait(device)
    except RuntimeError:
        return True
    return False


def wait(device: torch.device) -> None:
    """Synchronizes this stream alone: a collective on another one may wait for other ranks."""
    torch.cuda.current_stream(device).synchronize()


class Verifier:
    """Compares errors of results, relative to exact ones, with those of the vendor's results (accuracy.limit).

    Args:
        exact: computes the results with more bits.
        vendor: the same by the vendor's library.
        eps: of the dtype that results are rounded to.

    Raises:
        Unverifiable: exact or vendor's results can't be computed, aren't finite, or are all zero.
    """

    def __init__(
        self, exact: Callable[[], Any], vendor: Callable[[], Any], eps: float, device: torch.device
    ) -> None:
        self.device, self.eps = device, eps
        try:
            with _in_full_precision(device):
                self.exact = _results(exact())
            wait(device)
        except RuntimeError as error:
            if _is_device_error(error, device):
                raise
            raise Unverifiable(f"the exact result can't be computed: {error}") from None
        self.sizes = [accuracy.size_of(x) if x.is_floating_point() else 1.0 for x in self.exact]
        if not all(map(math.isfinite, self.sizes)):
            raise Unverifiable("a result is not finite")
        if not all(self.sizes):
            raise Unverifiable("a result is all zero")
        self.vendor_errors = [self._errors(i, x) for i, x in enumerate(_results(vendor()))]
        of_floats = (errors for errors in self.vendor_errors if isinstance(errors, tuple))
        if not all(math.isfinite(error) for errors in of_floats for error in errors):
            raise Unverifiable("a result of the vendor is not finite")

    def check(self, run: Callable[[], Any]) -> None:
        """Runs it ``RUNS`` times in poisoned memory.

        Raises:
            Rejected: it is less accurate than the rule allows, or its results differ from run to run.
        """
        results = self._run(run)
        if [x.shape for x in results] != [x.shape for x in self.exact]:
            raise Rejected(f"{WRONG}: results of shapes {[tuple(x.shape) for x in results]}")
        for i, x in enumerate(results):
            self._compare(i, x)
        for _ in range(RUNS - 1):
            again = self._run(run)
            for i, (x, y) in enumerate(zip(results, again, strict=True)):
                if not torch.equal(x, y):
                    raise Rejected(f"{UNSTABLE}: result {i} differs from run to run")

    def _run(self, run: Callable[[], Any]) -> list[Tensor]:
        with PoisonedMemory():
            results = _results(run())
        wait(self.device)
        return results

    def _errors(self, i: int, x: Tensor) -> Any:
        """(relative error, element error) of a result; the number of bits that differ of a mask."""
        exact, size = self.exact[i], self.sizes[i]
        if not x.is_floating_point():
            return accuracy.bits_that_differ(x, exact)
        return accuracy.relative_error(x, exact, size), accuracy.element_error(x, exact, size)

    def _compare(self, i: int, x: Tensor) -> None:
        errors, vendor_errors = self._errors(i, x), self.vendor_errors[i]
        if not x.is_floating_point():
            if why := accuracy.why_mask_is_wrong(errors, vendor_errors, x.numel()):
                raise Rejected(f"{WRONG}: result {i}: {why}")
            return
        for name, error, vendor_error in zip(("relative", "element"), errors, vendor_errors, strict=True):
            limit = accuracy.limit(vendor_error, self.eps)
            if not error <= limit:
                allowed = f"{limit:.3g} = 1.5 * {vendor_error:.3g} (vendor) + 4 * {self.eps:.3g}"
                raise Rejected(f"{WRONG}: result {i}: {name} error {error:.3g} > {allowed}")


def _results(returned: Any) -> list[Tensor]:
    """The tensors that have elements: for a result that is not needed launchers return None, ops an empty tensor."""
    if isinstance(returned, Tensor):
        return [returned] if returned.numel() else []
    return [x for value in returned if value is not None for x in _results(value)]


@contextmanager
def _in_full_precision(device: torch.device) -> Iterator[None]:
    """A context without TF32 and autocast."""
    convolutions, matmuls = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(matmuls)

"""Whether a configuration computes what it should: it is held to the accuracy rule before its time counts."""

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
from triton.runtime.errors import OutOfResources, PTXASError

from resnet_fused import accuracy
from resnet_fused.kernels.autotune.cache import TuningKey
from resnet_fused.kernels.launch import Config

#: Runs whose results have to be the same bit for bit.
RUNS = 3
#: What reasons begin with: it does not compile or start, breaks the accuracy rule, or gives other results each time.
REASONS = COMPILE, WRONG, UNSTABLE = "compile", "wrong", "unstable"
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


class Refused(Exception):
    """A configuration may not be chosen."""


class Unverifiable(Exception):
    """Right and wrong can not be told apart now: on these operands, or in the memory that is left."""


class PoisonedMemory(TorchDispatchMode):
    """Within, new tensors are full of NaN, or of the largest bytes: what is not written shows."""

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


@contextmanager
def refusing(
    refusals: dict[Config, str], config: Config, problem: TuningKey, device: torch.device
) -> Iterator[None]:
    """Notes why ``config`` is refused, where it is; an error after which the device is of no use gets out.

    Raises:
        RuntimeError: CUDA reports an error, which says which configuration was at work.
    """
    try:
        yield
        return
    except Refused as error:
        reason = str(error)
    except torch.OutOfMemoryError:
        raise
    except (OutOfResources, PTXASError, triton.CompilationError) as error:
        reason = _reason_of(error)
    except RuntimeError as error:
        if _is_of_device(error, device):
            raise RuntimeError(
                f"{config} of {problem} left {device} with an error, so that nothing on it can be trusted: {error}"
            ) from error
        reason = _reason_of(error)
    refusals[config] = reason
    _log.warning("%s is refused for %s: %s", config, problem, reason)


def _reason_of(error: Exception) -> str:
    return f"{COMPILE}: {type(error).__name__}: {error}"[:400]


def _is_of_device(error: RuntimeError, device: torch.device) -> bool:
    if isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error):
        return True
    try:
        wait(device)
    except RuntimeError:
        return True
    return False


def wait(device: torch.device) -> None:
    """For this stream alone: a collective on another one may wait for other ranks."""
    torch.cuda.current_stream(device).synchronize()


class Verifier:
    """Holds results of a problem to the exact ones, and to how far from them the vendor's are.

    Args:
        exact: the results in more bits.
        vendor: the same by the vendor's library; None: the limit is four roundings.
        eps: of the dtype that results are rounded to.

    Raises:
        Unverifiable: see there.
    """

    def __init__(
        self, exact: Callable[[], Any], vendor: Callable[[], Any] | None, eps: float, device: torch.device
    ) -> None:
        self.device, self.eps = device, eps
        try:
            with _in_full_precision(device):
                self.exact = _results(exact())
            wait(device)
        except RuntimeError as error:
            if _is_of_device(error, device):
                raise
            raise Unverifiable(f"there is no exact result: {error}") from None
        self.sizes = [accuracy.size_of(x) if x.is_floating_point() else 1.0 for x in self.exact]
        if not all(map(math.isfinite, self.sizes)):
            raise Unverifiable("a result is not finite")
        if not all(self.sizes):
            raise Unverifiable("a result is zero throughout")
        if vendor is None:
            self.by_vendor: list[Any] = [(0.0, 0.0) if x.is_floating_point() else 0 for x in self.exact]
            return
        found = _results(vendor())
        if [x.shape for x in found] != [x.shape for x in self.exact]:
            raise Unverifiable(f"the vendor's results have shapes {[tuple(x.shape) for x in found]}")
        self.by_vendor = [self._errors(i, x) for i, x in enumerate(found)]
        if not all(
            math.isfinite(e) for errors in self.by_vendor if isinstance(errors, tuple) for e in errors
        ):
            raise Unverifiable("a result of the vendor is not finite")

    def check(self, run: Callable[[], Any]) -> None:
        """Runs it some times in poisoned memory.

        Raises:
            Refused: it is less accurate than the rule allows, or its results differ from run to run.
        """
        found = self._run(run)
        shapes = [x.shape for x in self.exact]
        if [x.shape for x in found] != shapes:
            raise Refused(f"{WRONG}: results of shapes {[tuple(x.shape) for x in found]}")
        for i, x in enumerate(found):
            self._compare(i, x)
        for _ in range(RUNS - 1):
            again = self._run(run)
            for i, (x, y) in enumerate(zip(found, again, strict=True)):
                if not torch.equal(x, y):
                    raise Refused(f"{UNSTABLE}: result {i} differs from run to run")

    def _run(self, run: Callable[[], Any]) -> list[Tensor]:
        with PoisonedMemory():
            found = _results(run())
        wait(self.device)
        return found

    def _errors(self, i: int, x: Tensor) -> Any:
        """Of a result: as a vector and of its elements; of a mask: the bits that differ."""
        exact, size = self.exact[i], self.sizes[i]
        if not x.is_floating_point():
            return accuracy.bits_that_differ(x, exact)
        return accuracy.relative_error(x, exact, size), accuracy.element_error(x, exact, size)

    def _compare(self, i: int, x: Tensor) -> None:
        errors, by_vendor = self._errors(i, x), self.by_vendor[i]
        if not x.is_floating_point():
            if why := accuracy.why_mask_is_wrong(errors, by_vendor, x.numel()):
                raise Refused(f"{WRONG}: result {i}: {why}")
            return
        for name, error, vendor_error in zip(("relative", "element"), errors, by_vendor, strict=True):
            most = accuracy.limit(vendor_error, self.eps)
            if not error <= most:
                allowed = f"{most:.3g} = 1.5 * {vendor_error:.3g} (vendor) + 4 * {self.eps:.3g}"
                raise Refused(f"{WRONG}: result {i}: {name} error {error:.3g} > {allowed}")


def _results(found: Any) -> list[Tensor]:
    """The tensors that have elements: where an op has no result, a launcher has None and the op an empty tensor."""
    if isinstance(found, Tensor):
        return [found] if found.numel() else []
    return [x for each in found if each is not None for x in _results(each)]


@contextmanager
def _in_full_precision(device: torch.device) -> Iterator[None]:
    """Without TF32 and autocast."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = convolutions
        torch.set_float32_matmul_precision(products)

"""``Launch``: what is compiled again, on which device kernels start, captured launches. No kernel runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fused.kernels import launch as module
from resnet_fused.kernels.launch import Config, Launch, capture_launches, cdiv, observe_launches
from resnet_fused.plan import launches


class Kernel:
    """Stands for a triton.jit function; ``compiled`` and ``ran`` have the arguments that it was called with."""

    def __init__(self, on_start: Callable[[], None] = lambda: None) -> None:
        self.compiled: list[tuple[Any, ...]] = []
        self.ran: list[tuple[Any, ...]] = []
        self.on_start = on_start

    def fn(self) -> None:
        raise AssertionError("kernels are launched, not called")

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def first(*arguments: Any, **constants_and_options: Any) -> Any:
            self.on_start()
            self.compiled.append((grid, *arguments))
            return self.Compiled(self)

        return first

    class Compiled:
        def __init__(self, kernel: Kernel) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments: self.kernel.ran.append((grid, *arguments))


class TensorOnSecondGPU:
    """What ``Launch`` uses of a tensor."""

    device, is_meta = torch.device("cuda", 1), False


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(module, "_compiled", {})
    return Kernel()


def start(kernel: Kernel, x: Tensor, size: int = 5, block: int = 32, warps: int = 4) -> None:
    arguments = {"x": x, "absent": None, "size": size}
    Launch(kernel, (2,), arguments, {"BLOCK": block}, Config(warps=warps)).start()


def test_a_second_launch_uses_the_compiled_kernel(kernel: Kernel) -> None:
    x, other = torch.empty(8), torch.empty(9)
    start(kernel, x)
    start(kernel, other)
    assert kernel.compiled == [((2,), x, None, 5)]
    assert kernel.ran == [((2, 1, 1), other, None, 5, 32)]


@pytest.mark.parametrize("size", [21, 37])
def test_sizes_of_one_specialization_are_compiled_once(kernel: Kernel, size: int) -> None:
    start(kernel, torch.empty(8))
    start(kernel, torch.empty(8), size=size)
    assert len(kernel.compiled) == 1 and kernel.ran[0][3] == size


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.empty(8, dtype=torch.float16)},
        {"x": torch.empty(8)[1:]},
        {"size": 16},
        {"size": 1},
        {"block": 64},
        {"warps": 8},
    ],
    ids=["dtype", "alignment", "divisible by 16", "one", "constant", "warps"],
)
def test_other_specializations_are_compiled(kernel: Kernel, other: dict[str, Any]) -> None:
    start(kernel, torch.empty(8))
    start(kernel, **{"x": torch.empty(8)} | other)
    assert len(kernel.compiled) == 2 and not kernel.ran


def test_kernels_start_on_the_device_of_their_tensors(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model may live on another GPU than the current one."""
    current = [0]

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        before, current[0] = current[0], wanted.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(module, "architecture", lambda device: 90)
    devices: list[int] = []
    kernel.on_start = lambda: devices.append(current[0])
    start(kernel, TensorOnSecondGPU())  # type: ignore[arg-type]
    assert devices == [1] and current == [0]


def test_captured_launches_do_not_start(kernel: Kernel) -> None:
    x = torch.empty(8)
    with observe_launches(lambda _: pytest.fail("observed")), capture_launches() as captured:
        start(kernel, x)
    assert not kernel.compiled
    assert [captured_launch.grid for captured_launch in captured] == [(2,)]
    start(kernel, x)
    assert len(kernel.compiled) == 1 and len(captured) == 1


@pytest.mark.parametrize(("size", "part", "parts"), [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2), (8, 1, 8)])
def test_cdiv(size: int, part: int, parts: int) -> None:
    assert cdiv(size, part) == parts


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_arguments_are_in_the_order_of_the_parameters(arch: str, dtype: str) -> None:
    """They are passed by position."""
    planned = launches(arch, 8, dtype, 64)
    assert planned
    for each in planned:
        assert [*each.arguments, *each.constants] == each.kernel.arg_names, each.name

"""A GPU and its times, invented: no kernel runs. What is computed is computed on the CPU."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fused.kernels.autotune import cache, search, verification
from resnet_fused.kernels.autotune.search import Tunable, TuningKey, choose
from resnet_fused.kernels.launch import Config

GPU = torch.device("cuda", 0)
FIRST, SECOND, THIRD = CANDIDATES = [Config(64, 64, block_k) for block_k in (16, 32, 64)]
CONV, DGRAD = (TuningKey(kernel, (16, 56, 56, 64, 256), "bf16") for kernel in ("conv", "dgrad"))
VENDOR = "vendor"


class Bench:
    """Stands for a GPU that takes ``times`` milliseconds for a configuration or the vendor.

    ``exact`` is what they compute; ``results`` what one of them makes of that instead of rounding it.
    """

    def __init__(self, times: dict[Any, float]) -> None:
        self.times = times
        self.measured: Counter[Any] = Counter()
        self.verified: Counter[Any] = Counter()
        self.errors: dict[Config, Exception] = {}
        self.exact: list[Tensor] = [torch.randn(64, 64, generator=torch.Generator().manual_seed(0))]
        self.results: dict[Any, Callable[[list[Tensor]], list[Tensor]]] = {}
        self.last: Any = None

    def run(self, config: Config) -> list[Tensor]:
        if config in self.errors:
            raise self.errors[config]
        return self.result(config)

    def vendor(self) -> list[Tensor]:
        return self.result(VENDOR)

    def result(self, what: Any) -> list[Tensor]:
        self.last = what
        self.verified[what] += 1
        rounded = [torch.empty_like(x, dtype=torch.bfloat16).copy_(x) for x in self.exact]
        return self.results.get(what, lambda x: x)(rounded)

    def measure(self, run: Callable[[], Any], device: torch.device, repetitions: int = 1) -> float:
        assert device == GPU and repetitions >= 1
        run()
        self.measured[self.last] += 1
        return self.times[self.last]

    def work(self, problem: TuningKey = CONV, *, vendor: bool = True, **other: Any) -> Tunable:
        by_vendor = self.vendor if vendor else None
        return Tunable(problem, CANDIDATES, self.run, by_vendor, lambda: self.exact)._replace(**other)

    def choose(
        self, problem: TuningKey = CONV, *, vendor: bool = True, device: torch.device = GPU, **other: Any
    ) -> Config | None:
        return choose(self.work(problem, vendor=vendor, **other), device)


def pretend(patch: pytest.MonkeyPatch, folder: Path, times: dict[Any, float]) -> Bench:
    """An H100 whose cache and shipped tables are in ``folder``."""
    bench = Bench(times)
    properties = SimpleNamespace(shared_memory_per_block_optin=227 << 10)
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    patch.setattr(cache, "TUNED", folder)
    patch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    patch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    patch.setattr(search, "measure", bench.measure)
    patch.setattr(verification, "wait", lambda device: None)
    search.clear_cache()
    return bench


def cache_file() -> Path:
    return cache._cache_path(cache.header(GPU))


@contextlib.contextmanager
def only_warning(*parts: str) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 1 and all(part in texts[0] for part in parts), texts

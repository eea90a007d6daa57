"""A simulated GPU for tests of the autotuner: its times are given, no kernel runs, results are computed on the CPU."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_fused.kernels.autotune import cache, measurement, search, verification
from resnet_fused.kernels.autotune.search import choose
from resnet_fused.kernels.autotune.tunable import Tunable, TuningKey
from resnet_fused.kernels.launch import Config

DEVICE = torch.device("cuda", 0)
FIRST, SECOND, THIRD = CONFIGS = [Config(64, 64, block_k) for block_k in (16, 32, 64)]
CONV, DGRAD = (TuningKey(kernel, (16, 56, 56, 64, 256), "bf16") for kernel in ("conv_bn_stats", "dgrad"))
VENDOR = "vendor"


class SimulatedGPU:
    """A GPU that takes ``times`` milliseconds for a configuration or the vendor.

    ``exact`` is what they compute; ``results`` replaces the rounding of it for some of them.
    """

    def __init__(self, times: dict[Any, float]) -> None:
        self.times = times
        self.measured: Counter[Any] = Counter()
        self.ran: Counter[Any] = Counter()
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
        self.ran[what] += 1
        rounded = [torch.empty_like(x, dtype=torch.bfloat16).copy_(x) for x in self.exact]
        return self.results.get(what, lambda x: x)(rounded)

    def measure(self, run: Callable[[], Any], device: torch.device, repetitions: int = 1) -> float:
        assert device == DEVICE and repetitions >= 1
        run()
        self.measured[self.last] += 1
        return self.times[self.last]

    def tunable(self, key: TuningKey = CONV, **fields: Any) -> Tunable:
        return Tunable(key, CONFIGS, self.run, self.vendor, lambda: self.exact)._replace(**fields)

    def choose(self, key: TuningKey = CONV, device: torch.device = DEVICE, **fields: Any) -> Config | None:
        return choose(self.tunable(key, **fields), device)


def simulate(patch: pytest.MonkeyPatch, folder: Path, times: dict[Any, float]) -> SimulatedGPU:
    """An H100 whose cache and shipped tables are in ``folder``."""
    sim = SimulatedGPU(times)
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    patch.setattr(cache, "SHIPPED_TABLES", folder)
    patch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100 80GB HBM3")
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    patch.setattr(measurement, "measure", sim.measure)
    patch.setattr(verification, "wait", lambda device: None)
    search.forget_measurements()
    return sim


def cache_file() -> Path:
    return cache.cache_path(cache.header(DEVICE))


def forget_all() -> None:
    """The measurements of this process, and those on disk."""
    search.forget_measurements()
    cache_file().unlink()


@contextlib.contextmanager
def only_warning(*parts: str) -> Iterator[None]:
    """A context in which there is one warning, with all ``parts`` in its text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 1 and all(part in texts[0] for part in parts), texts

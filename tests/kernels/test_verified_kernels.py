"""What a GPU verifies before it measures, for every kernel of a block: on a GPU, or through the interpreter."""

from __future__ import annotations

import functools

import pytest
import torch

import resnet_fused
from resnet_fused.kernels.autotune import search, verification
from resnet_fused.kernels.autotune.search import Tunable
from resnet_fused.kernels.autotune.verification import EPS, Refused, Verifier
from resnet_fused.kernels.launch import Config
from resnet_fused.plan import PASSES
from tests.kernels.devices import DEVICES, DTYPES
from tests.ops.test_residual_block import fused, gradient_for, make_case, plain, results


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_pass_and_what_they_leave_out_is_refused(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each kernel of a block; with the end of its largest result left out it is refused."""
    verified = set()

    def choose(work: Tunable, device: torch.device) -> Config:
        with torch.no_grad():
            verifier = Verifier(work.exact, work.vendor, EPS[work.problem.dtype], device)
            verifier.check(functools.partial(work.run, work.candidates[0]))
            with pytest.raises(Refused):
                verifier.check(functools.partial(cut_off, work))
        verified.add(work.problem.kernel)
        return work.candidates[0]

    if device == "cpu":
        monkeypatch.setattr(verification, "wait", lambda device: None)
        monkeypatch.setattr(verification, "RUNS", 2)
    monkeypatch.setattr(search, "choose", choose)
    monkeypatch.setattr(
        search, "choose_sharing", lambda works, shared, device: [choose(work, device) for work in works]
    )
    torch.use_deterministic_algorithms(False)
    with resnet_fused.backend("triton"):
        case = make_case("bottleneck_stride", "plain", dtype, device)
        grad = gradient_for(plain(case.to(torch.float64), True).detach(), dtype)
        results(fused, case, grad, True, None)
    assert verified == set(PASSES)


def cut_off(work: Tunable) -> list[torch.Tensor]:
    found = verification._results(work.run(work.candidates[0]))
    largest = max(found, key=torch.Tensor.numel)
    largest[-1] = torch.empty_like(largest[-1])
    return found

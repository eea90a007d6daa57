"""On a CUDA GPU"""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.compat.small_models import every_case, images, small_pair
from tests.model_pairs import assert_equal, results

pytestmark = pytest.mark.gpu


@every_case
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_training_and_evaluation(kind: str, layout: torch.memory_format, training: bool) -> None:
    """Training and evaluation"""
    x = images(layout).cuda()
    assert_equal(*(results(model.cuda(), x) for model in small_pair(kind, layout, training)))


@every_case
def test_compile(kind: str, layout: torch.memory_format) -> None:
    """torch.compile(fullgraph=True)"""
    fused, eager = (model.cuda() for model in small_pair(kind, layout))
    x = images(layout).cuda()
    fused.compile(fullgraph=True)
    assert_equal(results(fused, x), results(eager, x))


@every_case
def test_distributed_data_parallel(
    kind: str, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DistributedDataParallel with NCCL, in one process"""
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
    }.items():
        monkeypatch.setitem(os.environ, name, value)
    fused, eager = (model.cuda() for model in small_pair(kind, layout))
    x = images(layout).cuda()
    dist.init_process_group("nccl")
    try:
        found = results(DistributedDataParallel(fused), x)
    finally:
        dist.destroy_process_group()
    assert_equal({name.removeprefix("module."): value for name, value in found.items()}, results(eager, x))

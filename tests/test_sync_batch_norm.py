"""SyncBatchNorm on two processes equals plain batch norm on one process that sees both their batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

import resnet_fused

#: Images of each process: their number differs, as in the last batch of an epoch.
SHARES = (3, 2)


def model(arch: str) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = getattr(resnet_fused, arch)(num_classes=7).double()
    return made


def work(rank: int, folder: str, arch: str) -> None:
    """Trains one step's forward and backward on this process's share, and saves what it found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(SHARES))
    try:
        synced = nn.SyncBatchNorm.convert_sync_batchnorm(model(arch))
        assert resnet_fused.explain(synced) == {}
        images, labels = torch.load(f"{folder}/batch.pt")
        mine = slice(sum(SHARES[:rank]), sum(SHARES[: rank + 1]))
        loss = F.cross_entropy(synced(images[mine]), labels[mine], reduction="sum")
        loss.backward()
        found = {f"{name} gradient": p.grad for name, p in synced.named_parameters()}
        torch.save(found | dict(synced.named_buffers()), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_two_processes_equal_one(arch: str, layout: torch.memory_format, tmp_path: Path) -> None:
    images = torch.randn(sum(SHARES), 3, 64, 64, dtype=torch.float64).to(memory_format=layout)
    labels = torch.arange(sum(SHARES))
    torch.save((images, labels), tmp_path / "batch.pt")
    mp.spawn(work, (str(tmp_path), arch), nprocs=len(SHARES))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))

    alone = model(arch)
    F.cross_entropy(alone(images), labels, reduction="sum").backward()
    for name, parameter in alone.named_parameters():
        both = first[f"{name} gradient"] + second[f"{name} gradient"]
        torch.testing.assert_close(both, parameter.grad, rtol=1e-8, atol=1e-10, msg=name)
    for name, buffer in alone.named_buffers():
        torch.testing.assert_close(first[name], buffer, rtol=1e-10, atol=1e-12, msg=name)
        assert torch.equal(first[name], second[name]), name

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
from resnet_fused.ops.bn_stats import merge_across

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


@pytest.mark.parametrize("level", [0.0, 1e3])
def test_statistics_are_merged_as_if_they_were_of_one_process(
    level: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where |mean| / std is 1000; nothing is lost but the rounding of each process's mean to float32."""
    shares = [torch.randn(pixels, 5, dtype=torch.float64) + level for pixels in (40, 3, 200)]
    for share in shares:
        share[:, 1] = level  # a constant channel
    sums: list[torch.Tensor] = []
    for sum_up in (
        lambda x, group: sums.append(x.clone()),
        lambda x, group: x.copy_(torch.stack(sums).sum(0)),
    ):
        monkeypatch.setattr(dist, "all_reduce", sum_up)
        merged = [
            merge_across(None, share.mean(0).float(), share.var(0, correction=0).float(), len(share))  # type: ignore[arg-type]
            for share in shares
        ]
    whole = torch.cat(shares)
    for mean, var, total in merged:
        torch.testing.assert_close(mean.double(), whole.mean(0), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            var.double(), whole.var(0, correction=0), rtol=1e-6, atol=2 * level * 2.0**-24 + 1e-12
        )
        assert total == len(whole) and (var >= 0).all()

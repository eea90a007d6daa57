"""SyncBatchNorm on two processes equals plain batch norm on one process that sees both their batches."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_fused
from resnet_fused.ops.bn_stats import merge_across
from tests.conftest import RESIDUAL_BLOCK
from tests.model_pairs import KINDS, make_model

#: Images of each process: their number differs, as in the last batch of an epoch. Of so many and so large ones only the
#: first process folds 1x1 convolutions; the second computes their outputs again. Both save those of others.
SHARES, SIZE = (3, 2), 64
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return make_model(resnet_fused, kind).double()


def batch(layout: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    images = torch.randn(sum(SHARES), 3, SIZE, SIZE, dtype=torch.float64)
    return images.to(memory_format=LAYOUTS[layout]), torch.arange(sum(SHARES))


def gradients_and_buffers(trained: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    F.cross_entropy(trained(images), labels, reduction="sum").backward()
    found = {f"{name} gradient": p.grad for name, p in trained.named_parameters()}
    return found | dict(trained.named_buffers())


def work(rank: int, folder: str) -> None:
    """One step's forward and backward on this process's images, of all models and layouts."""
    torch.set_num_threads(1)
    policy, policies = RESIDUAL_BLOCK.output_policy, set[str]()

    def noted_policy(*args: Any) -> str:
        chosen: str = policy(*args)
        policies.add(chosen)
        return chosen

    vars(RESIDUAL_BLOCK).update(FOLD_BYTES=0, RECOMPUTE_BYTES=0, output_policy=noted_policy)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(SHARES))
    mine = slice(sum(SHARES[:rank]), sum(SHARES[: rank + 1]))
    try:
        for kind, layout in itertools.product(KINDS, LAYOUTS):
            synced = nn.SyncBatchNorm.convert_sync_batchnorm(model(kind))
            assert resnet_fused.explain(synced) == {}
            images, labels = batch(layout)
            found = gradients_and_buffers(synced, images[mine], labels[mine])
            torch.save(found, f"{folder}/{kind}-{layout}-{rank}.pt")
        assert policies == {"saved", "recomputed"} | ({"folded"} if rank == 0 else set())
    finally:
        dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path),), nprocs=len(SHARES))
    for kind, layout in itertools.product(KINDS, LAYOUTS):
        first, second = (torch.load(tmp_path / f"{kind}-{layout}-{rank}.pt") for rank in range(2))
        for name, expected in gradients_and_buffers(model(kind), *batch(layout)).items():
            what = f"{kind} {layout} {name}"
            if "gradient" in name:
                both = first[name] + second[name]
                torch.testing.assert_close(both, expected, rtol=1e-8, atol=1e-10, msg=what)
            else:
                torch.testing.assert_close(first[name], expected, rtol=1e-10, atol=1e-12, msg=what)
                assert torch.equal(first[name], second[name]), what


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

"""Training on two processes: data parallel, sharded, and with statistics of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_module, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import resnet_fused
from resnet_fused import reference
from tests.compat.small_models import every_kind, small_model
from tests.conftest import RESIDUAL_BLOCK
from tests.model_pairs import KINDS, assert_equal

#: Images of each process: their number differs, as in the last batch of an epoch.
SHARES = (3, 2)
PROCESSES = len(SHARES)
Found = dict[str, Tensor]


def model(library: Any, kind: str) -> nn.Module:
    """The same on every process, from either library. Its weights are contiguous: FSDP2 refuses others."""
    torch.manual_seed(0)
    return small_model(library, kind).double()


def batch(rank: int | None) -> tuple[Tensor, Tensor]:
    """The images and labels of one process; None: those of all of them."""
    torch.manual_seed(1)
    images = torch.randn(sum(SHARES), 3, 32, 32, dtype=torch.float64)
    mine = slice(None) if rank is None else slice(sum(SHARES[:rank]), sum(SHARES[: rank + 1]))
    return images.to(memory_format=torch.channels_last)[mine], torch.arange(len(images))[mine]


def results(trained: nn.Module) -> Found:
    """Gradients and buffers, whole where they are sharded."""
    found = {f"{name} gradient": p.grad for name, p in trained.named_parameters() if p.grad is not None}
    found |= {name: b for name, b in trained.named_buffers() if b.is_floating_point()}
    return {
        name.removeprefix("_orig_mod.").removeprefix("module."): t.full_tensor()
        if isinstance(t, DTensor)
        else t
        for name, t in found.items()
    }


def one_loss(trained: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(trained(images), labels)


def summed_loss(trained: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(trained(images), labels, reduction="sum")


def two_losses(trained: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(trained(images), labels) + trained(images.flip(0)).square().mean()


def slopes(trained: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The squared norm of the gradient w.r.t. the images, of a loss that is a sum over all images."""
    images = images.detach().requires_grad_()
    loss = summed_loss(trained, images, labels)
    return torch.autograd.grad(loss, images, create_graph=True)[0].square().sum()


def data_parallel(made: nn.Module, **options: Any) -> nn.Module:
    # Else the second forward would take the first process's buffers. Torch 2.11 has no other name for the argument.
    return DistributedDataParallel(made, broadcast_buffers=False, **options)


def compiled(made: nn.Module) -> nn.Module:
    wrapped: nn.Module = torch.compile(data_parallel(made), backend="aot_eager")
    return wrapped


def sharded(made: nn.Module) -> nn.Module:
    for stage in (made.layer1, made.layer2):
        for block in stage:
            fully_shard(block)
    return fully_shard(made)


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.block, x, use_reentrant=False)
        return out


def sharded_by_module(made: nn.Module) -> nn.Module:
    """FSDP2 changes the classes of convolutions and norms, so that blocks run unfused."""
    for module in list(made.modules()):
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            fully_shard(module)
    sharded = fully_shard(made)
    assert {reason.partition(" ")[2] for reason in resnet_fused.explain(sharded).values()} == {
        "is a FSDPBatchNorm2d"
    }
    return sharded


def accumulated(trained: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    if isinstance(trained, DistributedDataParallel):
        with trained.no_sync():
            one_loss(trained, images, labels).backward()
    else:
        one_loss(trained, images, labels).backward()
    return one_loss(trained, images, labels)


def checkpointed(made: nn.Module) -> nn.Module:
    for stage in (made.layer1, made.layer2):
        stage[0] = Checkpointed(stage[0])
    return made


def plain(made: nn.Module) -> nn.Module:
    return made


class Way(NamedTuple):
    """How a model is changed, also the one it is compared with, how it is wrapped, its loss, and of which kinds."""

    change: Callable[[nn.Module], nn.Module]
    wrap: Callable[[nn.Module], nn.Module]
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    kinds: Iterable[str] = KINDS


#: Gradients are means over the processes.
AVERAGED = {
    "ddp": Way(plain, data_parallel, one_loss),
    "ddp_static_graph": Way(plain, lambda m: data_parallel(m, static_graph=True), one_loss),
    "ddp_bucket_view": Way(plain, lambda m: data_parallel(m, gradient_as_bucket_view=True), one_loss),
    "ddp_two_forwards": Way(plain, data_parallel, two_losses),
    "ddp_no_sync": Way(plain, data_parallel, accumulated),
    "ddp_compiled": Way(plain, compiled, one_loss, ["basic"]),
    "fsdp": Way(plain, sharded, one_loss),
    "fsdp_by_module": Way(plain, sharded_by_module, one_loss),
    "fsdp_checkpointed": Way(checkpointed, sharded, one_loss),
}
#: With SyncBatchNorm. A process alone, with all images, has the same statistics, and the sum of the gradients.
SYNCHRONIZED = {
    "fsdp": Way(nn.SyncBatchNorm.convert_sync_batchnorm, sharded, summed_loss),
    "double_backward": Way(nn.SyncBatchNorm.convert_sync_batchnorm, plain, slopes),
}


def refuses_batched_gradients(kind: str, rank: int) -> bool:
    trained = nn.SyncBatchNorm.convert_sync_batchnorm(model(resnet_fused, kind))
    images = batch(rank)[0].requires_grad_()
    out = trained(images)
    gradients = torch.stack([out.detach().sin(), out.detach().cos()])
    with pytest.raises(RuntimeError, match="batched gradients are not supported with statistics shared"):
        torch.autograd.grad(out, images, gradients, is_grads_batched=True, retain_graph=True)
    with pytest.raises(RuntimeError, match="batched gradients are not supported with statistics shared"):
        torch.vmap(lambda g: torch.autograd.grad(out, images, g, retain_graph=True))(gradients)
    return True


def replicated(library: Any, kind: str) -> Found:
    """What a model of DTensors finds. Convolutions take no other placement, and no channels_last."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    made = distribute_module(model(library, kind), mesh)
    images, labels = batch(None)
    images = distribute_tensor(images.contiguous(), mesh, [Replicate()])
    F.cross_entropy(made(images).full_tensor(), labels).backward()
    return results(made)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    vars(RESIDUAL_BLOCK).update(FOLD_BYTES=0, RECOMPUTE_BYTES=0)
    vars(resnet_fused.modules).update(is_measured=lambda *_: False)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    try:
        for kind in KINDS:
            for ways in (AVERAGED, SYNCHRONIZED):
                for name, (change, wrap, loss, kinds) in ways.items():
                    if kind not in kinds:
                        continue
                    made = change(model(resnet_fused, kind))
                    assert resnet_fused.explain(made, batch(rank)[0]) == {}
                    trained = wrap(made)
                    loss(trained, *batch(rank)).backward()
                    found = results(trained)
                    torch.save(found, f"{folder}/{kind}-{name}-{ways is SYNCHRONIZED}-{rank}.pt")
            torch.save(replicated(resnet_fused, kind), f"{folder}/{kind}-replicated-False-{rank}.pt")
            torch.save(
                {"refused": refuses_batched_gradients(kind, rank)}, f"{folder}/{kind}-batched-True-{rank}.pt"
            )
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def by_two_processes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, bool], list[Found]]:
    """What the processes found, one after the other, by kind and way."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(work, (str(folder),), nprocs=PROCESSES)

    def load(kind: str, name: str, synchronized: bool) -> list[Found]:
        return [torch.load(folder / f"{kind}-{name}-{synchronized}-{rank}.pt") for rank in range(PROCESSES)]

    return load


def means(each: list[Found]) -> Found:
    """Means of the gradients over the processes, and the buffers of the first one."""
    return {
        name: sum(e[name] for e in each) / len(each) if name.endswith("gradient") else each[0][name]  # type: ignore[misc]
        for name in each[0]
    }


def averaged(prefix: str) -> pytest.MarkDecorator:
    cases = [(k, name) for name, way in AVERAGED.items() if name.startswith(prefix) for k in way.kinds]
    return pytest.mark.parametrize(("kind", "name"), cases)


def assert_averaged(found: list[Found], kind: str, name: str) -> None:
    change, _, loss, _ = AVERAGED[name]
    expected = []
    for rank in range(PROCESSES):
        eager = change(model(reference, kind))
        loss(eager, *batch(rank)).backward()
        expected.append(results(eager))
    for rank in range(PROCESSES):
        assert_equal(found[rank], means([expected[rank], expected[1 - rank]]))


@averaged("ddp")
def test_distributed_data_parallel(by_two_processes: Any, kind: str, name: str) -> None:
    """DistributedDataParallel: static_graph, gradient_as_bucket_view, no_sync, compiled, two forwards"""
    assert_averaged(by_two_processes(kind, name, False), kind, name)


@every_kind
def test_distributed_tensors(by_two_processes: Any, kind: str) -> None:
    """DTensor parameters and inputs, replicated"""
    eager = model(reference, kind)
    images, labels = batch(None)
    one_loss(eager, images.contiguous(), labels).backward()
    for found in by_two_processes(kind, "replicated", False):
        assert_equal(found, results(eager))


@averaged("fsdp")
def test_fully_shard(by_two_processes: Any, kind: str, name: str) -> None:
    """FSDP2 (fully_shard) of blocks or of every module, also with activation checkpointing"""
    assert_averaged(by_two_processes(kind, name, False), kind, name)


def assert_synchronized(found: list[Found], kind: str, name: str) -> None:
    """Compares sums of the gradients, and the buffers of each process, with those of one process."""
    eager = model(reference, kind)
    SYNCHRONIZED[name].loss(eager, *batch(None)).backward()
    expected = results(eager)
    summed = {name: PROCESSES * t for name, t in means(found).items() if name.endswith("gradient")}
    for each in found:
        assert_equal(each | summed, expected)


@every_kind
def test_fully_shard_with_sync_batch_norm(by_two_processes: Any, kind: str) -> None:
    """FSDP2 (fully_shard) with SyncBatchNorm"""
    assert_synchronized(by_two_processes(kind, "fsdp", True), kind, "fsdp")


@every_kind
def test_double_backward_of_sync_batch_norm(by_two_processes: Any, kind: str) -> None:
    """Double backward with SyncBatchNorm"""
    assert_synchronized(by_two_processes(kind, "double_backward", True), kind, "double_backward")


@every_kind
def test_batched_gradients_of_sync_batch_norm_are_refused(by_two_processes: Any, kind: str) -> None:
    """Batched gradients with SyncBatchNorm: refused, with an error that says so"""
    assert all(found["refused"] for found in by_two_processes(kind, "batched", True))

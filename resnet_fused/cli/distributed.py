"""One process or many: rank, agreement between ranks, and what DDP leaves to its user."""

import contextlib
import gc
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from resnet_fused.cli.errors import UserError


@dataclass(frozen=True)
class World:
    """This process among those that train together."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks of a CPU tensor; the tensor itself where there is one rank."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def max(self, values: Tensor) -> Tensor:
        """Maximum over the ranks of a CPU tensor; the tensor itself where there is one rank."""
        if self.size > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def share_buffers(self, model: nn.Module) -> None:
        """Gives every rank the buffers of rank 0: DDP does so before each forward, but not after the last."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def digests(self, model: nn.Module) -> list[str]:
        """`digest` of every rank's model, in the order of the ranks."""
        digests: list[str] = [digest(model)]
        if self.size > 1:
            digests = [""] * self.size
            dist.all_gather_object(digests, digest(model))
        return digests


def from_environment() -> World:
    """The rank and world size in torchrun's environment variables.

    Raises:
        UserError: they are no ranks and numbers of processes.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return World()
    rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    found = {
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": os.environ.get("LOCAL_RANK", rank),
        "LOCAL_WORLD_SIZE": os.environ.get("LOCAL_WORLD_SIZE", size),
    }
    values = [int(value) if value.isdecimal() else -1 for value in found.values()]
    if not (0 <= values[0] < values[1] and 0 <= values[2] < values[3]):
        given = ", ".join(f"{name}={value}" for name, value in found.items())
        wanted = "0 <= RANK < WORLD_SIZE and 0 <= LOCAL_RANK < LOCAL_WORLD_SIZE, as torchrun sets them"
        # Not `everywhere`: which process is the first is what is unknown.
        raise UserError(f"the environment has {given}: set {wanted}, or none of them", everywhere=False)
    return World(*values)


@contextlib.contextmanager
def process_group(world: World, device: torch.device) -> Iterator[None]:
    """The default process group while the context lasts; nothing where there is one rank.

    CPU tensors use gloo on either device, so that ranks can exchange numbers without waiting for their GPUs.

    Destroying the group ends gloo's threads. A thread that released the last reference to a tensor after the
    interpreter has exited would abort the process, so nothing else may hold the group: DDP, which is never freed
    completely, gets a group of its own.
    """
    if world.size == 1:
        yield
        return
    # torchrun's store outlives processes that it starts again, and holds the addresses of those before: in torch 2.13
    # a process may connect to one that has ended, and wait.
    store, rank, size = next(iter(rendezvous("env://")))
    own = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=own, rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        gc.collect()  # DDP, which holds its group, is part of a reference cycle


def pick_device(name: str, world: World) -> torch.device:
    """The device for `auto`, `cpu`, `cuda` or `cuda:N`; under torchrun the GPU of this process's local rank.

    Raises:
        UserError: the name is no device, or there is no such GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is not a device: use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is not supported: use auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch {torch.__version__} sees no CUDA GPU; use --device cpu")
    index = world.local_rank if world.size > 1 else device.index or 0
    if index >= torch.cuda.device_count():
        raise UserError(
            f"GPU {index} is asked for, but there are {torch.cuda.device_count()}: start fewer processes"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def digest(model: nn.Module) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a state_dict, names and bytes in its order."""
    total = hashlib.sha256()
    for name, value in model.state_dict().items():
        total.update(name.encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]

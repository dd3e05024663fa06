"""The processes that train together: one by default, several under torchrun.

A batch of the recipe is cut into equal parts of neighbouring rows, one for each process in turn. What is drawn at
random belongs to a row of the batch, whoever holds it, so that the number of processes changes nothing but rounding.
"""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist


class WorldError(ValueError):
    """Work that cannot be shared by so many processes; the message says why."""


@dataclass(frozen=True)
class World:
    """This process among those that train together.

    Attributes:
        rank, size: its number, from 0, and how many there are. Number 0 writes the run folder.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def rows(self, batch_size: int) -> slice:
        """The rows of a batch that are this process's.

        Raises:
            WorldError: the batch cannot be cut into equal parts.
        """
        if batch_size % self.size:
            raise WorldError(f"a batch of {batch_size} cannot be shared equally by {self.size} processes.")
        part = batch_size // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def sum(self, values: list[float], device: torch.device) -> list[float]:
        """The sum of each number over all processes, the same in all of them."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.tolist()

    def share(self, value):
        """The first process's value, in all of them."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]


ALONE = World()


def local_device(name: str) -> str:
    """The name of this process's own device: under torchrun, of several GPUs the one of its number on this machine."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name


def join(device: torch.device) -> World:
    """Meets the other processes that torchrun started (over NCCL on GPUs, Gloo on CPUs); alone without torchrun."""
    if "RANK" not in os.environ:
        return ALONE
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        store, rank, size = next(dist.rendezvous("env://"))
        # torchrun keeps its store over a restart; without a name of its own, a start would find old addresses in it
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)} of {size}", store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    return World(dist.get_rank(), dist.get_world_size())


def leave() -> None:
    """Parts from the other processes, at the end."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()

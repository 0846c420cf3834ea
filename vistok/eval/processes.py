"""Several processes that measure together: how work is shared out, and how results come together.

``torchrun`` starts them; without it there is one, to which everything here applies too. Each takes a run of
neighbouring batches of those that one process would take. So a batch, and the rounding of what is computed from it, is
the same for any number of processes, and what they find, one process after the other, is in order.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import IO, Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from vistok.errors import UserError

K = TypeVar("K")
T = TypeVar("T")
_PIECE_BYTES = 2**26


@contextmanager
def together() -> Iterator[None]:
    """A group of the processes that torchrun started, while the context lasts; the first one alone prints to stdout.

    Of processes that fail only the one that failed first says why: the others fail for the same reason, or because they
    wait for it.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    store, rank, world_size = next(rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    local_rank = int(os.environ["LOCAL_RANK"])
    if local_rank < torch.cuda.device_count():
        torch.cuda.set_device(local_rank)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank else sys.stdout):
        try:
            yield
        except Exception:
            if store.add("vistok/failures", 1) > 1:
                sys.exit(2)
            raise
    dist.destroy_process_group()


def num_processes() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process shows progress and writes files."""
    return num_processes() == 1 or dist.get_rank() == 0


def own_device() -> str:
    """The GPU of this process, or ``cpu`` where there is none."""
    if not torch.cuda.is_available():
        return "cpu"
    return "cuda" if num_processes() == 1 else f"cuda:{os.environ['LOCAL_RANK']}"


def own_share(work: Sequence[T]) -> Sequence[T]:
    """This process's part of ``work``: neighbours, of which another process may have one more.

    Raises:
        UserError: if a process would have nothing to do.
    """
    size = num_processes()
    if size == 1:
        return work
    if len(work) < size:
        raise UserError(
            f"{len(work)} batches are too few for {size} processes: lower --batch-size, or start fewer processes"
        )
    start, stop = (-(-len(work) * rank // size) for rank in (dist.get_rank(), dist.get_rank() + 1))
    return work[start:stop]


def of_all(value: T) -> list[T]:
    """The ``value`` of each process, in the order of their shares. A tensor must be on the CPU, and no view."""
    if num_processes() == 1:
        return [value]
    values: list[Any] = [None] * num_processes()
    dist.all_gather_object(values, value)
    return values


def groups_of_all(groups: dict[K, list[T]]) -> dict[K, list[T]]:
    """Groups of what all processes found, each in the order of their shares; all of them have the same groups."""
    parts = of_all(groups)
    return {key: [found for part in parts for found in part[key]] for key in groups}


def rows_of_all(rows: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "N ..."]:
    """Rows of all processes on the CPU, in the order of their shares."""
    # A view would be sent with everything that it is a view of.
    return rows.cpu() if num_processes() == 1 else torch.cat(of_all(rows.cpu().clone()))


def gather_file(file: IO[bytes]) -> None:
    """Write to the end of the first process's file what those of the others hold, in the order of their shares."""
    if is_first():
        for process in range(1, num_processes()):
            received: list[Any] = [None]
            while received[0] != b"":
                dist.recv_object_list(received, process)
                file.write(received[0])
        return
    file.seek(0)
    piece = None
    while piece != b"":
        piece = file.read(_PIECE_BYTES)
        dist.send_object_list([piece], 0)  # an empty one says that there are no more

"""Peak memory of a piece of work, for the benchmarks beside this file."""

import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

import torch

T = TypeVar("T")


def peak_bytes(device: str) -> int:
    """The most memory that this process has held: of the allocator on a GPU, else resident."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_fresh_process(work: Callable[..., T], *args: object) -> T:
    """What ``work`` returns in a process that has done nothing else; a process starts with the peak of its parent."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, *args).result()

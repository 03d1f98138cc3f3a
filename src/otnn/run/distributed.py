"""Several processes under `torchrun`; one process needs nothing of this."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


def launched() -> int:
    """The number of processes that `torchrun` says it started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def world() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process; 0 writes."""
    return dist.get_rank() if world() > 1 else 0


@contextmanager
def processes(device: torch.device) -> Iterator[torch.device]:
    """Join the group that `torchrun` announces, and yield this process's own device."""
    if launched() == 1 or world() > 1:
        yield device
        return
    on_gpu = device.type == "cuda"
    if on_gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield device
        dist.barrier()  # nobody leaves before process 0 has put the run folder in place
    finally:
        dist.destroy_process_group()

"""The processes of one run. Without torchrun there is one, and nothing here does anything."""

import atexit
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dpmix.core.checks import require


def processes(device: str | torch.device = "cpu") -> tuple[int, int]:
    """(rank, number of processes), joining the group that torchrun describes in the environment if there is one."""
    if not dist.is_available():
        return 0, 1
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        device_of(device)  # NCCL talks through the GPU that is current, and each process needs its own
        dist.init_process_group("nccl" if torch.device(device).type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def device_of(device: str | torch.device) -> torch.device:
    """The device, checked; "cuda" is this process's own GPU."""
    device = torch.device(device)
    if device.type == "cuda":
        require(torch.cuda.is_available(), "device", str(device), "there is no GPU that PyTorch can use; take 'cpu'")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
        torch.cuda.set_device(device)
    return device


def from_first(value: Any, world: int) -> Any:
    """The first process's value, in every process."""
    box = [value]
    if world > 1:
        dist.broadcast_object_list(box)
    return box[0]


def add_up(sums: Tensor, counts: dict[str, int], world: int) -> dict[str, int]:
    """Add `sums` (in place) and `counts` up over all processes; every process gets the same bits."""
    if world == 1:
        return counts
    dist.all_reduce(sums)
    box = torch.tensor(list(counts.values()), device=sums.device)
    dist.all_reduce(box)
    return dict(zip(counts, box.tolist(), strict=True))


def agree(value: int, world: int, device: torch.device, otherwise: str) -> None:
    """Refuse in every process, in the words `otherwise`, to go on where `value` is not the same in all of them."""
    if world > 1:
        bounds = torch.tensor([value, -value], device=device)
        dist.all_reduce(bounds, dist.ReduceOp.MAX)
        if bounds[0] != -bounds[1]:
            raise ValueError(otherwise)

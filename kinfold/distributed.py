# SPDX-License-Identifier: Apache-2.0
"""Several processes: started by torchrun, and made to do what one process does.

Rank r of W holds the images r, r + W, r + 2W, … of the global batch, so the gathered batch in *global order* is the
batch that one process would hold, and split batch norm in one process (which interleaves in the same way) equals
plain batch norm in several. Without torchrun every function here is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as dist


def start(device: str) -> None:
    """Join the other processes where torchrun started several; nccl on CUDA devices, gloo elsewhere."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        # The first rank decodes and probes while the others wait: the usual ten minutes are too short for large sets.
        kind = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(kind, timeout=timedelta(hours=2))


def stop() -> None:
    """Leave the group of processes, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def world() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process among those that train together."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def wait_for_all() -> None:
    """Return when every process has come here."""
    if world() > 1:
        dist.barrier()


@torch.no_grad()
def gather(part: Tensor) -> Tensor:
    """Join the `[B, ...]` of all ranks to `[B · ranks, ...]` in global order; carries no gradient."""
    if world() == 1:
        return part.detach()
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(world())]
    dist.all_gather(parts, part.detach().contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)  # [B · ranks, ...]


def local_part(whole: Tensor) -> Tensor:
    """This rank's images of a tensor `[B · ranks, ...]` in global order."""
    return whole[rank() :: world()] if world() > 1 else whole


def global_rows(count: int, device: torch.device) -> Tensor:
    """Rows `[B]` of the global order that this rank's `count` images have."""
    return torch.arange(count, device=device) * world() + rank()  # [B]


@torch.no_grad()
def average_(tensors: Iterable[Tensor]) -> None:
    """Replace every tensor by its mean over the ranks, in place, in one message per element type."""
    if world() == 1:
        return
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.dtype, []).append(tensor)
    for group in kinds.values():
        flat = torch.cat([tensor.flatten() for tensor in group])
        dist.all_reduce(flat)
        flat /= world()
        for tensor, mean in zip(group, torch.split(flat, [tensor.numel() for tensor in group])):
            tensor.copy_(mean.view_as(tensor))


def join(part: dict[int, str]) -> dict[int, str]:
    """The entries of all ranks' dictionaries together."""
    if world() == 1:
        return part
    parts: list[dict[int, str]] = [{} for _ in range(world())]
    dist.all_gather_object(parts, part)
    return {key: value for each in parts for key, value in each.items()}


def largest(number: int, device: torch.device) -> int:
    """The largest of the ranks' numbers, told to all of them."""
    if world() == 1:
        return number
    value = torch.tensor([number], device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value.item())


def all_alike(facts: dict[str, object]) -> list[str]:
    """Names of the facts that are not the same on every rank."""
    if world() == 1:
        return []
    everyone: list[dict[str, object]] = [{} for _ in range(world())]
    dist.all_gather_object(everyone, facts)
    return [name for name in facts if any(theirs[name] != facts[name] for theirs in everyone)]

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
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable


def start(device: str) -> None:
    """Join the other processes where torchrun started several; nccl on CUDA devices, gloo elsewhere.

    A process that trains on CUDA has chosen its device before.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        # The first rank decodes and probes while the others wait: the usual ten minutes are too short for large sets.
        on_cuda = device.startswith("cuda")
        # Told its device, nccl joins the processes now, and not on a device that it guesses at the first barrier.
        own = torch.device("cuda", torch.cuda.current_device()) if on_cuda else None
        dist.init_process_group("nccl" if on_cuda else "gloo", timeout=timedelta(hours=2), device_id=own)


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


class _Gathered(torch.autograd.Function):
    """`gather`, whose gradient adds up what all ranks made of a row and hands it to the rank that the row is from."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        return gather(part)  # [B · ranks, ...]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)  # [B · ranks, ...]
        dist.all_reduce(total)
        return local_part(total)  # [B, ...]


def gather_with_gradient(part: Tensor) -> Tensor:
    """Join the `[B, ...]` of all ranks to `[B · ranks, ...]` in global order; the identity in one process.

    The gradient of a row is the sum of those that the ranks have for it. Every rank must go backward, in one order.
    """
    if world() == 1:
        return part
    joined: Tensor = _Gathered.apply(part)
    return joined  # [B · ranks, ...]


class _Dealt(torch.autograd.Function):
    """`deal`; the gradient goes back the way that the values came."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor) -> Tensor:
        return _exchange(whole.view(-1, world(), *whole.shape[1:]).transpose(0, 1))  # [ranks, B, ...]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _exchange(gradient).transpose(0, 1).flatten(0, 1)  # [B · ranks, ...]


def _exchange(parts: Tensor) -> Tensor:
    """Send part r of `[ranks, ...]` to rank r, and return the parts that came, by sender."""
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts)
    return received


def deal(whole: Tensor) -> Tensor:
    """Give every rank what concerns its images: `[B · ranks, ...]` in global order, from each rank its own, becomes
    `[ranks, B, ...]`, by the rank that it is from. Carries the gradient; every rank must go backward, in one order.
    """
    if world() == 1:
        return whole[None]  # [1, B, ...]
    dealt: Tensor = _Dealt.apply(whole)
    return dealt  # [ranks, B, ...]


def share(count: int, of: int | None = None) -> range:
    """Which of `count` rows this rank holds (or rank `of`), where they are divided: consecutive, as even as can be."""
    held_by = rank() if of is None else of
    return range(count * held_by // world(), count * (held_by + 1) // world())


@torch.no_grad()
def join_rows(part: Tensor, count: int, *, block: int = 65536) -> Tensor | None:
    """All `count` rows that the ranks hold by `share`, on the CPU of the main process; None in the others.

    The rows travel in blocks, so that no device needs room for more than its own.
    """
    whole = part.new_empty((count, *part.shape[1:]), device="cpu") if is_main() else None  # [count, ...]
    for owner in range(world()):
        rows = share(count, owner)
        for start in range(rows.start, rows.stop, block):
            stop = min(start + block, rows.stop)
            if owner == rank():
                some = part[start - rows.start : stop - rows.start].contiguous()  # [<= block, ...]
            else:
                some = part.new_empty((stop - start, *part.shape[1:]))
            if world() > 1:
                dist.broadcast(some, src=owner)
            if whole is not None:
                whole[start:stop] = some
    return whole


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

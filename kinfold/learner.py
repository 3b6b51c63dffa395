# SPDX-License-Identifier: Apache-2.0
"""The learner holds the state: query encoder, key encoder and memory, in one module with one state dict.

`forward` only reads state (but for the running statistics of batch norm), `advance` only writes it, after the
optimiser's step. MoCo's code moves the key encoder at the start of a step and SCE's at its end: the same sequence of
weights.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from kinfold import distributed
from kinfold.devices import to_device
from kinfold.encoders import BatchNorm, Encoder, split_batch_norm
from kinfold.errors import UserError
from kinfold.memory import Memo, Memory
from kinfold.methods.method import Method
from kinfold.randomness import SHUFFLE, permutation
from kinfold.views import Views

_KINDS = 64  # kinds of batch that compiled encoders may meet: sizes of views and batches, in training and in probes


class Learner(nn.Module):
    """Everything that learns or remembers.

    With a loop of your own, a step is

        losses, memos = learner(views, index, epoch)
        sum(losses.values()).backward(); optimizer.step(); optimizer.zero_grad()
        learner.advance([memos], momentum=0.99)
    """

    step: Tensor

    def __init__(
        self,
        *,
        method: Method,
        views: Views,
        encoder: Encoder,
        memory: Memory,
        batch_norm: BatchNorm | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        batch_norm = batch_norm or BatchNorm()
        self.method = method
        self.views = views
        self.seed = seed
        self.shuffle_keys = batch_norm.shuffle_keys
        key_encoder = None
        if views.keys:
            key_encoder = Encoder(copy.deepcopy(encoder.backbone), copy.deepcopy(encoder.head))
            split_batch_norm(key_encoder.backbone, _splits_here(batch_norm.key_splits))
            key_encoder.requires_grad_(False)
        split_batch_norm(encoder.backbone, _splits_here(batch_norm.query_splits))
        self.encoder = encoder
        self.key_encoder = key_encoder
        self.memory = memory
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        # The number of the step again, where reading it does not make a device wait.
        self._step = 0
        self._graphs = False
        self.register_load_state_dict_post_hook(_read_step)  # type: ignore[no-untyped-call]

    def forward(self, views: list[Tensor], index: Tensor, epoch: int) -> tuple[dict[str, Tensor], list[Memo]]:
        """Compare the views `[B, C, H, W]` of the images `index` `[B]` as the pairs say.

        Returns the terms of the loss, scalars averaged over this rank's batch and joined over the pairs, and what
        the memory wants back, one memo a key view.
        """
        if self._graphs:
            # From here on the graphs may write over what they gave in the step before.
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        queries = {view: self._own(self.encoder(views[view])) for view in self.views.queries}  # each [B, D]
        keys = {view: self.keys(views[view], view) for view in self.views.keys}  # each [B · ranks, D]
        losses: dict[str, Tensor] = {}
        memos: dict[int | None, Memo] = {}
        share = 1.0 / len(self.views.pairs) if self.views.combine == "mean" else 1.0
        # Similarities are taken and divided by temperatures in full precision, whatever the encoders run in.
        with torch.autocast(index.device.type, enabled=False):
            for asks, answers in self.views.pairs:
                key = None if answers is None else keys[answers]
                seen, memos[answers] = self.memory.compare(queries[asks], key, index)
                for name, value in self.method.loss(seen, epoch).items():
                    losses[name] = losses.get(name, 0.0) + share * value
        return losses, [memos[view] for view in self.views.keys or (None,)]

    @torch.no_grad()
    def keys(self, images: Tensor, view: int) -> Tensor:
        """Keys `[B · ranks, D]` in global order of the images `[B, C, H, W]` that each rank holds."""
        if self.key_encoder is None:
            raise ValueError("This learner has no key encoder: its pairs have no key view.")
        if not self.shuffle_keys:
            return distributed.gather(self._own(self.key_encoder(images)))
        everything = distributed.gather(images)  # [B · ranks, C, H, W]
        order = permutation(SHUFFLE, self.seed, self._step, view, n=len(everything))
        shuffled = to_device(torch.from_numpy(order), images.device)  # [B · ranks]
        # Without channels-last the copy above loses the memory format that the convolutions are fastest in.
        mine = everything[distributed.local_part(shuffled)].to(memory_format=_format_of(images))
        gathered = distributed.gather(self._own(self.key_encoder(mine)))  # [B · ranks, D]
        return torch.empty_like(gathered).index_copy_(0, shuffled, gathered)

    @torch.no_grad()
    def advance(self, memos: list[list[Memo]], *, momentum: float) -> None:
        """Write all state: what the step saw is remembered, and the key encoder follows the query encoder.

        `memos` holds what `forward` returned, one entry a micro-batch, in order. `momentum` is how much of the
        key encoder stays.
        """
        joined = [tuple(torch.cat(parts) for parts in zip(*view)) for view in zip(*memos)]
        self.memory.remember(joined)
        self.follow(momentum)
        if distributed.world() > 1:
            distributed.average_(b for n, b in self.named_buffers() if n.endswith(("running_mean", "running_var")))
        self.step += 1
        self._step += 1

    def compile_encoders(self, *, graphs: bool = False) -> None:
        """Compile both encoders (torch.compile); names and state stay as they are, results agree to rounding.

        With `graphs` a GPU replays each encoder as one CUDA graph, for models so small that starting their kernels
        takes longer than running them; a CPU compiles them as without. Each step is then one forward and one backward
        pass, with gradients that are None before it (`zero_grad(set_to_none=True)`).

        Raises torch's limit of what is compiled of one piece of code, for all that this process compiles.
        """
        # To torch all modules are one piece of code, and what it has compiled for eight kinds of batch it runs as it
        # is from then on, with no more than a line in its log. Six crops of five sizes and a probe are eight already.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _KINDS)
        for encoder in (self.encoder, self.key_encoder):
            if encoder is not None:
                # The batches of a run have one size, and perhaps another at the end of an epoch: no need for code
                # that suits any size.
                encoder.compile(dynamic=False, mode="reduce-overhead" if graphs else None)
        self._graphs = graphs

    def _own(self, embeddings: Tensor) -> Tensor:
        """The embeddings in memory of their own: a graph's next replay writes over what the last one gave."""
        return embeddings.clone() if self._graphs else embeddings

    def synchronise_batch_norm(self) -> None:
        """Let batch norm see the batch of all processes (SyncBN). Does nothing in one process.

        Call it when the learner is on its device and before an optimiser is made. Raises `UserError` on devices other
        than CUDA, which torch's SyncBatchNorm does not work on.
        """
        if distributed.world() == 1:
            return
        if self.step.device.type != "cuda":
            raise UserError(
                "batch_norm.synchronise: torch synchronises batch norm on CUDA devices only. Start one process, or set "
                "batch_norm.synchronise=false and query_splits and key_splits to the number of processes."
            )
        self.encoder = nn.SyncBatchNorm.convert_sync_batchnorm(self.encoder)  # type: ignore[no-untyped-call]
        if self.key_encoder is not None:
            self.key_encoder = nn.SyncBatchNorm.convert_sync_batchnorm(self.key_encoder)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """Move the key encoder's parameters: θ_k ← m θ_k + (1 − m) θ_q. Buffers are its own."""
        if self.key_encoder is None:
            return
        query = dict(self.encoder.named_parameters())
        key = dict(self.key_encoder.named_parameters())
        torch._foreach_lerp_(list(key.values()), [query[name] for name in key], 1.0 - momentum)


def _read_step(learner: Learner, _: object) -> None:
    learner._step = int(learner.step)


def _splits_here(splits: int) -> int:
    """The share of batch norm groups that one of several processes has."""
    world = distributed.world()
    if splits > world and splits % world:
        raise UserError(
            f"batch_norm: {splits} splits cannot be shared by {world} processes evenly. Start {splits} processes, or "
            f"a divisor of {splits}."
        )
    return max(1, splits // world)


def _format_of(images: Tensor) -> torch.memory_format:
    """The memory format of a batch of images."""
    last = images.dim() == 4 and images.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last and images.shape[1] > 1 else torch.contiguous_format

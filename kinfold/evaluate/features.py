# SPDX-License-Identifier: Apache-2.0
"""Features of images: what every evaluation protocol starts from, and what embeddings are.

A model is looked at and never changed: it runs in evaluation mode and without gradients, and each of its modules is put
back into the mode that it was in, so weights and running statistics are the same after as before, to the bit.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from kinfold import distributed
from kinfold.console import bar
from kinfold.data.centre_crops import evaluation_batches
from kinfold.data.decode import Undecodable
from kinfold.data.sources import Source, Subset
from kinfold.data.work import read
from kinfold.data.written import written
from kinfold.errors import UserError
from kinfold.evaluate import feature_cache
from kinfold.evaluate.backbones import FrozenBackbone, hash_of, load_backbone
from kinfold.evaluate.conditions import Conditions

__all__ = [
    "FrozenBackbone",
    "extract",
    "features_of",
    "frozen",
    "hash_of",
    "left_out",
    "load_backbone",
    "resize_for",
    "stream",
]

Positions = NDArray[np.int64]


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Lend `model` in evaluation mode and without gradients, then put every module's mode back as it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            yield model.eval()
    finally:
        for module, mode in modes:
            module.training = mode


def stream(
    model: nn.Module,
    source: Source,
    *,
    size: int,
    resize: int | None,
    channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int = 256,
    workers: int = 0,
    device: str | torch.device = "cpu",
    normalise: bool = False,
    progress: str | None = None,
    bad: dict[int, str] | None = None,
) -> Iterator[tuple[Tensor, Positions]]:
    """Give the features of a source batch by batch, in its order: float32 [b, F] on the CPU, positions int64 [b].

    Short side to `resize` (None: to `size`), central crop of `size`, no augmentation. Images that do not decode are
    left out: their positions are missing, and `bad` (where given) is told why. `model` must be on `device`.
    `normalise` makes unit vectors. Raises `UserError` where no image decodes, or features are NaN or infinite.
    """
    images: Tensor
    with bar(progress, len(source)) as advance:
        for images, positions in evaluation_batches(
            source,
            size=size,
            resize=resize,
            channels=channels,
            mean=tuple(mean),
            std=tuple(std),
            batch_size=batch_size,
            workers=workers,
            device=device,
            bad=bad,
        ):
            # Lent for one batch at a time: between two batches the caller finds its model as it left it.
            with frozen(model), _full_precision(images.device):
                features = model(images).flatten(1).float()  # [b, F]
                finite = torch.isfinite(features).all(dim=1).cpu()  # [b]
                if not finite.all():
                    first = source.name(int(positions[int(finite.logical_not().nonzero()[0])]))
                    raise UserError(
                        f"The backbone gives features that are not finite, first for {first}. Its weights are broken, "
                        "or the training that made them diverged."
                    )
                if normalise:
                    features = F.normalize(features, dim=1)  # [b, F]
            yield features.cpu(), np.asarray(positions, np.int64)
            advance(len(images))


def extract(
    model: nn.Module,
    source: Source,
    *,
    size: int,
    resize: int | None,
    channels: int,
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int = 256,
    workers: int = 0,
    device: str | torch.device = "cpu",
    normalise: bool = False,
    progress: str | None = None,
    bad: dict[int, str] | None = None,
) -> tuple[Tensor, Positions]:
    """Give the features of a source: float32 [n, F] on the CPU, and the positions int64 [n] they belong to.

    As `stream`, held in memory at once.
    """
    features: Tensor | None = None
    found: list[Positions] = []
    filled = 0
    for part, positions in stream(
        model,
        source,
        size=size,
        resize=resize,
        channels=channels,
        mean=mean,
        std=std,
        batch_size=batch_size,
        workers=workers,
        device=device,
        normalise=normalise,
        progress=progress,
        bad=bad,
    ):
        if features is None:  # one allocation: joining parts at the end would hold all of them twice
            features = torch.empty(len(source), part.shape[1])  # [N, F]
        features[filled : filled + len(part)] = part
        filled += len(part)
        found.append(positions)
    assert features is not None  # a source without a readable image has been refused
    return features[:filled], np.concatenate(found)


IN_MEMORY = 2**30
"""bytes of features that are held in memory where no cache is wanted; more go to a file without a name"""


def features_of(
    conditions: Conditions,
    backbone: FrozenBackbone,
    network: nn.Module,
    source: Source,
    *,
    size: int | None = None,
    resize: int | None = None,
    doing: str | None = None,
) -> tuple[Tensor, Positions]:
    """Give the features [n, F] of a source's images and their positions [n], made once and kept where a cache is.

    `network` is `backbone`'s, or something made of it; the images look as the backbone wants them. `size` and `resize`
    take the place of its own; without `size` the images decide about `resize`. Several processes share the work and
    all get all. What is given may be a map of a file: take rows of it rather than copies of all. Says which images do
    not decode.
    """
    if size is None:
        size = backbone.size
        resize = resize_for(source, size, backbone.resize, channels=backbone.channels)
    look: dict[str, Any] = {
        "size": size,
        "resize": resize,
        "channels": backbone.channels,
        "mean": list(backbone.mean),
        "std": list(backbone.std),
    }
    facts = {"data": source.fingerprint, "written": written(source), **look}
    # One key for all processes: what a network file system tells of a file may lag behind on some machines.
    key = distributed.join({distributed.rank(): feature_cache.key_of(network, facts)})[0]
    kept: feature_cache.Kept | None = None
    with ExitStack() as until_opened:
        folder = conditions.cache
        if folder is None:
            # A map stays readable when its file has lost its name, and the disk gets it back when the map is dropped.
            mine = until_opened.enter_context(tempfile.TemporaryDirectory(prefix="kinfold-features-"))
            folder = Path(distributed.join({distributed.rank(): mine})[0])
        else:
            kept = feature_cache.find(folder, key, images=len(source))
            # All make them, or none: a process may have come when another had just finished.
            if distributed.largest(int(kept is None), torch.device(conditions.device)):
                kept = None
        if kept is None:
            about = {"backbone": backbone.description, "images_from": source.description, **facts}
            writing = feature_cache.Writing(folder, key, images=len(source), about=about)
            kept = _write(writing, conditions, network, source, look, doing)
            if conditions.cache is None and len(kept.features) * kept.features.shape[1] * 4 <= IN_MEMORY:
                kept = kept._replace(features=kept.features.clone())
            distributed.wait_for_all()
    remark = left_out(source, kept.bad)
    if remark is not None:
        conditions.say(remark)
    return kept.features, kept.positions


def _write(
    writing: feature_cache.Writing,
    conditions: Conditions,
    network: nn.Module,
    source: Source,
    look: dict[str, Any],
    doing: str | None,
) -> feature_cache.Kept:
    """Make this process's share of the features, and put it where all are."""
    world, rank = distributed.world(), distributed.rank()
    first = len(source) * rank // world
    share = np.arange(first, len(source) * (rank + 1) // world)  # [n]
    bad: dict[int, str] = {}
    try:
        parts = (
            stream(
                network,
                source if world == 1 else Subset(source, share),
                **look,
                batch_size=conditions.batch_size,
                workers=conditions.workers,
                device=conditions.device,
                progress=doing,
                bad=bad,
            )
            if len(share)
            else iter(())
        )
        start = next(parts, None)
        writing.begin(distributed.largest(0 if start is None else start[0].shape[1], torch.device(conditions.device)))
        for features, positions in () if start is None else itertools.chain([start], parts):
            writing.write(positions + first, features)
        return writing.finish({position + first: reason for position, reason in bad.items()})
    except BaseException:
        writing.abandon()
        raise


def left_out(source: Source, bad: dict[int, str], *, shown: int = 5) -> str | None:
    """Say how many images of `source` do not decode, and name some with the reason; None if all do."""
    if not bad:
        return None
    names = ", ".join(f"{source.name(position)} ({bad[position]})" for position in sorted(bad)[:shown])
    more = f" and {len(bad) - shown:,} more" if len(bad) > shown else ""
    return f"{len(bad):,} of {len(source):,} images do not decode and are left out: {names}{more}"


def resize_for(source: Source, size: int, asked: int | None = None, *, channels: int = 3) -> int | None:
    """The short side to resize to before the central crop: as asked, else by the images.

    Images that are `size` x `size` already (the first ones tell) stay as they are: None. Others get the share that
    is usual on ImageNet, 256 for 224.
    """
    if asked is not None:
        return asked
    seen = 0
    for position in range(min(len(source), 64)):
        try:
            image = read(source, position, channels)
        except Undecodable:
            continue
        if image.shape[:2] != (size, size):
            return round(size * 256 / 224)
        seen += 1
        if seen == 8:
            break
    return None


def _full_precision(device: torch.device) -> Any:
    """Switch off an autocast that the caller may be under: features are compared in fp32."""
    return torch.autocast(device.type, enabled=False) if device.type in ("cpu", "cuda") else nullcontext()

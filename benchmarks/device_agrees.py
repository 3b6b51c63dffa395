# SPDX-License-Identifier: Apache-2.0
"""Does a device give what the CPU gives, and does a step there wait for nothing? Before anything is measured on it.

    python benchmarks/device_agrees.py --device cuda

Every fast path that only a device takes, on small inputs: the search in a bank, crops and colours of sets that live on
the device and of decoded files (also compiled, and decoded there), memory that steps have yet to read while files are
decoded, training as it is, compiled, and as CUDA graphs, and steps under torch's own watch for waiting. Each check
prints how far the device is from the CPU and how far it may be; one that fails leaves the others. Writes
`benchmarks/results/device-agrees.json`. Needs what kinfold needs but for `datasets`, and no network.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measured import write
from photographs import photo, pixels
from torch.nn import functional as F

from kinfold.data.augment import draw
from kinfold.data.exact_crop import crop_levels
from kinfold.data.loader import Loader
from kinfold.data.sources import open_source
from kinfold.devices import choose_device
from kinfold.kernels.search import nearest_rows, nearest_rows_dense
from kinfold.log import read_metrics
from kinfold.pretrain import begin, pretrain
from kinfold.recipe import load
from kinfold.views import Views, preset

STATISTICS: dict[str, Any] = {"channels": 3, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "seed": 0}
PHOTO = (120, 160)
"""height and width of the photographs"""
Found = tuple[float, float]
"""how far the device is from the CPU at most, and how far it may be"""


def search(device: torch.device, place: Path) -> Found:
    """Rows found whose similarity is not that of the dense search on the CPU; similarities within rounding."""
    made = torch.Generator().manual_seed(0)
    queries, rows = (F.normalize(torch.randn(n, 128, generator=made), dim=1) for n in (64, 50_000))  # [Q, D], [N, D]
    ours, _ = nearest_rows(queries.to(device), rows.to(device), 512)
    expected, _ = nearest_rows_dense(queries, rows, 512)
    return float((ours.cpu() - expected).abs().max()), 1e-5


def crops(device: torch.device, place: Path) -> Found:
    """Levels of crops of a set on the device, which are the same to the bit."""
    images = torch.from_numpy(np.stack([pixels(seed, 96, 96) for seed in range(16)])).permute(0, 3, 1, 2).contiguous()
    index = torch.arange(16)
    sides = np.full(16, 96), np.full(16, 96)
    boxes = draw(
        preset("moco-v2", size=32), seed=0, epoch=0, image=np.arange(16), view=0, height=sides[0], width=sides[1]
    ).box
    ours = crop_levels(images.to(device), index.to(device), boxes, 32).cpu()  # [B, C, S, S]
    return float((ours.int() - crop_levels(images, index, boxes, 32).int()).abs().max()), 0.0


def photos(place: Path, device: torch.device, *, batch_size: int = 32, **how: Any) -> Loader:
    """A loader of two views of 32 photographs."""
    folder = place / "photos"
    if not folder.exists():
        folder.mkdir()
        for seed in range(32):
            (folder / f"{seed}.jpg").write_bytes(photo(seed, *PHOTO))
    two = Views(augment=(preset("sce-alpha", size=64), preset("sce-beta", size=64)), pairs=((0, 1),))
    return Loader(open_source(str(folder)), two, batch_size=batch_size, device=device, **STATISTICS, **how)


def views_as(how: dict[str, Any], device: torch.device, place: Path) -> float:
    """The mean difference of views of files from those that the CPU makes, in standard deviations of a pixel."""
    made = []
    for where, words in ((device, how), (torch.device("cpu"), {"workers": 0, "resident": False})):
        loader = photos(place, where, **words)
        made.append([view.cpu() for batch in loader.epoch(0) for view in batch.views])
        loader.close()
    return max(float((ours - theirs).abs().mean()) for ours, theirs in zip(*made, strict=True))


def memory(how: dict[str, Any], device: torch.device, place: Path) -> Found:
    """Sums of tensors that were let go while they were queued to be read, and files decoded meanwhile: to the bit.

    The tensors are as large as decoded photographs, so that a decoder would be handed their memory.
    """
    size = 4096 if device.type == "cuda" else 64
    factor = torch.zeros(size, size, device=device)
    into = torch.empty_like(factor)
    loader = photos(place, device, batch_size=8, epochs=8, **how)
    sums = []
    for epoch in range(8):
        batches = loader.epoch(epoch)
        for _ in range(loader.steps_per_epoch):
            whole = [torch.ones(3, *PHOTO, dtype=torch.uint8, device=device) for _ in range(32)]
            for _ in range(40):  # a tenth of a second, for which the host is ahead
                torch.mm(factor, factor, out=into)
            sums += [one.sum() for one in whole]
            del whole
            next(batches)
        next(batches, None)
    loader.close()
    return float((torch.stack(sums) - 3 * PHOTO[0] * PHOTO[1]).abs().max()), 0.0


def trained(device: torch.device, place: Path, **run: Any) -> list[float]:
    """The losses of two epochs on digits."""
    where = {"data": "digits", "out": str(place / f"{device.type}-{run}".replace(" ", "")), "device": str(device)}
    recipe, how = load(
        "digits", ["epochs=2", "log_every=1", "probe_every=0", "learning_rate.warmup_epochs=0"], run={**where, **run}
    )
    done = pretrain(recipe, how, quiet=True)
    return [line["loss"] for line in read_metrics(done.folder) if "loss" in line]


def training_as(run: dict[str, Any], device: torch.device, place: Path) -> Found:
    """Losses of the first steps within a hundredth, and of all within a twentieth: rounding grows with the steps."""
    ours, expected = trained(device, place, **run), trained(torch.device("cpu"), place, workers=0)
    apart = [abs(a - b) for a, b in zip(ours, expected, strict=True)]
    if not max(apart) < 0.05 * max(expected):
        raise AssertionError(f"losses differ by {max(apart):.3f}; they are {max(expected):.3f} at most")
    return max(apart[:3]), 0.01 * max(expected)


def waiting(name: str, device: torch.device, place: Path) -> Found:
    """Steps of a recipe while torch raises where the host waits for the device; nothing to be apart from."""
    slim = ["backbone.name=resnet10_w16", "batch_size=64", "epochs=2", "learning_rate.warmup_epochs=0"]
    slim += ["views.augment.*.size=32", "probe_every=0", "resident=true"]
    few = ["memory.nearest=64", "method.positives=8", "method.start_epoch=0"] if "invp" in name else ["memory.size=512"]
    folder = place / "squares"
    if not folder.exists():
        folder.mkdir()
        for seed in range(256):
            (folder / f"{seed}.jpg").write_bytes(photo(seed, 40, 40))
    where = {"data": str(folder), "out": str(place / f"waiting-{name.replace('/', '-')}"), "device": str(device)}
    training = begin(*load(name, [*slim, *few], run=where), quiet=True)
    batches = ((epoch, batch) for epoch in range(2) for batch in training.loader.epoch(epoch))
    epoch, batch = next(batches)
    training.take_step(batch, epoch)  # libraries wait while they are loaded
    watched = device.type == "cuda"
    try:
        if watched:
            torch.cuda.set_sync_debug_mode("error")
        for epoch, batch in batches:
            training.take_step(batch, epoch)
    finally:
        if watched:
            torch.cuda.set_sync_debug_mode("default")
    training.look()
    return 0.0, 0.0


def checks(device: torch.device) -> dict[str, Callable[[torch.device, Path], Found]]:
    """Every check by name."""
    found: dict[str, Callable[[torch.device, Path], Found]] = {"search": search, "crops": crops}
    ways: dict[str, tuple[dict[str, Any], float]] = {
        "views on the device": ({"resident": True}, 1e-4),
        "views by workers": ({"resident": False, "workers": 2, "epochs": 1}, 1e-4),
    }
    runs: dict[str, dict[str, Any]] = {"training": {}, "training, compiled": {"compile": True}}
    there: dict[str, Any] = {"resident": False, "workers": 2, "decode": "device"}
    if device.type == "cuda":
        ways["views on the device, compiled"] = ({"resident": True, "compiled": True}, 1e-3)
        ways["views of files decoded there"] = (there, 0.2)
        found["memory while files are decoded there"] = lambda d, p: memory(there, d, p)
        runs["training, graphs"] = {"compile": "graphs"}
    for name, (how, allowed) in ways.items():
        found[name] = lambda d, p, how=how, allowed=allowed: (views_as(how, d, p), allowed)  # type: ignore[misc]
    for name in (
        "moco/imagenet-v2",
        "sce/imagenet-1000",
        "ressl/imagenet",
        "co2/imagenet-moco-v2",
        "invp/imagenet-mlp",
    ):
        found[f"no waiting in {name}"] = lambda d, p, name=name: waiting(name, d, p)  # type: ignore[misc]
    for name, run in runs.items():  # compiling takes longest
        found[name] = lambda d, p, run=run: training_as(run, d, p)  # type: ignore[misc]
    return found


def main() -> None:
    """Make every check, say how each went, and end with an error if one has failed."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--device", default="cuda")
    words.add_argument("--quick", action="store_true", help="without compiling and without ImageNet's recipes")
    given = words.parse_args()
    device = choose_device(given.device)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        os.environ["KINFOLD_CACHE"] = f"{place}/cache"
        for name, check in checks(device).items():
            if given.quick and ("compiled" in name or ("waiting" in name and "moco/" not in name)):
                continue
            try:
                apart, allowed = check(device, Path(place))
                found[name] = {"apart": apart, "allowed": allowed, "agrees": apart <= allowed}
            except Exception as error:  # whatever it was, the other checks are to be made
                traceback.print_exc()
                found[name] = {"agrees": False, "error": f"{type(error).__name__}: {str(error)[:300]}"}
            print(name, found[name], flush=True)
            result = {"question": "does a device give what the CPU gives", "device": given.device, "checks": found}
            if not given.quick:
                write("device-agrees", result)
    if given.quick:
        print(write("device-agrees", result, quick=True))
    failed = [name for name, each in found.items() if not each["agrees"]]
    if failed:
        sys.exit(f"The device does not give what the CPU gives in: {', '.join(failed)}")


if __name__ == "__main__":
    main()

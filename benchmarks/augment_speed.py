# SPDX-License-Identifier: Apache-2.0
"""How fast are the device augmentations against kornia's batches and against torchvision v2, image by image?

    uv run --with-requirements benchmarks/alternatives.txt python benchmarks/augment_speed.py
    python benchmarks/augment_speed.py --device cuda

Both views of every image of a batch, as a step makes them: from decoded pixels in memory to normalised floats, with the
random numbers drawn anew each time, and with the same operations at the same probabilities: 32 photos of 500 x 375 to
224 pixels, and 256 images of 32 pixels out of 2,048 that stay whole on the device. The contenders take turns in one
process. The crop, the rest, and both together are timed each on its own. Ours cuts photos in the loader's workers, in
whole levels, image by image; small images it cuts on the device, as a batch. On an accelerator only what happens there
is timed: of photos all but the crop, of small images everything. Decoding is no part of this;
benchmarks/loader_speed.py has it.

Where the work differs: ours draws all of a view's numbers at once, so each of its two parts has all of the drawing in
it, and an alternative's only its own share. kornia draws one order of the jitter's four operations for a batch, ours
and torchvision one an image; kornia's crop has no antialias, which is less work. All blur with the same 13 pixels. On
an accelerator kornia makes both views in one call where they are alike, as ours does.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import photographs
import torch
from augment_speed_page import PARTS, page
from measured import in_turns, synchronise, write
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import v2

from kinfold.data.augment import Drawn, draw
from kinfold.data.cutting import Cutting
from kinfold.data.exact_crop import crop_levels
from kinfold.data.finish import finish
from kinfold.data.resident import resident_views
from kinfold.data.work import Task
from kinfold.views import Augmentation, Views, preset

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KORNIA = importlib.util.find_spec("kornia") is not None
CASES = (
    (("moco-v2", "moco-v2"), 224),
    (("sce-alpha", "sce-beta"), 224),
    (("moco-v2", "moco-v2"), 32),
    (("moco-notebook", "moco-notebook"), 32),
)
"""presets of the two views, and their size"""

Part = Callable[[], object]
Contenders = dict[str, dict[str, Part]]
"""part -> contender -> what to call"""


class Decoded:
    """Images [N, H, W, C] in memory as a source that has nothing to decode."""

    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] | None = None
    fingerprint = "-"
    description = "images in memory"

    def __init__(self, images: NDArray[np.uint8]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def read(self, i: int) -> NDArray[np.uint8]:
        image: NDArray[np.uint8] = self.images[i]  # [H, W, C]
        return image

    def name(self, i: int) -> str:
        return f"number {i}"


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--device", default="cpu")
    words.add_argument("--rounds", type=int, default=7)
    words.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of torch, on a CPU")
    words.add_argument("--quick", action="store_true", help="a few images and one round; prints, and writes nothing")
    given = words.parse_args()
    device = torch.device(given.device)
    on_cpu = device.type == "cpu"
    small, large = (8, 4) if given.quick else (256, 32 if on_cpu else 256)
    if given.quick:
        given.rounds, given.threads = 1, given.threads[:1]
    timed: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for threads in given.threads if on_cpu else [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        for names, size in CASES:
            batch = large if size == 224 else small
            looks = [preset(name, size=size) for name in names]
            for part, contenders in prepared(looks, batch, device, failed).items():
                runs = working({who: finished(what, device) for who, what in contenders.items()}, failed)
                found = in_turns(runs, rounds=given.rounds, warm_up=1 if on_cpu else 3, per=batch)
                timed.append(
                    {
                        "presets": list(names),
                        "size": size,
                        "batch": batch,
                        "threads": threads,
                        "part": part,
                        "seconds": found,
                    }
                )
                print(*names, size, PARTS[part], f"{threads} thread(s)", line(found), flush=True)
                told = tell(device, timed, failed, quick=given.quick)  # again each time: what is measured is kept
    print(told)


def tell(device: torch.device, timed: list[dict[str, Any]], failed: dict[str, str], *, quick: bool) -> str:
    """Write what there is so far, with its page."""
    result = {"question": (__doc__ or "").splitlines()[0], "device": device.type, "timed": timed, "failed": failed}
    return write(
        "augment-speed" if device.type == "cpu" else "gpu-augment-speed",
        {**result, "page": page(result)},
        alternatives=("kornia",) if KORNIA else (),
        quick=quick,
    )


def working(contenders: dict[str, Part], failed: dict[str, str]) -> dict[str, Part]:
    """Those that can be called, in their order."""
    found = {}
    for who, what in contenders.items():
        with leaving_out(who, failed):
            what()
            found[who] = what
    return found


@contextmanager
def leaving_out(who: str, failed: dict[str, str]) -> Iterator[None]:
    """Note that a contender fails, such as for a compiler that is missing, and leave the others; ours must not."""
    try:
        yield
    except Exception as error:
        if who == "ours":
            raise
        print(f"{who} is left out:", flush=True)
        traceback.print_exc()
        failed.setdefault(who, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")


def line(found: dict[str, Any]) -> str:
    return ", ".join(f"{who} {1e3 * each['median']:.3f} ms" for who, each in found.items())


def finished(what: Part, device: torch.device) -> Part:
    """The same, until the device has done it."""

    def wait() -> None:
        what()
        synchronise(device)

    return wait


def prepared(augment: Sequence[Augmentation], batch: int, device: torch.device, failed: dict[str, str]) -> Contenders:
    """The contenders for two views, each with its images in the form that it is fastest with."""
    photos = augment[0].size > 64
    height, width = (375, 500) if photos else (32, 32)
    count = batch if photos else 8 * batch  # a set to take the batch from
    images = np.stack([photographs.pixels(seed, height, width) for seed in range(count)])  # [N, H, W, C]
    chosen = np.random.default_rng(1).permutation(count)[:batch]  # [B]
    found = ours(images, chosen, augment, device)
    whole = torch.from_numpy(images).permute(0, 3, 1, 2)  # [N, C, H, W]
    if KORNIA:
        with leaving_out("kornia", failed):
            add(found, "kornia", by_kornia(whole.contiguous().to(device), chosen, augment))
    # On a CPU torchvision's uint8 crop is fastest on pixels as they were decoded, channels last in memory.
    with leaving_out("torchvision", failed):
        add(found, "torchvision", by_torchvision(whole if device.type == "cpu" else whole.to(device), chosen, augment))
    if photos and device.type != "cpu":
        return {"rest": found["rest"]}
    return found


def add(found: Contenders, name: str, parts: dict[str, Part]) -> None:
    """Put a contender's parts beside those of the others."""
    for part, contenders in found.items():
        contenders[name] = parts[part]


def ours(
    images: NDArray[np.uint8], chosen: NDArray[np.int64], augment: Sequence[Augmentation], device: torch.device
) -> Contenders:
    """What a worker and the device do for photos, and the device alone for small images, with fresh numbers a step."""
    views = Views(augment=tuple(augment), pairs=((0, 1),))
    height, width = (np.full(len(chosen), side) for side in images.shape[1:3])
    epochs = itertools.count()

    def numbers() -> list[Drawn]:
        words: dict[str, Any] = {"seed": 0, "epoch": next(epochs), "image": chosen, "height": height, "width": width}
        return [draw(augmentation, view=view, **words) for view, augmentation in enumerate(augment)]

    if augment[0].size > 64:
        cutting = Cutting(Decoded(images), views, 3, 0)
        crops = [crop.to(device) for crop in cutting(Task(0, chosen)).crops]  # [B, C, S, S] each

        def crop() -> object:
            return cutting(Task(next(epochs), chosen))

        def whole(compiled: bool) -> object:
            cut = cutting(Task(next(epochs), chosen))
            return finish([one.to(device) for one in cut.crops], cut.drawn, MEAN, STD, compiled=compiled)
    else:
        resident = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)  # [N, C, H, W]
        rows = torch.from_numpy(chosen).to(device)  # [B]

        def cut_all() -> list[Tensor]:
            pairs = zip(numbers(), augment)
            return [crop_levels(resident, rows, drawn.box, look.size) for drawn, look in pairs]  # [B, C, S, S] each

        crops, crop = cut_all(), cut_all

        def whole(compiled: bool) -> object:
            task = Task(next(epochs), chosen)
            return resident_views(resident, chosen, task, views, seed=0, mean=MEAN, std=STD, compiled=compiled)

    def rest(compiled: bool) -> object:
        return finish(crops, numbers(), MEAN, STD, compiled=compiled)

    found: Contenders = {
        "crop": {"ours": crop},
        "rest": {"ours": lambda: rest(False)},
        "both": {"ours": lambda: whole(False)},
    }
    if device.type != "cpu":
        found["rest"]["ours, compiled"] = lambda: rest(True)
        found["both"]["ours, compiled"] = lambda: whole(True)
    return found


def by_kornia(images: Tensor, chosen: NDArray[np.int64], augment: Sequence[Augmentation]) -> dict[str, Part]:
    """Its two views of a batch out of `images` [N, C, H, W], in floats."""
    rows = torch.from_numpy(chosen).to(images.device)  # [B]
    # One call for two views of one kind starts half as many operations; on a CPU it is as slow as two calls.
    together = images.device.type != "cpu" and augment[0] == augment[1]
    pairs = [kornia_parts(one) for one in (augment[:1] if together else augment)]

    def batch() -> Tensor:
        floats = images.index_select(0, rows) / 255.0  # [B, C, H, W]
        return torch.cat([floats, floats]) if together else floats  # [2B or B, C, H, W]

    def crop() -> list[Tensor]:
        floats = batch()  # [2B or B, C, H, W]
        return [cut(floats) for cut, _ in pairs]

    def rest(crops: Sequence[Tensor]) -> list[Tensor]:
        return [change(one) for (_, change), one in zip(pairs, crops)]

    crops = crop()
    return {"crop": crop, "rest": lambda: rest(crops), "both": lambda: rest(crop())}


def kornia_parts(a: Augmentation) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Its crop, and the rest, for batches of floats."""
    from kornia import augmentation as k  # type: ignore[import-not-found]  # of alternatives.txt

    rest = [
        k.ColorJitter(*a.jitter, p=a.jitter_probability, same_on_batch=False),
        k.RandomGrayscale(p=a.grey, same_on_batch=False),
    ]
    if a.blur:
        rest.append(k.RandomGaussianBlur((13, 13), a.blur_sigma, p=a.blur, same_on_batch=False))
    if a.solarize:
        limit = a.solarize_threshold
        rest.append(k.RandomSolarize((limit, limit), (0.0, 0.0), p=a.solarize, same_on_batch=False))
    rest += [k.RandomHorizontalFlip(p=a.flip, same_on_batch=False), k.Normalize(torch.tensor(MEAN), torch.tensor(STD))]
    crop = k.RandomResizedCrop((a.size, a.size), scale=a.scale, ratio=a.ratio, same_on_batch=False)
    return k.ImageSequential(crop), k.ImageSequential(*rest)


def by_torchvision(images: Tensor, chosen: NDArray[np.int64], augment: Sequence[Augmentation]) -> dict[str, Part]:
    """Its two views of some of `images` [N, C, H, W], image by image: the crop on uint8, the rest on floats."""
    singles = [images[int(i)] for i in chosen]  # [C, H, W] each
    pairs = [torchvision_parts(one) for one in augment]
    cuts = [[cut(image) for image in singles] for cut, _ in pairs]  # [C, S, S] each

    def rest() -> list[Tensor]:
        return [torch.stack([change(image) for image in crops]) for (_, change), crops in zip(pairs, cuts)]

    return {
        "crop": lambda: [torch.stack([cut(image) for image in singles]) for cut, _ in pairs],
        "rest": rest,
        "both": lambda: [torch.stack([change(cut(image)) for image in singles]) for cut, change in pairs],
    }


def torchvision_parts(a: Augmentation) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Its crop of a uint8 image, and the rest from a uint8 crop on, in floats: a little faster than on levels."""
    rest = [
        v2.ToDtype(torch.float32, scale=True),
        v2.RandomApply([v2.ColorJitter(*a.jitter)], p=a.jitter_probability),
        v2.RandomGrayscale(p=a.grey),
    ]
    if a.blur:
        rest.append(v2.RandomApply([v2.GaussianBlur(13, a.blur_sigma)], p=a.blur))
    if a.solarize:
        rest.append(v2.RandomSolarize(a.solarize_threshold, p=a.solarize))
    rest += [v2.RandomHorizontalFlip(p=a.flip), v2.Normalize(MEAN, STD)]
    return v2.RandomResizedCrop(a.size, scale=a.scale, ratio=a.ratio, antialias=True), v2.Compose(rest)


if __name__ == "__main__":
    main()

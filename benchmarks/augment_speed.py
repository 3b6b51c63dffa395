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
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import photographs
import torch
from measured import in_turns, plain, synchronise, times, write
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
PARTS = {"crop": "crop and resize", "rest": "colour, blur, flip, normalise", "both": "all"}
OWN = ("ours", "ours, compiled")
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
    timed = []
    for threads in given.threads if on_cpu else [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        for names, size in CASES:
            batch = large if size == 224 else small
            for part, contenders in prepared([preset(name, size=size) for name in names], batch, device).items():
                runs = {who: finished(what, device) for who, what in contenders.items()}
                if not on_cpu:
                    runs = {who: what for who, what in runs.items() if works(who, what)}
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
    result = {"question": (__doc__ or "").splitlines()[0], "device": device.type, "timed": timed}
    print(
        write(
            "augment-speed" if on_cpu else "gpu-augment-speed",
            {**result, "page": page(result)},
            alternatives=("kornia",) if KORNIA else (),
            quick=given.quick,
        )
    )


def works(who: str, what: Part) -> bool:
    """Whether a contender can be called; a compiler that is missing leaves the others."""
    try:
        what()
    except Exception:
        if who != "ours, compiled":
            raise
        print(f"{who} is left out:", flush=True)
        traceback.print_exc()
        return False
    return True


def line(found: dict[str, Any]) -> str:
    return ", ".join(f"{who} {1e3 * times['median']:.3f} ms" for who, times in found.items())


def finished(what: Part, device: torch.device) -> Part:
    """The same, until the device has done it."""

    def wait() -> None:
        what()
        synchronise(device)

    return wait


def prepared(augment: Sequence[Augmentation], batch: int, device: torch.device) -> Contenders:
    """The contenders for two views, each with its images in the form that it is fastest with."""
    photos = augment[0].size > 64
    height, width = (375, 500) if photos else (32, 32)
    count = batch if photos else 8 * batch  # a set to take the batch from
    images = np.stack([photographs.pixels(seed, height, width) for seed in range(count)])  # [N, H, W, C]
    chosen = np.random.default_rng(1).permutation(count)[:batch]  # [B]
    found = ours(images, chosen, augment, device)
    whole = torch.from_numpy(images).permute(0, 3, 1, 2)  # [N, C, H, W]
    if KORNIA:
        add(found, "kornia", by_kornia(whole.contiguous().to(device), chosen, augment))
    # On a CPU torchvision's uint8 crop is fastest on pixels as they were decoded, channels last in memory.
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


def page(result: dict[str, Any]) -> dict[str, Any]:
    """What a reader should see."""
    timed, on_cpu = result["timed"], result["device"] == "cpu"
    whos = {who for one in timed for who in one["seconds"]}
    alternatives, own = sorted(whos - {*OWN}), sorted(whos & {*OWN})
    rows = []
    for one in timed:
        seconds = one["seconds"]
        cells = [plain(1e3 * seconds[who]["median"]) if who in seconds else "" for who in [*own, *alternatives]]
        ratios = [times(seconds[who]["times_ours"]) for who in alternatives]
        shape = f"{one['batch']} at {one['size']} px"
        rows.append([shape, kind(one), PARTS[one["part"]], str(one["threads"]), *cells, *ratios])
    columns = ["images", "views", "part", "threads"]
    columns += [f"{who}, ms an image" for who in [*own, *alternatives]]
    columns += [f"{who} / ours" for who in alternatives]
    text = [
        "Both views of every image of a batch, as a step makes them: from decoded pixels in memory to normalised "
        "floats, the random numbers drawn anew each time, with the same operations at the same probabilities. "
        f"{'kornia works on the batch, ' if 'kornia' in alternatives else ''}torchvision v2 image by image, the crop "
        "on uint8 tensors and the rest on floats, its fastest way. Decoding is not in it. Photos are 500 x 375 "
        "pixels; their crop is the loader's workers' work with ours. Images of 32 pixels stay whole in the device's "
        "memory, and ours cuts them there.",
        "The work is not the same to the last detail. Ours draws all of a view's numbers at once, and both its parts "
        "have all of the drawing in them, so that they are together more than the whole; of an alternative each part "
        "draws its own. kornia draws one order of the four colour operations for a whole batch, ours and torchvision "
        "one for every image, and kornia's crop has no antialias, which is less work.",
    ]
    if "kornia" not in alternatives:
        text.append("kornia was not installed where this was measured, so it is left out.")
    if not on_cpu:
        text.append("Of photos only what happens on the device is timed, which is all but the crop.")
    whole = [one for one in timed if one["part"] == "both"]
    summary = []
    for who in alternatives:
        ratios_ = [one["seconds"][who]["times_ours"] for one in whole]
        ours_, theirs = ([1e3 * one["seconds"][name]["median"] for one in whole] for name in ("ours", who))
        summary.append(
            {
                "question": f"both views of each image of a batch, {len(whole)} cases of size, presets and threads, "
                "ms an image",
                "ours": f"{plain(min(ours_))} to {plain(max(ours_))}",
                "alternative": f"{plain(min(theirs))} to {plain(max(theirs))} ({who})",
                "ratio": f"{times(min(ratios_))[:-1]} to {times(max(ratios_))}",
            }
        )
    return {"title": "Augmentations", "text": text, "table": {"columns": columns, "rows": rows}, "summary": summary}


def kind(one: dict[str, Any]) -> str:
    """The two views' presets in words."""
    first, second = one["presets"]
    return f"{first} twice" if first == second else f"{first} and {second}"


if __name__ == "__main__":
    main()

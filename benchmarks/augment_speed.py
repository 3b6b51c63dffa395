# SPDX-License-Identifier: Apache-2.0
"""How fast are the device augmentations against kornia's batches and against torchvision v2, image by image?

    uv run --with-requirements benchmarks/alternatives.txt python benchmarks/augment_speed.py
    python benchmarks/augment_speed.py --device cuda

One view of every image of a batch, from decoded pixels in memory to normalised floats, with the same operations at the
same probabilities: 32 photos of 500 x 375 to 224 pixels, and 256 images of 32 pixels, which stay whole on the device.
The contenders take turns in one process. The crop, the rest, and both together are timed each on its own. Ours cuts
photos in the loader's workers, in whole levels, image by image; small images it cuts on the device, as a batch. On an
accelerator only what happens there is timed: of photos all but the crop, of small images everything. Decoding is no
part of this; benchmarks/loader_speed.py has it.

Where the work differs: kornia draws one order of the jitter's four operations for a batch, ours and torchvision's one
an image; kornia's crop has no antialias, which is less work. torchvision blurs with the same 13 pixels.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

import measured
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import v2

from kinfold.data.augment import Drawn, draw
from kinfold.data.crop import crop_resize
from kinfold.data.exact_crop import crop_levels
from kinfold.data.finish import finish
from kinfold.views import Augmentation, preset

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KORNIA = importlib.util.find_spec("kornia") is not None
PARTS = {"crop": "crop and resize", "rest": "colour, blur, flip, normalise", "both": "both"}

Part = Callable[[], object]
Contenders = dict[str, dict[str, Part]]
"""part -> contender -> what to call"""


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--device", default="cpu")
    words.add_argument("--rounds", type=int, default=7)
    words.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of torch, on a CPU")
    words.add_argument("--quick", action="store_true", help="a few images and one round, to see that it runs")
    given = words.parse_args()
    device = torch.device(given.device)
    rounds, small, large = (1, 8, 4) if given.quick else (given.rounds, 256, 32)
    if device.type != "cpu" and not given.quick:
        large = 256
    cases = [("moco-v2", 224, large), ("sce-beta", 224, large), ("moco-v2", 32, small), ("moco-notebook", 32, small)]
    timed = []
    for threads in given.threads if device.type == "cpu" else [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        for name, size, batch in cases:
            for part, contenders in prepared(preset(name, size=size), batch, device).items():
                found = measured.in_turns(
                    {who: finished(what, device) for who, what in contenders.items()},
                    rounds=rounds,
                    warm_up=1 if device.type == "cpu" else 3,
                    per=batch,
                )
                timed.append(
                    {"preset": name, "size": size, "batch": batch, "threads": threads, "part": part, "seconds": found}
                )
                print(name, size, PARTS[part], f"{threads} thread(s)", line(found))
    where = "" if device.type == "cpu" else "gpu-"
    path = measured.write(
        f"{where}augment-speed",
        {"question": (__doc__ or "").splitlines()[0], "timed": timed, "page": page(timed, device)},
        alternatives=("kornia",) if KORNIA else (),
    )
    print(path)


def line(found: dict[str, Any]) -> str:
    return ", ".join(f"{who} {1e3 * times['median']:.3f} ms" for who, times in found.items())


def finished(what: Part, device: torch.device) -> Part:
    """The same, until the device has done it."""
    if device.type != "cuda":
        return what

    def wait() -> None:
        what()
        torch.cuda.synchronize(device)

    return wait


def prepared(augmentation: Augmentation, batch: int, device: torch.device) -> Contenders:
    """The contenders, each with its images in the form that it is fastest with."""
    photos = augmentation.size > 64
    height, width = (375, 500) if photos else (32, 32)
    count = batch if photos else 8 * batch  # a set to take the batch from
    images = noise(count, height, width)  # [N, H, W, C]
    chosen = np.random.default_rng(1).permutation(count)[:batch]  # [B]
    whole = torch.from_numpy(images).permute(0, 3, 1, 2)  # [N, C, H, W]
    resident = whole.contiguous().to(device)  # [N, C, H, W]
    rows = torch.from_numpy(chosen).to(device)  # [B]

    def numbers() -> Drawn:
        sides = np.full(batch, height), np.full(batch, width)
        return draw(augmentation, seed=0, epoch=0, image=chosen, view=0, height=sides[0], width=sides[1])

    def crop(drawn: Drawn) -> Tensor:
        if not photos:
            return crop_levels(resident, rows, drawn.box, augmentation.size)  # [B, C, S, S]
        cuts = [crop_resize(images[i], tuple(box), augmentation.size) for i, box in zip(chosen, drawn.box.tolist())]
        return torch.stack(cuts)  # [B, C, S, S]

    drawn = numbers()
    cut = crop(drawn).to(device)  # [B, C, S, S]

    def both() -> Tensor:
        fresh = numbers()
        return finish([crop(fresh)], [fresh], MEAN, STD)[0]

    found: Contenders = {
        "crop": {"ours": lambda: crop(numbers())},
        "rest": {"ours": lambda: finish([cut], [drawn], MEAN, STD)},
        "both": {"ours": both},
    }
    if device.type != "cpu":
        found["rest"]["ours, compiled"] = lambda: finish([cut], [drawn], MEAN, STD, compiled=True)
    if KORNIA:
        kornia_crop, kornia_rest = by_kornia(augmentation)
        floats = cut / 255.0  # [B, C, S, S]

        def cropped() -> Tensor:
            made: Tensor = kornia_crop(resident.index_select(0, rows) / 255.0)  # [B, C, S, S]
            return made

        found["crop"]["kornia"] = cropped
        found["rest"]["kornia"] = lambda: kornia_rest(floats)
        found["both"]["kornia"] = lambda: kornia_rest(cropped())
    single_crop, single_rest = by_torchvision(augmentation)
    # On a CPU its uint8 crop is fastest on pixels as they were decoded, channels last in memory.
    singles = [(whole if device.type == "cpu" else resident)[int(i)] for i in chosen]
    cuts = list(cut)
    found["crop"]["torchvision"] = lambda: torch.stack([single_crop(image) for image in singles])
    found["rest"]["torchvision"] = lambda: torch.stack([single_rest(image) for image in cuts])
    found["both"]["torchvision"] = lambda: torch.stack([single_rest(single_crop(image)) for image in singles])
    if photos and device.type != "cpu":
        return {"rest": found["rest"]}
    return found


def by_kornia(a: Augmentation) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Its crop, and the rest, for batches of floats."""
    from kornia import augmentation as k

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


def by_torchvision(a: Augmentation) -> tuple[Callable[..., Any], Callable[..., Any]]:
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


def noise(count: int, height: int, width: int) -> NDArray[np.uint8]:
    """Coloured noise, coarse and fine: uint8 [n, H, W, 3]."""
    random = np.random.default_rng(0)
    coarse = random.uniform(0, 200, (count, height // 8 + 1, width // 8 + 1, 3))
    large = coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]
    return (large + random.uniform(0, 55, (count, height, width, 3))).astype(np.uint8)


def page(timed: list[dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """What a reader should see of it."""
    alternatives = sorted({who for one in timed for who in one["seconds"]} - {"ours", "ours, compiled"})
    own = sorted({who for one in timed for who in one["seconds"]} & {"ours", "ours, compiled"})
    rows = []
    for one in timed:
        seconds = one["seconds"]
        cells = [f"{1e3 * seconds[who]['median']:.3f}" if who in seconds else "" for who in [*own, *alternatives]]
        ratios = [f"{seconds[who]['times_ours']:.1f}" for who in alternatives]
        shape = f"{one['batch']} at {one['size']} px"
        rows.append([shape, one["preset"], PARTS[one["part"]], str(one["threads"]), *cells, *ratios])
    columns = ["images", "preset", "part", "threads"]
    columns += [f"{who}, ms an image" for who in [*own, *alternatives]]
    columns += [f"{who} / ours" for who in alternatives]
    text = [
        "One view of every image of a batch, from decoded pixels in memory to normalised floats, with the same "
        "operations at the same probabilities. kornia works on the batch, torchvision v2 image by image, the "
        "crop on uint8 tensors and the rest on floats, its fastest way. Decoding is not in it. "
        "Photos are 500 x 375 pixels; their crop is the loader's workers' work with "
        "ours. Images of 32 pixels stay whole in the device's memory, and ours cuts them there.",
        "The work is not the same to the last detail: kornia draws one order of the four colour operations for a "
        "whole batch, ours and torchvision one for every image, and kornia's crop has no antialias, which is less "
        "work.",
    ]
    if not KORNIA:
        text.append("kornia was not installed where this was measured, so it is left out.")
    if device.type != "cpu":
        text.append("Of photos only what happens on the device is timed, which is all but the crop.")
    summary = []
    for who in alternatives:
        ratios_ = [one["seconds"][who]["times_ours"] for one in timed if one["part"] == "both"]
        summary.append(
            {
                "question": f"one view of each image of a batch, {len(ratios_)} cases of size, preset and threads",
                "ours": "see below",
                "alternative": who,
                "ratio": f"{min(ratios_):.1f} to {max(ratios_):.1f}×",
            }
        )
    return {"title": "Augmentations", "text": text, "table": {"columns": columns, "rows": rows}, "summary": summary}


if __name__ == "__main__":
    main()

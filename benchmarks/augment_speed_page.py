# SPDX-License-Identifier: Apache-2.0
"""What docs/performance.md says of benchmarks/augment_speed.py, as far as it was measured."""

from __future__ import annotations

from typing import Any

from measured import plain, times

PARTS = {"crop": "crop and resize", "rest": "colour, blur, flip, normalise", "both": "all"}
OWN = ("ours", "ours, compiled")


def page(result: dict[str, Any]) -> dict[str, Any]:
    """What a reader should see."""
    timed, on_cpu, failed = result["timed"], result["device"] == "cpu", result.get("failed", {})
    whos = {who for one in timed for who in one["seconds"]}
    alternatives, own = sorted(whos - {*OWN}), sorted(whos & {*OWN})
    rows = []
    for one in timed:
        seconds = one["seconds"]
        cells = [plain(1e3 * seconds[who]["median"]) if who in seconds else "" for who in [*own, *alternatives]]
        ratios = [times(seconds[who]["times_ours"]) if who in seconds else "" for who in alternatives]
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
    if "kornia" not in {*alternatives, *failed}:
        text.append("kornia was not installed where this was measured, so it is left out.")
    if failed:
        reasons = "; ".join(f"{who} ({reason})" for who, reason in failed.items())
        text.append(f"Failed at least once, and left out there: {reasons}.")
    if not on_cpu:
        text.append("Of photos only what happens on the device is timed, which is all but the crop.")
    summary = []
    for who in alternatives:
        whole = [one for one in timed if one["part"] == "both" and who in one["seconds"]]
        if not whole:
            continue
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

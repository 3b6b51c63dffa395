# SPDX-License-Identifier: Apache-2.0
"""What docs/performance.md says of each part of benchmarks/gpu_step.py, as far as it was measured."""

from __future__ import annotations

from typing import Any

from measured import times

WHOLE = {
    "on_the_device": "whole step, images on the device",
    "from_files": "whole step, from JPEG files",
    "alone": "forward and backward alone",
}


def page(result: dict[str, Any]) -> dict[str, Any]:
    """What a reader should see of one part."""
    return changes_page(result) if "changes" in result else whole_page(result)


def setting(result: dict[str, Any]) -> str:
    """Model, views and batch in words."""
    compiled = f", compile={str(result['compile']).lower()}" if result["compile"] else ""
    return (
        f"SCE, {result['backbone']}, two crops of {result['size']} px, each of which asks and answers, batch "
        f"{result['batch_size']}, {result['precision']}{compiled}, one device"
    )


def left_out(result: dict[str, Any], names: dict[str, str]) -> list[str]:
    """A sentence on what could not be measured."""
    failed = [f"{names.get(name, name)} ({reason})" for name, reason in result["failed"].items()]
    return [f"Failed, at least once: {'; '.join(failed)}."] if failed else []


def whole_page(result: dict[str, Any]) -> dict[str, Any]:
    """The whole step beside a forward and backward of the same model."""
    medians, share, used = result["medians"], result["share_of_the_encoders_alone"], result["utilisation"]
    rows = []
    for name, title in WHOLE.items():
        if name in medians:
            found = medians[name]
            memory, waiting = found.get("peak_gpu_memory_mb"), found.get("waiting_for_images")
            rows.append([
                title, f"{found['images_per_second']:,.0f}", f"{100 * share[name]:.1f} %" if name in share else "",
                f"{100 * used[name]:.1f} %", "" if waiting is None else f"{100 * waiting:.1f} %",
                "" if memory is None else f"{memory / 1000:.1f} GB",
            ])  # fmt: skip
    of_files = medians.get("from_files", {})
    longer = ""
    if "steps" in of_files:
        longer = (
            f" From files {of_files['steps']:,.0f} steps count; the {of_files['steps_left_out']:,.0f} before them do "
            "not, as workers have made images ahead for these."
        )
    splits = result["batch_norm_splits"]
    norm = "plain batch norm" if splits == [1, 1] else f"batch norm in {splits[0]} and {splits[1]} groups"
    text = [
        f"{setting(result)}. Alone: forward and backward of the query encoder and forward of the key encoder for each "
        f"crop, {norm} as in the recipe, channels-last, on random tensors that lie on the device; no optimiser, and "
        "in place of the loss one product. The whole step adds crops, colour, blur, normalisation, loss, memory, "
        "optimiser, momentum and the log.",
        f"The files are {result['files']:,} generated JPEGs of 500 × 375 pixels, "
        f"{result['kilobytes_of_a_photograph']:.0f} kB each (ImageNet's are about as large: 110 kB), in the system's "
        f"memory once they are written; they are read and decoded on {result['machine_cores']} cores. "
        f"Contenders took turns, {len(result['rounds'])} rounds of {result['steps']} steps, another one first in each."
        f"{longer}",
        *left_out(result, WHOLE),
    ]
    return {
        "title": "The whole step beside its encoders alone, ResNet-50 at 224 px",
        "text": text,
        "table": {
            "columns": ["what", "images/s", "share of alone", "of the device's bf16 rate", "waiting", "memory"],
            "rows": rows,
        },
        "summary": [
            {
                "question": f"SCE, ResNet-50 at 224 px, {title}, images/s",
                "ours": f"{medians[name]['images_per_second']:,.0f}",
                "alternative": f"{medians['alone']['images_per_second']:,.0f} (forward and backward alone)",
                "ratio": f"{100 * share[name]:.1f} %",
            }
            for name, title in WHOLE.items()
            if name in share
        ],
    }


def changes_page(result: dict[str, Any]) -> dict[str, Any]:
    """The step in parts before and after each change."""
    found = result["changes"]
    first, last = next(iter(found.values())), list(found.values())[-1]
    names = {name: name if number == 0 else f"+ {name}" for number, name in enumerate(found)}
    labels = list(dict.fromkeys(label for one in found.values() for label in one["parts_seconds"]))
    rows = [
        [names[name], f"{one['images_per_second']:,.0f}",
         times(one["images_per_second"] / first["images_per_second"]), f"{1e3 * one['undisturbed_step_seconds']:.1f}",
         *(f"{1e3 * one['parts_seconds'][label]:.1f}" for label in labels)]
        for name, one in found.items()
    ]  # fmt: skip
    most = ", ".join(f"{row['name']} {100 * row['share']:.1f} %" for row in last["kernels"][:5])
    return {
        "title": "The step in parts before and after each change, ResNet-50 at 224 px",
        "text": [
            f"{setting({**result, 'precision': 'bf16 from the second row on', 'compile': False})}, images on the "
            "device; each row has the changes of those above it as well, in this order. Plain is fp32 (convolutions "
            "in tf32, torch's default), torch's ordinary memory format and an optimiser that takes one parameter "
            "after the other. Parts are in milliseconds; the device is waited for after each, so that together they "
            "take longer than the undisturbed step.",
            *([f"Kernels that take most of the last row: {most}."] if most else []),
            *left_out(result, {}),
        ],
        "table": {"columns": ["step", "images/s", "against plain", "ms, undisturbed", *labels], "rows": rows},
        "summary": [],
    }

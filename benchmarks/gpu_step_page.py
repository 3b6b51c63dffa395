# SPDX-License-Identifier: Apache-2.0
"""What docs/performance.md says of each part of benchmarks/gpu_step.py."""

from __future__ import annotations

from typing import Any


def page(part: str, result: dict[str, Any]) -> dict[str, Any]:
    """What a reader should see of one part."""
    setting = f"SCE, {result['backbone']}, two crops of {result['size']} px, batch {result['batch_size']}, one device"
    if part == "whole":
        medians, share = result["medians"], result["share_of_the_encoders_alone"]
        names = {
            "on_the_device": "whole step, images on the device",
            "from_files": "whole step, from JPEG files of 500 x 375",
            "alone": "encoders alone",
        }
        rows = [
            [title, f"{medians[name]['images_per_second']:,.0f}", f"{100 * share.get(name, 1.0):.1f} %",
             f"{100 * medians[name]['waiting_for_images']:.1f} %" if name in share else ""]
            for name, title in names.items()
        ]  # fmt: skip
        return {
            "title": "The whole step beside its encoders alone, ResNet-50 at 224 px",
            "text": [
                f"{setting}. The encoders alone are every pass that the pairs ask for, forward, backward and "
                "optimiser, on tensors that lie ready on the device. The whole step adds crops, colour, blur, "
                "normalisation, loss, memory, momentum and the log; from files it adds reading and decoding on "
                f"{result['machine_cores']} cores. Utilisation of the device's bf16 rate: "
                f"{100 * result['utilisation']:.1f} %."
            ],
            "table": {
                "columns": ["what", "images/s", "share of the encoders alone", "waiting for images"],
                "rows": rows,
            },
            "summary": [
                {
                    "question": f"{title}, ResNet-50 at 224 px, images/s",
                    "ours": f"{medians[name]['images_per_second']:,.0f}",
                    "alternative": f"{medians['alone']['images_per_second']:,.0f} (encoders alone)",
                    "ratio": f"{100 * share[name]:.1f} %",
                }
                for name, title in names.items()
                if name in share
            ],
        }
    if part == "profile":
        step = sum(result["parts_seconds"].values())
        rows = [
            [name, f"{1000 * seconds:.1f} ms", f"{100 * seconds / step:.1f} %"]
            for name, seconds in result["parts_seconds"].items()
        ]
        kernels = ", ".join(f"{row['name']} {100 * row['share']:.1f} %" for row in result["kernels"][:5])
        return {
            "title": "Where the time of a step goes, ResNet-50 at 224 px",
            "text": [
                f"{setting}, images on the device. The device was waited for after each part, so that together they "
                f"take {1000 * step:.1f} ms; undisturbed a step takes {1000 * result['undisturbed_step_seconds']:.1f} "
                f"ms. The five kernels that took most: {kernels}."
            ],
            "table": {"columns": ["part", "time", "share"], "rows": rows},
            "summary": [],
        }
    found = result["images_per_second"]
    first = next(iter(found.values()))
    return {
        "title": "What each change is worth, ResNet-50 at 224 px",
        "text": [f"{setting}; the encoders alone, each change on top of those above it."],
        "table": {
            "columns": ["encoders alone", "images/s", "against the first row"],
            "rows": [[name, f"{speed:,.0f}", f"{speed / first:.2f}×"] for name, speed in found.items()],
        },
        "summary": [],
    }

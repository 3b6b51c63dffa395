# SPDX-License-Identifier: Apache-2.0
"""Results as JSON files: the numbers, and all that it takes to know what they are numbers of.

One file holds one answer: protocol, complete settings, the weights' hash, the data with their fingerprints, the values,
remarks, machine, versions and time. The same question has the same file name, so asking again replaces the answer.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kinfold import __version__, distributed
from kinfold.data.sources import Source
from kinfold.encoders import feature_width
from kinfold.errors import UserError
from kinfold.evaluate.backbones import FrozenBackbone, hash_of
from kinfold.log import json_ready

FORMAT = 1


def about_backbone(backbone: FrozenBackbone) -> dict[str, Any]:
    """Say which backbone it is, and hash its weights."""
    return {
        "description": backbone.description,
        "weights_sha256": hash_of(backbone.module),
        "head_sha256": hash_of(backbone.head),
        "features": feature_width(backbone.module) if hasattr(backbone.module, "num_features") else None,
        "size": backbone.size,
        "resize": backbone.resize,
        "channels": backbone.channels,
        "mean": list(backbone.mean),
        "std": list(backbone.std),
    }


def about_source(source: Source | None) -> dict[str, Any] | None:
    """Say which images they are."""
    if source is None:
        return None
    return {"description": source.description, "images": len(source), "fingerprint": source.fingerprint}


def about_machine(device: str) -> dict[str, Any]:
    """Say what computed: processor, cores, memory of the device."""
    accelerator = torch.cuda.get_device_name(torch.device(device)) if device.startswith("cuda") else None
    return {
        "system": platform.system(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
        # Batch norm that is trained without being synchronised sees each process's images alone.
        "processes": distributed.world(),
        "accelerator": accelerator,
    }


def versions() -> dict[str, str]:
    """Say which versions of what decides numbers."""
    found = {"kinfold": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("timm", "torchvision", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = sys.modules[name].__version__ if name in sys.modules else "unknown"
    found["numpy"] = np.__version__
    return found


def file_name(result: dict[str, Any]) -> str:
    """Name a result by its question: protocol, recipe, and eight digits for settings, weights and data."""
    question = {key: result[key] for key in ("protocol", "settings", "backbone", "data")}
    digest = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:8]
    recipe = Path(str(result["recipe"])).stem or "settings"
    return f"{result['protocol']}-{recipe}-{digest}.json"


def folder_of(out: Path) -> Path:
    """The folder that results for `out`, a folder or a `.json` file, lie in."""
    return out.parent if out.suffix == ".json" else out


def check_place(out: Path) -> None:
    """Refuse, before hours are spent, a place that is taken. Raises `UserError` for a file that is no result."""
    if out.suffix != ".json":
        if out.exists() and not out.is_dir():
            raise UserError(f"out: {out} is a file. Give a folder, or a name that ends in .json.")
        return
    if out.is_dir():
        raise UserError(f"out: {out} is a folder with the name of a file. Give another.")
    if out.exists():
        try:
            mine = json.loads(out.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            mine = None
        if not isinstance(mine, dict) or not {"protocol", "values"} <= mine.keys():
            raise UserError(f"out: {out} is there already and is no result of an evaluation. Give another name.")


def write_result(result: dict[str, Any], out: Path) -> Path:
    """Write a result to `out`, a `.json` file or a folder, whole or not at all; returns the file.

    Numbers that JSON does not have (NaN, infinity) become null. Raises `UserError` where the disk refuses.
    """
    path = out if out.suffix == ".json" else out / file_name(result)
    text = json.dumps(json_ready(result), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UserError(
            f"The result could not be written to {path}: {error.strerror or error}. The numbers were: "
            f"{json.dumps(json_ready(result['values']))}. Give another out=."
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return path

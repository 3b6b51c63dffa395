# SPDX-License-Identifier: Apache-2.0
"""The trained backbone as a file that others can load: safetensors, with a model card beside it.

    backbone.safetensors   the weights, and in its header what they are: text only, nothing that runs
    backbone.md            the same for people: what it is, how to load it, what to feed it

The keys are those of `kinfold.encoders.build_backbone`, which are timm's; torchvision's ResNets have the
same. A backbone whose architecture is theirs loads there with `strict=True`, but for torchvision's classifier
`fc`, which a backbone does not have; this is tried, on the real model, before a file is written for one of
them by name.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, cast

import timm
import torch
import torchvision
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kinfold.encoders import Backbone, build_backbone, feature_width
from kinfold.errors import UserError

FORMAT = 1

Card = Mapping[str, object]
_WRITTEN = ("features", "names", "kinfold_format", "kinfold_version", "torch_version")
_TITLE = ", learned without labels"
_NEEDED = ("name", "stem", "channels", "mean", "std")


def export_backbone(
    encoder_backbone: nn.Module,
    path: Path,
    *,
    card: Card,
    names: Literal["kinfold", "timm", "torchvision"] = "kinfold",
) -> Path:
    """Write the backbone to `path` (`.safetensors`) and its card to the same name with `.md`; returns `path`.

    `card` says what it is: `name` and `stem` of `kinfold.encoders.Backbone`, `channels`, `mean` and `std` of
    the input; where known also `size` (pixels), `recipe` (its text), `data`, `results`, and whatever else is
    worth telling. Strings are stored as they are, everything else as JSON. `names` says where it is to load:
    with `"timm"` or `"torchvision"` the file is refused unless their own model takes it.

    Both files replace older ones in one move each. Raises `UserError` when the model does not load where it
    was asked to, or the disk refuses; `ValueError` when the card lacks what a reader needs.
    """
    lacking = [name for name in _NEEDED if name not in card]
    if lacking:
        raise ValueError(f"card: {', '.join(lacking)} missing; a reader needs {', '.join(_NEEDED)}.")
    if path.suffix != ".safetensors":
        raise UserError(f"A backbone is written as .safetensors; {path} ends otherwise. Change the name of the file.")
    card_file = path.with_suffix(".md")
    if card_file.exists() and not _is_card(card_file):
        raise UserError(
            f"The card would be written over {card_file}, which is no card of a backbone. Give another name than "
            f"{path.name}."
        )
    if names != "kinfold":
        _try_elsewhere(encoder_backbone, card, names)
    # Copies: safetensors refuses tensors that share memory or are not contiguous.
    state = {name: value.detach().cpu().contiguous().clone() for name, value in encoder_backbone.state_dict().items()}
    metadata = _metadata(encoder_backbone, card, names)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _put(path, lambda temporary: save_file(state, temporary, metadata=metadata))
        text = _card_text(path, metadata, sum(value.numel() for value in encoder_backbone.parameters()))
        _put(path.with_suffix(".md"), lambda temporary: temporary.write_text(text, encoding="utf-8"))
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} could not be written: {error}. Make room, or give a folder that can be written."
        ) from error
    return path


def export_file(what: Path, out: Path, *, names: str = "timm") -> Path:
    """Write the backbone of a run folder, or of its `backbone.safetensors`, anew under the names of another library.

    Returns `out`. Raises `UserError` as `export_backbone` and `rebuild_backbone` do, and for names that nobody has.
    """
    if names not in ("kinfold", "timm", "torchvision"):
        raise UserError(f"--names: {names!r} is nobody's. Use kinfold, timm or torchvision.")
    source = what / "backbone.safetensors" if what.is_dir() else what
    backbone, about = rebuild_backbone(source)
    card = {name: value for name, value in about.items() if name not in _WRITTEN}
    return export_backbone(backbone, out, card=card, names=cast(Literal["kinfold", "timm", "torchvision"], names))


def read_backbone(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights and the metadata of a file that `export_backbone` has written; no pickle is opened.

    Numbers and lists in the metadata are JSON text. Raises `UserError` when the file is missing, broken, or
    not from here, or when its format is newer than ours.
    """
    if not path.is_file():
        raise UserError(f"There is no file {path}. Give a .safetensors file that kinfold export has written.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}. Export or copy it again.") from error
    if "kinfold_format" not in metadata:
        raise UserError(
            f"{path} is safetensors, but nothing in it says which backbone it is. Give a file that kinfold export "
            f"has written, or load it as weights of a backbone that you name."
        )
    if int(metadata["kinfold_format"]) > FORMAT:
        raise UserError(
            f"{path} has export format {metadata['kinfold_format']}; this Kinfold reads up to {FORMAT}. Update Kinfold."
        )
    return state, metadata


def rebuild_backbone(path: Path) -> tuple[nn.Module, dict[str, str]]:
    """The backbone of an exported file, built anew with its weights and in evaluation mode, and the file's
    metadata.

    Raises `UserError` as `read_backbone` does, and when the weights do not fit what the metadata describe.
    """
    state, about = read_backbone(path)
    backbone = build_backbone(_settings(about), int(about["channels"]))
    try:
        backbone.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"{path} says that it is {about['name']} with the {about['stem']} stem, but its weights do not fit: {error}"
        ) from error
    return backbone.eval(), about


def _settings(about: Mapping[str, object]) -> Backbone:
    return Backbone(name=str(about["name"]), stem=about["stem"])  # type: ignore[arg-type]


def _try_elsewhere(backbone: nn.Module, card: Card, names: Literal["timm", "torchvision"]) -> None:
    """Load the weights into the other library's own model, strictly, and compare the features of one image."""
    name, channels = str(card["name"]), int(str(card["channels"]))
    if card["stem"] != "standard":
        raise UserError(
            f"{names} has no {name} with the {card['stem']} stem: its own begins with another convolution and a "
            f"max-pool, so these weights cannot load there. Export with names='kinfold' and rebuild it by "
            f"kinfold.export.rebuild_backbone (or kinfold.encoders.build_backbone with the file's metadata)."
        )
    model: nn.Module
    if names == "timm":
        if not timm.is_model(name):
            raise UserError(f"timm has no model {name!r}. Export with names='kinfold'.")
        model = timm.create_model(name, num_classes=0, in_chans=channels)
    else:
        if name not in torchvision.models.list_models():
            raise UserError(f"torchvision has no model {name!r}. Export with names='timm' or names='kinfold'.")
        if channels != 3:
            raise UserError(
                f"torchvision's {name} takes 3 channels and this one {channels}. Export with names='timm', whose "
                f"in_chans can say {channels}, or names='kinfold'."
            )
        model = torchvision.models.get_model(name, weights=None)
        for classifier in ("fc", "classifier", "head", "heads"):
            if hasattr(model, classifier):
                setattr(model, classifier, nn.Identity())
    ours = copy.deepcopy(backbone).cpu().float().eval()
    model.eval()
    try:
        model.load_state_dict(ours.state_dict())
    except RuntimeError as error:
        raise UserError(
            f"{names}'s {name} does not take these weights: {str(error).splitlines()[-1].strip()} "
            f"Export with names='kinfold'."
        ) from error
    image = torch.linspace(-2, 2, channels * 224 * 224).sin().view(1, channels, 224, 224)  # [1, C, 224, 224]
    with torch.no_grad():
        expected, found = ours(image), model(image)  # [1, F], [1, F]
    if expected.shape != found.shape or not torch.allclose(expected, found, rtol=1e-3, atol=1e-5):
        raise UserError(
            f"{names}'s {name} loads these weights but computes other features with them. Export with names='kinfold'."
        )


def _metadata(backbone: nn.Module, card: Card, names: str) -> dict[str, str]:
    """What the header of the file says: text to text, as safetensors asks."""
    try:
        ours = version("kinfold")
    except PackageNotFoundError:  # used from a checkout that was never installed
        ours = "unknown"
    about: dict[str, object] = {
        **card,
        "features": feature_width(backbone),
        "names": names,
        "kinfold_format": FORMAT,
        "kinfold_version": ours,
        "torch_version": torch.__version__,
    }
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in about.items()}


def _is_card(path: Path) -> bool:
    """Whether a file is a card that was written here, by its title."""
    try:
        with path.open(encoding="utf-8") as file:
            return file.readline().rstrip().endswith(_TITLE)
    except (OSError, UnicodeDecodeError):
        return False


def _put(path: Path, write: Callable[[Path], object]) -> None:
    """Write through a temporary file, so that `path` is the old file or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _card_text(path: Path, about: Mapping[str, str], parameters: int) -> str:
    """The model card in Markdown."""
    name, stem, channels, names = about["name"], about["stem"], about["channels"], about["names"]
    size = f", {about['size']} pixels a side in training" if "size" in about else ""
    lines = [
        f"# {name}{_TITLE}",
        "",
        f"A {name} backbone ({stem} stem, {parameters / 1e6:,.1f} M parameters) that turns an image into "
        f"{about['features']} features. It was trained by Kinfold {about['kinfold_version']} and has no classifier.",
        "",
        "## Input",
        "",
        f"`[B, {channels}, H, W]`{size}: pixels from 0 to 1, minus the mean, over the standard deviation.",
        "",
        f"- mean: {about['mean']}",
        f"- std: {about['std']}",
        "",
        "## Loading",
        "",
        "```python",
        "from pathlib import Path",
        "from kinfold.export import rebuild_backbone",
        "",
        f'backbone, about = rebuild_backbone(Path("{path.name}"))',
        "```",
        "",
        "The header of the file holds all that is needed: it is built by "
        f'`kinfold.encoders.build_backbone(Backbone(name="{name}", stem="{stem}"), channels={channels})`.',
    ]
    if stem != "standard":
        lines += [
            "",
            f"The {stem} stem is not that of timm's and torchvision's {name}: their models do not take these weights.",
        ]
    if names == "timm":
        lines += [
            "",
            "Or without Kinfold, by timm:",
            "",
            "```python",
            "import timm",
            "from safetensors.torch import load_file",
            "",
            f'backbone = timm.create_model("{name}", num_classes=0, in_chans={channels})',
            f'backbone.load_state_dict(load_file("{path.name}"))',
            "```",
        ]
    if names == "torchvision":
        lines += [
            "",
            "Or without Kinfold, by torchvision, whose classifier is the only part that the file does not fill:",
            "",
            "```python",
            "import torchvision",
            "from safetensors.torch import load_file",
            "",
            f'model = torchvision.models.get_model("{name}", weights=None)',
            f'missing, unexpected = model.load_state_dict(load_file("{path.name}"), strict=False)',
            'assert not unexpected and all(name.startswith(("fc.", "classifier.", "head")) for name in missing)',
            "```",
        ]
    told = {"name", "stem", "channels", "mean", "std", "size", "features", "names", "recipe"}
    others = {what: text for what, text in about.items() if what not in told and not what.startswith("kinfold_")}
    lines += ["", "## About", ""]
    lines += [f"- {what.replace('_', ' ')}: {text}" for what, text in others.items()]
    if "recipe" in about:
        fence = "```"
        while fence in about["recipe"]:
            fence += "`"
        lines += ["", "## Recipe", "", f"{fence}yaml", about["recipe"].rstrip(), fence]
    return "\n".join(lines) + "\n"

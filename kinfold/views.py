# SPDX-License-Identifier: Apache-2.0
"""Question 1, views: which augmented views of an image are made, and which pairs of them meet.

The pairs decide the work: exactly the views on the left of a pair go through the query encoder, exactly those on
the right through the key encoder. Numbers are those of the papers' code (moco `main_moco.py`, SCE
`configs/transform`, InvP `datasets/*.py`); which recipe uses which preset stands in the recipe.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from kinfold.errors import UserError
from kinfold.settings import settings

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]


@settings
class Augmentation:
    """One view, complete: crop and resize, then colour, grey, blur and solarise, flip, normalise, in this order.

    Raises: `ValidationError` where a range is empty or a probability lies outside [0, 1].
    """

    size: Annotated[int, Field(ge=1)]
    """side of the view in pixels"""
    scale: tuple[Positive, Positive] = (0.2, 1.0)
    """smallest and largest share of the image's area that a crop covers"""
    ratio: tuple[Positive, Positive] = (0.75, 4 / 3)
    """smallest and largest width / height of a crop"""
    flip: Probability = 0.5
    """probability of a horizontal flip"""
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """strength of brightness, contrast, saturation and hue, in torchvision's meaning; their order is random"""
    jitter_probability: Probability = 0.0
    grey: Probability = 0.0
    """probability that the view loses its colour"""
    grey_first: bool = False
    """grey before the jitter instead of after it (MoCo v1, InvP without blur)"""
    blur: Probability = 0.0
    """probability of a Gaussian blur"""
    blur_sigma: tuple[Positive, Positive] = (0.1, 2.0)
    """smallest and largest standard deviation of the blur, in pixels"""
    solarize: Probability = 0.0
    """probability that pixels at or above the threshold are inverted"""
    solarize_threshold: Probability = 0.5
    """on [0, 1]: 0.5 is 128 of 255"""

    def __post_init__(self) -> None:
        for name in ("scale", "ratio", "blur_sigma"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: the first number is the smaller one, but got [{low}, {high}]")
        if self.scale[1] > 1.0:
            raise ValueError(f"scale: a crop covers at most the whole image (1.0), but got {self.scale[1]}")
        if min(self.jitter) < 0 or self.jitter[3] > 0.5:
            raise ValueError(f"jitter: strengths are 0 or more and hue at most 0.5, but got {list(self.jitter)}")


_COLOUR = {"jitter": (0.4, 0.4, 0.4, 0.1), "jitter_probability": 0.8, "grey": 0.2}
_SCE = {"jitter": (0.4, 0.4, 0.2, 0.1), "jitter_probability": 0.8, "grey": 0.2}

PRESETS: dict[str, dict[str, Any]] = {
    # RandomResizedCrop and flip: the answering side of ReSSL and of SCE's asymmetric form.
    "weak": {},
    # main_moco.py without --aug-plus: grey first, then jitter on every image, hue 0.4.
    "moco-v1": {"grey": 0.2, "grey_first": True, "jitter": (0.4, 0.4, 0.4, 0.4), "jitter_probability": 1.0},
    # main_moco.py --aug-plus; also ReSSL's strong view and SCE's on CIFAR.
    "moco-v2": {**_COLOUR, "blur": 0.5},
    # The MoCo CIFAR-10 notebook: torchvision's default crop, no blur.
    "moco-notebook": {**_COLOUR, "scale": (0.08, 1.0)},
    # SCE on ImageNet: first global view, second global view, local views.
    "sce-alpha": {**_SCE, "blur": 1.0},
    "sce-beta": {**_SCE, "blur": 0.1, "solarize": 0.2},
    "sce-gamma": {**_SCE, "blur": 0.5, "solarize": 0.2},
    # InvP's CIFAR and SVHN view: jitter on every image, then grey; no flip, no blur (datasets/cifar.py).
    "invp-small": {"jitter": (0.4, 0.4, 0.4, 0.4), "jitter_probability": 1.0, "grey": 0.2, "flip": 0.0},
    # Written strokes: no flip and no colour, a gentler crop. Not from a paper.
    "strokes": {"scale": (0.4, 1.0), "flip": 0.0, "jitter": (0.4, 0.4, 0.0, 0.0), "jitter_probability": 0.8},
}


def expand_preset(item: Any) -> Any:
    """Replace `like: NAME` by the preset's settings, under those that the item gives itself."""
    if not isinstance(item, dict):
        return item
    own = {key: tuple(value) if isinstance(value, list) else value for key, value in item.items()}
    if "like" not in own:
        return own
    name = own.pop("like")
    if name not in PRESETS:
        raise ValueError(f"like: {name!r} is no preset; there are {', '.join(PRESETS)}")
    return {**PRESETS[name], **own}


def preset(name: str, *, size: int, **changes: Any) -> Augmentation:
    """Give the named augmentation at `size` pixels, with `changes` to single settings.

    Raises: `UserError` for a name that `PRESETS` does not have.
    """
    if name not in PRESETS:
        raise UserError(f"There is no augmentation {name!r}. There are: {', '.join(PRESETS)}.")
    return Augmentation(size=size, **{**PRESETS[name], **changes})


@settings
class Views:
    """Which views are made of every image, and which pairs (query view, key view) meet.

    `((0, 1),)` is MoCo, `((0, 1), (1, 0))` its symmetric form, more pairs are multi-crop, and `((0, None),)` has no
    key encoder (InvP).
    """

    augment: tuple[Annotated[Augmentation, BeforeValidator(expand_preset)], ...]
    """one entry a view; in YAML `{like: moco-v2, size: 32, blur: 0.0}` starts from a preset"""
    pairs: tuple[tuple[int, int | None], ...] = ((0, 1),)
    """(query view, key view), counted from 0"""
    combine: Literal["mean", "sum"] = "mean"
    """how the losses of several pairs become one: the MoCo notebook sums, SCE takes the mean"""

    def __post_init__(self) -> None:
        if not self.pairs:
            raise ValueError("pairs: at least one pair is needed, for example [[0, 1]]")
        used: set[int] = set()
        for pair in self.pairs:
            for view in pair:
                if view is None:
                    continue
                if not 0 <= view < len(self.augment):
                    raise ValueError(
                        f"pairs: [{pair[0]}, {pair[1]}] names view {view}, but augment has {len(self.augment)}"
                    )
                used.add(view)
        unused = set(range(len(self.augment))) - used
        if unused:
            raise ValueError(f"augment: view {min(unused)} stands in no pair; remove it or pair it")
        if len({right is None for _, right in self.pairs}) == 2:
            raise ValueError("pairs: either every pair has a key view or none has (null)")

    @property
    def queries(self) -> tuple[int, ...]:
        """The views that the query encoder sees, in order, each once."""
        return tuple(sorted({left for left, _ in self.pairs}))

    @property
    def keys(self) -> tuple[int, ...]:
        """The views that the key encoder sees, in order, each once; empty where there is no key encoder."""
        return tuple(sorted({right for _, right in self.pairs if right is not None}))

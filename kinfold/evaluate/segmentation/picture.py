# SPDX-License-Identifier: Apache-2.0
"""A picture of segmentations: each image, its mask, and what was predicted, in the colours of VOC."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from kinfold.data.annotated.masks import VOID

_HEIGHT, _GAP, _LINE, _SQUARE = 128, 6, 18, 11


def palette() -> NDArray[np.uint8]:
    """Give VOC's colours of the values 0 to 255, uint8 [256, 3]: bits 0, 3 and 6 are red's highest, and so on.

    The void is white here, so that it is no colour of a class. Source: VOC 2012 development kit.
    """
    numbers = np.arange(256)[:, None]  # [256, 1]
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(3):  # from the lowest three bits of a number to its highest
        colours |= ((numbers >> (3 * bit + np.arange(3)) & 1) << (7 - bit)).astype(np.uint8)
    colours[VOID] = 255
    return colours


def draw_segmentations(shown: Sequence[tuple[Tensor, Tensor, Tensor]], classes: Sequence[str], path: Path) -> Path:
    """Draw one line for each image, as a PNG file: image, truth, prediction, and which colour is which class.

    `shown` are the image uint8 [C, H, W], its truth uint8 [H, W] with `VOID`, and the predicted classes [H, W].
    """
    colours = palette()
    lines = []
    for image, truth, predicted in shown:
        pixels = image.permute(1, 2, 0).numpy()  # [H, W, C]
        pixels = pixels if pixels.shape[2] == 3 else pixels[:, :, :1].repeat(3, axis=2)
        masks = [truth.numpy(), predicted.numpy()]
        width = max(1, round(_HEIGHT * pixels.shape[1] / pixels.shape[0]))
        picture = [Image.fromarray(np.ascontiguousarray(pixels)).resize((width, _HEIGHT))]
        picture += [Image.fromarray(colours[mask]).resize((width, _HEIGHT), Image.Resampling.NEAREST) for mask in masks]
        there = [np.unique(mask) for mask in masks]
        lines.append((picture, sorted(set(np.concatenate(there).tolist()) - {VOID})))
    pitch = max(picture[0].width for picture, _ in lines) + _GAP  # images lie and stand
    across = 3 * pitch + _GAP
    sheet = Image.new("RGB", (across, len(lines) * (_HEIGHT + _LINE + _GAP) + _LINE + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=_LINE - 6)
    for column, title in enumerate(("image", "truth (white: void)", "prediction")):
        draw.text((_GAP + column * pitch, 3), title, fill="black", font=font)
    for row, (picture, there_are) in enumerate(lines):
        top = _LINE + row * (_HEIGHT + _LINE + _GAP)
        for column, each in enumerate(picture):
            sheet.paste(each, (_GAP + column * pitch, top))
        left = _GAP
        for number in there_are:
            text, below = classes[number], top + _HEIGHT + 3
            if left + _SQUARE + 4 + draw.textlength(text, font=font) > across - _GAP:
                break
            draw.rectangle(
                (left, below + 2, left + _SQUARE, below + 2 + _SQUARE), fill=tuple(colours[number]), outline="black"
            )
            draw.text((left + _SQUARE + 4, below), text, fill="black", font=font)
            left += _SQUARE + 14 + round(draw.textlength(text, font=font))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
    return path

# SPDX-License-Identifier: Apache-2.0
"""The second half of augmentation: what was drawn for each image happens to its pixels, on the device.

`photometric` does it for a whole batch, each image with its own numbers; `one_by_one` is the same in plain words,
image by image, and `kinfold.data.fused` the same for a compiler. For the same numbers all equal the functions of
`torchvision.transforms.v2.functional` on float images within 1e-4.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kinfold.data.augment import BRIGHTNESS, CONTRAST, HUE, SATURATION, Drawn, Flags, Floats
from kinfold.devices import to_device

_CACHE = 2**19  # numbers of a piece of a batch on a CPU: 2 MiB of float32; images of a quarter of it go alone
_LAST_BIT = math.sqrt(2.0 * 24.0 * math.log(2.0))  # so many sigmas away a bell has fallen to 2**-24


@torch.no_grad()
def one_by_one(images: Tensor, drawn: Drawn, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Do what `photometric` does, image by image, where it can in torchvision's words: the reference."""
    from torchvision.transforms.v2 import functional  # slow to import, and only the reference needs it

    made = []
    for i, image in enumerate(_zero_to_one(images)):
        x = image  # [C, S, S]
        colour = len(x) == 3
        if colour and drawn.grey[i] and drawn.grey_first[i]:
            x = functional.rgb_to_grayscale(x, num_output_channels=3)
        for which in drawn.order[i].tolist() if drawn.jitter[i] else ():
            factor = float(drawn.factors[i, which])
            if which == BRIGHTNESS:
                x = (factor * x).clamp(0.0, 1.0)
            elif which == CONTRAST:
                grey = functional.rgb_to_grayscale(x) if colour else x  # [1, S, S] or [C, S, S]
                x = (factor * x + (1.0 - factor) * grey.mean()).clamp(0.0, 1.0)
            elif which == SATURATION and colour:
                x = functional.adjust_saturation(x, factor)
            elif which == HUE and colour:
                x = functional.adjust_hue(x, factor)
        if colour and drawn.grey[i] and not drawn.grey_first[i]:
            x = functional.rgb_to_grayscale(x, num_output_channels=3)
        if drawn.blur[i]:
            reach, size = int(drawn.reach[i]), x.shape[2]
            bell = np.exp(-0.5 * (np.arange(-reach, reach + 1) / drawn.sigma[i]) ** 2)
            taps = torch.from_numpy(bell / bell.sum()).to(x)  # [2 * reach + 1]
            around = mirrored(size, reach, x.device)  # [S + 2 * reach]
            x = (x[:, :, around].unfold(2, 2 * reach + 1, 1) * taps).sum(3)
            x = (x[:, around].unfold(1, 2 * reach + 1, 1) * taps).sum(3)
        if drawn.solarize[i]:
            x = torch.where(x >= drawn.threshold[i], 1.0 - x, x)
        made.append(x.flip(2) if drawn.flip[i] else x)
    centre, spread = _channels(mean, images.device), _channels(std, images.device)  # [C, 1, 1]
    return (torch.stack(made) - centre) / spread  # [B, C, S, S]


@torch.no_grad()
def photometric(images: Tensor, drawn: Drawn, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Do to crops [B, C, S, S] what was drawn for them, then normalise: a new float32 tensor, same shape.

    Crops are uint8, or float on [0, 1]. In the order of `Augmentation`: colour and grey (or grey and colour), blur,
    solarise, flip, normalise. With other than 3 channels brightness and contrast act, and saturation, hue and grey are
    left out. On a CPU an image comes out the same to the bit in any batch. The reference is `one_by_one`.
    """
    centre, spread = _channels(mean, images.device), _channels(std, images.device)  # [C, 1, 1]
    numbers = math.prod(images.shape[1:])
    piece = len(images)
    if images.device.type == "cpu":
        piece = 1 if 4 * numbers > _CACHE else _CACHE // max(numbers, 1)
    plan = _Plan.of(drawn, colour=images.shape[1] == 3, piece=piece)
    images = plan.arrange(images)
    columns = send(plan.columns, images.device)  # [B, columns]
    made = torch.empty(images.shape, dtype=torch.float32, device=images.device)  # [B, C, S, S]
    for start, stop in plan.pieces:
        some = slice(start, stop)
        floats = _zero_to_one(images[some].flip(3) if plan.order is None and drawn.flip[start] else images[some])
        changed = _change(floats, plan, columns, some)  # [b, C, S, S]
        torch.sub(changed, centre, out=made[some]).div_(spread)
    if plan.order is None or (np.diff(plan.order) == 1).all():
        return made
    return _take(made, np.argsort(plan.order))  # [B, C, S, S]


_SCALE, _TO_GREY, _TO_MEAN, _SHIFT, _THRESHOLD, _TAPS = 0, 4, 8, 12, 13, 14


@dataclass(frozen=True)
class _Plan:
    """The numbers of a batch in the order in which its images are worked on, so that like stands beside like."""

    drawn: Drawn
    order: NDArray[np.int64] | None
    """[B]: which image comes first, second, ...; None where they stay where they are"""
    pieces: list[tuple[int, int]]
    """first image and the one after the last; in a piece the hue has the same turn for all"""
    columns: NDArray[np.float32]
    """[B, columns]: for each of four turns the scale, the share of the image's grey and of its mean; then the hue's
    shift in sixths of the circle, the threshold, and the blur's weights from the middle outwards"""
    hue: NDArray[np.int64]
    """[B]: the turn of the hue; 4 without"""
    far: NDArray[np.int64]
    """[B]: so many pixels on either side have a weight that counts"""

    @staticmethod
    def of(drawn: Drawn, *, colour: bool, piece: int) -> _Plan:
        scale, to_grey, to_mean = _blends(drawn, colour=colour)  # each [B, 4]
        turned = _hue_shift(drawn, colour=colour)  # [B]
        hue = np.where(turned != 0.0, np.argmax(drawn.order == HUE, axis=1), 4)  # [B]
        weights, far = taps(drawn)  # [B, reach + 1], [B]
        count = len(hue)
        columns = np.concatenate([scale, to_grey, to_mean, turned[:, None], drawn.threshold[:, None], weights], axis=1)
        columns = columns.astype(np.float32)  # [B, columns]
        if piece == 1:
            return _Plan(drawn, None, [(i, i + 1) for i in range(count)], columns, hue, far)
        kind = np.where((hue == 4) & ~drawn.jitter, 5, hue)  # [B]
        order = np.lexsort((far, drawn.blur, kind))  # [B]
        hue, kind = hue[order], kind[order]
        changes = np.flatnonzero(np.diff(kind)) + 1
        edges = [0, *changes.tolist(), count]
        runs = itertools.pairwise(edges)
        pieces = [(first, min(first + piece, stop)) for start, stop in runs for first in range(start, stop, piece)]
        return _Plan(drawn.at(order), order, pieces, columns[order], hue, far[order])

    def arrange(self, images: Tensor) -> Tensor:
        """The images in the plan's order, those that are flipped already so."""
        if self.order is None:
            return images
        flipped = np.flatnonzero(self.drawn.flip)  # [m], counted in the plan's order
        rows = self.order.copy()  # [B]
        if len(flipped):
            rows[flipped] = len(images) + np.arange(len(flipped))
            images = torch.cat([images, _take(images, self.order[flipped]).flip(3)])  # [B + m, C, S, S]
        return _take(images, rows)  # [B, C, S, S]


def _change(images: Tensor, plan: _Plan, columns: Tensor, some: slice) -> Tensor:
    """Everything but the normalisation, in place."""
    drawn = plan.drawn
    numbers = plan.columns[some]  # [b, columns]
    column = columns[some, :, None, None, None].unbind(1)  # each [b, 1, 1, 1]
    if images.shape[1] == 3:
        _where(drawn.grey[some] & drawn.grey_first[some], images, _to_grey)
    for turn in range(4):
        if turn == plan.hue[some.start]:
            _turn_hue(images, column[_SHIFT])
        else:
            _blend(images, numbers, column, turn)
    if images.shape[1] == 3:
        _where(drawn.grey[some] & ~drawn.grey_first[some], images, _to_grey)
    blurred = np.flatnonzero(drawn.blur[some])
    if len(blurred):  # they stand at the end of a piece
        first = int(blurred[0])
        _blur(images[first:], [weight[first:] for weight in column[_TAPS:]], plan.far[some][first:])
    _where(drawn.solarize[some], images, _solarize, column[_THRESHOLD])
    return images


def _blends(drawn: Drawn, *, colour: bool) -> tuple[Floats, Floats, Floats]:
    """Brightness, contrast and saturation as one operation: scale, share of the grey, share of the mean, each [B, 4].

    In each turn, what is not one of the three for an image has 1, 0, 0, which changes nothing.
    """
    factor = np.take_along_axis(drawn.factors, drawn.order, axis=1)  # [B, 4], in the order of the turns
    acts = drawn.jitter[:, None] & (drawn.order != HUE)  # [B, 4]
    if not colour:
        acts &= drawn.order != SATURATION
    rest = np.where(acts, 1.0 - factor, 0.0)  # [B, 4]
    return (
        np.where(acts, factor, 1.0),
        np.where(drawn.order == SATURATION, rest, 0.0),
        np.where(drawn.order == CONTRAST, rest, 0.0),
    )


def _hue_shift(drawn: Drawn, *, colour: bool) -> Floats:
    """How far the hue is turned, in sixths of the circle: [B], 0 where it stays."""
    return np.where(drawn.jitter & colour, 6.0 * drawn.factors[:, HUE], 0.0)


def taps(drawn: Drawn) -> tuple[Floats, NDArray[np.int64]]:
    """The blur's weights from the middle outwards, [B, greatest reach + 1], and how far they count, [B].

    A weight that is below half of the middle's last bit is 0.
    """
    distance = np.arange(int(drawn.reach.max(initial=0)) + 1)[None, :]  # [1, reach + 1]
    bell = np.exp(-0.5 * (distance / drawn.sigma[:, None]) ** 2)  # [B, reach + 1]
    bell[distance > drawn.reach[:, None]] = 0.0
    bell /= 2.0 * bell.sum(axis=1, keepdims=True) - bell[:, :1]
    far = np.minimum(drawn.reach, np.floor(_LAST_BIT * drawn.sigma).astype(np.int64))  # [B]
    bell[distance > far[:, None]] = 0.0
    return bell, far


def _channels(numbers: Sequence[float], device: torch.device) -> Tensor:
    """One number a channel, to go with images: [C, 1, 1]."""
    # Made here and sent: made there, torch would wait for the device.
    return to_device(torch.tensor(numbers, dtype=torch.float32), device)[:, None, None]


def send(numbers: NDArray[np.float32], device: torch.device) -> Tensor:
    """All of a step's numbers in one transfer that nobody waits for."""
    tensor = torch.from_numpy(numbers)
    return to_device(tensor.pin_memory() if device.type == "cuda" else tensor, device)


def _zero_to_one(images: Tensor) -> Tensor:
    """Levels or shares as float32 on [0, 1], in memory of their own: channel by channel, row by row."""
    floats = torch.empty(images.shape, dtype=torch.float32, device=images.device).copy_(images)  # [B, C, S, S]
    return floats if images.is_floating_point() else floats.div_(255.0)


def _take(images: Tensor, rows: NDArray[np.int64]) -> Tensor:
    return images.index_select(0, to_device(torch.from_numpy(rows), images.device))


def _where(mask: Flags, images: Tensor, change: Callable[..., object], *columns: Tensor) -> None:
    """Let `change` write into the images where `mask` [B] is true, without work on the others.

    It gets these images, and of `columns` [B, 1, 1, 1] what is theirs.
    """
    rows = np.flatnonzero(mask)
    if not len(rows):
        return
    first, last = int(rows[0]), int(rows[-1]) + 1
    if last - first == len(rows):
        change(images[first:last], *(column[first:last] for column in columns))
        return
    index = to_device(torch.from_numpy(rows), images.device)  # [n]
    some = images.index_select(0, index)  # [n, C, S, S]
    change(some, *(column.index_select(0, index) for column in columns))
    images.index_copy_(0, index, some)


def _to_grey(images: Tensor) -> Tensor:
    return images.copy_(_grey(images))  # [n, 3, S, S]


def _grey(images: Tensor) -> Tensor:
    """Luma of Rec. 601 with torchvision's rounding of the weights: [n, 3, S, S] -> [n, 1, S, S]."""
    red, green, blue = images[:, 0:1], images[:, 1:2], images[:, 2:3]  # each [n, 1, S, S]
    grey: Tensor = (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)  # [n, 1, S, S]
    return grey


def _blend(images: Tensor, numbers: NDArray[np.float32], column: Sequence[Tensor], turn: int) -> None:
    """One turn of brightness, contrast or saturation, whichever each image has; in place."""
    grey_acts, mean_acts = numbers[:, _TO_GREY + turn].any(), numbers[:, _TO_MEAN + turn].any()
    if not grey_acts and not mean_acts:
        if (numbers[:, _SCALE + turn] != 1.0).any():
            images.mul_(column[_SCALE + turn]).clamp_(0.0, 1.0)
        return
    base = _grey(images) if images.shape[1] == 3 else images  # [n, 1, S, S]
    if mean_acts:
        # In two steps, so that the sum's order, and with it the last bit, does not depend on how many images
        # there are.
        mean = base.mean(3, keepdim=True).mean((1, 2), keepdim=True) * column[_TO_MEAN + turn]  # [n, 1, 1, 1]
        base = base.mul_(column[_TO_GREY + turn]).add_(mean) if grey_acts else mean  # [n, 1, S, S] or [n, 1, 1, 1]
    else:
        base.mul_(column[_TO_GREY + turn])
    images.mul_(column[_SCALE + turn]).add_(base).clamp_(0.0, 1.0)


def _turn_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by `shift` sixths of the circle, without writing out HSV; in place.

    A colour lies between its smallest and largest channel. How far up each channel lies is a trapezium of the hue,
    which is counted 0 to 6 from red over green and blue; so turning the hue slides three trapezia. The way from red
    to the hue, |hue| on -3 to 3, is (2 u + | |green - blue| - u |) / chroma with u = largest - red, in every sixth.
    """
    red, green, blue = images[:, 0:1], images[:, 1:2], images[:, 2:3]  # each [n, 1, S, S]
    high = torch.maximum(red, green)  # [n, 1, S, S]
    torch.maximum(high, blue, out=high)
    low = torch.minimum(red, green)  # [n, 1, S, S]
    torch.minimum(low, blue, out=low)
    chroma = high - low  # [n, 1, S, S]
    side = green - blue  # [n, 1, S, S], above 0 from red towards green
    below = torch.sub(high, red, out=high)  # [n, 1, S, S], u
    hue = side.abs().sub_(below).abs_().add_(below, alpha=2.0)  # [n, 1, S, S]
    hue = torch.copysign(hue, side, out=hue)
    # Grey has no hue: 0 / tiny is 0, and its trapezia have no height.
    hue.div_(torch.clamp(chroma, min=torch.finfo(torch.float32).tiny, out=below)).add_(shift)
    around = torch.mul(hue, 1.0 / 6.0, out=side).floor_()
    hue.sub_(around, alpha=6.0)  # 0 to 6
    # Upright for red, which is high at both ends; upside down for the others: largest - chroma * depth.
    torch.addcmul(low, torch.sub(hue, 3.0, out=side).abs_().sub_(1.0).clamp_(0.0, 1.0), chroma, out=red)
    high = low.add_(chroma)  # [n, 1, S, S]
    torch.addcmul(high, torch.sub(hue, 2.0, out=side).abs_().sub_(1.0).clamp_(0.0, 1.0), chroma, value=-1.0, out=green)
    torch.addcmul(high, hue.sub_(4.0).abs_().sub_(1.0).clamp_(0.0, 1.0), chroma, value=-1.0, out=blue)
    return images


def _blur(images: Tensor, weights: Sequence[Tensor], far: NDArray[np.int64]) -> None:
    """Blur each image with its own weights, reach + 1 of [n, 1, 1, 1], mirrored at the edges; in place.

    `far` [n] says how far each image's weights count and does not fall. Where the window is wider than the image, the
    image is mirrored as often as it takes.
    """
    half, size = int(far[-1]), images.shape[3]
    if half == 0:
        return
    if half < size:
        around = torch.nn.functional.pad(images, (half, half, half, half), mode="reflect")
    else:
        index = mirrored(size, half, images.device)  # [S + 2 * half]
        around = images.index_select(3, index).index_select(2, index)
    # The kernel is even: the two pixels at one distance are added first, which halves the products. On a CPU faster
    # than a grouped convolution, and a sum's order does not depend on how many images there are.
    starts = np.searchsorted(far, np.arange(half + 1)).tolist()  # from this image on, a distance counts
    across = around.narrow(3, half, size) * weights[0]  # [n, C, S + 2 * half, S]
    pair = torch.empty_like(across)
    for away in range(1, half + 1):
        left, right = (around[starts[away] :].narrow(3, half + step, size) for step in (-away, away))
        both = torch.add(left, right, out=pair[starts[away] :])
        across[starts[away] :].addcmul_(both, weights[away][starts[away] :])
    pair = pair.narrow(2, 0, size)  # [n, C, S, S]
    torch.mul(across.narrow(2, half, size), weights[0], out=images)
    for away in range(1, half + 1):
        above, below = (across[starts[away] :].narrow(2, half + step, size) for step in (-away, away))
        both = torch.add(above, below, out=pair[starts[away] :])
        images[starts[away] :].addcmul_(both, weights[away][starts[away] :])


def _solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert what is at or above the threshold [n, 1, 1, 1], in place: |1 - x| there and |0 - x| below."""
    inverted = images.clone().ge_(threshold)  # [n, C, S, S], 1 where so
    return torch.sub(inverted, images, out=images).abs_()


def mirrored(size: int, half: int, device: torch.device) -> Tensor:
    """Positions of -half .. size + half - 1 after reflection at the first and the last pixel: int64."""
    positions = torch.arange(-half, size + half, device=device)  # [size + 2 * half]
    if size == 1:
        return torch.zeros_like(positions)
    period = 2 * (size - 1)
    positions = positions.remainder(period)  # [size + 2 * half]
    return torch.minimum(positions, period - positions)  # [size + 2 * half]

# SPDX-License-Identifier: Apache-2.0
"""Randomness that is addressed, not consumed: every random number is a function of where it is used.

An address is a row of whole numbers that starts with a purpose word, for example `(VIEW, seed, epoch,
image, view)`. The same address gives the same numbers, on any machine, with any version of numpy, for any
number of workers and ranks, and there is no state to save: a run resumes in the middle of an epoch by
asking for the same addresses again.

The numbers are those of a counter-based hash: the words of the address are folded one after the other into
64 bits, each time through the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom
number generators", 2014), and draw j of an address is output j of the SplitMix64 stream that starts there.
It is good enough for simulation, and not for secrets.
"""

from __future__ import annotations

from typing import overload

import numpy as np
from numpy.typing import NDArray

# Purpose words: the first word of an address, so that no two uses ever share numbers. Never renumber them:
# stored runs resume by these numbers.
ORDER = 1
"""the order of the images in an epoch: (ORDER, seed, epoch)"""
VIEW = 2
"""the parameters of one view: (VIEW, seed, epoch, image, view)"""
SHUFFLE = 3
"""the shuffle of a batch between devices or groups: (SHUFFLE, seed, step, view)"""
REPLACE = 4
"""the image that stands in for an unreadable one: (REPLACE, seed, epoch, position, trial)"""
WEIGHTS = 5
"""first weights and first memories: (WEIGHTS, seed, ...)"""
STEP = 6
"""whatever else is random in a training step: (STEP, seed, step)"""
SPLIT = 7
"""splits of a data set into parts: (SPLIT, seed, ...)"""

_WORD = 0xFFFF_FFFF_FFFF_FFFF
_GAMMA = np.uint64(0x9E37_79B9_7F4A_7C15)
_FIRST = np.uint64(0xBF58_476D_1CE4_E5B9)
_SECOND = np.uint64(0x94D0_49BB_1331_11EB)

Words = NDArray[np.uint64]
Part = int | NDArray[np.integer]


def _mix(words: Words) -> Words:
    """Scramble each 64-bit word; one-to-one, and every input bit reaches every output bit."""
    words = (words ^ (words >> np.uint64(30))) * _FIRST
    words = (words ^ (words >> np.uint64(27))) * _SECOND
    return words ^ (words >> np.uint64(31))


def _word(part: Part) -> Words:
    """Take a part of an address modulo 2**64, so that negative numbers are addresses like any other."""
    if isinstance(part, np.ndarray):
        if part.dtype.kind not in "iu":
            raise TypeError(f"an address is made of whole numbers, but got an array of {part.dtype}")
        return part.astype(np.int64).view(np.uint64) if part.dtype.kind == "i" else part.astype(np.uint64)
    return np.asarray(int(part) & _WORD, dtype=np.uint64)


def _start(address: tuple[Part, ...]) -> Words:
    """Fold an address into the 64 bits where its stream starts; parts broadcast against each other."""
    if not address:
        raise TypeError("an address has at least one word, its purpose")
    start: Words = np.asarray(0, dtype=np.uint64)
    for part in address:
        # One mix before the word and one after it: neighbouring words end far apart, and (1, 2) is not (2,
        # 1).
        start = _mix(_mix(start + _GAMMA) ^ _word(part))
    return start


def _stream(address: tuple[Part, ...], draws: int) -> Words:
    """Give the first `draws` words of each address's stream: [*address, draws]."""
    with np.errstate(over="ignore"):  # 64-bit arithmetic wraps; numpy warns of it for single numbers only
        counter = np.arange(1, draws + 1, dtype=np.uint64) * _GAMMA  # [draws]
        return _mix(np.asarray(_start(address))[..., None] + counter)  # [*address, draws]


def uniforms(*address: Part, draws: int) -> NDArray[np.float64]:
    """Draw numbers from [0, 1): `draws` of them for each address.

    Parts of the address broadcast: whole numbers alone give [draws], arrays of shape [B] give [B, draws].
    Draw j does not depend on how many are asked for.
    """
    return (_stream(address, draws) >> np.uint64(11)).astype(np.float64) * 2.0**-53  # [*address, draws]


@overload
def integers(*address: int, below: int) -> int: ...
@overload
def integers(*address: Part, below: int) -> int | NDArray[np.int64]: ...
def integers(*address: Part, below: int) -> int | NDArray[np.int64]:
    """Draw one whole number from [0, below) for each address.

    The unevenness is below / 2**53 at most, a ten-thousandth of a millionth for a million images.

    Raises: `ValueError` where `below` is not in [1, 2**40].
    """
    if not 1 <= below <= 2**40:
        raise ValueError(f"below: a whole number from 1 to 2**40, but got {below}")
    numbers = np.floor(uniforms(*address, draws=1)[..., 0] * below).astype(np.int64)  # [*address]
    return numbers if isinstance(numbers, np.ndarray) and numbers.ndim else int(numbers)


def permutation(*address: int, n: int) -> NDArray[np.int64]:
    """Shuffle 0..n-1 as the address says: int64 [n]."""
    # Sorting random words by value is an even shuffle as long as no two are equal, and the stable sort says
    # what happens when they are (for a million images once in 40 million shuffles).
    return np.argsort(_stream(address, n), kind="stable").astype(np.int64)  # [n]


def seed_of(*address: int) -> int:
    """Give one number in [0, 2**63) for a generator of someone else's, for example `torch.manual_seed`."""
    return int(_stream(address, 1)[0] >> np.uint64(1))

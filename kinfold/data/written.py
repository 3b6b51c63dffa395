# SPDX-License-Identifier: Apache-2.0
"""When the files of a source were written: what its fingerprint, which knows their names, does not see."""

from __future__ import annotations

import hashlib
import os

from kinfold.data.sources import Source

_LOOKED_AT = 64  # images that decide whether each has a file of its own


def written(source: Source) -> str:
    """Hash sizes and times of the files that the images lie in: another folder with the same names has others.

    Empty for images without files of their own (tables, arrays), whose fingerprints know what is in them. Looking at
    a million files takes some seconds.
    """
    if not any(os.path.isfile(source.name(i)) for i in range(min(len(source), _LOOKED_AT))):
        return ""
    digest = hashlib.sha256()
    for i in range(len(source)):
        try:
            state = os.stat(source.name(i))
        except OSError:  # gone, or a name that is no text: it is read in vain too
            digest.update(b"\n")
        else:
            digest.update(f"{state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def same_images(one: Source, other: Source) -> bool:
    """Whether two sources show the same images in the same order: by their names, and by when these were written."""
    return one.fingerprint == other.fingerprint and written(one) == written(other)

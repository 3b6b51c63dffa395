# SPDX-License-Identifier: Apache-2.0
"""When the files of a source were written: what its fingerprint, which knows their names, does not see."""

from __future__ import annotations

import hashlib
import os

from kinfold.data.sources import Source, Subset
from kinfold.data.tables import TableSource
from kinfold.data.tars import TarSource

_LOOKED_AT = 64  # images that decide whether each has a file of its own


def written(source: Source) -> str:
    """Hash sizes and times of the files that the images lie in: another folder with the same names has others.

    Of images in tar files, hash these; of tables that hold paths, the files there. Empty for other images without
    files of their own (tables, arrays), whose fingerprints know what is in them. Looking at a million files takes some
    seconds.
    """
    digest = hashlib.sha256()
    whole = source
    while isinstance(whole, Subset):
        whole = whole.source
    if isinstance(whole, TarSource):
        for path in whole.paths:
            digest.update(_state(path))
        return digest.hexdigest()
    if isinstance(whole, TableSource):
        if not any(whole.file(i) for i in range(min(len(whole), _LOOKED_AT))):
            return ""
        for i in range(len(whole)):
            digest.update(_state(whole.file(i) or ""))
        return digest.hexdigest()
    if not any(os.path.isfile(source.name(i)) for i in range(min(len(source), _LOOKED_AT))):
        return ""
    for i in range(len(source)):
        digest.update(_state(source.name(i)))
    return digest.hexdigest()


def _state(path: str) -> bytes:
    """Size and time of a file; nothing where it has gone or its name is no text, and so is read in vain too."""
    try:
        state = os.stat(path)
    except OSError:
        return b"\n"
    return f"{state.st_size} {state.st_mtime_ns}\n".encode()


def same_images(one: Source, other: Source) -> bool:
    """Whether two sources show the same images in the same order: by their names, and by when these were written."""
    return one.fingerprint == other.fingerprint and written(one) == written(other)

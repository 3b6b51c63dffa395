# SPDX-License-Identifier: Apache-2.0
"""How long does it take to know what is in a folder, the first and the second time?

    python benchmarks/listing.py --files 1000000

Makes a nested folder of empty `.jpg` files (a thousand a directory) in a temporary place, opens it twice with an index
cache of its own, then adds one file and opens it again. Writes `benchmarks/results/listing-FILES.json`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from measured import write

from kinfold.data.sources import open_source


def make(folder: Path, files: int) -> None:
    """Make `files` empty images in directories of a thousand."""
    for number in range(0, files, 1000):
        inner = folder / f"{number // 100_000:02d}" / f"{number // 1000:05d}"
        inner.mkdir(parents=True)
        for name in range(number, min(number + 1000, files)):
            (inner / f"image-{name:08d}.jpg").touch()


def timed(folder: Path, cache: Path) -> tuple[float, int]:
    """Seconds to open the folder, and the images found."""
    began = time.perf_counter()
    source = open_source(str(folder), cache=cache)
    source.name(len(source) - 1)
    return time.perf_counter() - began, len(source)


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--files", type=int, default=100_000)
    asked = words.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, cache = Path(place, "images"), Path(place, "cache")
        make(folder, asked.files)
        time.sleep(3)  # a directory changed within the last seconds is not trusted
        first, found = timed(folder, cache)
        second, again = timed(folder, cache)
        next(folder.rglob("image-*.jpg")).with_name("one-more.jpg").touch()
        time.sleep(3)
        changed, more = timed(folder, cache)
    assert found == again == asked.files
    assert more == asked.files + 1
    result = {
        "question": "seconds to open a folder of images",
        "files": asked.files,
        "seconds_first": round(first, 3),
        "seconds_second": round(second, 3),
        "seconds_after_one_file_was_added": round(changed, 3),
    }
    print(result)
    print(write(f"listing-{asked.files}", result))


if __name__ == "__main__":
    main()

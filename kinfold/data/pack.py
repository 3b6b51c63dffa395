# SPDX-License-Identifier: Apache-2.0
"""One-time repack of a set: short sides shrunk, images encoded anew, in a few large files that others read too.

    OUT/train-00000-of-00012.parquet     the images and labels of one split, in the source's order
    OUT/pack.json                        what was packed, how, and what was left out
    OUT/.packing-train/                  while it runs: shards that are whole, and how far it is

A shard is written under another name and gets its own when all of its split are there; a run that was stopped goes on
behind its last whole shard. Images are worked on by processes, and a few hundred at most are held at a time.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kinfold import __version__
from kinfold.data.repack import Encoded, Repacking
from kinfold.data.shards import FORMATS, Shard
from kinfold.data.sources import Source, open_source
from kinfold.data.work import in_order, no_readable_image, run
from kinfold.data.written import written
from kinfold.devices import choose_workers
from kinfold.errors import UserError
from kinfold.run_folder import held
from kinfold.settings import settings

RECORD = "pack.json"
_AT_ONCE = 16  # images of a task


@settings
class Packing:
    """How a set is packed."""

    split: str = "train"
    """which split; "all" makes one of all"""
    short_side: int = 512
    """pixels that the short side has at most"""
    quality: int = 90
    """of JPEG, 1 to 95"""
    png: bool = False
    """write PNG, which loses nothing, in place of JPEG"""
    format: str = "parquet"
    """parquet or webdataset"""
    shard_mb: int = 256
    """MB of images in a file"""

    def check(self) -> None:
        """Raise `UserError` for a number that cannot be."""
        for name, value, least, most in (
            ("short-side", self.short_side, 1, 65_000),
            ("quality", self.quality, 1, 95),
            ("shard-mb", self.shard_mb, 1, 1_000_000),
        ):
            if not least <= value <= most:
                raise UserError(f"--{name} is {value}; it has to be {least} to {most:,}.")
        if self.format not in FORMATS:
            raise UserError(f"--format is {self.format!r}; it has to be {' or '.join(FORMATS)}.")

    @property
    def name(self) -> str:
        """What the files of this split are called: one of all splits is to be opened without naming it."""
        return "train" if self.split == "all" else self.split


@dataclass(kw_only=True)
class Packed:
    """What was made of one split, so far or in the end; kept as JSON."""

    source: str
    fingerprint: str
    written: str
    """what the files of the source were when it was packed; empty for tables and tar files"""
    settings: dict[str, Any]
    classes: list[str] | None
    done: int = 0
    """images of the source that were gone through"""
    images: int = 0
    untouched: int = 0
    """images that were small enough and upright, whose bytes are the source's"""
    bytes_before: int = 0
    bytes_after: int = 0
    shards: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """images that do not decode: name and reason"""

    def same_task(self, other: Packed) -> bool:
        """Whether both are of the same images and settings."""
        facts = ("fingerprint", "written", "settings", "classes")
        return all(getattr(self, fact) == getattr(other, fact) for fact in facts)


def pack(
    data: str | Source,
    out: str | Path,
    packing: Packing | None = None,
    *,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Packed:
    """Write the images of `data` (what `open_source` takes, or gives) into shards in the folder `out`.

    The same call goes on where one was stopped, and does nothing where one was finished. `progress(count)` is called
    as images are gone through.

    Raises: `UserError` where `out` holds something else, another process packs into it, no image decodes, or the disk
    refuses.
    """
    packing = packing or Packing()
    packing.check()
    out = Path(out).expanduser()
    source = open_source(data, split=packing.split) if isinstance(data, str) else data
    _check(source, out, packing)
    new = Packed(
        source=source.description,
        fingerprint=source.fingerprint,
        written=written(source),
        settings=asdict(packing),
        classes=None if source.classes is None else list(source.classes),
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"{out} is a file: give a folder for the shards.") from None
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}. Give another folder.") from error
    with held(out, patience=1.0, option="OUT"):
        record = _records(out, packing, new)
        if packing.name in record:
            return _still_there(record[packing.name], out)
        draft = out / f".packing-{packing.name}"
        packed = _begun(draft, new)
        try:
            _write_shards(source, packing, packed, draft, choose_workers(workers), progress)
            _publish(out, draft, packing, packed)
        except OSError as error:
            raise UserError(
                f"{out} could not be written: {error.strerror or error}. Make room; the same command then goes on "
                f"behind the first {packed.done:,} of {len(source):,} images."
            ) from error
    return packed


def _still_there(packed: Packed, out: Path) -> Packed:
    """What was packed before, if its files have stayed."""
    if missing := [name for name in packed.shards if not (out / name).is_file()]:
        raise UserError(
            f"{out / RECORD} says that {missing[0]} was packed, but it is gone ({len(missing)} of "
            f"{len(packed.shards)} files are). Bring it back, or remove {out} and pack again."
        )
    return packed


def _check(source: Source, out: Path, packing: Packing) -> None:
    """Refuse a place whose files would be taken for images to pack, and labels that the format cannot hold."""
    root = getattr(source, "root", None)
    if root is not None and Path(root).resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(f"{out} lies in {root}, which is packed: give a folder outside of it.")
    if packing.format == "webdataset" and source.labels is not None and (source.labels < 0).any():
        raise UserError(
            f"{int((source.labels < 0).sum()):,} images of {source.description} have no label, which is told apart in "
            "Parquet only: leave --format out."
        )


def _records(out: Path, packing: Packing, new: Packed) -> dict[str, Packed]:
    """The splits that were packed into the folder. Raises `UserError` where it holds anything else."""
    there = sorted(os.listdir(out))
    if RECORD not in there:
        if strange := [name for name in there if not name.startswith(".packing-")]:
            # A run that was stopped while its shards got their names goes on.
            begun = _read(out / f".packing-{packing.name}" / RECORD)
            if begun is None or not all(name.startswith(f"{packing.name}-") for name in strange):
                raise UserError(f"{out} is not empty (it holds {', '.join(strange[:3])}): give a new folder.")
        return {}
    try:
        content = json.loads((out / RECORD).read_text(encoding="utf-8"))
        record = {name: Packed(**values) for name, values in content["splits"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{out / RECORD} cannot be read ({error}): give a new folder.") from error
    for name, packed in record.items():
        if name == packing.name and not packed.same_task(new):
            raise UserError(
                f"{out} holds the split {name!r} of other images or with other settings ({packed.source}; "
                f"{_in_words(packed.settings)}; now {_in_words(new.settings)}): give a new folder, or remove this one."
            )
        if packed.classes != new.classes or packed.settings["format"] != new.settings["format"]:
            raise UserError(
                f"{out} holds the split {name!r} of a set with other classes or in another format: give a new folder."
            )
    return record


def _in_words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _begun(draft: Path, new: Packed) -> Packed:
    """How far a run was that was stopped; a draft of other images or settings is thrown away."""
    begun = _read(draft / RECORD)
    if begun is not None and begun.same_task(new):
        return begun
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{draft.parent} cannot be written: {error.strerror}. Give another folder.") from error
    return new


def _read(path: Path) -> Packed | None:
    try:
        return Packed(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _save(path: Path, content: dict[str, Any]) -> None:
    """Write JSON in one step."""
    draft = path.with_name(f"{path.name}.part")
    with draft.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def _write_shards(
    source: Source,
    packing: Packing,
    packed: Packed,
    draft: Path,
    workers: int,
    progress: Callable[[int], None] | None,
) -> None:
    """Write the rest of the shards; `packed` is saved with each, so it never names half a one."""
    ending, make = FORMATS[packing.format]
    labels = source.labels
    total, digits = len(source), max(8, len(str(len(source))))
    tasks = in_order(total, _AT_ONCE, start=packed.done)
    work = Repacking(source, packing.short_side, packing.quality, packing.png)
    part = draft / f"shard.{ending}.part"
    shard: Shard | None = None
    held: list[Encoded] = []
    bad: dict[int, str] = {}
    if progress is not None:
        progress(packed.done)

    def close(shard: Shard, done: int) -> None:
        shard.close()
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, draft / f"{len(packed.shards):05d}.{ending}")
        packed.shards.append(f"{len(packed.shards):05d}.{ending}")
        packed.images += shard.rows
        packed.bytes_after += shard.size
        packed.untouched += sum(image.untouched for image in held)
        packed.bytes_before += sum(image.before for image in held)
        packed.left_out.update((source.name(i), reason) for i, reason in bad.items() if i < done)
        packed.done = done
        held.clear()
        _save(draft / RECORD, asdict(packed))

    for part_done, task in zip(run(work, tasks, workers=workers), tasks):
        bad.update(part_done.bad)
        for image in part_done.images:
            if shard is None:
                shard = make(part, labelled=labels is not None, classes=source.classes)
            label = None if labels is None or labels[image.position] < 0 else int(labels[image.position])
            shard.add(f"{image.position:0{digits}d}.{image.kind}", image.raw, label)
            held.append(image._replace(raw=b""))
            if shard.size >= packing.shard_mb * 1e6:
                close(shard, image.position + 1)
                shard = None
        if progress is not None:
            progress(len(task.positions))
    if shard is not None:
        close(shard, total)
    if not packed.images:
        raise UserError(no_readable_image(source, bad))
    packed.left_out.update((source.name(i), reason) for i, reason in bad.items())
    packed.done = total
    _save(draft / RECORD, asdict(packed))


def _publish(out: Path, draft: Path, packing: Packing, packed: Packed) -> None:
    """Give the shards their names, and say last that they are there."""
    count = len(packed.shards)
    names = [f"{packing.name}-{n:05d}-of-{count:05d}.{FORMATS[packing.format][0]}" for n in range(count)]
    for shard, name in zip(packed.shards, names):
        if (draft / shard).exists():  # else an earlier run has come so far
            os.replace(draft / shard, out / name)
    packed.shards = names
    try:
        splits = json.loads((out / RECORD).read_text(encoding="utf-8"))["splits"]
    except FileNotFoundError:
        splits = {}
    splits[packing.name] = asdict(packed)
    _save(out / RECORD, {"kinfold": __version__, "classes": packed.classes, "splits": splits})
    shutil.rmtree(draft, ignore_errors=True)

# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: one dict a file, written whole or not at all, and known to be whole when read.

    checkpoints/step-00001234.pt          {"format": 1, "step": 1234, "state": {...}}, written by `torch.save`
    checkpoints/step-00001234.pt.sha256   what its bytes must hash to, in the form `sha256sum -c` reads

The order of the writing is the promise. The state goes to a temporary file in the same folder and is hashed
on the way; the file reaches the disk (fsync); the hash is put beside it; the file is renamed, and the rename
reaches the disk. A hash is thus never missing for a file that stands: a process killed anywhere in between
leaves a temporary file, or a hash without its file, both of which the next save removes, and the older
checkpoints are untouched. They are deleted only when the new one is complete. A zip archive that was cut
short or lost a bit often still opens; the hash says so without guessing.

Files are read with `weights_only=True`: they hold tensors and plain values, never code.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import shutil
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import torch
from torch import Tensor

from kinfold.errors import UserError

FORMAT = 1
FOLDER = "checkpoints"

_NAME = re.compile(r"step-(\d{8,})\.pt")
_PLAIN = (Tensor, str, bytes, bool, int, float, type(None), torch.dtype, torch.device, torch.Size)


class Loaded(NamedTuple):
    """The newest whole checkpoint, and what had to be passed over to reach it."""

    state: dict[str, Any]
    path: Path
    step: int
    skipped: list[str]  # one line per broken file: its name and what is wrong with it


def save(folder: Path, state: dict[str, Any], *, step: int, keep: int = 2) -> Path:
    """Write `state` as the checkpoint of `step` in the run folder `folder` and return its path.

    Of the checkpoints up to `step` the newest `keep` stay. Those of later steps are left alone: they can only
    be broken ones that a resume has passed over, and the run writes over them when it gets there.

    Raises `UserError` when the disk refuses (full, quota, read-only): nothing half-written stays, and the
    older checkpoints stand. Raises `TypeError`, before anything is written, when `state` holds something that
    could not be read back without running code.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"step {step} and keep {keep}: a step is 0 or more, and at least one checkpoint is kept.")
    _refuse_code(state, "state")
    folder = folder / FOLDER
    path = folder / f"step-{step:08d}.pt"
    file: _Hashing | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        file = _Hashing(path.with_name(path.name + ".tmp"))
        with file:
            torch.save({"format": FORMAT, "step": step, "state": state}, cast(IO[bytes], file))
        _put_hash(path, file.digest)
        os.replace(file.path, path)
        _sync(folder)
    except OSError as error:
        if file is not None:
            file.path.unlink(missing_ok=True)  # before the free space is measured
        raise UserError(_no_room(folder, step, file, error)) from error
    finally:
        if file is not None:
            file.path.unlink(missing_ok=True)
    for old in [old for old in _standing(folder) if _step(old) <= step][keep:]:
        old.unlink(missing_ok=True)
        _hash_of(old).unlink(missing_ok=True)  # after its file: a file without its hash would count as broken
    return path


def load_latest(folder: Path) -> Loaded | None:
    """Read the newest whole checkpoint of the run folder `folder`, onto the CPU; None when there is none at
    all.

    Broken files are passed over and named in `skipped`, for the caller to tell. Raises `UserError` when there
    are checkpoints and none can be read, or when the newest was written by a newer Kinfold.
    """
    files = standing(folder)
    skipped: list[str] = []
    for path in files:
        try:
            _check(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
            found = content["format"]
        except MemoryError:
            raise
        except Exception as error:  # torch.load raises many kinds; each means that this file is of no use
            skipped.append(f"{path.name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
            continue
        if found > FORMAT:
            raise UserError(
                f"{path} has checkpoint format {found}; this Kinfold reads up to {FORMAT}. "
                f"Update Kinfold, or resume with the version that wrote the run."
            )
        return Loaded(content["state"], path, content["step"], skipped)
    if not files:
        return None
    raise UserError(
        f"No checkpoint in {folder / FOLDER} can be read:\n  "
        + "\n  ".join(skipped)
        + "\nRestore one from a copy, or start again in another folder."
    )


def standing(folder: Path) -> list[Path]:
    """The checkpoint files of the run folder `folder`, the newest step first, whole or not."""
    return _standing(folder / FOLDER)


class _Hashing(io.RawIOBase):
    """A file that hashes what passes through, and that keeps counting after the disk has refused.

    The error is kept and raised at the end rather than inside `torch.save`, whose archive writer would bury
    it; so the message can say how large the whole checkpoint is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._hash = hashlib.sha256()
        self._refusal: OSError | None = None
        self._file = path.open("wb", buffering=1 << 20)

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.size += size
        if self._refusal is None:
            self._hash.update(data)
            try:
                self._file.write(data)
            except OSError as error:
                self._refusal = error
        return size

    def __exit__(self, *exception: object) -> None:
        """Bring the file to the disk and close it; raises the `OSError` that any write has met."""
        if self.closed:
            return
        try:
            if self._refusal is None and exception[0] is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        except OSError as error:
            self._refusal = error
        finally:
            try:
                self._file.close()  # flushes again what could not be written, and fails again
            except OSError as error:
                self._refusal = self._refusal or error
            self.close()
        if self._refusal is not None:
            raise self._refusal


def _refuse_code(value: object, where: str) -> None:
    """Raise `TypeError` unless `value` is tensors and plain values all the way down."""
    if isinstance(value, dict):
        for name, item in value.items():
            _refuse_code(name, f"a key of {where}")
            _refuse_code(item, f"{where}[{name!r}]")
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):  # type: ignore[arg-type, var-annotated]
            _refuse_code(item, f"{where}[{i}]")
    elif not (isinstance(value, Tensor) or type(value) in _PLAIN):
        raise TypeError(
            f"{where} is a {type(value).__module__}.{type(value).__qualname__}; a checkpoint holds tensors, "
            f"numbers, strings, lists, tuples and dicts. Convert it before saving."
        )


def _standing(folder: Path) -> list[Path]:
    """The checkpoint files of `folder`, the newest step first, whole or not."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=_step, reverse=True)


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _hash_of(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _put_hash(path: Path, digest: str) -> None:
    """Put `digest` beside `path`, which is about to be renamed into place.

    When a file of the same step stands already, its own hash stays in the list until the rename: whichever of
    the two files a killed process leaves is then still known to be whole.
    """
    lines = [f"{digest}  {path.name}\n"]
    if path.exists() and _hash_of(path).exists():
        lines += [line for line in _hash_of(path).read_text().splitlines(keepends=True) if line not in lines]
    temporary = path.with_name(path.name + ".sha256.tmp")
    try:
        with temporary.open("w", encoding="ascii") as file:
            file.writelines(lines[:2])
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, _hash_of(path))
    finally:
        temporary.unlink(missing_ok=True)


def _check(path: Path) -> None:
    """Raise `ValueError` that says what is wrong unless the bytes of `path` are those that were written."""
    if not _hash_of(path).exists():
        raise ValueError(f"{_hash_of(path).name} is missing, so nothing says whether the file is whole")
    known = {line.split()[0] for line in _hash_of(path).read_text().splitlines() if line.strip()}
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest not in known:
        size = path.stat().st_size
        raise ValueError(f"truncated or damaged, its {size:,} bytes do not have the hash they were written with")


def _remove_leftovers(folder: Path) -> None:
    """Remove what a killed run has left: temporary files, and hashes whose file never came."""
    for path in folder.glob("step-*"):
        orphan = path.name.endswith(".pt.sha256") and not path.with_name(path.name.removesuffix(".sha256")).exists()
        if orphan or path.name.endswith((".pt.tmp", ".sha256.tmp")):
            path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Bring the names in `folder` to the disk where the system can: POSIX, not every network file system."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _no_room(folder: Path, step: int, file: _Hashing | None, error: OSError) -> str:
    """What to tell when the disk has refused the checkpoint of `step`."""
    size = f" It takes {file.size / 1e6:,.1f} MB" if file is not None else ""
    try:
        free = f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB free"
    except OSError:
        free = "unknown free space"
    older = [path for path in _standing(folder) if _step(path) != step]
    stands = f"The checkpoint of step {_step(older[0]):,} stands" if older else "There is no earlier checkpoint"
    return (
        f"The checkpoint of step {step:,} could not be written to {folder}: {error.strerror or error}.{size}"
        f"{'; the disk has' if size else ' The disk has'} {free}. {stands}; "
        f"make room (or lift the limit) there and run the same command again to go on from it."
    )

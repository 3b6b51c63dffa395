# SPDX-License-Identifier: Apache-2.0
"""Sets that live on the device: the workers' crops to the bit, decoded once, and a cache that is never trusted."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hostile import bytes_of, photos
from PIL import Image

from kinfold import distributed
from kinfold.data import decoded_set, equal_images, resident
from kinfold.data.decoded_set import DecodedSet
from kinfold.data.free_memory import free_memory
from kinfold.data.resident import Asked, open_resident
from kinfold.data.sources import Digits, Source, Subset, open_source
from kinfold.errors import UserError

CPU = torch.device("cpu")
MACHINE = "kinfold.data.free_memory._machine_memory"


# The cache.


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Thirty pictures, the third unreadable, in a set that is large enough to be kept."""
    monkeypatch.setattr(resident, "KEPT_FROM", 1)
    place = photos(tmp_path / "photos", 30)
    (place / "002.png").write_bytes(b"broken")
    return place


def asked(source: Source, cache: Path, said: list[str] | None = None, **words: Any) -> Asked:
    given = {"channels": 3, "device": CPU, "wanted": None, "say": [].append if said is None else said.append}
    return Asked(source=source, cache=cache, **{**given, **words})


def opened(data: Path, cache: Path, said: list[str] | None = None, **words: Any) -> DecodedSet:
    found = open_resident(asked(open_source(str(data)), cache, said, **words))
    assert found is not None
    return found


def refuse(*words: object, **named: object) -> None:
    raise AssertionError("decoded again")


def test_a_set_is_decoded_once_and_found_again_with_its_unreadable_images(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    first = opened(folder, tmp_path / "cache", progress=told.append)
    assert sum(told) == 30
    assert first.images.shape == (30, 3, 20, 23)
    assert np.array_equal(first.images[7].permute(1, 2, 0).numpy(), np.asarray(Image.open(folder / "007.png")))
    assert list(first.bad) == [2]
    assert not first.images[2].any()
    (place,) = (tmp_path / "cache" / "pixels").iterdir()
    assert sorted(bytes_of(place)) == ["about.json", "pixels.npy"]
    assert np.array_equal(np.load(place / "pixels.npy"), first.images.numpy())
    monkeypatch.setattr(resident, "_decoded", refuse)
    second = opened(folder, tmp_path / "cache")
    assert torch.equal(second.images, first.images)
    assert second.bad == first.bad


def test_an_image_that_was_written_again_is_decoded_again(folder: Path, tmp_path: Path) -> None:
    before = opened(folder, tmp_path / "cache")
    Image.new("RGB", (23, 20), "red").save(folder / "009.png")
    after = opened(folder, tmp_path / "cache")
    assert after.images[9, 0].eq(255).all()
    assert torch.equal(after.images[10:], before.images[10:])
    assert opened(folder, tmp_path / "cache", channels=1).images.shape == (30, 1, 20, 23)


def test_an_image_that_could_not_be_read_for_a_while_is_not_lost_to_later_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(folder))

    def fail(position: int) -> bytes:
        if position == 5:
            raise PermissionError(errno.EACCES, "Permission denied")
        return type(source).read(source, position)

    monkeypatch.setattr(source, "read", fail)
    first = open_resident(asked(source, tmp_path / "cache"))
    assert first is not None
    assert list(first.bad) == [2, 5]
    second = opened(folder, tmp_path / "cache")
    assert list(second.bad) == [2]
    assert second.images[5].any()


def test_a_table_of_paths_has_other_pixels_when_the_files_there_are_written_again(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20), "blue").save(tmp_path / "a.png")
    paths = pa.array([{"bytes": None, "path": "a.png"}], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({"image": paths}), tmp_path / "table.parquet")
    source = open_source(str(tmp_path / "table.parquet"), cache=tmp_path / "cache")
    before = decoded_set.key_of(source, (1, 3, 20, 20))
    assert decoded_set.key_of(source, (1, 3, 20, 20)) == before
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    assert decoded_set.key_of(source, (1, 3, 20, 20)) != before


def test_a_tar_that_was_written_again_with_the_same_places_is_decoded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "KEPT_FROM", 1)

    def write(shade: int, when: int) -> None:
        with tarfile.open(tmp_path / "one.tar", "w") as tar:
            for number in range(3):
                member = tarfile.TarInfo(f"{number}.npy")
                content = io.BytesIO()
                np.save(content, np.full((4, 4, 3), shade, np.uint8))
                member.size = len(content.getvalue())
                tar.addfile(member, io.BytesIO(content.getvalue()))
        os.utime(tmp_path / "one.tar", (when, when))

    for shade, when in ((10, 1000), (200, 2000)):
        write(shade, when)
        assert opened(tmp_path / "one.tar", tmp_path / "cache").images.eq(shade).all()


def shorten(place: Path) -> None:
    content = (place / "pixels.npy").read_bytes()
    (place / "pixels.npy").write_bytes(content[:-5])


def change(place: Path) -> None:
    content = bytearray((place / "pixels.npy").read_bytes())
    content[-500] ^= 1
    (place / "pixels.npy").write_bytes(content)


def foreign(place: Path) -> None:
    np.save(place / "pixels.npy", np.zeros((30, 3, 20, 23), np.float32))


def objects(place: Path) -> None:
    np.save(place / "pixels.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)


def no_json(place: Path) -> None:
    (place / "about.json").write_text("[")


def other_json(place: Path) -> None:
    (place / "about.json").write_text(json.dumps({"crc32": "x", "bad": []}))


@pytest.mark.parametrize("harm", [shorten, change, foreign, objects, no_json, other_json])
def test_a_damaged_or_foreign_file_is_made_anew_with_one_remark(harm: Any, folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    first = opened(folder, tmp_path / "cache", said)
    assert said == []
    kept = first.images.clone()
    (place,) = (tmp_path / "cache" / "pixels").iterdir()
    harm(place)
    assert torch.equal(opened(folder, tmp_path / "cache", said).images, kept)
    assert len(said) == 1
    assert "damaged" in said[0]
    assert torch.equal(opened(folder, tmp_path / "cache", said).images, kept)
    assert len(said) == 1


def test_a_disk_that_refuses_costs_one_remark_and_no_image(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, array: np.ndarray) -> None:
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    said: list[str] = []
    monkeypatch.setattr(decoded_set, "_write", full)
    assert len(opened(folder, tmp_path / "cache", said).images) == 30
    assert len(said) == 1
    assert "No space left on device. This run goes on" in said[0]
    assert list((tmp_path / "cache" / "pixels").iterdir()) == []
    (tmp_path / "file").write_text("")
    said.clear()
    assert len(opened(folder, tmp_path / "file", said).images) == 30
    assert len(said) == 1


def test_a_disk_that_is_too_small_is_not_filled_first(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    monkeypatch.setattr(decoded_set, "_write", refuse)
    opened(folder, tmp_path / "cache", said)
    assert len(said) == 1
    assert "the disk has 0.0 GB left" in said[0]


def test_the_longest_unused_set_goes_when_the_bound_is_reached(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 30 * 3 * 20 * 23
    monkeypatch.setenv("KINFOLD_PIXELS_GB", str(2.5 * size / 1e9))
    kept = tmp_path / "cache" / "pixels"
    sets = [folder, photos(tmp_path / "b", 30, seed=1), photos(tmp_path / "c", 30, seed=2)]
    names = []
    for number, data in enumerate(sets[:2]):
        opened(data, tmp_path / "cache")
        (name,) = {path.name for path in kept.iterdir()} - set(names)
        names.append(name)
        os.utime(kept / name / "about.json", (number, number))
    opened(sets[0], tmp_path / "cache")  # used now, so the other is the oldest
    opened(sets[2], tmp_path / "cache")
    assert names[0] in {path.name for path in kept.iterdir()}
    assert names[1] not in {path.name for path in kept.iterdir()}
    monkeypatch.setenv("KINFOLD_PIXELS_GB", "0")
    opened(folder, tmp_path / "none")
    assert not (tmp_path / "none" / "pixels").exists()
    monkeypatch.setenv("KINFOLD_PIXELS_GB", "much")
    with pytest.raises(UserError, match="KINFOLD_PIXELS_GB is 'much'"):
        opened(folder, tmp_path / "none")


def three_kept(folder: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """Keep a set of 30, one of 10 and one of 20 pictures, the first unused for longest: folder and names."""
    kept, names = tmp_path / "cache" / "pixels", list[str]()
    for number, data in enumerate((folder, photos(tmp_path / "b", 10, seed=1), photos(tmp_path / "c", 20, seed=2))):
        opened(data, tmp_path / "cache")
        (name,) = {path.name for path in kept.iterdir()} - set(names)
        names.append(name)
        os.utime(kept / name / "about.json", (number, number))
    return kept, names


@pytest.mark.parametrize("shown", [True, False])
def test_a_full_disk_gives_up_the_longest_unused_sets_before_it_refuses(
    shown: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, names = three_kept(folder, tmp_path)
    disk = {"size": (25 + 10 + 30) * 3 * 20 * 23}  # room for five pictures beside those that are there

    def taken() -> int:
        return sum(file.stat().st_size for file in kept.rglob("*.npy"))

    original = decoded_set._write

    def write(path: Path, array: np.ndarray) -> None:
        if taken() + array.nbytes > disk["size"]:
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path, array)

    free = (lambda: disk["size"] - taken()) if shown else (lambda: 10**12)  # a person's share of a disk does not show
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": free()}))
    monkeypatch.setattr(decoded_set, "_write", write)
    said: list[str] = []
    opened(photos(tmp_path / "d", 30, seed=3), tmp_path / "cache", said)
    assert said == []
    left = {path.name for path in kept.iterdir()}
    assert len(left) == 3
    assert names[0] not in left
    assert {names[1], names[2]} < left
    disk["size"] = taken()
    before = bytes_of(kept)
    opened(photos(tmp_path / "e", 70, seed=4), tmp_path / "cache", said)  # more than all together: none goes for it
    assert len(said) == 1
    assert "This run goes on" in said[0]
    assert bytes_of(kept) == before


def test_a_set_larger_than_the_whole_share_is_refused_and_costs_no_other(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, _ = three_kept(folder, tmp_path)
    before = bytes_of(kept)
    monkeypatch.setenv("KINFOLD_PIXELS_GB", str(65 * 3 * 20 * 23 / 1e9))
    monkeypatch.setattr(decoded_set, "_write", refuse)
    said: list[str] = []
    opened(photos(tmp_path / "d", 70, seed=3), tmp_path / "cache", said)
    assert len(said) == 1
    assert "KINFOLD_PIXELS_GB allows" in said[0]
    assert bytes_of(kept) == before


def test_a_set_that_is_given_up_stays_readable_where_it_is_in_use(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(folder, tmp_path / "cache")
    (name,) = os.listdir(tmp_path / "cache" / "pixels")
    used = opened(folder, tmp_path / "cache").images  # mapped
    before = used.clone()
    monkeypatch.setenv("KINFOLD_PIXELS_GB", str(31 * 3 * 20 * 23 / 1e9))
    opened(photos(tmp_path / "b", 30, seed=1), tmp_path / "cache")
    assert name not in os.listdir(tmp_path / "cache" / "pixels")
    assert torch.equal(used, before)


def test_a_set_that_cannot_be_given_up_stays_whole(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, names = three_kept(folder, tmp_path)
    original = Path.rename

    def rename(self: Path, target: Path) -> Path:  # as Windows does for what is mapped
        if self.name == names[0]:
            raise PermissionError(errno.EACCES, "Permission denied")
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    before = bytes_of(kept / names[0])
    monkeypatch.setenv("KINFOLD_PIXELS_GB", str(61 * 3 * 20 * 23 / 1e9))
    opened(photos(tmp_path / "d", 30, seed=3), tmp_path / "cache")
    assert bytes_of(kept / names[0]) == before
    assert names[1] not in os.listdir(kept)


# Workers.


class ReadByWorkers(Subset):
    """Images of which the main process may read the first two only."""

    def read(self, i: int) -> bytes | np.ndarray:
        """Read the i-th of the positions."""
        assert i < 2 or torch.utils.data.get_worker_info() is not None
        return super().read(i)


def test_workers_decode_a_set_as_the_process_itself_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "_LOOKED_AT", 2)
    monkeypatch.setattr(resident, "_DECODED_AT_ONCE", 4)
    place = photos(tmp_path / "photos", 30)
    for number in (2, 17, 29):
        (place / f"{number:03}.png").write_bytes(b"broken")
    source, everything, told = open_source(str(place)), np.arange(30), list[int]()
    alone = open_resident(asked(Subset(source, everything), tmp_path))
    shared = open_resident(asked(ReadByWorkers(source, everything), tmp_path, workers=2, progress=told.append))
    assert alone is not None
    assert shared is not None
    assert torch.equal(shared.images, alone.images)
    assert shared.bad == alone.bad
    assert list(shared.bad) == [2, 17, 29]
    assert told == [4] * 7 + [2]


def test_an_image_of_another_size_that_a_worker_meets_is_told_as_without_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "_LOOKED_AT", 2)
    monkeypatch.setattr(resident, "_DECODED_AT_ONCE", 4)
    place = photos(tmp_path / "photos", 12)
    Image.new("RGB", (9, 9)).save(place / "010.png")
    source = ReadByWorkers(open_source(str(place)), np.arange(12))
    assert open_resident(asked(source, tmp_path, workers=2)) is None
    with pytest.raises(UserError, match=r"resident=true needs images of one size, but .*010\.png"):
        open_resident(asked(source, tmp_path, workers=2, wanted=True))


def test_small_sets_are_not_kept(tmp_path: Path) -> None:
    assert open_resident(asked(Digits(), tmp_path, channels=1)) is not None
    assert list(tmp_path.iterdir()) == []


# Room.


def test_a_set_that_does_not_fit_goes_by_workers_and_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    needed = len(Digits()) * 64
    monkeypatch.setattr(resident, "free_memory", lambda device, processes: 2.0 * needed - 1)
    said: list[str] = []
    assert open_resident(asked(Digits(), tmp_path, said, channels=1)) is None
    assert len(said) == 1
    assert "cpu has 0.00 GB free, of which at most 50%" in said[0]
    monkeypatch.setattr(resident, "free_memory", lambda device, processes: 2.0 * needed)
    assert open_resident(asked(Digits(), tmp_path, said, channels=1)) is not None
    assert len(said) == 1


def test_a_resident_set_that_does_not_fit_at_all_is_refused_before_decoding(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    needed = len(Digits()) * 64
    monkeypatch.setattr(resident, "_decoded", refuse)
    monkeypatch.setattr(resident, "free_memory", lambda device, processes: needed - 1.0)
    with pytest.raises(UserError, match=r"resident=true: the decoded images take 0\.00 GB, and cpu has .* Leave resi"):
        open_resident(asked(Digits(), tmp_path, channels=1, wanted=True))


def test_the_free_memory_of_this_machine_is_a_number_of_bytes() -> None:
    assert 1e6 < free_memory(CPU) < 1e15


def test_the_memory_of_a_machine_is_divided_among_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MACHINE, lambda: 800.0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (300, 400))
    assert free_memory(CPU, 8) == 100.0
    assert free_memory(torch.device("cuda", 1), 2) == 300.0  # a device of its own
    assert free_memory(torch.device("cuda", 1), 8) == 100.0


def test_large_images_are_not_all_looked_at_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    looked: list[int] = []
    original = equal_images.read_equal

    def read_equal(source: Source, position: int, channels: int, **words: Any) -> np.ndarray:
        looked.append(position)
        return original(source, position, channels, **words)

    monkeypatch.setattr(resident, "read_equal", read_equal)
    assert resident._common_size(asked(Digits(), tmp_path, channels=1)) == (8, 8)
    assert looked == list(range(64))
    looked.clear()
    monkeypatch.setattr(resident, "_LOOKED_AT_PIXELS", 3 * 64)
    assert resident._common_size(asked(Digits(), tmp_path, channels=1)) == (8, 8)
    assert looked == [0, 1, 2]


# Several processes.


class Group:
    """Two threads that take each other for processes."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.here, self.meet, self.parts = threading.local(), threading.Barrier(2, timeout=30), [None, None]
        patch.delenv("LOCAL_RANK", raising=False)
        patch.setattr(distributed, "world", lambda: 2)
        patch.setattr(distributed, "rank", lambda: self.here.rank)
        patch.setattr(distributed, "largest", lambda number, device: max(self.exchange(number)))
        patch.setattr(distributed, "join", lambda part: {k: v for each in self.exchange(part) for k, v in each.items()})

    def exchange(self, part: Any) -> list[Any]:
        self.parts[self.here.rank] = part
        self.meet.wait()
        both = list(self.parts)
        self.meet.wait()
        return both

    def run(self, work: Any) -> list[Any]:
        """What `work(rank)` gives, or raises, in each."""

        def one(rank: int) -> Any:
            self.here.rank = rank
            try:
                return work(rank)
            except UserError as error:
                return str(error)

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(one, range(2)))


def test_of_two_processes_one_decodes_and_both_have_all(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[list[int]] = [[], []]
    with monkeypatch.context() as patch:
        both = Group(patch).run(lambda rank: opened(folder, tmp_path, world=2, progress=decoded[rank].append))
    assert [sum(counts) for counts in decoded] == [30, 0]
    alone = opened(folder, tmp_path / "other")
    for found in both:
        assert torch.equal(found.images, alone.images)
        assert found.bad == alone.bad


def test_where_nothing_can_be_kept_each_process_decodes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patch:
        both = Group(patch).run(lambda rank: opened(folder, tmp_path / "file", world=2))
    assert torch.equal(both[0].images, both[1].images)
    assert len(both[1].images) == 30


@pytest.mark.parametrize("how", ["bound", "disk"])
def test_where_nothing_can_be_kept_all_processes_of_the_machine_need_memory_at_once(
    how: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 30 * 3 * 20 * 23
    monkeypatch.setattr(MACHINE, lambda: 4.0 * needed - 1)  # one would fit, two do not
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    cache = tmp_path / "cache"
    if how == "bound":  # known beforehand
        monkeypatch.setenv("KINFOLD_PIXELS_GB", "0")
        monkeypatch.setattr(resident, "_decoded", refuse)
    else:
        cache.write_text("")
    source, said = open_source(str(folder)), list[str]()
    for wanted in (None, True):
        if wanted:
            monkeypatch.setattr(MACHINE, lambda: 2.0 * needed - 1)
        with monkeypatch.context() as patch:
            both = Group(patch).run(
                lambda rank: open_resident(asked(source, cache, said, world=2, wanted=wanted))  # noqa: B023
            )
        if wanted:
            assert all("free for each of 2 processes" in text for text in both)
        else:
            assert both == [None, None]
    assert any("free for each of 2 processes, of which at most 50%" in text for text in said)


def test_what_goes_wrong_in_the_process_that_decodes_is_told_to_the_other(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (9, 9)).save(photos(folder, 70) / "999.png")
    source = open_source(str(folder))
    for wanted, reason in ((None, "None"), (True, "resident=true needs images of one size")):
        with monkeypatch.context() as patch:
            both = Group(patch).run(lambda rank: open_resident(asked(source, tmp_path, world=2, wanted=wanted)))  # noqa: B023
        assert str(both[0]) == str(both[1])
        assert str(both[0]).startswith(reason)


def test_a_process_without_room_sends_all_by_workers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        group = Group(patch)
        patch.setattr(resident, "free_memory", lambda device, processes: 1e12 if group.here.rank == 0 else 10.0)
        said: list[str] = []
        assert group.run(lambda rank: open_resident(asked(open_source(str(folder)), tmp_path, said, world=2))) == [
            None,
            None,
        ]
    assert len(set(said)) == 1


def test_a_subset_is_kept_apart_from_its_set(folder: Path, tmp_path: Path) -> None:
    source = open_source(str(folder))
    some = Subset(source, np.array([5, 4]))
    whole, two = open_resident(asked(source, tmp_path)), open_resident(asked(some, tmp_path))
    assert whole is not None
    assert two is not None
    assert torch.equal(two.images, whole.images[[5, 4]])

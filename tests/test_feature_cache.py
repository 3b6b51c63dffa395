# SPDX-License-Identifier: Apache-2.0
"""Features are made once for the same weights, images and look, and what was made half is never used."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_knn import Largest
from test_processes import free_port
from test_resume import processes
from torch import Tensor, nn

from kinfold import distributed
from kinfold.data.sources import Digits, Source, Subset, open_source
from kinfold.errors import UserError
from kinfold.evaluate import FrozenBackbone, Labelled, evaluate, feature_cache


class Rows(nn.Module):
    """[B, 1, 8, 8] to the pixels of the rows: no two images have the same."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.counted = Counter[str]()  # a plain number would be part of what the module computes with

    @property
    def calls(self) -> int:
        return self.counted["calls"]

    def forward(self, images: Tensor) -> Tensor:
        self.counted["calls"] += 1
        return images.flatten(1) * self.scale  # [B, 64]


class WithHoles:
    """Digits of which some do not decode."""

    def __init__(self, count: int, holes: set[int]) -> None:
        self.inner, self.holes = Subset(Digits(), np.arange(count)), holes
        self.labels, self.classes = self.inner.labels, self.inner.classes
        self.fingerprint, self.description = f"{count}-{sorted(holes)}", f"{count} digits with holes"

    def __len__(self) -> int:
        return len(self.inner)

    def read(self, i: int) -> Any:
        return b"this is no image" if i in self.holes else self.inner.read(i)

    def name(self, i: int) -> str:
        return self.inner.name(i)


def frozen(network: nn.Module, **changes: Any) -> FrozenBackbone:
    return FrozenBackbone(module=network, size=8, channels=1, mean=(0.5,), std=(0.5,), **changes)


def labelled(source: Source, cache: Path | None, said: list[str] | None = None) -> Labelled:
    say = said.append if said is not None else lambda text: None
    return Labelled(train=source, cache=cache, say=say, batch_size=7)


def expected(source: Source) -> Tensor:
    images = [source.read(i) for i in range(len(source))]
    pixels = [torch.from_numpy(np.asarray(image)) for image in images if not isinstance(image, bytes)]
    return (torch.stack(pixels).flatten(1) / 255.0 - 0.5) / 0.5  # [n, 64]


def test_the_second_time_nothing_is_computed_and_all_is_the_same(tmp_path: Path) -> None:
    source, network = Subset(Digits(), np.arange(30)), Rows()
    first, positions = labelled(source, tmp_path).features(frozen(network), network, source)
    made = network.calls
    second, again = labelled(source, tmp_path).features(frozen(network), network, source)
    assert made > 0
    assert network.calls == made
    assert torch.equal(first, second)
    assert positions.tolist() == again.tolist() == list(range(30))
    torch.testing.assert_close(first, expected(source))


@pytest.mark.parametrize("change", ["weights", "images", "size", "mean", "structure"])
def test_whatever_changes_the_features_makes_them_anew(change: str, tmp_path: Path) -> None:
    source, network = Subset(Digits(), np.arange(10)), Rows()
    labelled(source, tmp_path).features(frozen(network), network, source)
    backbone, asked, other = frozen(network), network, source
    if change == "weights":
        with torch.no_grad():
            network.scale.mul_(2)
    elif change == "images":
        other = Subset(Digits(), np.arange(1, 11))
    elif change == "size":
        backbone = FrozenBackbone(module=network, size=4, channels=1, mean=(0.5,), std=(0.5,))
    elif change == "mean":
        backbone = FrozenBackbone(module=network, size=8, channels=1, mean=(0.4,), std=(0.5,))
    else:
        asked = nn.Sequential(network, nn.ReLU())  # type: ignore[assignment]
    before = network.calls
    labelled(other, tmp_path).features(backbone, asked, other)
    assert network.calls > before
    assert len(list(tmp_path.iterdir())) == 2


def test_without_a_cache_the_same_comes_and_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, network = WithHoles(20, {3}), Rows()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    kept, _ = labelled(source, tmp_path / "cache").features(frozen(network), network, source)
    for most in (2**30, 0):  # in memory, and as a map of a file that has lost its name
        monkeypatch.setattr("kinfold.evaluate.features.IN_MEMORY", most)
        loose, positions = labelled(source, None).features(frozen(network), network, source)
        assert torch.equal(kept, loose)
        assert len(positions) == 19
        assert [place.name for place in tmp_path.iterdir()] == ["cache"]


class Wide(Rows):
    """[B, 1, 8, 8] to 4096 numbers."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).repeat(1, 64)  # [B, 4096]


@pytest.mark.parametrize("cached", [True, False], ids=["kept", "not kept"])
def test_features_on_their_way_to_the_disk_take_no_more_memory_for_more_images(
    cached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kinfold.evaluate.features.IN_MEMORY", 0)
    monkeypatch.setattr("kinfold.evaluate.feature_cache._ROWS", 4)
    network = Wide()
    few, many = WithHoles(40, {3, 30}), WithHoles(160, {3, 30})
    real, made = feature_cache.Writing.write, list[int]()

    def write(self: feature_cache.Writing, rows: np.ndarray, features: Tensor) -> None:
        made.append(network.calls)
        real(self, rows, features)

    monkeypatch.setattr(feature_cache.Writing, "write", write)

    def largest(source: Source) -> int:
        with Largest() as watched:
            features, _ = labelled(source, tmp_path if cached else None).features(frozen(network), network, source)
        assert features.shape == (len(source) - 2, 4096)
        return watched.numbers

    assert largest(few) == 7 * 4096  # a batch
    tracemalloc.start()  # what numpy holds
    try:
        assert largest(many) == 7 * 4096
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 160 * 4096 * 4 / 4
    assert made == list(range(1, 1 + 6 + 23))  # each batch is written before the next is made


def test_images_that_do_not_decode_are_left_out_and_named_every_time(tmp_path: Path) -> None:
    source, network = WithHoles(25, {0, 6, 7, 24}), Rows()
    said: list[str] = []
    first, positions = labelled(source, tmp_path, said).features(frozen(network), network, source)
    assert positions.tolist() == [i for i in range(25) if i not in source.holes]
    torch.testing.assert_close(first, expected(source))
    labelled(source, tmp_path, said).features(frozen(network), network, source)
    assert len(said) == 2
    assert said[0] == said[1]
    assert "4 of 25 images do not decode" in said[0]
    array = np.load(next(tmp_path.iterdir()) / "features.npy")  # any program can read it
    assert array.shape == (21, 64)


def test_rows_are_closed_up_in_pieces_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kinfold.evaluate.feature_cache._ROWS", 2)
    source, network = WithHoles(40, {1, 2, 9, 30, 39}), Rows()
    found, _ = labelled(source, tmp_path).features(frozen(network), network, source)
    torch.testing.assert_close(found, expected(source))


@pytest.mark.parametrize("damage", ["short", "json", "shape", "missing"])
def test_damaged_files_are_made_anew(damage: str, tmp_path: Path) -> None:
    source, network = Subset(Digits(), np.arange(12)), Rows()
    first, _ = labelled(source, tmp_path).features(frozen(network), network, source)
    first = first.clone()
    place = next(tmp_path.iterdir())
    if damage == "short":
        os.truncate(place / "features.npy", 300)
    elif damage == "json":
        (place / "about.json").write_text('{"bad": [')
    elif damage == "shape":
        np.save(place / "features.npy", np.zeros((3, 64), np.float32))
    else:
        (place / "features.npy").unlink()
    second, _ = labelled(source, tmp_path).features(frozen(network), network, source)
    assert torch.equal(first, second)


def test_a_full_disk_is_one_message_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, network = Subset(Digits(), np.arange(12)), Rows()

    def full(file: Any, data: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("kinfold.evaluate.feature_cache._write_all", full)
    with pytest.raises(UserError, match=r"12 images take .* No space left on device.*--no-cache"):
        labelled(source, tmp_path).features(frozen(network), network, source)
    assert list(tmp_path.iterdir()) == []


def test_the_sets_used_longest_ago_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Rows()
    sources = [Subset(Digits(), np.arange(start, start + 10)) for start in range(3)]
    places = []
    for age, source in zip((50, 90), sources):
        known = set(tmp_path.iterdir())
        labelled(source, tmp_path).features(frozen(network), network, source)
        places += set(tmp_path.iterdir()) - known
        os.utime(places[-1] / "about.json", (time.time() - age, time.time() - age))
    monkeypatch.setenv("KINFOLD_FEATURES_GB", str(2.5 * 10 * 64 * 4 / 1e9))
    labelled(sources[2], tmp_path).features(frozen(network), network, sources[2])
    assert places[0].is_dir()
    assert not places[1].is_dir()
    assert len(list(tmp_path.iterdir())) == 2


def slow_extraction(cache: str) -> None:
    class Slow(Rows):
        def forward(self, images: Tensor) -> Tensor:
            time.sleep(0.05)
            return super().forward(images)

    network = Slow()
    source = Subset(Digits(), np.arange(700))
    labelled(source, Path(cache)).features(frozen(network), network, source)


def test_a_kill_in_the_middle_leaves_nothing_that_is_used(tmp_path: Path) -> None:
    process = processes.Process(target=slow_extraction, args=(str(tmp_path),))
    process.start()
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".*.partial/features.npy")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    drafts = list(tmp_path.iterdir())
    assert [draft.name[0] for draft in drafts] == ["."]
    for path in (drafts[0], *drafts[0].iterdir()):
        os.utime(path, (0, 0))  # two days later
    source, network = Subset(Digits(), np.arange(20)), Rows()
    labelled(source, tmp_path).features(frozen(network), network, source)
    assert [place.name[0] == "." for place in tmp_path.iterdir()] == [False]


def share(rank: int, world: int, port: int, cache: str, out: str) -> None:
    """Make features as one of several processes, and leave what it got."""
    torch.set_num_threads(1)
    if world > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
        distributed.start("cpu")
    source, network = WithHoles(31, {2, 16, 17}), Rows()
    for kind in (Path(cache), None):
        found, positions = labelled(source, kind).features(frozen(network), network, source)
        torch.save({"x": found.clone(), "positions": positions.tolist()}, f"{out}/{world}-{rank}-{kind is None}.pt")
    distributed.stop()


def test_one_process_and_two_make_the_same_bytes(tmp_path: Path) -> None:
    port = free_port()
    for world in (1, 2):
        cache = str(tmp_path / f"cache-{world}")
        started = [processes.Process(target=share, args=(r, world, port, cache, str(tmp_path))) for r in range(world)]
        for process in started:
            process.start()
        for process in started:
            process.join(120)
            assert process.exitcode == 0
    one, two = (next((tmp_path / f"cache-{world}").iterdir()) for world in (1, 2))
    assert one.name == two.name
    assert (one / "features.npy").read_bytes() == (two / "features.npy").read_bytes()
    assert json.loads((one / "about.json").read_text()) == json.loads((two / "about.json").read_text())
    whole = torch.load(tmp_path / "1-0-False.pt", weights_only=True)
    for name in ("2-0-False", "2-1-False", "2-0-True", "2-1-True", "1-0-True"):
        part = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert torch.equal(part["x"], whole["x"])
        assert part["positions"] == whole["positions"]


def test_protocols_share_their_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KINFOLD_CACHE", str(tmp_path / "cache"))
    network = Rows()
    backbone = frozen(network)
    evaluate("knn", backbone, "digits", out=tmp_path, limit=50)
    made = network.calls
    evaluate("linear", backbone, "digits", out=tmp_path, limit=50, overrides=["epochs=1", "augment=null"])
    assert network.calls == made
    assert len(list((tmp_path / "cache" / "features").iterdir())) == 2  # training and test images
    evaluate("knn", backbone, "digits", out=tmp_path, limit=50, cache=False)
    assert network.calls > made


def test_a_key_knows_kinds_of_modules_that_hold_no_weights() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

    assert feature_cache.key_of(Rows(), {}) != feature_cache.key_of(Other(), {})
    assert feature_cache.key_of(Rows(), {}) == feature_cache.key_of(Rows(), {})


class Times(nn.Module):
    """[B, 1, 8, 8] times a number that no weight holds."""

    def __init__(self, number: float, *, buffer: bool) -> None:
        super().__init__()
        self.number: float | Tensor = number
        if buffer:
            del self.number
            self.register_buffer("number", torch.tensor(number), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) * self.number  # [B, 64]


@pytest.mark.parametrize("buffer", [False, True])
def test_a_number_that_is_no_weight_makes_other_features(buffer: bool, tmp_path: Path) -> None:
    source = Subset(Digits(), np.arange(5))
    for number in (1.0, 2.0):
        network = Times(number, buffer=buffer)
        found, _ = labelled(source, tmp_path).features(frozen(network), network, source)
        torch.testing.assert_close(found, number * expected(source))


def grey_images(folder: Path, first: int) -> Source:
    for name in ("ant", "bee"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(3):
            pixels = np.full((8, 8), first + number, np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.bmp")  # all files have one size
    return open_source(str(folder))


def test_other_images_of_the_same_names_have_features_of_their_own(tmp_path: Path) -> None:
    network = Rows()

    def brightness(source: Source) -> list[int]:
        found, _ = labelled(source, tmp_path / "cache").features(frozen(network), network, source)
        return ((found[:, 0] * 0.5 + 0.5) * 255).round().int().tolist()

    assert brightness(grey_images(tmp_path / "clear", 10)) == [10, 11, 12] * 2
    assert brightness(grey_images(tmp_path / "blurred", 90)) == [90, 91, 92] * 2
    source = grey_images(tmp_path / "clear", 10)
    Image.fromarray(np.full((8, 8), 200, np.uint8)).save(tmp_path / "clear" / "bee" / "1.bmp")
    assert brightness(Subset(source, np.array([4, 0]))) == [200, 10]
    assert brightness(source) == [10, 11, 12, 10, 200, 12]


def test_what_a_killed_process_of_the_same_number_left_is_in_nobodys_way(tmp_path: Path) -> None:
    source, network = Subset(Digits(), np.arange(5)), Rows()
    labelled(source, tmp_path).features(frozen(network), network, source)
    (place,) = tmp_path.iterdir()
    place.rename(tmp_path / f".{place.name}.{os.getpid()}.partial")
    found, _ = labelled(source, tmp_path).features(frozen(network), network, source)
    torch.testing.assert_close(found, expected(source))


def test_a_cache_that_may_only_be_read_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **words: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    source, network = Subset(Digits(), np.arange(5)), Rows()
    labelled(source, tmp_path).features(frozen(network), network, source)
    made = network.calls
    monkeypatch.setattr(os, "utime", refuse)
    labelled(source, tmp_path).features(frozen(network), network, source)
    assert network.calls == made


@pytest.mark.parametrize("asked", ["abc", "-1", "nan", "inf"])
def test_a_bound_that_is_no_number_is_refused(asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KINFOLD_FEATURES_GB", asked)
    source, network = Subset(Digits(), np.arange(12)), Rows()
    with pytest.raises(UserError, match=f"KINFOLD_FEATURES_GB is '{asked}'"):
        labelled(source, tmp_path).features(frozen(network), network, source)
    assert list(tmp_path.iterdir()) == []

# SPDX-License-Identifier: Apache-2.0
"""Transfer gives the numbers of a plain loop over scikit-learn, on the published splits; what is left out is said."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_set_files as files
import torch
from PIL import Image
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import nn

from kinfold.data.cropped import Cropped
from kinfold.data.decode import Undecodable, decode
from kinfold.data.named_sets import open_small_set
from kinfold.data.sources import Digits, Subset, open_source
from kinfold.errors import UserError
from kinfold.evaluate import FrozenBackbone
from kinfold.evaluate.backbones import hash_of
from kinfold.evaluate.protocol import Request
from kinfold.evaluate.resumable import Stopped
from kinfold.evaluate.transfer import Transfer, open_transfer, transfer
from kinfold.evaluate.transfer.logistic import eleven_point, published_decays
from kinfold.evaluate.transfer.sets import ELEVEN, Collection
from kinfold.reading import parse, read_text, read_yaml
from kinfold.recipe import RECIPES

QUICK = {"decays": (1e-3, 1.0, 100.0), "max_iter": 20}


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KINFOLD_CACHE", str(tmp_path / "the cache"))
    monkeypatch.delenv("KINFOLD_DOWNLOAD", raising=False)
    warnings.simplefilter("ignore", ConvergenceWarning)


def backbone(channels: int = 1) -> FrozenBackbone:
    """A few random features, with a batch norm that a careless evaluation would change."""
    torch.manual_seed(3)
    module = nn.Sequential(nn.Conv2d(channels, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
    module.train()
    none = (0.0,) * channels
    return FrozenBackbone(module=module, size=8, channels=channels, mean=none, std=tuple(1 + m for m in none))


def opened(data: str | Path, settings: Transfer, said: list[str] | None = None, **request: Any) -> Collection:
    say = (lambda text: None) if said is None else said.append
    return open_transfer(Request(data=str(data), **request), settings, {"say": say})


def features(of: FrozenBackbone, images: list[np.ndarray]) -> np.ndarray:
    """By hand: [n, H, W, C] of 0 to 255 to [n, F]."""
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        return of.module.eval()(x).flatten(1).numpy()


def test_the_numbers_are_those_of_a_plain_loop() -> None:
    settings = Transfer(decays=9, max_iter=10)
    values = transfer(backbone(), opened("digits", settings), settings)

    train, test = Digits("train"), Digits("test")
    x, queries = (features(backbone(), [source.read(i) for i in range(len(source))]) for source in (train, test))
    y, truth = train.labels, test.labels
    indices = list(range(len(x)))
    np.random.seed(0)
    np.random.shuffle(indices)
    held, rest = indices[: int(np.floor(0.2 * len(x)))], indices[int(np.floor(0.2 * len(x))) :]
    model, best, chosen = LogisticRegression(solver="lbfgs", max_iter=10, warm_start=True), 0.0, 0.0
    for decay in published_decays(9):
        score = 100 * model.set_params(C=1 / decay).fit(x[rest], y[rest]).score(x[held], y[held])
        if score > best:
            best, chosen = score, decay
    final = 100 * model.set_params(C=1 / chosen).fit(x, y).score(queries, truth)
    expected = {"digits": final, "val/digits": best, "decay/digits": chosen, "mean": final}
    assert values == pytest.approx(expected)
    assert values["digits"] > 40  # chance is 10


def test_voc2007_is_one_regression_a_class_on_its_published_splits(tmp_path: Path) -> None:
    files.voc2007(tmp_path)
    said: list[str] = []
    settings = Transfer(**QUICK)
    data = opened(f"torchvision:voc2007@{tmp_path}", settings, said)
    data = Collection(sets=data.sets, say=said.append)
    values = transfer(backbone(3), data, settings)

    parts = {}
    for split in ("train", "val", "test"):
        source = Cropped(open_small_set("voc2007", tmp_path, split=split), size=8)
        numbers = [int(Path(source.name(i)).stem) for i in range(len(source))]
        shown = np.array([[n % 2 == 0, n % 3 == 0] for n in numbers])
        parts[split] = features(backbone(3), [source.read(i) for i in range(len(source))]), shown
    model = LogisticRegression(solver="lbfgs", max_iter=20, warm_start=True)

    def precisions(decay: float, learned: tuple, asked: tuple) -> list[float]:
        found = []
        for column in range(2):
            model.set_params(C=1 / decay).fit(learned[0], learned[1][:, column])
            found.append(100 * eleven_point(asked[1][:, column], model.decision_function(asked[0])))
        return found

    scores = [float(np.mean(precisions(decay, parts["train"], parts["val"]))) for decay in settings.decays]
    both = tuple(np.concatenate([a, b]) for a, b in zip(parts["train"], parts["val"]))
    cat, dog = precisions(settings.decays[int(np.argmax(scores))], both, parts["test"])
    assert values["AP/voc2007/cat"] == pytest.approx(cat)
    assert values["AP/voc2007/dog"] == pytest.approx(dog)
    assert values["voc2007"] == values["mean"] == pytest.approx((cat + dog) / 2)
    assert values["val/voc2007"] == pytest.approx(max(scores))
    assert any("18 of 20 classes" in text and "bird" in text for text in said)


def test_the_backbone_is_the_same_afterwards() -> None:
    mine = backbone()
    before = hash_of(mine.module)
    settings = Transfer(decays=2, max_iter=2)
    transfer(mine, opened("digits", settings, limit=60), settings)
    assert hash_of(mine.module) == before
    assert all(module.training for module in mine.module.modules())


def test_published_validation_images_are_used_and_joined_for_the_last_fit(tmp_path: Path) -> None:
    files.aircraft(tmp_path)
    settings = Transfer(**QUICK)
    (this,) = opened(tmp_path, settings).sets
    assert (this.name, this.metric) == ("aircraft", "per-class")
    assert this.val is not None
    assert [len(part.source) for part in (this.train, this.val, this.test)] == [3, 2, 1]
    values = transfer(backbone(3), Collection(sets=(this,), say=lambda text: None), settings)
    assert values["aircraft"] in (0.0, 100.0)


def test_a_root_gives_the_sets_that_are_there_and_names_the_others(tmp_path: Path) -> None:
    for build in (files.food101, files.dtd, files.svhn, files.pets):
        build(tmp_path)
    said: list[str] = []
    settings = Transfer(**QUICK)
    data = opened(tmp_path, settings, said)
    assert [this.name for this in data.sets] == ["food101", "dtd", "pets"]
    assert set(data.about()) == {"food101", "dtd", "pets"}
    assert len(said) == 1
    assert "3 of the eleven" in said[0]
    assert "cifar10, cifar100, sun397" in said[0]
    values = transfer(backbone(3), Collection(sets=data.sets, say=said.append), Transfer(**QUICK, valid_size=1))
    assert values["mean"] == pytest.approx(np.mean([values[name] for name in ("food101", "dtd", "pets")]))


def test_a_set_that_was_named_has_to_be_there(tmp_path: Path) -> None:
    files.dtd(tmp_path)
    with pytest.raises(UserError, match=r"Flowers-102 is not in"):
        opened(tmp_path, Transfer(sets=("dtd", "flowers")))
    with pytest.raises(UserError, match=r"no set 'mnist'"):
        opened(tmp_path, Transfer(sets=("mnist",)))
    with pytest.raises(UserError, match="twice"):
        opened(tmp_path, Transfer(sets=("dtd", "DTD")))
    with pytest.raises(UserError, match="published splits"):
        opened(tmp_path, Transfer(sets=("dtd",)), test_split="val")


def test_a_folder_of_a_sets_name_is_that_set(tmp_path: Path) -> None:
    files.dtd(tmp_path / "DTD")  # torchvision's layout inside a folder of the set's own
    for split, count in (("train", 6), ("test", 3)):
        for n in range(count):
            files.put(tmp_path / "Flowers102" / split / f"kind {n % 3}" / f"{n}.jpg")
    data = opened(tmp_path, Transfer())
    assert [(this.name, this.metric) for this in data.sets] == [("dtd", "accuracy"), ("flowers", "per-class")]
    assert data.sets[1].val is None


def test_class_folders_with_the_name_of_a_set_are_no_sets(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for of in ("flowers", "cars"):
            for n in range(3):
                files.put(tmp_path / split / of / f"{n}.jpg", 40 * n)
    (this,) = opened(tmp_path, Transfer()).sets
    assert this.classes == ("cars", "flowers")
    assert this.name == tmp_path.name
    with pytest.raises(UserError, match="no test images apart"):
        opened(tmp_path / "train", Transfer())


def test_a_folder_that_is_no_set_and_holds_none_is_told_which_there_are(tmp_path: Path) -> None:
    for name in ("cats/1.png", "dogs/2.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / "photos" / name)
    with pytest.raises(UserError, match=r"a folder with some of the sets food101, .* here is none"):
        opened(tmp_path / "photos", Transfer())


def test_a_set_with_three_splits_brings_its_own_validation_images(tmp_path: Path) -> None:
    for split, shift in (("train", 0), ("val", 1), ("test", 2)):
        for n in range(4 + shift):
            files.put(tmp_path / split / f"class {n % 2}" / f"{n + 10 * shift}.jpg")
    (this,) = opened(tmp_path, Transfer()).sets
    assert this.val is not None
    assert [len(part.source) for part in (this.train, this.val, this.test)] == [4, 5, 6]
    assert this.val.truth.tolist() == [0, 0, 0, 1, 1]


def test_too_few_images_for_a_fifth_say_so() -> None:
    with pytest.raises(UserError, match=r"valid_size 0\.2 holds out 0 of 4"):
        transfer(backbone(), opened("digits", Transfer(), limit=4), Transfer(**QUICK))
    data = opened("digits", Transfer(), limit=40)
    assert "digits" in transfer(backbone(), data, Transfer(**QUICK, valid_size=10))


def test_several_labels_are_only_for_voc(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mAP is for images with several classes"):
        opened("digits", Transfer(metric="mAP"))
    files.voc2007(tmp_path)
    with pytest.raises(UserError, match="accuracy is not for voc2007"):
        opened(tmp_path, Transfer(metric="accuracy"))


def test_a_stopped_run_goes_on_to_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kinfold.evaluate import transfer as protocol

    settings = Transfer(decays=5, max_iter=5)
    (this,) = opened("digits", settings, limit=200).sets
    whole = transfer(backbone(), Collection(sets=(this,), say=lambda text: None), settings)
    kept = Collection(sets=(this,), say=lambda text: None, progress=tmp_path / "progress")
    fit, fits = protocol.Probe.score, []

    def interrupted(*words: Any) -> Any:
        fits.append(1)
        if len(fits) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return fit(*words)

    monkeypatch.setattr(protocol.Probe, "score", interrupted)
    with pytest.raises(Stopped, match="step 3 of 5"):
        transfer(backbone(), kept, settings)
    assert transfer(backbone(), kept, settings) == whole
    assert len(fits) == 3 + 2 + 1  # the three, the other two, and the last one on all images


# The images


def test_images_are_resized_as_pil_does() -> None:
    image = np.random.RandomState(0).randint(0, 256, (90, 130, 3)).astype(np.uint8)

    class One:
        labels, classes, fingerprint, description = None, None, "one", "one image"

        def __len__(self) -> int:
            return 1

        def read(self, i: int) -> np.ndarray:
            return image

        def name(self, i: int) -> str:
            return "it"

    cut = Cropped(One(), size=40).read(0)
    resized = np.asarray(Image.fromarray(image).resize((40 * 130 // 90, 40), Image.Resampling.BICUBIC))
    left = round((resized.shape[1] - 40) / 2)
    assert np.abs(cut.astype(int) - resized[:, left : left + 40].astype(int)).max() <= 1
    soft = Cropped(One(), size=40, filter="bilinear").read(0)
    assert np.abs(cut.astype(int) - soft.astype(int)).mean() > 3
    assert Cropped(One(), size=40, resize=48).read(0).shape == (40, 40, 3)


def test_cropped_images_are_other_data_and_keep_the_rest() -> None:
    source = Subset(open_source("digits"), np.arange(5))
    crops = [Cropped(source, size=8), Cropped(source, size=6), Cropped(source, size=8, filter="bilinear")]
    assert len({crop.fingerprint for crop in crops} | {source.fingerprint}) == 4
    np.testing.assert_array_equal(crops[0].labels, source.labels)
    np.testing.assert_array_equal(crops[0].read(3), decode(source.read(3)))
    assert crops[0].name(3) == source.name(3)


def test_an_image_that_does_not_decode_is_named_and_left_out(tmp_path: Path) -> None:
    files.dtd(tmp_path)
    broken = tmp_path / "dtd" / "dtd" / "images" / "dotted" / "dotted_4.jpg"
    broken.write_bytes(b"no image")
    with pytest.raises(Undecodable):
        Cropped(open_small_set("dtd", tmp_path, split="test"), size=8).read(0)
    said: list[str] = []
    settings = Transfer(**QUICK)
    data = Collection(sets=opened(tmp_path, settings).sets, say=said.append)
    values = transfer(backbone(3), data, settings)
    assert 3 * values["dtd"] / 100 == pytest.approx(round(3 * values["dtd"] / 100))  # of three images
    assert any("1 of 4 images" in text and "dotted_4.jpg" in text for text in said)


# The recipes


def test_the_published_recipe_is_the_protocol() -> None:
    folder = RECIPES / "evaluate" / "transfer"
    found = {}
    for name in ("default", "sce-eleven"):
        values = read_yaml(read_text(folder / f"{name}.yaml"), source=name)
        found[name] = parse(Transfer, values, source=name)
        assert set(values) == set(Transfer.__dataclass_fields__)
    assert found["default"] == Transfer()
    published = found["sce-eleven"]
    assert (published.test_size, published.test_resize, published.filter) == (224, 224, "bicubic")
    assert (published.decays, published.max_iter, published.valid_size, published.seed) == (45, 100, 0.2, 0)
    assert len(ELEVEN) == 11

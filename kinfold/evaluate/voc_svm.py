# SPDX-License-Identifier: Apache-2.0
"""VOC classification by linear support vector machines: one a class, on frozen features, with all images or with few.

    features of unit length (norm + 1e-5)  →  LinearSVC of each class against the rest  →  average precision on the test

Source: PCL `eval_svm_voc.py`, which SCE uses; Goyal et al., ICCV 2019. Low-shot: k images of each class are drawn and
joined, an image of two classes may come twice, and every machine learns from all of them with all their labels.
Differs: which images are drawn and the order in which liblinear visits them are functions of the seed, not of Python's
`random` and of time. An image drawn for k is also drawn for every larger k of the same draw.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from kinfold.console import bar
from kinfold.data.annotated.voc import Presence
from kinfold.evaluate.average_precision import all_point, curve, eleven_point
from kinfold.evaluate.backbones import FrozenBackbone
from kinfold.evaluate.multi_label import MultiLabel
from kinfold.randomness import SPLIT, STEP, permutation, seed_of
from kinfold.settings import Count, settings
from kinfold.views import Positive

Features = NDArray[np.float64]
_SHOTS, _FOLDS = 1, 2  # places of the two uses in a seed's splits


@settings
class VOCSVM:
    """A linear support vector machine for each class, on frozen features."""

    costs: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.5,)
    """C: each is tried"""
    difficult: Literal["negative", "ignore"] = "negative"
    """images that show only difficult objects of a class: examples against it (PCL), or left out for this class"""
    positive_weight: Positive = 2.0
    """how much more a mistake on an image of the class costs than one on another"""
    iterations: Count = 2000
    """the most that liblinear takes for one machine"""
    shots: tuple[Count, ...] = (1, 2, 4, 8, 16)
    """k: images drawn of each class; none for no low-shot results"""
    draws: Count = 5
    """independent draws for each k"""
    folds: Annotated[int, Field(ge=2)] = 3
    """parts of the training set in turn held out to choose a cost, where there are several"""
    test_size: Count | None = None
    """side of an image in pixels; the backbone's own size if not given"""
    test_resize: Count | None = None
    """short side before the central crop of `test_size`; straight to `test_size` if not given"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    def __post_init__(self) -> None:
        if self.test_resize is not None and (self.test_size is None or self.test_resize < self.test_size):
            raise ValueError(
                f"test_resize: {self.test_resize} is the short side that test_size is cut from, so give a test_size of "
                f"at most {self.test_resize}"
            )


class Machines:
    """Trains machines, and keeps count of those that could not be trained as they should."""

    def __init__(self, settings: VOCSVM) -> None:
        self.settings = settings
        self.unfinished = 0
        """machines that were still changing after the last iteration"""
        self.idle: set[int] = set()
        """classes of which there were once only examples, or only examples against"""

    def scores(self, x: Features, present: Presence, asked: Features, classes: Sequence[int], cost: float) -> Features:
        """Learn from x [n, F] and present [n, C], and score asked [q, F] by each of `classes`: [q, len(classes)].

        A class that cannot be learned, having only examples or only examples against, scores every image alike.
        """
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.svm import LinearSVC

        found = np.zeros((len(asked), len(classes)))  # [q, c]
        for place, number in enumerate(classes):
            known = self.known(present[:, number])  # [n]
            target = np.where(present[known, number] == 1, 1, -1)  # [known]
            if len(np.unique(target)) < 2:
                self.idle.add(number)
                continue
            machine = LinearSVC(
                C=cost,
                class_weight={1: self.settings.positive_weight, -1: 1.0},
                intercept_scaling=1.0,
                penalty="l2",
                loss="squared_hinge",
                tol=1e-4,
                dual=True,
                max_iter=self.settings.iterations,
                random_state=seed_of(STEP, self.settings.seed, number) % 2**32,
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # counted instead
                machine.fit(x[known], target)
            self.unfinished += int(machine.n_iter_) >= self.settings.iterations
            found[:, place] = machine.decision_function(asked)
        return found

    def known(self, present: Presence) -> NDArray[np.bool_]:
        """Which images [n] count for a class, by what they show of it [n]."""
        counts: NDArray[np.bool_] = present != 0  # [n]
        return counts if self.settings.difficult == "ignore" else np.ones_like(counts)

    def precisions(self, scores: Features, asked: Presence, classes: Sequence[int]) -> Features:
        """Give the average precision of each class, all-point and 11-point, in percent: [len(classes), 2]."""
        rows = []
        for place, number in enumerate(classes):
            known = self.known(asked[:, number])  # [q]
            found = curve(scores[known, place], asked[known, number] == 1)
            rows.append((100.0 * all_point(found), 100.0 * eleven_point(found)))
        return np.array(rows)  # [c, 2]


def voc_svm(backbone: FrozenBackbone, data: MultiLabel, settings: VOCSVM) -> dict[str, float]:
    """Measure mean average precision over the classes, in percent, with all images and with k of each class.

    `mAP/full,C=0.5` is of one cost, and `mAP/full` of the best one, which is chosen on the test set as PCL does; `best`
    is the same. `chosen` takes for each class the cost that was best on held-out parts of the training set, so nothing
    in it was chosen on the test set; `AP/aeroplane` are its classes. `mAP11` is the 11-point form. `mAP/k=4` is the
    mean over the draws, of the best cost, and `std/k=4` their standard deviation; `by_cost/k=4,C=0.5` is of one cost.

    Raises `UserError` where the test images show no class.
    """
    size, resize, network = settings.test_size, settings.test_resize, backbone.module
    x, found = data.features(backbone, network, data.train, size=size, resize=resize, doing="training features")
    present, x_train = data.present[found], unit(x.numpy())  # [n, C], [n, F]
    x, found = data.features(backbone, network, data.test, size=size, resize=resize, doing="test features")
    asked, x_test = data.asked[found], unit(x.numpy())  # [q, C], [q, F]
    classes = data.answerable(asked)  # [c]
    machines = Machines(settings)

    values: dict[str, float] = {}
    by_cost = []
    with bar("machines of all images, costs", len(settings.costs)) as advance:
        for cost in settings.costs:
            scores = machines.scores(x_train, present, x_test, classes, cost)  # [q, c]
            by_cost.append(machines.precisions(scores, asked, classes))
            advance(1)
    table = np.stack(by_cost)  # [costs, c, 2]
    for name, column in (("mAP", 0), ("mAP11", 1)):
        means = table[:, :, column].mean(axis=1)  # [costs]
        values |= {f"{name}/full,C={cost:g}": float(mean) for cost, mean in zip(settings.costs, means)}
        values[f"{name}/full"] = float(means.max())
    places = choose_costs(machines, x_train, present, classes)  # [c]
    own = table[places, np.arange(len(classes)), 0]  # [c]
    values |= {f"AP/{data.classes[number]}": float(value) for number, value in zip(classes, own)}
    values["chosen"], values["best"] = float(own.mean()), values["mAP/full"]
    values |= low_shot(machines, data, x_train, present, x_test, asked, classes)
    _remark(machines, data)
    return values


def low_shot(
    machines: Machines,
    data: MultiLabel,
    x: Features,
    present: Presence,
    x_test: Features,
    asked: Presence,
    classes: Sequence[int],
) -> dict[str, float]:
    """Learn from k images a class, for each k, draw and cost."""
    settings = machines.settings
    values: dict[str, float] = {}
    counts = zip(data.classes, (present == 1).sum(axis=0).tolist())
    short = [f"{name} ({count})" for name, count in counts if count < max(settings.shots, default=0)]
    if short:
        data.say(f"Fewer than {max(settings.shots)} training images, all of which are drawn: {', '.join(short)}")
    with bar("machines of few images, draws", len(settings.shots) * settings.draws) as advance:
        for k in settings.shots:
            runs = []
            for draw in range(settings.draws):
                rows = drawn(present, k, draw=draw, seed=settings.seed)  # [k · C]
                by_cost = [
                    machines.precisions(
                        machines.scores(x[rows], present[rows], x_test, classes, cost), asked, classes
                    ).mean(axis=0)
                    for cost in settings.costs
                ]
                runs.append(by_cost)
                advance(1)
            table = np.array(runs)  # [draws, costs, 2]
            means = table.mean(axis=0)  # [costs, 2]
            values |= {f"by_cost/k={k},C={cost:g}": float(mean) for cost, mean in zip(settings.costs, means[:, 0])}
            values[f"mAP/k={k}"], values[f"mAP11/k={k}"] = (float(best) for best in means.max(axis=0))
            if settings.draws > 1:
                values[f"std/k={k}"] = float(table[:, means[:, 0].argmax(), 0].std(ddof=1))
    return values


def drawn(present: Presence, k: int, *, draw: int, seed: int) -> NDArray[np.int64]:
    """Draw k images of each class from those that show it, as a function of seed and draw: rows of present, joined."""
    rows = []
    for number in range(present.shape[1]):
        shown = np.flatnonzero(present[:, number] == 1)
        rows.append(shown[permutation(SPLIT, seed, _SHOTS, draw, number, n=len(shown))[:k]])
    return np.concatenate(rows)  # [at most k · C]


def choose_costs(machines: Machines, x: Features, present: Presence, classes: Sequence[int]) -> NDArray[np.int64]:
    """Choose each class's cost by cross-validation on x [n, F] and present [n, C]: places in `costs`, [len(classes)].

    Each part holds its share of the class's images. A class with one image cannot be held out; it gets the first cost.
    """
    settings = machines.settings
    places = np.zeros(len(classes), np.int64)  # [c]
    if len(settings.costs) == 1:
        return places
    with bar("choosing costs, classes", len(classes)) as advance:
        for place, number in enumerate(classes):
            folds = min(settings.folds, int((present[:, number] == 1).sum()))
            if folds < 2:
                continue
            part = parts_of(present[:, number], folds, seed=settings.seed, number=number)  # [n]
            totals = np.zeros(len(settings.costs))  # [costs]
            for fold in range(folds):
                out = part == fold  # [n]
                for trial, cost in enumerate(settings.costs):
                    scores = machines.scores(x[~out], present[~out], x[out], [number], cost)  # [out, 1]
                    totals[trial] += machines.precisions(scores, present[out], [number])[0, 0]
            places[place] = totals.argmax()
            advance(1)
    return places


def parts_of(present: Presence, folds: int, *, seed: int, number: int) -> NDArray[np.int64]:
    """Deal images [n] into parts: those with the class, those without it and the difficult ones each evenly."""
    part = np.empty(len(present), np.int64)  # [n]
    for value in (-1, 0, 1):
        rows = np.flatnonzero(present == value)
        part[rows[permutation(SPLIT, seed, _FOLDS, number, value, n=len(rows))]] = np.arange(len(rows)) % folds
    return part


def unit(x: NDArray[np.float32]) -> Features:
    """Divide features [n, F] by their length plus 1e-5."""
    wide = x.astype(np.float64)  # [n, F], as liblinear computes
    lengths: Features = np.linalg.norm(wide, axis=1, keepdims=True)  # [n, 1]
    return wide / (lengths + 1e-5)


def _remark(machines: Machines, data: MultiLabel) -> None:
    """Say what a reader of the numbers should know of the machines."""
    if machines.unfinished:
        data.say(
            f"{machines.unfinished:,} machines had not converged after {machines.settings.iterations:,} iterations"
        )
    if machines.idle:
        names = ", ".join(data.classes[number] for number in sorted(machines.idle))
        data.say(f"Not to be learned at least once, as all training images show it or none does: {names}")

# SPDX-License-Identifier: Apache-2.0
"""Looking at the encoder while it trains: k-NN where there are labels, and signs of health that need none.

A probe reads and changes nothing: the encoders are put into evaluation mode and back, running statistics stay as they
were, and no random number is consumed.
"""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kinfold import distributed, health
from kinfold.data.loader import Batch
from kinfold.data.sources import Source, Subset, open_source
from kinfold.data.splits import NoSuchSplit
from kinfold.data.written import same_images
from kinfold.errors import UserError
from kinfold.evaluate.features import Positions, extract, frozen, resize_for
from kinfold.evaluate.knn import knn_scores
from kinfold.evaluate.labelled import Labels, labels_of
from kinfold.learner import Learner
from kinfold.memory import Queue
from kinfold.randomness import SPLIT, permutation
from kinfold.recipe import Recipe, Run

NEIGHBOURS = 20
TEMPERATURE = 0.07


class Probes:
    """The probes of one run: which images they look at is decided once, from the seed."""

    def __init__(self, recipe: Recipe, run: Run, source: Source, device: torch.device, *, workers: int) -> None:
        self.recipe = recipe
        self.device = device
        self.workers = workers
        self.bank = some_of(source, run.probe_limit, recipe.seed)
        self.asked: Source | None = None
        self.labels: tuple[Labels, Labels, int] | None = None
        if run.probe_data is not None:
            try:
                asked = open_source(run.probe_data, split="test")
            except NoSuchSplit:
                asked = open_source(run.probe_data)  # a set without splits is all test
            self.asked = some_of(asked, run.probe_limit, recipe.seed)
            for name, labelled in (("data", self.bank), ("probe_data", self.asked)):
                if labelled.labels is None:
                    raise UserError(
                        f"probe_data: the k-NN probe compares labels, but {name} has none. Leave probe_data out, or "
                        "use class folders or a label column."
                    )
            if same_images(self.asked, self.bank):  # every image would find itself
                self.asked = None
            try:
                self.labels = labels_of(self.bank, self.asked, say=_silently)
            except UserError as error:
                raise UserError(f"probe_data: {error}") from None
        elif self.bank.labels is not None:
            # Without a second split that fits, every image asks the others; with one class there is nothing to ask.
            for held_out in (_second_split(run, source), None):
                asked_some = None if held_out is None else some_of(held_out, run.probe_limit, recipe.seed)
                with suppress(UserError):
                    self.labels = labels_of(self.bank, asked_some, say=_silently)
                    self.asked = asked_some
                    break

    def measure(self, learner: Learner, batch: Batch | None, epoch: int) -> dict[str, float]:
        """Measure the query encoder as it is; `batch` is the last one trained on, if there is one."""
        with frozen(learner):
            return self._measure(learner, batch, epoch)

    def _measure(self, learner: Learner, batch: Batch | None, epoch: int) -> dict[str, float]:
        features, positions = self._features(learner, self.bank)
        measures: dict[str, float] = {}
        if self.labels is not None:
            measures.update(self._neighbours(learner, features, positions, *self.labels))
        measures["rankme"] = health.rankme(features)
        measures["dimensions"] = float(min(features.shape))
        measures["alpha_req"] = health.alpha_req(features)
        embeddings = learner.encoder.head(features.to(self.device))  # [n, D]
        measures["spread"] = health.spread(embeddings)
        measures["uniformity"] = health.uniformity(F.normalize(embeddings, dim=1))
        if batch is not None:
            measures.update(self._meeting(learner, batch, epoch))
        if isinstance(learner.memory, Queue) and learner.memory.size:
            age = health.queue_age(learner.memory.born, int(learner.memory.written))
            measures.update(queue_age=age.mean, queue_age_max=age.max)
        return measures

    def _features(self, learner: Learner, source: Source) -> tuple[Tensor, Positions]:
        view, images = self.recipe.views.augment[0], self.recipe.images
        features, positions = extract(
            learner.encoder.backbone,
            source,
            size=view.size,
            resize=resize_for(source, view.size, channels=images.channels),
            channels=images.channels,
            mean=images.mean,
            std=images.std,
            batch_size=256,
            workers=self.workers,
            device=str(self.device),
        )
        return torch.as_tensor(features), positions

    def _neighbours(
        self, learner: Learner, features: Tensor, positions: Positions, known: Labels, asked: Labels, classes: int
    ) -> dict[str, float]:
        """Top-1 accuracy of weighted k-NN: held-out images ask, or every image asks the others."""
        labels = torch.from_numpy(known[positions])
        asking, truth = features, labels
        if self.asked is not None:
            asking, found = self._features(learner, self.asked)
            truth = torch.from_numpy(asked[found])
        neighbours = min(NEIGHBOURS, len(features) - (self.asked is None))
        if neighbours == 0:  # a single readable image has no other to ask
            return {}
        scores = knn_scores(
            asking,
            features,
            labels,
            k=neighbours,
            temperature=TEMPERATURE,
            classes=classes,
            exclude_self=self.asked is None,
        )
        return {"knn": 100.0 * float((scores.argmax(1) == truth).double().mean())}

    def _meeting(self, learner: Learner, batch: Batch, epoch: int) -> dict[str, float]:
        """How far apart the views of an image lie, and how many images share the target."""
        asks, answers = self.recipe.views.pairs[0]
        if answers is None or learner.key_encoder is None:
            return {}
        q = learner.encoder(batch.views[asks])  # [B, D]
        k = learner.key_encoder(batch.views[answers])  # [B, D]
        measures = {"alignment": health.alignment(q, k)}
        if distributed.world() == 1:
            seen, _ = learner.memory.compare(q, k, batch.index)
            target = learner.method.target(seen)
            if target is not None:
                entropy = health.target_entropy(target)
                measures.update(target_entropy=entropy.nats, perplexity=entropy.perplexity, keys=float(target.shape[1]))
        return measures


def _second_split(run: Run, source: Source) -> Source | None:
    """The test or validation split of the data, None where there is none or it has no labels."""
    try:
        held_out = open_source(run.data, split="test")
    except NoSuchSplit:  # one that is there and cannot be read is an error
        return None
    return None if held_out.labels is None or same_images(held_out, source) else held_out


def _silently(text: str) -> None:
    """Take a note that evaluation would print and a probe need not."""


def some_of(source: Source, limit: int, seed: int) -> Source:
    """At most `limit` images of `source`, spread evenly, the same ones at every start."""
    if len(source) <= limit:
        return source
    return Subset(source, np.sort(permutation(SPLIT, seed, n=len(source))[:limit]))

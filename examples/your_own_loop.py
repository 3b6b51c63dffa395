# SPDX-License-Identifier: Apache-2.0
"""A loop of your own around Kinfold's learner: your data, your optimiser, our four lines.

    python examples/your_own_loop.py --steps 60

Everything that is Kinfold's is in `build` and in the four lines of `train`. The images here are scikit-learn's digits;
put your own tensors `[N, C, H, W]` and your own augmentation in their place.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from kinfold import SCE, Augmentation, Encoder, Learner, Queue, Views
from kinfold.encoders import Head, build_head


def build(*, dimension: int = 32) -> Learner:
    """Put a learner together from parts: any module can be the backbone, any the head."""
    backbone = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 64, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
    )
    two_alike = (Augmentation(size=8), Augmentation(size=8))
    return Learner(
        method=SCE(temperature=0.1, target_temperature=0.05, instance_weight=0.5),
        views=Views(augment=two_alike, pairs=((0, 1),)),  # view 0 asks, view 1 answers
        encoder=Encoder(backbone, build_head(Head(hidden=(128,), out=dimension, batch_norm=True), 256)),
        memory=Queue(512, dimension),
    )


def augment(images: Tensor) -> Tensor:
    """Shift each image [B, 1, 8, 8] by up to a pixel and add noise; a stand-in for your own augmentation."""
    padded = nn.functional.pad(images, (1, 1, 1, 1))  # [B, 1, 10, 10]
    places = torch.randint(0, 3, (len(images), 2)).tolist()
    cut = torch.stack([image[:, y : y + 8, x : x + 8] for image, (y, x) in zip(padded, places)])  # [B, 1, 8, 8]
    return cut + 0.1 * torch.randn_like(cut)


def train(learner: Learner, images: Tensor, *, steps: int, batch: int = 128) -> list[float]:
    """Take `steps` steps on images [N, 1, 8, 8]; gives the loss of each."""
    optimizer = torch.optim.SGD(learner.encoder.parameters(), lr=0.06, momentum=0.9, weight_decay=5e-4)
    learner.train()
    seen = []
    for step in range(steps):
        index = torch.randperm(len(images))[:batch]  # [B] which images of the set these are
        views = [augment(images[index]), augment(images[index])]  # [B, 1, 8, 8] each, as many as `Views` says
        epoch = step * batch // len(images)

        losses, memos = learner(views, index, epoch)
        loss = torch.stack(list(losses.values())).sum()
        loss.backward(); optimizer.step(); optimizer.zero_grad()  # fmt: skip  # noqa: E702
        learner.advance([memos], momentum=0.99)

        seen.append(loss.item())
    return seen


def main() -> None:
    """Train on the digits and print the loss."""
    words = argparse.ArgumentParser(description="A loop of your own around Kinfold's learner.")
    words.add_argument("--steps", type=int, default=60)
    words.add_argument("--seed", type=int, default=0)
    given = words.parse_args()
    torch.manual_seed(given.seed)
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None]  # [1797, 1, 8, 8] on [0, 16]
    images = (images - images.mean()) / images.std()  # [1797, 1, 8, 8]
    learner = build()
    losses = train(learner, images, steps=given.steps)
    for step, loss in enumerate(losses):
        if step % 10 == 0 or step == given.steps - 1:
            print(f"step {step:4d}  loss {loss:.4f}")
    # The state dict is everything: encoders and memory. Save the optimiser's beside it and the loop can go on.
    print(f"one state dict holds {len(learner.state_dict())} tensors")


if __name__ == "__main__":
    main()

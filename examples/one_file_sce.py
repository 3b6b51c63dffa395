# SPDX-License-Identifier: Apache-2.0
"""SCE in one file, without the package: torch, torchvision, and scikit-learn's handwritten digits.

    python examples/one_file_sce.py --steps 150

Read it from `similarity_loss` outwards. It has what the method needs and nothing else: no resume, no several devices,
no recipes. Source: Denize et al., WACV 2023 (the masked target of the paper); MoCo's queue and key encoder (He et al.,
CVPR 2020).
"""

from __future__ import annotations

import argparse
import copy

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align


def similarity_loss(
    q: Tensor, k: Tensor, queue: Tensor, *, temperature: float, target_temperature: float, instance_weight: float
) -> Tensor:
    """Hold queries q [B, D] against their own keys k [B, D] and the keys of other images, queue [K, D].

    The target lies partly on the own key, and partly where the key itself sees similarity to other images.
    """
    relations = torch.softmax(k @ queue.T / target_temperature, dim=1)  # [B, K]
    own = torch.full((len(q), 1), instance_weight, device=q.device, dtype=q.dtype)  # [B, 1]
    target = torch.cat([own, (1 - instance_weight) * relations], dim=1)  # [B, 1 + K]
    by_query = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1)  # [B, 1 + K]
    prediction = torch.log_softmax(by_query / temperature, dim=1)  # [B, 1 + K]
    return -(target * prediction).sum(1).mean()


MEAN, STD = 0.3053, 0.3759  # of the digits on [0, 1]


class Encoder(nn.Module):
    """A small convolutional network, a head, and the unit sphere: [B, 1, 8, 8] to [B, D]."""

    def __init__(self, width: int = 16, out: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((1, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2)):
            convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        self.backbone = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Sequential(
            nn.Linear(4 * width, 4 * width), nn.BatchNorm1d(4 * width), nn.ReLU(), nn.Linear(4 * width, out)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Embed images [B, 1, 8, 8] as unit vectors [B, D]."""
        return F.normalize(self.head(self.backbone(images)), dim=1)


def view(images: Tensor) -> Tensor:
    """Cut a random crop of 40 to 100 % of the area out of each image [B, 1, 8, 8], and vary its contrast."""
    count, size = len(images), images.shape[-1]
    area = torch.empty(count).uniform_(0.4, 1.0)  # [B]
    ratio = torch.empty(count).uniform_(-0.29, 0.29).exp()  # [B] width / height, 3:4 to 4:3
    width = (size * (area * ratio).sqrt()).clamp(max=size)  # [B]
    height = (size * (area / ratio).sqrt()).clamp(max=size)  # [B]
    left, top = torch.rand(count) * (size - width), torch.rand(count) * (size - height)  # [B] each
    boxes = torch.stack([torch.arange(count), left, top, left + width, top + height], dim=1)  # [B, 5]
    crops = roi_align(images, boxes, size, aligned=True)  # [B, 1, 8, 8]
    return (crops - MEAN) / STD * torch.empty(count, 1, 1, 1).uniform_(0.6, 1.4)


def neighbour_accuracy(encoder: Encoder, bank: Tensor, labels: Tensor, asked: Tensor, truth: Tensor) -> float:
    """Share of the images whose nearest neighbour in the bank has their label, in per cent."""
    encoder.eval()
    with torch.no_grad():
        keys, queries = (F.normalize(encoder.backbone(images), dim=1) for images in (bank, asked))
    encoder.train()
    return 100 * (labels[(queries @ keys.T).argmax(1)] == truth).float().mean().item()


def main() -> None:
    """Train for some steps; print the loss, and the accuracy before and after."""
    words = argparse.ArgumentParser(description="SCE on handwritten digits, in one file.")
    words.add_argument("--steps", type=int, default=150)
    words.add_argument("--batch", type=int, default=128)
    words.add_argument("--queue", type=int, default=1024, help="a multiple of the batch")
    words.add_argument("--momentum", type=float, default=0.99, help="how much of the key encoder stays")
    words.add_argument("--rate", type=float, default=0.06, help="learning rate")
    words.add_argument("--seed", type=int, default=0)
    given = words.parse_args()
    if given.queue % given.batch:
        words.error(f"--queue {given.queue} is no multiple of --batch {given.batch}")
    torch.manual_seed(given.seed)

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # [1797, 1, 8, 8]
    labels = torch.tensor(digits.target)  # [1797]
    seen, held_out = slice(0, 1437), slice(1437, None)
    plain = (images - MEAN) / STD  # [1797, 1, 8, 8]

    query_encoder = Encoder()
    key_encoder = copy.deepcopy(query_encoder).requires_grad_(False)
    queue = F.normalize(torch.randn(given.queue, 64), dim=1)  # [K, D]
    optimizer = torch.optim.SGD(query_encoder.parameters(), lr=given.rate, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, given.steps)
    everything = (plain[seen], labels[seen], plain[held_out], labels[held_out])
    print(f"nearest neighbour, untrained: {neighbour_accuracy(query_encoder, *everything):.1f} %")

    for step in range(given.steps):
        batch = images[seen][torch.randperm(1437)[: given.batch]]  # [B, 1, 8, 8]
        asks, answers = view(batch), view(batch)  # [B, 1, 8, 8] each
        q = query_encoder(asks)  # [B, D]
        with torch.no_grad():
            # Shuffled, so that batch norm does not tell a query which key is its own.
            order = torch.randperm(given.batch)
            k = torch.empty_like(q)  # [B, D]
            k[order] = key_encoder(answers[order])
        loss = similarity_loss(q, k, queue, temperature=0.1, target_temperature=0.05, instance_weight=0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():  # only now, after the step: the key encoder follows, and the batch is remembered
            for ours, theirs in zip(key_encoder.parameters(), query_encoder.parameters()):
                ours.lerp_(theirs, 1 - given.momentum)
            row = step * given.batch % given.queue
            queue[row : row + given.batch] = k
        if step % 10 == 0 or step == given.steps - 1:
            print(f"step {step:4d}  loss {loss.item():.4f}", flush=True)

    print(f"nearest neighbour, trained:   {neighbour_accuracy(query_encoder, *everything):.1f} %")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Where the encoder is in the checkpoints of others: one small entry for each way of writing them.

A checkpoint of self-supervised learning holds two encoders, heads, a queue and an optimiser. Each entry of `LAYOUTS`
says how its checkpoint is known, which prefix the right encoder has, and what cannot be seen in the weights but was
the case where it was trained: the images of small networks and the padding of their first convolution. An entry is
"read in" where its source was seen in the authors' repository, and "recalled" where not.

What is behind the prefix is brought under the names of torchvision and timm: the layers of an `nn.Sequential` have
numbers there, and the ResNets for CIFAR call the downsampling branch `shortcut`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""mean and standard deviation of the three channels"""
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
"""of CIFAR-10 as the MoCo notebook, SCE and InvP have them"""
_SOLO_CIFAR = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2430, 0.2610))

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


@final
@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way in which a checkpoint holds its encoder."""

    name: str
    """what people call it"""
    prefix: str = ""
    """what the names of the encoder begin with; what begins otherwise is left out: heads, queues, the other encoder"""
    known_by: tuple[str, ...] = ()
    """regular expressions at the beginning of names: each has to be met by one"""
    beside: str = ""
    """name beside the weights in the file by which it is known; empty: none is needed"""
    small: Statistics = CIFAR
    """mean and deviation of the images where the first convolution is 3x3"""
    padding: int = 1
    """of that convolution"""
    source: str
    """where this was seen"""

    def matches(self, names: Collection[str], beside: Collection[str]) -> bool:
        """Whether a checkpoint with these names of tensors, and these `beside` them, is of this layout."""
        return (not self.beside or self.beside in beside) and all(
            any(re.match(pattern, name) for name in names) for pattern in self.known_by
        )


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        name="MoCo's CIFAR-10 notebook",
        prefix="encoder_q.net.",
        known_by=(r"encoder_q\.net\.\d+\.",),
        source="read in facebookresearch/moco colab/moco_cifar10_demo.ipynb: layers by number, no max-pool, fc inside",
    ),
    Layout(
        name="ReSSL",
        prefix="encoder_q.net.",
        known_by=(r"encoder_q\.net\.",),
        source="read in mingkai-zheng/ReSSL linear_eval.py, network/backbone.py: 'model'; head.linear1, linear2",
    ),
    Layout(
        name="MoCo v1/v2",
        prefix="encoder_q.",
        known_by=(r"encoder_q\.",),
        source="read in facebookresearch/moco main_lincls.py: 'state_dict', without fc; encoder_k, queue beside",
    ),
    Layout(
        name="MoCo v3",
        prefix="base_encoder.",
        known_by=(r"base_encoder\.",),
        source="read in facebookresearch/moco-v3 main_lincls.py, moco/builder.py: momentum_encoder, predictor beside",
    ),
    Layout(
        name="SCE (CEA-LIST/SCE or eztorch)",
        prefix="trunk.",
        known_by=(r"trunk\.",),
        source="read in CEA-LIST/SCE sce/evaluation/linear_classifier.py, sce/models/trunks/resnet.py, and in eztorch",
    ),
    Layout(
        name="DINO",
        prefix="backbone.",
        known_by=(r"backbone\.",),
        beside="student",
        source="recalled: dictionaries 'student' and 'teacher' of backbone and head",
    ),
    Layout(
        name="DINO, teacher",  # the better of the two encoders, so it stands first
        prefix="teacher.",
        known_by=(r"teacher\.",),
        source="recalled",
    ),
    Layout(name="DINO, student", prefix="student.", known_by=(r"student\.",), source="recalled"),
    Layout(
        name="lightly, layers by number",
        prefix="backbone.",
        known_by=(r"backbone\.\d+\.",),
        small=IMAGENET,
        source="read in lightly-ai/lightly examples/pytorch_lightning/moco.py, lightly/models/resnet.py, benchmarks",
    ),
    Layout(
        name="solo-learn",
        prefix="backbone.",
        known_by=(r"backbone\.", r"classifier\."),
        small=_SOLO_CIFAR,
        padding=2,
        source="read in vturrisi/solo-learn solo/methods/base.py: padding=2 on CIFAR, always a classifier",
    ),
    Layout(
        name="backbone and heads",
        prefix="backbone.",
        known_by=(r"backbone\.",),
        source="read in lightly-ai/lightly benchmarks/imagenet/resnet50/mocov2.py; VICReg, Barlow Twins: recalled",
    ),
    Layout(
        name="solo-learn, early",
        prefix="encoder.",
        known_by=(r"encoder\.(conv1|patch_embed)\.", r"classifier\."),
        small=_SOLO_CIFAR,
        padding=2,
        source="read in vturrisi/solo-learn main_linear.py, solo/methods/base.py of its first year",
    ),
    Layout(
        name="encoder and heads",
        prefix="encoder.",
        known_by=(r"encoder\.(conv1|patch_embed)\.",),
        source="recalled",
    ),
    Layout(
        name="InvP",
        beside="memory_banks",
        source="read in WangFeng18/InvariancePropagation main.py, models/resnet.py: 'state_dict', torchvision's names",
    ),
    Layout(
        name="InvP, or another ResNet with shortcut",
        known_by=(r"layer\d\.\d+\.shortcut\.",),
        source="read in WangFeng18/InvariancePropagation models/resnet_cifar.py: shortcut, linear, no max-pool",
    ),
    Layout(name="torchvision or timm", source="torchvision and timm themselves"),
)

# Dictionaries around the weights. A teacher is the better of the two encoders: it stands first.
_AROUND = ("teacher", "student", "state_dict", "model", "backbone", "model_state_dict", "net", "network")
_WRAPPERS = ("module.", "_orig_mod.")  # of DataParallel and torch.compile
_HEADS = re.compile(r"(fc|head|head_dist|classifier|linear|projection_head|prototypes)\.")


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """An encoder in a checkpoint."""

    layout: Layout
    state: dict[str, Tensor]
    """the tensors of the encoder under the names of torchvision and timm, without classifiers and heads"""
    names: tuple[str, ...]
    """all names of tensors that the checkpoint has"""
    beside: tuple[str, ...]
    """what is beside the tensors"""

    def about(self) -> str:
        """What the checkpoint has, for a message: names by their first part, with counts and the first few."""
        groups = Counter(name.split(".")[0] for name in self.names)
        parts = []
        for group, count in list(groups.items())[:8]:
            first = [name for name in self.names if name.split(".")[0] == group][:3]
            parts.append(f"{count} of {group} ({', '.join(first)}{', …' if count > len(first) else ''})")
        more = f", and {len(groups) - 8} other groups" if len(groups) > 8 else ""
        found = ", ".join(parts) + more if parts else "no tensors by name"
        return f"{found}; beside them {', '.join(self.beside[:8])}" if self.beside else found


def wanted() -> str:
    """Which names the known layouts have, for a message."""
    prefixes: dict[str, list[str]] = {}
    for layout in LAYOUTS:
        prefixes.setdefault(layout.prefix or "conv1., layer1. to layer4., or patch_embed., blocks.", []).append(
            layout.name
        )
    return "; ".join(f"{prefix} ({' / '.join(names)})" for prefix, names in prefixes.items())


def find_encoder(checkpoint: Mapping[str, Any], own: Collection[str] = ()) -> Found:
    """Find the encoder in what a file holds. `own` are names that the backbone has, where that is known already.

    Dictionaries around the weights and prefixes are taken off as long as there are any that are no part of `own`. The
    layout is the first that was recognised. What is in no layout comes back as it is: whoever fills a network with it
    sees what does not fit.
    """
    beside: list[str] = []
    weights: Mapping[str, Any] = checkpoint
    while inner := next((name for name in _AROUND if isinstance(weights.get(name), Mapping)), None):
        beside += [str(name) for name in weights if name != inner]
        weights = weights[inner]
    state = {k: v for k, v in weights.items() if isinstance(k, str) and isinstance(v, Tensor)}
    beside += [str(k) for k in weights if k not in state]
    names, layout = tuple(state), LAYOUTS[-1]
    before: dict[str, Tensor] | None = None
    while before is None or before.keys() != state.keys():
        before = state
        state = _unwrapped(state, own)
        found = next(
            (e for e in LAYOUTS if not _begins(own, e.prefix) and e.matches(state.keys(), beside)), LAYOUTS[-1]
        )
        layout = found if layout is LAYOUTS[-1] else layout
        state = {k.removeprefix(found.prefix): v for k, v in state.items() if k.startswith(found.prefix)}
    state = {k: v for k, v in _named(state, own).items() if k in own or not _HEADS.match(k)}
    return Found(layout=layout, state=state, names=names, beside=tuple(beside))


def _begins(own: Collection[str], prefix: str) -> bool:
    """Whether a part of the backbone itself has this prefix, so that it must not be taken off."""
    return bool(prefix) and any(name.startswith(prefix) for name in own)


def _unwrapped(state: dict[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    for prefix in _WRAPPERS:
        if not _begins(own, prefix):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
    if state and all(k.startswith("model.") for k in state) and not _begins(own, "model."):
        state = {k.removeprefix("model."): v for k, v in state.items()}
    return state


def _named(state: dict[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """A ResNet under torchvision's names: `shortcut` is `downsample`, and numbers of a sequence are layers.

    The numbers count layers without weights too and so differ with the stem; the order does not.
    """
    if not any(".shortcut." in k for k in own):
        state = {re.sub(r"^((?:layer)?\d\.\d+)\.shortcut\.", r"\1.downsample.", k): v for k, v in state.items()}
    numbers = sorted({int(k.split(".")[0]) for k in state if k.split(".")[0].isdecimal()})
    stages = [n for n in numbers if f"{n}.0.conv1.weight" in state]
    first = [n for n in numbers if f"{n}.weight" in state and n not in stages][:2]
    if own and any(k.split(".")[0].isdecimal() for k in own):
        return state
    if len(stages) != 4 or len(first) != 2 or state[f"{first[0]}.weight"].dim() != 4:
        return state
    new = {first[0]: "conv1", first[1]: "bn1", **{n: f"layer{i + 1}" for i, n in enumerate(stages)}}
    new |= {n: "fc" for n in numbers if n > stages[-1]}
    renamed = {}
    for key, value in state.items():
        number, _, rest = key.partition(".")
        renamed[f"{new[int(number)]}.{rest}" if number.isdecimal() and int(number) in new else key] = value
    return renamed

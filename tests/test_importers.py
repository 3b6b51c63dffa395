# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of others give the right encoder: its features are those of the network in it, to the bit."""

from __future__ import annotations

import argparse
import copy
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from kinfold.architectures import architecture_of, heads_in
from kinfold.encoders import Backbone, build_backbone
from kinfold.errors import UserError
from kinfold.evaluate.backbones import load_backbone
from kinfold.layouts import CIFAR, IMAGENET, LAYOUTS
from kinfold.weights import load_backbone_weights

State = dict[str, Tensor]
HEAD = torch.ones(4, 4)
"""stands for the weights of a head"""


def scrambled(network: nn.Module) -> nn.Module:
    """A network whose statistics of batch norm are not those of the start, in evaluation mode."""
    for name, value in network.state_dict().items():
        if name.endswith(("running_mean", "bias")):
            value.uniform_(-0.2, 0.2)
        elif name.endswith("running_var") or ("bn" in name and name.endswith("weight")):
            value.uniform_(0.5, 1.5)
    return network.eval()


def resnet(padding: int | None = None) -> nn.Module:
    """torchvision's ResNet of four blocks with its `fc`; with a `padding` the 3x3 stem for CIFAR, and no pool."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        network = torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=8)
        if padding is not None:
            network.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=padding, bias=False)
            network.maxpool = nn.Identity()  # type: ignore[assignment]
        return scrambled(network)


SOURCES = {None: resnet(), 1: resnet(1), 2: resnet(2)}
"""by the padding of the small stem"""


def features(network: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = network(images)
    return found


def expected(source: nn.Module, images: Tensor) -> Tensor:
    """What the classifier of a torchvision ResNet would see."""
    without = copy.copy(source)
    without._modules = {**source._modules, "fc": nn.Identity()}
    return features(without, images)


def under(prefix: str, state: State, *, without: str = "fc.") -> State:
    return {prefix + k: v for k, v in state.items() if not without or not k.startswith(without)}


def wrong(state: State) -> State:
    """The other encoder: the same names and shapes, other values (one number in the file for each)."""
    return {k: torch.full((), 7, dtype=v.dtype).expand(v.shape) for k, v in state.items()}


def hollow(made: Any) -> Any:
    """A checkpoint of the same names and shapes that takes no room."""
    if isinstance(made, Tensor):
        return torch.zeros((), dtype=made.dtype).expand(made.shape)
    return {k: hollow(v) for k, v in made.items()} if isinstance(made, dict) else made


def numbered(network: nn.Module, *, keep: Callable[[nn.Module], bool]) -> nn.Sequential:
    """The children of a ResNet, those that are to be kept, as a sequence with numbers for names."""
    return nn.Sequential(*[child for child in network.children() if keep(child)])


def cifar_names(state: State) -> State:
    """The names of the ResNets for CIFAR that InvP has: `shortcut` and `linear`."""
    return {k.replace("downsample", "shortcut").replace("fc.", "linear."): v for k, v in state.items()}


def moco(state: State) -> Any:
    head = {"fc.0.weight": HEAD, "fc.0.bias": HEAD, "fc.2.weight": HEAD}
    rest = {"module.queue": HEAD, "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    query = under("module.encoder_q.", {**under("", state), **head}, without="")
    key = under("module.encoder_k.", {**wrong(under("", state)), **head}, without="")
    return {"epoch": 200, "arch": "resnet18", "state_dict": {**query, **key, **rest}, "optimizer": {"state": {}}}


def moco_notebook(source: nn.Module) -> Any:
    sequence = numbered(source, keep=lambda m: not isinstance(m, (nn.Identity, nn.Linear)))
    sequence.append(nn.Flatten(1))
    sequence.append(nn.Linear(512, 8))
    state = sequence.state_dict()
    both = {**under("encoder_q.net.", state), **under("encoder_k.net.", wrong(state)), "queue": HEAD}
    return {"epoch": 3, "state_dict": both, "optimizer": {}}


def moco_v3(state: State) -> Any:
    head = {f"module.{which}_encoder.fc.{n}.weight": HEAD for which in ("base", "momentum") for n in (0, 1, 3)}
    encoders = {**under("module.base_encoder.", state), **under("module.momentum_encoder.", wrong(state))}
    return {"state_dict": {**encoders, **head, "module.predictor.0.weight": HEAD}, "scaler": {"scale": 65536.0}}


def sce(state: State) -> Any:
    heads = {f"{m}{part}.layers.0.weight": HEAD for m in ("", "momentum_") for part in ("projector", "predictor")}
    encoders = {**under("momentum_trunk.", wrong(state)), **under("trunk.", state)}
    lightning = {"epoch": 9, "global_step": 10, "pytorch-lightning_version": "1.6.0", "lr_schedulers": []}
    return {**lightning, "state_dict": {**encoders, **heads, "queue": HEAD, "queue_ptr": HEAD}}


def ressl(state: State) -> Any:
    heads = {f"module.encoder_{e}.head.linear{n}.weight": HEAD for e in "qk" for n in (1, 2)}
    encoders = {**under("module.encoder_k.net.", wrong(state)), **under("module.encoder_q.net.", state)}
    return {"model": {**encoders, **heads, "module.queue": HEAD}, "optimizer": {}, "epoch": 200}


def invp(state: State) -> Any:
    return {"epoch": 801, "state_dict": under("module.", state, without=""), "memory_banks": HEAD, "neigh": HEAD}


def solo(state: State) -> Any:
    heads = {"classifier.weight": HEAD, "projector.0.weight": HEAD, "momentum_projector.0.weight": HEAD, "queue": HEAD}
    return {"state_dict": {**under("momentum_backbone.", wrong(state)), **under("backbone.", state), **heads}}


def solo_early(state: State) -> Any:
    return {"state_dict": {**under("encoder.", state), "classifier.weight": HEAD, "projector.0.weight": HEAD}}


def lightly(source: nn.Module, *, generator: bool) -> Any:
    """torchvision's children, or those of lightly's own ResNet for CIFAR, which has only layers with weights."""
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.Sequential)
    keep = (lambda m: isinstance(m, kinds)) if generator else (lambda m: not isinstance(m, nn.Linear))
    state = numbered(source, keep=keep).state_dict()
    if generator:
        state = cifar_names(state)
    heads = {"projection_head.layers.0.weight": HEAD, "projection_head_momentum.layers.0.weight": HEAD}
    return {"state_dict": {**under("backbone.", state), **under("backbone_momentum.", wrong(state)), **heads}}


def dino(state: State) -> Any:
    student = {**under("module.backbone.", wrong(state)), "module.head.mlp.0.weight": HEAD}
    return {"student": student, "teacher": {**under("backbone.", state), "head.mlp.0.weight": HEAD}, "epoch": 5}


def vicreg(state: State) -> Any:
    return {"model": {**under("module.backbone.", state), "module.projector.0.weight": HEAD}}


def swav(state: State) -> Any:
    heads = {"module.prototypes.weight": HEAD, "module.projection_head.0.weight": HEAD}
    return {**under("module.", state), **heads}


class Case(NamedTuple):
    layout: str
    make: Callable[[nn.Module], Any]
    padding: int | None = None
    """of the small stem; None: the standard stem"""
    mean: tuple[float, ...] = IMAGENET[0]
    std: tuple[float, ...] = IMAGENET[1]


def of(make: Callable[[State], Any]) -> Callable[[nn.Module], Any]:
    return lambda source: make(source.state_dict())


SOLO_STD = (0.247, 0.243, 0.261)
CASES = {
    "moco": Case("MoCo v1/v2", of(moco)),
    "moco-notebook": Case("MoCo's CIFAR-10 notebook", moco_notebook, 1, *CIFAR),
    "moco-v3": Case("MoCo v3", of(moco_v3)),
    "sce": Case("SCE (CEA-LIST/SCE or eztorch)", of(sce)),
    "sce-cifar": Case("SCE (CEA-LIST/SCE or eztorch)", of(sce), 1, *CIFAR),
    "ressl": Case("ReSSL", of(ressl)),
    "invp": Case("InvP", of(invp)),
    "invp-cifar": Case("InvP", of(lambda s: invp(cifar_names(s))), 1, *CIFAR),
    "invp-cifar-weights": Case("InvP, or another ResNet with shortcut", of(cifar_names), 1, *CIFAR),
    "solo": Case("solo-learn", of(solo)),
    "solo-cifar": Case("solo-learn", of(solo), 2, CIFAR[0], SOLO_STD),
    "solo-early": Case("solo-learn, early", of(solo_early)),
    "solo-early-cifar": Case("solo-learn, early", of(solo_early), 2, CIFAR[0], SOLO_STD),
    "lightly": Case("lightly, layers by number", lambda m: lightly(m, generator=False)),
    "lightly-cifar": Case("lightly, layers by number", lambda m: lightly(m, generator=True), 1),
    "dino": Case("DINO", of(dino)),
    "dino-flat": Case("DINO, teacher", of(lambda s: {**under("student.", wrong(s)), **under("teacher.", s)})),
    "student": Case("DINO, student", of(lambda s: under("module.student.backbone.", s))),
    "vicreg": Case("backbone and heads", of(vicreg)),
    "swav": Case("torchvision or timm", of(swav)),
    "encoder": Case("encoder and heads", of(lambda s: {**under("encoder.", s), "projection.0.weight": HEAD})),
    "compiled": Case("torchvision or timm", of(lambda s: under("_orig_mod.module.", s, without=""))),
    "lightning": Case("torchvision or timm", of(lambda s: {"state_dict": under("model.", s, without="")})),
    "torchvision": Case("torchvision or timm", of(lambda s: s)),
}  # fmt: skip


def test_every_layout_of_the_table_is_tried() -> None:
    assert {layout.name for layout in LAYOUTS} == {case.layout for case in CASES.values()}
    assert all(layout.source for layout in LAYOUTS)


@pytest.mark.parametrize("name", CASES)
def test_the_features_are_those_of_the_encoder_in_the_checkpoint(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    source, path = SOURCES[case.padding], tmp_path / "checkpoint.pth.tar"
    torch.save(case.make(source), path)
    found = load_backbone(str(path))
    images = torch.linspace(-2, 2, 2 * 3 * 36 * 36).sin().view(2, 3, 36, 36)
    assert torch.equal(features(found.module, images), expected(source, images))
    assert f"layout: {case.layout};" in found.description
    assert (found.size, found.mean, found.std) == (32 if case.padding else 224, case.mean, case.std)
    if case.padding:
        assert f"stride 1 and padding {case.padding}, no max-pool" in found.description


@pytest.mark.parametrize("name", CASES)
def test_a_weight_that_is_missing_or_too_much_in_the_encoder_is_named(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    made = hollow(case.make(SOURCES[case.padding]))
    state = next((made[name] for name in ("state_dict", "model", "teacher") if name in made), made)
    other = ("momentum", "encoder_k", "student.bn", "student.layer")
    ends = [k for k in state if k.endswith(".0.bn2.bias") and not any(o in k for o in other)]
    assert len(ends) == 4
    value = state.pop(ends[2])
    path = tmp_path / "checkpoint.ckpt"
    torch.save(made, path)
    with pytest.raises(UserError, match=r"missing layer3\.0\.bn2\.bias\."):
        load_backbone(str(path))
    state[ends[2]] = state[ends[2].replace("bn2.bias", "bn2.gain")] = value
    torch.save(made, path)
    with pytest.raises(UserError, match=r"unknown layer3\.0\.bn2\.gain\."):
        load_backbone(str(path))


@pytest.mark.parametrize("name", ["moco", "moco-notebook", "sce-cifar", "ressl", "invp-cifar", "solo-cifar", "lightly"])
def test_pretraining_starts_from_the_same_table(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    torch.save(case.make(SOURCES[case.padding]), tmp_path / "checkpoint.pth")
    backbone = build_backbone(Backbone(name="resnet10_w64", stem="small" if case.padding else "standard"))
    load_backbone_weights(backbone, tmp_path / "checkpoint.pth")
    theirs = SOURCES[case.padding].state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize(("name", "kernel"), [("resnet18", 3), ("resnet26", 1)])
def test_timms_resnets_give_their_own_features(name: str, kernel: int, tmp_path: Path) -> None:
    source: Any = timm.create_model(name, num_classes=5)
    scrambled(source)
    assert source.layer1[0].conv1.kernel_size == (kernel, kernel)  # of both kinds of block
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    images = torch.linspace(-2, 2, 3 * 64 * 64).sin().view(1, 3, 64, 64)
    with torch.inference_mode():
        pooled = source.forward_head(source.forward_features(images), pre_logits=True)
    found = load_backbone(str(tmp_path / "model.safetensors"))
    assert torch.equal(features(found.module, images), pooled)
    assert found.description.startswith(f"{name} from model.safetensors")


def test_torchvisions_resnet_50_gives_its_own_features(tmp_path: Path) -> None:
    source = scrambled(torchvision.models.resnet50())
    torch.save(source.state_dict(), tmp_path / "resnet50-0676ba61.pth")
    images = torch.linspace(-2, 2, 3 * 64 * 64).sin().view(1, 3, 64, 64)
    found = load_backbone(str(tmp_path / "resnet50-0676ba61.pth"))
    assert torch.equal(features(found.module, images), expected(source, images))
    assert found.description.startswith("resnet50 from")


NAMES = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2"]
NAMES += ["resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"]


@pytest.mark.parametrize("name", NAMES)
def test_torchvisions_resnets_are_told_by_their_shapes(name: str) -> None:
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name, weights=None).state_dict()
        how = architecture_of(theirs)
        assert how == Backbone(name=name)
        ours = build_backbone(Backbone(name=name)).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items() if not k.startswith("fc.")}


@pytest.mark.parametrize(
    ("name", "stem"), [("resnet10_w8", "small"), ("resnet10_w64", "standard"), ("resnet18_w16", "small")]
)
def test_our_slim_resnets_are_told_by_their_shapes(name: str, stem: Any) -> None:
    how = Backbone(name=name, stem=stem)
    assert architecture_of(build_backbone(how).state_dict()) == how


@pytest.mark.parametrize(("channels", "mean"), [(1, (0.5,)), (5, (0.5,) * 5)])
def test_other_numbers_of_channels_are_kept_and_said(channels: int, mean: tuple[float, ...], tmp_path: Path) -> None:
    torch.save(build_backbone(Backbone(name="resnet10_w8", stem="small"), channels).state_dict(), tmp_path / "w.pt")
    found = load_backbone(str(tmp_path / "w.pt"))
    assert (found.channels, found.mean, len(found.std)) == (channels, mean, channels)
    assert "assumed: 32 pixels; mean 0.5" in found.description


def transformer(heads: int, *, fixed: bool) -> nn.Module:
    """A tiny transformer; MoCo v3's positions are fixed, with zero for the class token."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network: Any = timm.create_model("vit_tiny_patch16_224", num_classes=0, num_heads=heads)
        network.pos_embed.data.normal_()
        if fixed:
            network.pos_embed.data[:, 0] = 0
    return network.eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize(("heads", "fixed"), [(3, False), (12, True)])
def test_a_transformer_has_as_many_heads_as_where_it_was_trained(heads: int, fixed: bool, tmp_path: Path) -> None:
    source = transformer(heads, fixed=fixed)
    state = under("module.base_encoder.", source.state_dict())
    torch.save({"state_dict": {**state, "module.base_encoder.head.0.weight": HEAD}}, tmp_path / "vit.pth.tar")
    found = load_backbone(str(tmp_path / "vit.pth.tar"))
    images = torch.linspace(-2, 2, 3 * 224 * 224).sin().view(1, 3, 224, 224)
    assert torch.equal(features(found.module, images), features(source, images))
    assert heads_in(found.module) == heads
    assert ("12 heads" in found.description) == fixed


def test_weights_for_another_number_of_heads_are_no_start(tmp_path: Path) -> None:
    torch.save(transformer(12, fixed=True).state_dict(), tmp_path / "vit.pth")
    with pytest.raises(UserError, match=r"12 heads of attention.*has 3"):
        load_backbone_weights(build_backbone(Backbone(name="vit_tiny_patch16_224")), tmp_path / "vit.pth")


SLIM = build_backbone(Backbone(name="resnet10_w8", stem="small"))


def test_the_encoder_of_a_run_without_its_folder_is_an_encoder_too(tmp_path: Path) -> None:
    save_file({**under("backbone.", SLIM.state_dict()), "head.0.weight": HEAD}, tmp_path / "encoder.safetensors")
    found = load_backbone(str(tmp_path / "encoder.safetensors"))
    assert all(torch.equal(v, SLIM.state_dict()[k]) for k, v in found.module.state_dict().items())


def test_half_precision_and_missing_counters_are_no_obstacle(tmp_path: Path) -> None:
    state = {k: v.half() for k, v in SLIM.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "half.pth")
    found = load_backbone(str(tmp_path / "half.pth")).module.state_dict()
    assert found["conv1.weight"].dtype == torch.float32
    assert torch.equal(found["conv1.weight"], state["conv1.weight"].float())


@pytest.fixture
def strangers(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Classes of packages that are not there where the file is read; what is returned takes the packages away."""
    places = ("omegaconf", "omegaconf.dictconfig", "omegaconf.base", "pytorch_lightning", "pytorch_lightning.utilities")
    for place in (*places, "pytorch_lightning.utilities.parsing"):
        monkeypatch.setitem(sys.modules, place, types.ModuleType(place))

    def stranger(place: str, name: str, base: type) -> None:
        setattr(sys.modules[place], name, type(name, (base,), {"__module__": place}))

    stranger("omegaconf.dictconfig", "DictConfig", object)
    stranger("omegaconf.base", "ContainerMetadata", object)
    stranger("pytorch_lightning.utilities.parsing", "AttributeDict", dict)
    return monkeypatch.undo


def test_settings_and_counters_of_training_loops_are_passed_over(strangers: Callable[[], None], tmp_path: Path) -> None:
    config = sys.modules["omegaconf.dictconfig"].DictConfig()
    config.__dict__.update(_metadata=sys.modules["omegaconf.base"].ContainerMetadata(), _content={"lr": 0.03})
    hyper = sys.modules["pytorch_lightning.utilities.parsing"].AttributeDict(trunk=config, data=Path("/data"))
    made = {
        "state_dict": under("trunk.", SLIM.state_dict()),
        "hyper_parameters": hyper,
        "args": argparse.Namespace(lr=0.03, where=Path("here")),
        "best_acc1": np.float64(71.1),
        "best": np.float32(3),
        "losses": np.arange(3.0),
    }
    torch.save(made, tmp_path / "new.ckpt")
    torch.save(made, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    strangers()
    before = set(sys.modules)
    for name in ("new.ckpt", "old.ckpt"):
        found = load_backbone(str(tmp_path / name)).module.state_dict()
        assert all(torch.equal(value, SLIM.state_dict()[key]) for key, value in found.items())
    assert not {m for m in set(sys.modules) - before if m.startswith(("omegaconf", "pytorch_lightning"))}


class Evil:
    """Touches a file when it is unpickled without care."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (Path.touch, (Path("run-by-the-pickle"),))


class Worse:
    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (eval, ("open('run-by-the-pickle', 'w')",))


@pytest.mark.parametrize("evil", [Evil, Worse])
@pytest.mark.parametrize("where", ["a weight", "the settings", "a namespace"])
def test_a_pickle_that_wants_to_run_code_is_refused(
    where: str, evil: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    state: dict[str, Any] = {"state_dict": dict(SLIM.state_dict())}
    if where == "a weight":
        state["state_dict"]["conv1.weight"] = evil()
    elif where == "the settings":
        state["hyper_parameters"] = {"callback": evil()}
    else:
        state["args"] = argparse.Namespace(callback=evil())
    torch.save(state, "evil.pth")
    with pytest.raises(
        UserError, match=r"evil\.pth could not be read as tensors \(it asks for .*would run code are ref"
    ):
        load_backbone("evil.pth")
    assert not (tmp_path / "run-by-the-pickle").exists()
    pickle.loads(pickle.dumps(evil()))  # it does what it is said to do where nobody takes care
    assert (tmp_path / "run-by-the-pickle").exists()


def test_a_whole_module_is_refused_with_what_to_save_instead(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(UserError, match=r"asks for torch\.nn\.modules\.linear\.Linear.*model\.state_dict\(\)"):
        load_backbone(str(tmp_path / "module.pt"))


def zipped(path: Path) -> None:
    torch.save(SLIM.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-3000])


def safe(path: Path) -> None:
    save_file(SLIM.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-300])


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 102\n"
FILES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "cut-short": ("w.pth", zipped, r"could not be read as tensors .*whole"),
    "cut-short-safetensors": ("w.safetensors", safe, r"could not be read as tensors"),
    "text": ("w.pth", lambda p: p.write_text("these are no weights, but words\n"), "it is no checkpoint"),
    "text-safetensors": ("w.safetensors", lambda p: p.write_text("words, and more of them"), "could not be read"),
    "lfs": ("w.pth.tar", lambda p: p.write_text(LFS), "pointer of Git LFS.*git lfs pull"),
    "lfs-safetensors": ("w.safetensors", lambda p: p.write_text(LFS), "pointer of Git LFS"),
    "page": ("w.pth", lambda p: p.write_text("\n<!DOCTYPE html><html>Sign in</html>"), "is a web page"),
    "empty": ("w.ckpt", lambda p: p.write_bytes(b""), "is empty"),
    "list": ("w.bin", lambda p: torch.save([torch.zeros(2)], p), "no tensors by name, but a list"),
    "optimiser": (
        "w.pth",
        lambda p: torch.save({"state": {0: {"momentum_buffer": HEAD}}, "param_groups": []}, p),
        r"no encoder.*It has no tensors by name; beside them state, param_groups\. Wanted are",
    ),
    "head": (
        "w.pth",
        lambda p: torch.save({"state_dict": {"projector.0.weight": HEAD, "projector.0.bias": HEAD, "queue": HEAD}}, p),
        r"It has 2 of projector \(projector\.0\.weight, projector\.0\.bias\), 1 of queue.*encoder_q\. \(MoCo v1/v2\); "
        r"base_encoder\. \(MoCo v3\); trunk\. \(SCE.*conv1\., layer1\.",
    ),
    "classifier": ("w.pth", lambda p: torch.save({"fc.weight": HEAD}, p), r"It has 1 of fc \(fc\.weight\)\. Wanted"),
    "another-network": (
        "w.pth",
        lambda p: torch.save(timm.create_model("mobilenetv3_small_050", num_classes=0).state_dict(), p),
        r"no encoder in it that is known.*of blocks \(blocks\.0\.0\.conv_dw\.weight, .*…\).*FrozenBackbone\(module",
    ),
    "not-finite": (
        "w.pth",
        lambda p: torch.save({**SLIM.state_dict(), "layer2.0.bn1.bias": torch.full((16,), torch.nan)}, p),
        r"not finite numbers, in layer2\.0\.bn1\.bias\.",
    ),
    "checkpoint-of-ours": (
        "w.pt",
        lambda p: torch.save({"format": 1, "step": 3, "state": {}}, p),
        "Give the run folder",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_no_backbone_is_one_message_that_names_it(kind: str, tmp_path: Path) -> None:
    name, write, message = FILES[kind]
    write(tmp_path / name)
    with pytest.raises(UserError, match=message) as caught:
        load_backbone(str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(UserError, match=r"^weights: .*w\."):
        load_backbone_weights(build_backbone(Backbone(name="resnet10_w8", stem="small")), tmp_path / name)


def test_shapes_that_look_like_another_network_do_not_load_as_it(tmp_path: Path) -> None:
    state = {**SLIM.state_dict(), "layer2.0.conv1.weight": torch.zeros(24, 8, 3, 3)}
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"of another shape layer2\.0\.conv1\.weight.*looked like those of resnet10_w8"):
        load_backbone(str(tmp_path / "other.pth"))


@pytest.mark.parametrize("where", ["nowhere.pth", "nowhere.safetensors", "nowhere"])
def test_a_file_that_is_not_there_is_said_to_be_missing(where: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names no backbone: there is no such file"):
        load_backbone(str(tmp_path / where))
    with pytest.raises(UserError, match=r"^weights: there is no file"):
        load_backbone_weights(SLIM, tmp_path / where)


def test_a_folder_is_a_run_folder_or_a_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        load_backbone(str(tmp_path))
    with pytest.raises(UserError, match=r"is a folder\. Give a \.safetensors or \.pth file"):
        load_backbone_weights(SLIM, tmp_path)

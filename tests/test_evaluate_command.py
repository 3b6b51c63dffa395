# SPDX-License-Identifier: Apache-2.0
"""What holds for every protocol: the same command, one whole result, and a backbone that is afterwards as it was."""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mask_layouts import shapes
from test_feature_cache import WithHoles
from test_processes import free_port
from torch import nn
from voc_layout import annotation, thing, write_devkit

from kinfold import cli, cli_evaluate
from kinfold.encoders import Backbone, build_backbone
from kinfold.errors import UserError
from kinfold.evaluate import PROTOCOLS, FrozenBackbone, Labelled, evaluate, load_protocol
from kinfold.evaluate import _at_size as at_size
from kinfold.evaluate.resumable import Resumable, place_of_progress
from kinfold.export import export_backbone
from kinfold.recipe import RECIPES
from kinfold.run_folder import held

SHORT: dict[str, list[str]] = {
    "knn": [],
    "linear": ["epochs=2"],
    "semi-supervised": ["epochs=2", "share=0.5", "batch_size=16", "backbone_rates=[0.01]"],
    "fine-tune": ["epochs=2", "batch_size=16"],
    "transfer": ["decays=3"],
    "voc-svm": ["shots=[1]", "costs=[0.5]"],
    "voc-logistic": ["steps=3", "batch_size=4", "augment.size=32", "test_size=32", "test_resize=36"],
    "detection": ["iterations=2", "batch_size=2", "train_short=[48]", "test_short=48", "warmup=0", "milestones=[]"],
    "segmentation": ["steps=2", "batch_size=2", "crops.size=33"],
    "patches": ["steps=2", "batch_size=2", "crops.size=33"],
}
FILES = sorted((RECIPES / "evaluate").rglob("*.yaml"))
RECIPE = {"detection": "bccd-two-cores", "segmentation": "voc-two-cores", "patches": "voc-two-cores"}


def backbone(channels: int = 3) -> FrozenBackbone:
    torch.manual_seed(0)
    module = build_backbone(Backbone(name="resnet10_w8", stem="small-stride2"), channels)
    module.train()  # so that a protocol that forgets evaluation mode changes the running statistics
    many = (0.5,) * channels
    return FrozenBackbone(module=module, size=16, channels=channels, mean=many, std=many, description="a small one")


def data_for(protocol: str, place: Path) -> str:
    """A few images in the layout that a protocol wants."""
    if protocol in ("segmentation", "patches"):
        return str(shapes(place, train=6, test=3))
    if protocol in ("voc-svm", "voc-logistic", "detection"):
        things = [(thing("cat"), thing("dog", (1, 1, 8, 8))), (thing("cat"),), (thing("dog", (4, 2, 14, 10)),)]
        xml = {f"{number:03}": annotation(*things[number % 3]) for number in range(12)}
        return str(write_devkit(place / "pets", xml, {"train": list(xml)[:8], "test": list(xml)[8:]}))
    return "digits"


def state_of(module: nn.Module) -> tuple[dict[str, torch.Tensor], list[bool]]:
    state = {name: value.clone() for name, value in module.state_dict().items()}
    return state, [part.training for part in module.modules()]


def test_the_command_names_the_protocols_of_the_package() -> None:
    assert list(cli_evaluate.PROTOCOLS) == list(PROTOCOLS)
    assert all((RECIPES / "evaluate" / name / "default.yaml").is_file() for name in PROTOCOLS)


@pytest.mark.parametrize(
    "file", sorted((RECIPES / "evaluate").rglob("*.yaml")), ids=lambda f: f"{f.parent.name}-{f.stem}"
)
def test_every_recipe_is_read_and_says_what_it_is(file: Path) -> None:
    assert load_protocol(file.parent.name, file.stem) is not None
    assert file.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("protocol", list(PROTOCOLS))
def test_a_protocol_leaves_the_backbone_as_it_was_and_writes_one_whole_result(protocol: str, tmp_path: Path) -> None:
    data = data_for(protocol, tmp_path)
    frozen = backbone(1 if data == "digits" else 3)
    state, modes = state_of(frozen.module)
    out = tmp_path / "out"
    splits: dict[str, Any] = {"train_split": "train"} if protocol in ("voc-svm", "voc-logistic", "detection") else {}
    said: list[str] = []
    result = evaluate(
        protocol,
        frozen,
        data,
        recipe=RECIPE.get(protocol, "default"),
        overrides=SHORT[protocol],
        limit=80 if data == "digits" else None,
        out=out,
        device="cpu",
        say=said.append,
        **splits,
    )
    after, modes_after = state_of(frozen.module)
    assert all(torch.equal(value, after[name]) for name, value in state.items())
    assert modes == modes_after
    assert all(parameter.grad is None for parameter in frozen.module.parameters())
    written = json.loads(Path(result["file"]).read_text())
    assert written["values"]
    assert all(value is None or math.isfinite(value) for value in written["values"].values())
    assert written["protocol"] == protocol
    assert written["unit"]
    assert written["backbone"]["weights_sha256"]
    assert written["data"]
    assert not list(out.glob("*.progress")), "what a stopped run would go on from is left behind"
    assert len(list(out.glob("*.json"))) == 1


def exported(place: Path) -> Path:
    """The small backbone as a file, as a person has it."""
    card = {"name": "resnet10_w8", "stem": "small-stride2", "channels": 1, "mean": [0.5], "std": [0.5], "size": 16}
    return export_backbone(backbone(1).module, place / "backbone.safetensors", card=card)


def run_command(monkeypatch: pytest.MonkeyPatch, *words: str) -> object:
    """Run the command in this process; gives its exit code."""
    monkeypatch.setattr("sys.argv", ["kinfold", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def only_values(folder: Path) -> dict[str, float]:
    (found,) = folder.glob("*.json")
    values: dict[str, float] = json.loads(found.read_text())["values"]
    return values


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_was_stopped_goes_on_and_ends_as_if_it_had_not_been(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ["evaluate", "linear", "--backbone", str(exported(tmp_path)), "--data", "digits", "--limit", "100"]
    told += ["augment={like: weak, size: 16}", "epochs=3", "batch_size=32", "--out"]
    assert run_command(monkeypatch, *told, str(tmp_path / "whole")) == 0
    count = Resumable.took_step

    def interrupted(going: Resumable) -> None:
        if going.step == 4:  # in the middle of the second epoch
            os.kill(os.getpid(), number)
        count(going)

    with monkeypatch.context() as patch:
        patch.setattr(Resumable, "took_step", interrupted)
        assert run_command(monkeypatch, *told, str(tmp_path / "broken")) == 128 + number
    assert "Stopped at step 5 of 12. The same command goes on from there." in capsys.readouterr().err
    (kept,) = (tmp_path / "broken").glob("*.progress")
    assert list(kept.rglob("step-*.pt"))
    assert run_command(monkeypatch, *told, str(tmp_path / "broken")) == 0
    assert "going on at step 5 of 12" in capsys.readouterr().err
    assert only_values(tmp_path / "whole") == only_values(tmp_path / "broken")
    assert not list((tmp_path / "broken").glob("*.progress"))


def test_damaged_progress_is_refused_with_what_to_remove(tmp_path: Path) -> None:
    frozen, place = backbone(1), tmp_path / "out"
    stored: list[Path] = []

    def remember(text: str) -> None:
        stored.extend(place.glob("*.progress"))

    words = ["augment={like: weak, size: 16}", "epochs=1", "batch_size=300"]  # the batch is said, before the training
    evaluate("linear", frozen, "digits", overrides=words, limit=60, out=place, say=remember)
    folder = stored[0] / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "step-00000003.pt").write_bytes(b"half a file")
    with pytest.raises(UserError, match=rf"(?s)No checkpoint .*Or remove {stored[0]}"):
        evaluate("linear", frozen, "digits", overrides=words, limit=60, out=place, say=remember)


def test_two_commands_do_not_work_on_one_question_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kinfold.evaluate.resumable.held", functools.partial(held, patience=0.1))
    with place_of_progress(tmp_path / "a.progress"):
        with pytest.raises(UserError, match="another process is at work"), place_of_progress(tmp_path / "a.progress"):
            pass
        with place_of_progress(tmp_path / "b.progress"):
            pass
    assert not list(tmp_path.iterdir())


def test_a_place_that_takes_no_files_is_found_before_anything_is_computed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    frozen = backbone(1)
    frozen.module.register_forward_hook(lambda *_: pytest.fail("something was computed"))
    with pytest.raises(UserError, match=r"takes no files .*another out="):
        evaluate("knn", frozen, "digits", limit=20, out=tmp_path / "file" / "results")


def test_a_size_reaches_training_and_test_images() -> None:
    for protocol, recipe in (("voc-logistic", "invp-voc07"), ("linear", "moco-imagenet"), ("fine-tune", "invp-cars")):
        settings = at_size(load_protocol(protocol, recipe), 112, None)
        assert (settings.augment.size, settings.test_size, settings.test_resize) == (112, 112, 128), protocol


def test_training_images_that_do_not_decode_are_named_by_linear() -> None:
    said: list[str] = []
    data = Labelled(train=WithHoles(30, {3, 7}), test=WithHoles(20, set()), say=said.append)
    settings = load_protocol("linear", overrides=["augment={like: weak, size: 16}", "epochs=2", "batch_size=10"])
    PROTOCOLS["linear"].measure(backbone(1), data, settings)
    assert any("2 of 30 images do not decode" in text and "others stand in" in text for text in said)


def test_a_recipe_of_evaluation_is_shown_complete(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(monkeypatch, "recipes", "show", "evaluate/linear/sce-cifar10", "--complete", "epochs=7") == 0
    shown = capsys.readouterr().out
    assert "epochs: 7" in shown
    assert "pad_crop: 4" in shown


def test_two_processes_write_one_result_with_the_values_of_one(tmp_path: Path) -> None:
    told = ["--backbone", str(exported(tmp_path)), "--data", "digits", "--limit", "200", "--no-cache"]
    words = ["evaluate", "linear", *told, "epochs=3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    alone = [sys.executable, "-m", "kinfold"]
    together = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    together += ["--master-port", str(free_port()), "-m", "kinfold"]
    values = []
    for name, start in (("one", alone), ("two", together)):
        subprocess.run(
            [*start, *words, "--out", str(tmp_path / name)], check=True, env=environment, capture_output=True
        )
        (found,) = (tmp_path / name).glob("*.json")
        values.append(json.loads(found.read_text())["values"])
    assert values[1] == pytest.approx(values[0], abs=1e-6)

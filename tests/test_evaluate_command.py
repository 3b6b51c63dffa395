# SPDX-License-Identifier: Apache-2.0
"""What holds for every protocol: the same command, one whole result, and a backbone that is afterwards as it was."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from mask_layouts import shapes
from test_processes import free_port
from torch import nn
from voc_layout import annotation, thing, write_devkit

from kinfold import cli
from kinfold.encoders import Backbone, build_backbone
from kinfold.evaluate import PROTOCOLS, FrozenBackbone, evaluate, load_protocol
from kinfold.export import export_backbone
from kinfold.recipe import RECIPES

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
    assert list(cli.PROTOCOLS) == list(PROTOCOLS)
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


def test_a_command_that_was_stopped_goes_on_and_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    frozen = backbone(1)
    card = {"name": "resnet10_w8", "stem": "small-stride2", "channels": 1, "mean": [0.5], "std": [0.5], "size": 16}
    export_backbone(frozen.module, tmp_path / "backbone.safetensors", card=card)

    def command(out: str, *words: str) -> list[str]:
        told = ["--backbone", str(tmp_path / "backbone.safetensors"), "--data", "digits", "--out", str(tmp_path / out)]
        settings = ["augment={like: weak, size: 16}", "epochs=25", "batch_size=64"]
        return [sys.executable, "-m", "kinfold", "evaluate", "linear", *told, *settings, "--limit", "256", *words]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command("whole"), check=True, env=environment, capture_output=True)
    process = subprocess.Popen(command("broken"), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(5)  # past the imports on a quiet machine; too early is fine too, then nothing has been kept
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    if process.returncode == 128 + signal.SIGTERM:
        assert b"The same command goes on from there" in errors
        assert list((tmp_path / "broken").glob("*.progress"))
    subprocess.run(command("broken"), check=True, env=environment, capture_output=True)
    results = [json.loads(next((tmp_path / out).glob("*.json")).read_text()) for out in ("whole", "broken")]
    assert results[0]["values"] == results[1]["values"]
    assert not list((tmp_path / "broken").glob("*.progress"))


def test_two_processes_write_one_result_with_the_values_of_one(tmp_path: Path) -> None:
    frozen = backbone(1)
    card = {"name": "resnet10_w8", "stem": "small-stride2", "channels": 1, "mean": [0.5], "std": [0.5], "size": 16}
    export_backbone(frozen.module, tmp_path / "backbone.safetensors", card=card)
    told = ["--backbone", str(tmp_path / "backbone.safetensors"), "--data", "digits", "--limit", "200", "--no-cache"]
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

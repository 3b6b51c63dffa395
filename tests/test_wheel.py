# SPDX-License-Identifier: Apache-2.0
"""What people install: the wheel is built, unpacked away from the checkout, and works from there, recipes included."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel holds."""
    place = tmp_path_factory.mktemp("wheel")
    # Where the backend is installed nothing has to be fetched; elsewhere `build` gets it for itself.
    alone = ["--no-isolation"] if importlib.util.find_spec("hatchling") else []
    words = [sys.executable, "-m", "build", "--wheel", *alone, "--outdir", str(place / "dist"), str(ROOT)]
    built = subprocess.run(words, capture_output=True, text=True, check=False, cwd=place)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (place / "dist").glob("kinfold-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place / "unpacked")
    return place / "unpacked"


def kinfold(unpacked: Path, *words: str) -> str:
    """What the command of the unpacked wheel prints, started from a folder where there is nothing else."""
    elsewhere = unpacked.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(unpacked), "KINFOLD_CACHE": str(unpacked.parent / "cache")}
    command = [sys.executable, "-m", "kinfold", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=elsewhere, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_the_package_with_every_recipe_and_nothing_else(unpacked: Path) -> None:
    def files(root: Path) -> set[str]:
        return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.suffix in (".py", ".yaml", ".typed")}

    assert files(unpacked / "kinfold") == files(ROOT / "kinfold")
    assert "sce/cifar10.yaml" in files(unpacked / "kinfold" / "recipes")
    assert sorted(p.name.split("-")[0] for p in unpacked.iterdir()) == ["kinfold", "kinfold"]
    assert list(unpacked.glob("kinfold-*.dist-info/licenses/LICENSE"))


def test_its_command_lists_and_shows_the_recipes(unpacked: Path) -> None:
    names = {line.split()[0] for line in kinfold(unpacked, "recipes").splitlines() if line.strip()}
    assert {"own-images", "sce/cifar10", "evaluate/knn/moco-notebook"} <= names
    shown = yaml.safe_load(kinfold(unpacked, "recipes", "show", "sce/cifar10", "--complete"))
    assert shown["method"]["name"] == "sce"
    assert shown["views"]["augment"][0]["size"] == 32


def test_it_pretrains_two_steps_from_where_it_was_unpacked(unpacked: Path) -> None:
    words = ["epochs=1", "limit=256", "batch_size=128", "probe_every=0", "probe_limit=64", "workers=0", "device=cpu"]
    told = kinfold(unpacked, "--traceback", "pretrain", "digits", "--out", "run", "backbone.name=resnet10_w8", *words)
    assert "Done: 2 steps" in told
    run = unpacked.parent / "elsewhere" / "run"
    wanted = {"recipe.yaml", "run.yaml", "metrics.jsonl", "backbone.safetensors", "backbone.md", "encoder.safetensors"}
    assert wanted | {"summary.json", "checkpoints"} <= {path.name for path in run.iterdir()}
    assert json.loads((run / "summary.json").read_text(encoding="utf-8"))["finished"] is True


def test_python_takes_the_unpacked_package_and_not_the_checkout(unpacked: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    command = [sys.executable, "-c", "import kinfold; print(kinfold.__file__)"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=unpacked.parent, env=environment)
    assert Path(done.stdout.strip()).is_relative_to(unpacked)

# SPDX-License-Identifier: Apache-2.0
"""Everything that wants a GPU, in one command, the most valuable first, within a limit of seconds where one is given.

    python benchmarks/device_all.py --data CIFAR10 --out measured
    python benchmarks/device_all.py --data CIFAR10 --out measured --seconds 560
    python benchmarks/device_all.py --data CIFAR10 --out measured --seconds 560 compile=true
    python benchmarks/device_all.py --device cpu --quick --out measured

The steps run one after the other, each in a process of its own: whether the device gives what the CPU gives, the step
of ResNet-50 beside its encoders, a CIFAR-10 recipe, then the bank's search, the augmentations, CIFAR-10 living on the
device, the step in parts, the other recipes (what wants CIFAR-10 is left out without `--data`). A step that fails or
takes too long is ended with all its processes and leaves the others. Results go to `benchmarks/results` and, after
every step, to the folder `--out`, with what each step printed. The same command goes on where the last one stopped: a
step is done where its result was measured to the end with the code as it is now. Exit code 0: all is done; 3: give the
command again; 1: a step failed.

On a machine that is new each time, carry the folder `--out`, which has all results and says what is done, there and
back, and `runs`, which has the checkpoints of a recipe under way; without `runs` that recipe begins anew. Where only
few files can be fetched, pack the folder into one archive. Results that it brings back belong in `benchmarks/results`,
charts in `docs`.

Needs what kinfold needs; on a machine without a network bring what it lacks. kinfold imports pydantic (with
pydantic-core, annotated-types, typing-inspection), typer, rich, timm, safetensors, pyyaml, pillow, pyarrow, scipy,
scikit-learn and matplotlib; `datasets` only where CIFAR10 is Parquet, not for class folders of PNG files. kornia is
compared with where it is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
AGAIN = 3
"""exit code of a step, and of this command, that goes on when it is given again"""
SETTLE = 10.0
"""seconds that a step has between being asked to end and being ended"""


@dataclass(frozen=True)
class Step:
    """One process."""

    name: str
    words: tuple[str, ...]
    """what python is given; {device}, {data}, {note}, {minutes}, {runs}, {code} and {settings} are filled in"""
    result: str | None
    """benchmarks/results/RESULT.json, which says that it is done"""
    least: float
    """seconds without which it is not begun"""
    most: float
    """seconds after which it is ended"""
    brings: tuple[str, ...] = ()
    """other files that it makes, from the repository's root"""


def cifar(name: str, recipe: str, *words: str) -> Step:
    """One CIFAR-10 recipe, as far as the time goes."""
    script = ("benchmarks/cifar10_gpu.py", recipe, "--data", "{data}", "--device", "{device}", "--name", name)
    goes_on = ("--minutes", "{minutes}", "--out", f"{{runs}}/gpu-{name}-{{code}}", "--note", "{note}")
    return Step(name, (*script, *goes_on, *words, "{settings}"), f"gpu-{name}", 60, 1e9)


STEPS = (
    Step("agrees", ("benchmarks/device_agrees.py", "--device", "{device}"), "device-agrees", 60, 300),
    Step(
        "step-whole",
        ("benchmarks/gpu_step.py", "--device", "{device}", "--part", "whole", "--rounds", "2", "{settings}"),
        "gpu-step-whole",
        120,
        420,
    ),
    cifar("moco-cifar10-notebook-asymmetric", "moco/cifar10-notebook-asymmetric"),
    Step(
        "bank-search",
        ("benchmarks/bank_search.py", "--device", "{device}"),
        "bank-search-cuda",
        150,
        300,
        ("docs/bank-search-cuda.png",),
    ),
    Step("augment-speed", ("benchmarks/augment_speed.py", "--device", "{device}"), "gpu-augment-speed", 120, 300),
    Step(
        "resident",
        ("benchmarks/resident.py", "--device", "{device}", "--data", "{data}"),
        "resident-cuda",
        60,
        300,
    ),
    Step(
        "step-changes",
        ("benchmarks/gpu_step.py", "--device", "{device}", "--part", "changes"),
        "gpu-step-changes",
        120,
        420,
    ),
    cifar("sce-cifar10", "sce/cifar10"),
    cifar("moco-256", "moco/cifar10-notebook-asymmetric", "batch_size=256"),
    cifar("sce-512", "sce/cifar10", "batch_size=512"),
)


def code(step: Step, settings: list[str]) -> str:
    """A hash of the package and of the step's own words and script: what a result depends on."""
    digest = hashlib.sha256(repr((step.words, settings if "{settings}" in step.words else [])).encode())
    own = [ROOT / word for word in step.words if word.endswith(".py")]
    package = (path for kind in ("*.py", "*.yaml") for path in (ROOT / "kinfold").rglob(kind))
    for path in sorted({*own, *package}):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def read(path: Path) -> dict[str, Any]:
    """A file of JSON; empty where there is none, or half of one."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found


def is_done(step: Step, out: Path, record: dict[str, Any], now: str) -> bool:
    """Whether it was measured to the end with the code `now`, here or where the folder `out` was brought from.

    `record` knows of steps without a result.
    """
    if step.result is None:
        return bool(record.get(step.name, {}).get("done") == now)
    return any(read(folder / f"{step.result}.json").get("measured_to_the_end_with") == now for folder in (RESULTS, out))


def filled(step: Step, given: argparse.Namespace, seconds: float) -> list[str]:
    """The command line of a step that has so many seconds."""
    values = {
        "device": given.device,
        "data": os.path.abspath(given.data) if given.data and os.path.exists(given.data) else given.data or "",
        "note": given.note,
        "minutes": f"{max(seconds - 20, 5) / 60:.2f}",
        "runs": str(given.out if given.quick else ROOT / "runs"),
        "code": code(step, given.settings),
    }
    words = [word.format(**values) for word in step.words if word != "{settings}"]
    words += given.settings if "{settings}" in step.words else []
    quick = ["--quick"] if given.quick and step.words[0].startswith("benchmarks/") else []
    return [sys.executable, *words[:1], *quick, *words[1:]]


def run(step: Step, given: argparse.Namespace, seconds: float) -> int | None:
    """Run a step, what it prints into OUT/NAME.log; its exit code, None where its time was over."""
    # The package need not be installed; it lies here.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with (given.out / f"{step.name}.log").open("ab") as log:
        process = subprocess.Popen(
            filled(step, given, seconds),
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that it ends with all the processes that it has started
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": path},
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end, give it a moment, and end what is left of its group."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SETTLE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def bring(step: Step, given: argparse.Namespace, *, finished: bool, since: float) -> None:
    """Note in the result what it was measured with, and copy what the step has made to OUT."""
    files = [ROOT / name for name in step.brings]
    if step.result is not None:
        path = RESULTS / f"{step.result}.json"
        found = read(path)
        if found and path.stat().st_mtime >= since:
            found["commit"] = found.get("commit") or given.commit
            if finished:
                found["measured_to_the_end_with"] = code(step, given.settings)
            path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        files.append(path)
    for path in files:
        if path.is_file() and path.stat().st_mtime >= since:
            shutil.copy2(path, given.out / path.name)


def main() -> None:
    """Read the words; run what is not done while there is time."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument(
        "--seconds", type=float, default=math.inf, help="this command's time, no end if not given; the same one goes on"
    )
    words.add_argument("--out", type=Path, required=True, help="folder for copies of all results, and logs")
    words.add_argument("--data", help="CIFAR-10; what wants it is left out if not given")
    words.add_argument("--note", default="", help="a sentence on CIFAR10 for the page, if it is not the original files")
    words.add_argument("--device", default="cuda")
    words.add_argument("--only", nargs="+", choices=[step.name for step in STEPS], help="these steps only")
    words.add_argument("--commit", help="what is measured, where git does not say")
    words.add_argument("--quick", action="store_true", help="to see that all of it runs; no results are written")
    words.add_argument("settings", nargs="*", help="key=value for the training runs, such as compile=true")
    given = words.parse_intermixed_args()
    until = time.monotonic() + given.seconds
    given.out = given.out.resolve()
    given.out.mkdir(parents=True, exist_ok=True)
    record = read(given.out / "device-all.json")
    wanted = [step for step in STEPS if given.data or "{data}" not in step.words]
    for step in (step for step in wanted if step.name in (given.only or [step.name])):
        left = until - time.monotonic() - SETTLE - 5
        now = code(step, given.settings)
        if is_done(step, given.out, record, now):
            told: dict[str, Any] = {"state": "done before", "done": now}
        elif left < step.least and not given.quick:
            told = {"state": "no time"}
        else:
            began, since = time.monotonic(), time.time() - 1
            print(f"{step.name} ...", flush=True)
            ended = run(step, given, max(min(step.most, left), 1.0))
            names = {0: "done", AGAIN: "unfinished", None: "out of time"}
            told = {"state": names.get(ended, "failed"), "exit": ended, "seconds": round(time.monotonic() - began, 1)}
            told["done"] = now if ended == 0 else None
            bring(step, given, finished=ended == 0, since=since)
        record[step.name] = told
        (given.out / "device-all.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        print(f"{step.name}: {told['state']}", *([f"{told['seconds']} s"] if "seconds" in told else []), flush=True)
    states = {record[step.name]["state"] for step in wanted if step.name in record}
    sys.exit(1 if "failed" in states else 0 if states <= {"done", "done before"} else AGAIN)


if __name__ == "__main__":
    main()

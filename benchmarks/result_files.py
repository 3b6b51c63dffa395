# SPDX-License-Identifier: Apache-2.0
"""The files under benchmarks/results, as the pages that are made of them read and name them."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NOT_YET = "not measured yet"


def read(name: str) -> dict[str, Any] | None:
    """The result file NAME.json; None where it is not there."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def link(name: str) -> str:
    """A Markdown link to a result file."""
    return f"[{name}.json](benchmarks/results/{name}.json)"


def spread(values: list[float], *, digits: int = 1, sign: bool = False) -> str:
    """A mean with its standard deviation over seeds; the value alone where there is one."""
    form = f"{'+' if sign else ''}.{digits}f"
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def machine(result: dict[str, Any]) -> str:
    """What a result was measured on, in words."""
    about = result["machine"]
    if about.get("gpu") and result.get("device") != "cpu":
        return str(about["gpu"])
    return f"{about['processor']}, {about['threads']} of {about['cores']} cores"

# SPDX-License-Identifier: Apache-2.0
"""Do the results say of their figures what their scripts say of them now?

    python benchmarks/pages.py            writes the entry "page" of the stored results anew
    python benchmarks/pages.py --check    says which would change, and fails if one would

Those are the results that stand on docs/performance.md. Figures are never touched. For a text that was corrected after
the measurement; then `performance.py` makes the page.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from measured import RESULTS
from performance_sections import SECTIONS


def stored() -> list[Path]:
    """The result files that stand on the page of performance, as far as they were measured."""
    paths = [RESULTS / f"{wanted.name}.json" for about in SECTIONS for wanted in about.files]
    return [path for path in paths if path.is_file()]


def script_of(result: dict[str, Any]) -> str:
    """The name of the script that measured it."""
    return Path(result["command"].split()[1]).stem


def page_of(result: dict[str, Any]) -> dict[str, Any]:
    """What the script that measured this says of it, as JSON would hold it."""
    told = importlib.import_module(script_of(result)).page({k: v for k, v in result.items() if k != "page"})
    found: dict[str, Any] = json.loads(json.dumps(told))
    return found


def main() -> None:
    """Write the pages, or check them."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--check", action="store_true")
    given = words.parse_args()
    others = []
    for path in stored():
        result = json.loads(path.read_text(encoding="utf-8"))
        page = page_of(result)
        if result.get("page") == page:
            continue
        others.append(path.name)
        if not given.check:
            text = json.dumps({**result, "page": page}, indent=2, ensure_ascii=False)
            path.write_text(text + "\n", encoding="utf-8")
    print(*others, sep="\n")
    if given.check and others:
        sys.exit("these say something else of their figures than their scripts do: run python benchmarks/pages.py")


if __name__ == "__main__":
    main()

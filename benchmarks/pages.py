# SPDX-License-Identifier: Apache-2.0
"""Do the results say of their figures what their scripts say of them now?

    python benchmarks/pages.py            writes every stored result's entry "page" anew
    python benchmarks/pages.py --check    says which would change, and fails if one would

Figures are never touched. For a text that was corrected after the measurement; then `performance.py` makes the page.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from measured import RESULTS


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
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if "page" not in result or result["page"] == (page := page_of(result)):
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

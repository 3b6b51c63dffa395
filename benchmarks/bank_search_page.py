# SPDX-License-Identifier: Apache-2.0
"""What docs/performance.md says of a result of benchmarks/bank_search.py."""

from __future__ import annotations

from typing import Any

from measured import counted, plain, suffix, times

NAMES = {"blocked": "Kinfold, blocked", "dense": "dense product + top-k", "numpy": "dense, numpy's product"}
APART = ("blocked", "dense")
"""ours and the other where each has a process of its own"""
CASES = {"together": "random", "clustered": "in clusters"}
"""part of the result -> how its rows lie"""


def page(result: dict[str, Any]) -> dict[str, Any]:
    """What a reader should see."""
    ways = list(result["together"]["seconds"])
    rows = []
    for part, layout in CASES.items():
        if part in result:
            found = result[part]["seconds"]
            spans = [seconds(found[way]) for way in ways]
            rows.append([f"{result[part]['rows']:,}, {layout}, in turns", *spans, "", ""])
    for count, one in result["growth"].items():
        spans = [alone(one[way]) if way in one else "" for way in ways]
        memory = [plain(one[way]["bytes"] / 1e6) if worked(one[way]) else "" for way in APART]
        rows.append([f"{int(count):,}", *spans, *memory])
    columns = ["images", *(f"seconds, {NAMES[way]}" for way in ways), *(f"MB, {NAMES[way]}" for way in APART)]
    return {
        "title": "The search in a bank of one key per image (InvP)",
        "text": text(result),
        "table": {"columns": columns, "rows": rows},
        "charts": [f"bank-search{suffix(result['device'])}.png"] if result["growth"] else [],
        "summary": summary(result),
    }


def worked(one: dict[str, Any] | None) -> bool:
    """Whether a process had the memory that it needs, and ended well."""
    return one is not None and "failed" not in one


def alone(one: dict[str, Any] | None) -> str:
    """Seconds in a process of its own, or why there are none."""
    if one is None:
        return "does not fit"
    return f"failed ({one['failed']})" if "failed" in one else seconds(one["seconds"])


def seconds(found: dict[str, Any]) -> str:
    """Median and range."""
    return f"{plain(found['median'])} ({plain(found['least'])} to {plain(found['greatest'])})"


def text(result: dict[str, Any]) -> list[str]:
    """The paragraphs of the page."""
    found = [
        f"{result['queries']} queries, the {result['nearest']:,} most similar keys of {result['width']} numbers, on "
        f"{result['device']} with {counted(result['threads'], 'thread')}; median (least to greatest) of the seconds. "
        "The search alone: no gradient and no loss is in it. Dense is one product with all rows and torch's top-k. In "
        "turns: in one process, round by round. Other rows: each way in a process of its own, one after the other, on "
        "random unit vectors; memory is the peak beyond the bank."
    ]
    numpy = result["together"]["seconds"].get("numpy")
    if numpy is not None:
        found.append(
            f"Our search multiplies with numpy's product on a CPU. Dense with that product takes "
            f"{times(numpy['times_ours'])} as long as ours, which is what the search itself gains; dense with torch's "
            f"takes {times(result['together']['seconds']['dense']['times_ours'])} as long."
        )
    shares = [f"{100 * result[part]['rows_in_common']:.3f} % ({CASES[part]})" for part in CASES if part in result]
    differs = max(result[part]["similarity_differs_at_most"] for part in CASES if part in result)
    found.append(
        f"Rows that ours and dense both find: {', '.join(shares)}; the n-th greatest similarities of the two differ by "
        f"{differs:.1g} at most."
    )
    if "clustered" in result:
        found.append(
            f"*In clusters*: {result['clustered']['clusters']:,} of them, one behind the other as in a folder sorted "
            "by class, with queries from the same clusters. The nearest rows then come all at once, a hard case for "
            "a search that keeps what beats the best so far."
        )
    behind = [f"{rows:,} ({times(ratio)} as fast)" for rows, ratio in apart(result).items() if ratio < 1]
    if behind:
        found.append(
            f"Slower than dense at N = {', '.join(behind)}, each way in a process of its own, by the quotient of the "
            "two medians."
        )
    return found


def apart(result: dict[str, Any]) -> dict[int, float]:
    """N -> how many times as long as ours dense took, by the medians, as processes of their own take no turns."""
    return {
        int(rows): found["dense"]["seconds"]["median"] / found["blocked"]["seconds"]["median"]
        for rows, found in result["growth"].items()
        if all(worked(found[way]) for way in APART)
    }


def summary(result: dict[str, Any]) -> list[dict[str, str]]:
    """What is compared, in a row each."""
    rows = []
    for part, layout in CASES.items():
        if part in result:
            found, at = result[part]["seconds"], result[part]["rows"]
            others = {NAMES[way]: one for way, one in found.items() if way != "blocked"}
            rows.append(
                {
                    "question": f"the {result['nearest']:,} nearest of {at:,} rows, {layout}, for "
                    f"{result['queries']} queries: time",
                    "ours": f"{plain(found['blocked']['median'])} s",
                    "alternative": ", ".join(f"{plain(one['median'])} s ({name})" for name, one in others.items()),
                    "ratio": ", ".join(times(one["times_ours"]) for one in others.values()),
                }
            )
    ratios = apart(result)
    if ratios:
        medians = {way: [result["growth"][str(n)][way]["seconds"]["median"] for n in ratios] for way in APART}
        least, most = (plain(end(medians["blocked"])) for end in (min, max))
        dense = [f"{plain(median)} s (dense, {n:,} rows)" for n, median in zip(ratios, medians["dense"])]
        rows.append(
            {
                "question": f"the {result['nearest']:,} nearest for {result['queries']} queries, each way in a process "
                "of its own: time",
                "ours": f"{least} to {most} s" if len(ratios) > 1 else f"{least} s",
                "alternative": ", ".join(dense),
                "ratio": ", ".join(times(ratio) for ratio in ratios.values()),
            }
        )
    at = result["together"]["rows"]
    if at in ratios:
        ours, theirs = (result["growth"][str(at)][way]["bytes"] / 1e6 for way in APART)
        rows.append(
            {
                "question": f"the {result['nearest']:,} nearest of {at:,} rows for {result['queries']} queries: memory "
                "beyond the bank",
                "ours": f"{plain(ours)} MB",
                "alternative": f"{plain(theirs)} MB ({NAMES['dense']})",
                "ratio": times(theirs / ours),
            }
        )
    return rows

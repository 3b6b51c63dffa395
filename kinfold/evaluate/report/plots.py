# SPDX-License-Identifier: Apache-2.0
"""Two pictures of results: mAP over the images a class (low-shot), and accuracy over the share of labels.

Curves are labelled where they end, in colours that colour-blind people tell apart, each with its own marker. Published
curves are dashed and grey and carry their provenance mark. Needs matplotlib.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from kinfold.evaluate.report.formats import MARK, plain_line
from kinfold.evaluate.report.published import LEGEND, MARKS
from kinfold.evaluate.report.tables import Cell, Column, Table

# Okabe and Ito, Color Universal Design (2008), without yellow, which is too light for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
_GREY = "#707070"
# Inches; at half the width the smallest letters have 4 points in print, and are read at twice that on a screen.
_WIDTH, _LEFT, _AXES_WIDTH, _AXES_HEIGHT = 5.4, 0.62, 2.9, 2.3
_ABOVE, _BELOW = 0.52, 0.52
_LINE, _LETTERS = 0.14, 23  # height of a label's line, and how many letters it has
OURS = ("MoCo", "ReSSL", "SCE", "CO2", "InvP")
"""methods whose published curves are drawn; the others stand in the table"""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A place on a curve."""

    x: float
    y: float
    spread: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One backbone's curve, or a published one."""

    label: str
    points: tuple[Point, ...]
    published: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Curves that compare, with what their axes are."""

    title: str
    about: str
    """which results these are"""
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]
    ticks: tuple[tuple[float, str], ...]
    remarks: tuple[str, ...] = ()


def draw(table: Table) -> dict[str, bytes]:
    """Draw the pictures that the results have curves for: file name to content."""
    found = {"low-shot": low_shot(table), "semi-supervised": semi_supervised(table)}
    return {
        f"{name}.{kind}": picture(panels, kind) for name, panels in found.items() if panels for kind in ("svg", "png")
    }


def low_shot(table: Table) -> list[Panel]:
    """One panel a question of the VOC SVM: mAP over k, and all images at the right end."""
    panels = []
    for columns in _together(table, "voc-svm", lambda c: (c.question._replace(metric=""), c.changes)):
        shots = {c: _shots(c.metric) for c in columns if _shots(c.metric) is not None}
        known = sorted({k for k in shots.values() if k is not None and k > 0})
        if not known:
            continue
        # "all" is no number of images a class; it stands one step to the right.
        places = {k: float(k) for k in known} | {0: known[-1] * 2.0}
        x = {c: places[k] for c, k in shots.items() if k is not None}
        ticks = tuple((places[k], str(k)) for k in known)
        if 0 in shots.values():
            ticks += ((places[0], "all"),)
        curves = _curves(table, x)
        if curves:
            panels.append(
                Panel(
                    title="Low-shot classification by linear SVM",
                    about=f"{_recipe(columns[0])}, {_images(columns[0])}",
                    x_label="training images a class",
                    y_label="mAP (%)",
                    curves=curves,
                    ticks=ticks,
                    remarks=_remarks(table, x),
                )
            )
    return panels


def semi_supervised(table: Table) -> list[Panel]:
    """Two panels a family of recipes: top-1 and top-5 over the share of labels.

    Of the best epoch where that is known, as papers report it, else of the last.
    """
    panels = []
    best = any(c.protocol == "semi-supervised" and c.metric.startswith("best/") for c in table.columns)
    for columns in _together(table, "semi-supervised", lambda c: (_family(c.recipe), c.images, c.subset, c.metric)):
        x = {column: share for column in columns if (share := _share(column)) is not None}
        if columns[0].metric.startswith("best/") != best:
            continue
        if len(set(x.values())) < 2:
            continue
        curves = _curves(table, x)
        if not curves:
            continue
        metric = columns[0].metric
        when = "best epoch" if metric.startswith("best") else "last epoch"
        top = "top-5" if metric.endswith("top5") else "top-1"
        panels.append(
            Panel(
                title=f"Fine-tuned on a share of the labels: {top}",
                about=f"{_family(columns[0].recipe)}, {_images(columns[0])}",
                x_label="labels used (%)",
                y_label=f"{top}, {when} (%)",
                curves=curves,
                ticks=tuple((share, f"{share:g}") for share in sorted(set(x.values()))),
                remarks=_remarks(table, x),
            )
        )
    return panels


def _together(table: Table, protocol: str, key: Callable[[Column], Any]) -> list[list[Column]]:
    groups: dict[Any, list[Column]] = {}
    for column in table.columns:
        if column.protocol == protocol:
            groups.setdefault(key(column), []).append(column)
    return list(groups.values())


def _shots(metric: str) -> int | None:
    """Images a class of a value's name; 0 for all of them, None for another value."""
    if metric == "mAP/full":
        return 0
    found = re.fullmatch(r"mAP/k=(\d+)", metric)
    return int(found[1]) if found else None


def _family(recipe: str) -> str:
    """The recipe's name without the share at its end: `invp-1` and `invp-10` are a curve."""
    return re.sub(r"-\d+$", "", recipe)


def _share(column: Column) -> float | None:
    """The share of the labels in percent."""
    share = column.settings.get("share")
    return 100.0 * share if isinstance(share, int | float) and not isinstance(share, bool) else None


def _images(column: Column) -> str:
    return f"{column.images}, subset" if column.subset else column.images


def _recipe(column: Column) -> str:
    return f"{column.recipe} ({column.changes})" if column.changes else column.recipe


def _curves(table: Table, x: dict[Column, float]) -> tuple[Curve, ...]:
    """The rows that have at least two points, ours first."""
    found = []
    for line in table.lines:
        points = [Point(x=x[c], y=cell.mean, spread=_spread(cell, c)) for c, cell in line.cells.items() if c in x]
        if len(points) > 1:
            found.append(Curve(label=line.label, points=_sorted(points)))
    if not found:
        return ()
    for published in table.published:
        numbers = {c: n for c, n in published.cells.items() if c in x and n.method.startswith(OURS)}
        if numbers:
            marks = "".join(sorted({MARKS[number.provenance] for number in numbers.values()}))
            points = [Point(x=x[c], y=number.value, spread=number.std or 0.0) for c, number in numbers.items()]
            label = f"{published.label}, published{marks}"
            if len(points) == 1:
                label = f"× {label}: {points[0].y:g}"
            found.append(Curve(label=label, points=_sorted(points), published=True))
    return tuple(found)


def _sorted(points: Sequence[Point]) -> tuple[Point, ...]:
    return tuple(sorted(points, key=lambda point: point.x))


def _spread(cell: Cell, column: Column) -> float:
    """The spread over repetitions; of a single result, that over its own draws of images."""
    if cell.std is not None:
        return cell.std
    return cell.answers[0].values.get(column.metric.replace("mAP/", "std/"), 0.0) if "/k=" in column.metric else 0.0


def _remarks(table: Table, x: dict[Column, float]) -> tuple[str, ...]:
    """What the bands and marks of a panel mean."""
    cells = [cell for line in table.lines for c, cell in line.cells.items() if c in x and _spread(cell, c)]
    used = [n for line in table.published for c, n in line.cells.items() if c in x and n.method.startswith(OURS)]
    found = []
    if cells:
        over = sorted({cell.over or "draws of images" for cell in cells})
        found.append(f"band: ± 1 standard deviation over {' or '.join(over)}")
    if used:
        kinds = [LEGEND[kind] for kind in MARKS if any(number.provenance == kind for number in used)]
        found.append("dashed or crosses: published; " + "; ".join(kinds))
    return tuple(found)


def picture(panels: Sequence[Panel], kind: str) -> bytes:
    """Draw panels under each other, as "svg" or "png"; the same panels give the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    look: Any = {"svg.hashsalt": "kinfold", "font.size": 10.0, "font.family": "DejaVu Sans", "text.parse_math": False}
    with matplotlib.rc_context(look):
        remarks = list(dict.fromkeys(remark for panel in panels for remark in panel.remarks))
        notes = [line for remark in remarks for line in textwrap.wrap(remark, 94)]
        labels = [_wrapped(panel) for panel in panels]
        heights = [max(_AXES_HEIGHT, _LINE * sum(len(label) + 0.3 for label in some)) for some in labels]
        whole = sum(heights) + (_ABOVE + _BELOW) * len(panels) + 0.1 + 0.15 * len(notes)
        figure = Figure(figsize=(_WIDTH, whole))
        top = whole
        for panel, some, height in zip(panels, labels, heights):
            bottom = top - _ABOVE - height
            axes = figure.add_axes((_LEFT / _WIDTH, bottom / whole, _AXES_WIDTH / _WIDTH, height / whole))
            _panel(axes, panel, some, height)
            figure.text(0.1 / _WIDTH, (top - 0.22) / whole, panel.title, fontsize=10.5, weight="bold")
            figure.text(0.1 / _WIDTH, (top - 0.4) / whole, plain_line(panel.about)[:90], fontsize=8.5, color="#404040")
            top = bottom - _BELOW
        for place, line in enumerate(reversed(notes)):
            figure.text(0.1 / _WIDTH, (0.1 + 0.15 * place) / whole, line, fontsize=8, color="#404040")
        content = io.BytesIO()
        metadata = {"Creator": MARK, "Date": None} if kind == "svg" else {"Software": MARK}
        figure.savefig(content, format=kind, dpi=200, metadata=metadata)
    return content.getvalue()


def _wrapped(panel: Panel) -> list[list[str]]:
    """The label of every curve as lines that fit beside the panel."""
    return [textwrap.wrap(plain_line(curve.label), _LETTERS, max_lines=4, placeholder=" ...") for curve in panel.curves]


def _panel(axes: Any, panel: Panel, labels: Sequence[list[str]], height: float) -> None:
    """Draw one panel: lines, bands, and a label where each line ends."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xscale("log", base=2)
    ends = []
    ours = 0
    for curve, label in zip(panel.curves, labels):
        x, y = [point.x for point in curve.points], [point.y for point in curve.points]
        style: Any = "solid"
        if curve.published:
            colour, style, marker = _GREY, (0, (4, 2)), "x"
        else:
            colour, marker = COLOURS[ours % len(COLOURS)], MARKERS[ours % len(MARKERS)]
            ours += 1
            low, high = [p.y - p.spread for p in curve.points], [p.y + p.spread for p in curve.points]
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(x, y, color=colour, linestyle=style, marker=marker, markersize=5, linewidth=1.5)
        # A line from the label of a single point would cross the picture; its label says where it is instead.
        ends.append(_End(x[-1], y[-1], label, colour, joined=len(curve.points) > 1))
    axes.set_xticks([place for place, _ in panel.ticks], [text for _, text in panel.ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.grid(axis="y", color="#D8D8D8", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _label(axes, ends, height)


class _End(NamedTuple):
    """Where a line ends, and what is written there."""

    x: float
    y: float
    label: list[str]
    colour: str
    joined: bool
    """whether a thin line leads to its label"""


def _label(axes: Any, ends: Sequence[_End], height: float) -> None:
    """Write the labels at the right, none over another, each joined to the end of its line."""
    low, high = axes.get_ylim()
    ends = sorted(ends, key=lambda end: end.y)
    sizes = [_LINE * (len(end.label) + 0.3) / height for end in ends]
    thin = {"arrowstyle": "-", "linewidth": 0.6, "relpos": (0, 0.5), "shrinkB": 4}
    for end, centre in zip(ends, spaced([(end.y - low) / (high - low) for end in ends], sizes)):
        axes.annotate(
            "\n".join(end.label),
            xy=(end.x, end.y),
            xycoords="data",
            xytext=(1.06, centre),
            textcoords="axes fraction",
            color=end.colour,
            fontsize=8.5,
            va="center",
            linespacing=1.05,
            annotation_clip=False,
            arrowprops={**thin, "color": end.colour} if end.joined else None,
        )


def spaced(wanted: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """Move rising centres as little as need be so that things of these sizes lie in [0, 1] and none over another.

    Things that touch move as one block, whose centre is the mean of what its members want. More than fit begin at 0.
    """
    blocks: list[tuple[float, float, int]] = []  # centre, size, members
    for centre, size in zip(wanted, sizes):
        block = (_inside(centre, size), size, 1)
        while blocks and blocks[-1][0] + blocks[-1][1] / 2 > block[0] - block[1] / 2:
            other = blocks.pop()
            members, both = other[2] + block[2], other[1] + block[1]
            block = (_inside((other[0] * other[2] + block[0] * block[2]) / members, both), both, members)
        blocks.append(block)
    found: list[float] = []
    for centre, size, members in blocks:
        edge = centre - size / 2
        for one in sizes[len(found) : len(found) + members]:
            found.append(edge + one / 2)
            edge += one
    return found


def _inside(centre: float, size: float) -> float:
    return max(min(centre, 1.0 - size / 2), size / 2)

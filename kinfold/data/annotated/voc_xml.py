# SPDX-License-Identifier: Apache-2.0
"""The XML files of the VOC layout: which objects an image shows, and where; everything wrong is named with its line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple
from xml.parsers import expat

from kinfold.errors import UserError


class Box(NamedTuple):
    """One object of an annotation."""

    name: str
    corners: tuple[float, float, float, float]
    """x1, y1, x2, y2 as the file says: counted from 1, the last pixel included"""
    difficult: bool
    line: int
    """where its <object> begins in the file"""

    @property
    def has_area(self) -> bool:
        """Whether the second corner lies to the right of and below the first; one on the other is a slip."""
        x1, y1, x2, y2 = self.corners
        return x2 > x1 and y2 > y1


class Annotation(NamedTuple):
    """What one XML file says."""

    path: Path
    width: int
    """in pixels, as the file says; 0 where it does not"""
    height: int
    boxes: list[Box]


def read_annotation(path: Path) -> Annotation:
    """Read an XML file of the VOC layout. Raises `UserError` with file and line where it is malformed."""
    reader = _Reader(path)
    try:
        reader.parser.Parse(path.read_bytes(), True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except expat.ExpatError as error:
        reason = expat.ErrorString(error.code)
        raise UserError(f"{path}, line {error.lineno}: the XML is malformed: {reason}.") from error
    except (LookupError, ValueError) as error:  # how expat's Python side refuses an encoding
        raise UserError(f"{path}, line 1: its encoding cannot be read ({error}). Save it as UTF-8.") from error
    return Annotation(path, reader.side("width"), reader.side("height"), reader.boxes)


class _Reader:
    """Follows an annotation tag by tag. What lies deeper than an object's own box, such as its parts, is passed by."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.boxes: list[Box] = []
        self.parser = expat.ParserCreate()
        self.parser.buffer_text = True
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._text
        self.parser.EntityDeclHandler = self._entity
        self._open: list[str] = []
        self._line = 0
        self._size: dict[str, str] = {}
        self._object: dict[str, str] = {}
        self._words: list[str] = []

    def side(self, name: str) -> int:
        """The image's width or height as the file says, 0 where it does not."""
        text = self._size.get(name, "0")
        try:
            return int(float(text))
        except (ValueError, OverflowError):
            raise UserError(f"{self.path}: the image's {name} is {text!r}, which is no number.") from None

    def _start(self, tag: str, _attributes: dict[str, str]) -> None:
        self._open.append(tag)
        self._words = []
        if self._open[1:] == ["object"]:
            self._line, self._object = self.parser.CurrentLineNumber, {}

    def _text(self, text: str) -> None:
        self._words.append(text)

    def _end(self, tag: str) -> None:
        inside, text = self._open[1:-1], "".join(self._words).strip()
        if inside == ["size"]:
            self._size[tag] = text
        elif inside in (["object"], ["object", "bndbox"]):
            self._object["/".join([*inside[1:], tag])] = text
        elif not inside and tag == "object":
            self.boxes.append(self._box())
        self._open.pop()
        self._words = []

    def _box(self) -> Box:
        name = self._object.get("name", "")
        if not name:
            raise UserError(f"{self.path}, line {self._line}: the object has no name.")
        corners = []
        for side in ("xmin", "ymin", "xmax", "ymax"):
            text = self._object.get(f"bndbox/{side}")
            try:
                number = float(text if text is not None else "nan")
            except ValueError:
                number = float("nan")
            if not math.isfinite(number):
                said = "has no" if text is None else f"says {text!r} for its"
                raise UserError(f"{self.path}, line {self._line}: the object {name!r} {said} {side}.")
            corners.append(number)
        difficult = self._object.get("difficult", "0") or "0"
        if difficult not in ("0", "1"):
            said = f"difficult is 0 or 1, not {difficult!r}"
            raise UserError(f"{self.path}, line {self._line}: of the object {name!r}, {said}.")
        x1, y1, x2, y2 = corners
        return Box(name, (x1, y1, x2, y2), difficult == "1", self._line)

    def _entity(self, name: str, *_rest: object) -> None:
        # Entities can make a small file into a huge one, and no annotation needs any.
        raise UserError(f"{self.path}, line {self.parser.CurrentLineNumber}: it declares the entity {name!r}.")

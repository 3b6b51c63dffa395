# SPDX-License-Identifier: Apache-2.0
"""The strict reader: YAML and `key=value` to settings, and back, with every fault named by its path.

pydantic finds the faults, as JSON so that lists are taken for tuples and nothing else is bent; here they become
sentences. YAML's own traps are removed: `1e-6` is a number, `on` is a word, a key stands once.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Hashable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from kinfold.errors import UserError

T = TypeVar("T")


class _Reader(yaml.SafeLoader):
    """YAML with numbers and truth values as people expect them: `1e-6` is a number, `on` is a word."""


_Reader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for _REPLACED in [{"tag:yaml.org,2002:bool", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"}]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Reader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false)$"), list("tf"))
_Reader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$"),
    list("-+.0123456789"),
)


def _unique_mapping(reader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    """Read a mapping and refuse a key that stands twice, which YAML would silently overwrite."""
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = reader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise UserError(f"line {key_node.start_mark.line + 1}: a key is a word, but this one is {key!r}.")
        if key in seen:
            raise UserError(f"line {key_node.start_mark.line + 1}: the key {key!r} stands twice; remove one.")
        seen.add(key)
    return reader.construct_mapping(node, deep=True)


_Reader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)
# Settings are words, numbers, lists and mappings: a date, a set or bytes asked for by a tag are refused as unknown.
_KNOWN = {None, *(f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map"))}
_Reader.yaml_constructors = {tag: make for tag, make in _Reader.yaml_constructors.items() if tag in _KNOWN}


def read_text(path: Path) -> str:
    """Read a text file of a person. Raises `UserError` where it cannot be read or is no UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Give a YAML file.") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path} is no text in UTF-8 (line {line}). Give a YAML file, saved as UTF-8.") from None


def read_yaml(text: str, *, source: str) -> Any:
    """Parse YAML text; `source` names it in messages. Raises `UserError` where it is not YAML."""
    try:
        return yaml.load(text, Loader=_Reader)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets a thousand deep
        raise UserError(f"{source} holds a value that is no setting: {error}") from None


def assign(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the entry with the dotted name `key`; a number counts list entries and `*` means all of them."""
    parts = key.split(".")
    places: list[Any] = [values]
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        following: list[Any] = []
        for place in places:
            if isinstance(place, list):
                if part != "*" and not (part.isdecimal() and int(part) < len(place)):
                    raise UserError(f"{key}: {part!r} is no entry; give a number from 0 to {len(place) - 1}, or *.")
                chosen: list[Any] = list(range(len(place))) if part == "*" else [int(part)]
            elif isinstance(place, dict):
                chosen = [part]
            else:
                raise UserError(f"{key}: {'.'.join(parts[:depth])} is a single value and has no {part!r}.")
            for entry in chosen:
                if last:
                    place[entry] = value
                else:
                    if isinstance(place, dict) and place.get(entry) is None:
                        place[entry] = {}
                    following.append(place[entry])
        places = following


def parse(kind: type[T], values: Any, *, source: str) -> T:
    """Check plain values against a settings class. Raises `UserError` listing every fault with its path."""
    try:
        return TypeAdapter(kind).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        lines = [_explain(kind, fault) for fault in error.errors(include_url=False)]
        raise UserError(f"{source}: " + ("\n  ".join(["", *lines]) if len(lines) > 1 else lines[0])) from None


def _explain(kind: type, fault: Any) -> str:
    """Say one fault that pydantic found: path, what was given, what to write."""
    path, owner = _path_of(kind, fault["loc"])
    if fault["type"] == "unexpected_keyword_argument":
        names = [f.name for f in fields(owner)] if owner is not None and is_dataclass(owner) else []
        near = difflib.get_close_matches(str(fault["loc"][-1]), names, n=1, cutoff=0.5)
        known = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(names)}."
        return f"{path}: unknown setting. {known}"
    if fault["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{path}: missing; give it a value."
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] in ("union_tag_invalid", "union_tag_not_found"):
        names = sorted(str(option.name) for option in _dataclasses_in(_hints(owner).get(fault["loc"][-1])))
        tag = fault["ctx"].get("tag")
        given = "the name is missing" if tag is None else f"{tag!r} is none"
        return f"{path}.name: {given}; there are {', '.join(names)}"
    if fault["type"] == "json_invalid":  # the only way there: a name with bytes that are no text
        return "a value holds bytes that are no UTF-8 text, as names from old systems do; rename the folder or file"
    if fault["type"] == "value_error":
        return f"{path}: {message}" if path else message
    return f"{path}: {message[0].lower() + message[1:]}, but got {json.dumps(fault['input'], default=str)}"


def _path_of(kind: Any, location: tuple[Any, ...]) -> tuple[str, Any]:
    """The dotted path that a person wrote for pydantic's location, and the class that holds its last part."""
    path: list[str] = []
    owner: Any = kind
    for part in location:
        options = _dataclasses_in(kind)
        tagged = next((o for o in options if getattr(o, "name", None) == part), None)
        if tagged is not None and part not in {f.name for f in fields(tagged)}:
            kind = tagged
            continue
        if isinstance(part, str) and not path and not options:
            continue
        path.append(str(part))
        owner = options[0] if options else None
        known = {f.name: f.type for f in fields(options[0])} if options else {}
        kind = _hints(options[0]).get(part) if options and part in known else kind
    return ".".join(path), owner


def _hints(owner: Any) -> dict[str, Any]:
    """The annotations of a settings class, evaluated."""
    return get_type_hints(owner, include_extras=True)


def _dataclasses_in(kind: Any) -> list[Any]:
    """The settings classes inside an annotation, through unions, tuples and `Annotated`."""
    if is_dataclass(kind):
        return [kind]
    if get_origin(kind) is None and not get_args(kind):
        return []
    return [found for inner in get_args(kind) for found in _dataclasses_in(inner)]


def plain(value: Any) -> dict[str, Any]:
    """Settings as plain values, complete, ready for YAML or JSON."""
    result: dict[str, Any] = TypeAdapter(type(value)).dump_python(value, mode="json")
    return result


def to_yaml(value: Any) -> str:
    """Settings as YAML, complete, in the order of their definition."""
    return yaml.safe_dump(plain(value), sort_keys=False, allow_unicode=True, width=110)


def differences(first: Any, second: Any, *, path: str = "") -> list[str]:
    """Dotted names and values in which two plain structures differ: `epochs: 100 here, 200 there`."""
    if isinstance(first, dict) and isinstance(second, dict):
        keys = [*first, *(k for k in second if k not in first)]
        return [d for k in keys for d in differences(first.get(k), second.get(k), path=f"{path}.{k}".lstrip("."))]
    if isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        return [d for i, (a, b) in enumerate(zip(first, second)) for d in differences(a, b, path=f"{path}.{i}")]
    return [] if first == second else [f"{path}: {json.dumps(first)} here, {json.dumps(second)} there"]

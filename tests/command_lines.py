# SPDX-License-Identifier: Apache-2.0
"""Command lines of the benchmarks, as the docs and other scripts name them, read by each script's own parser."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
ALTERNATIVES = "uv run --with-requirements benchmarks/alternatives.txt "


class Taken(Exception):
    """The words are taken; what they mean, in place of what the script would do."""


def named(text: str) -> list[str]:
    """The command lines of benchmarks between backticks in a text."""
    found: list[str] = re.findall(r"`([^`\n]*\bpython benchmarks/[^`\n]+)`", text)
    return found


def taken(command: str) -> argparse.Namespace:
    """What a command line means to the script that it names.

    Raises: `SystemExit` where the script refuses the words, `AssertionError` where the line is of another form.
    """
    words = shlex.split(command.removeprefix(ALTERNATIVES))
    assert words[0] == "python", command
    script = ROOT / words[1]
    assert script.is_file(), command

    def first(read: Any) -> Any:
        def reading(parser: argparse.ArgumentParser, *given: Any, **more: Any) -> None:
            raise Taken(read(parser, *given, **more))

        return reading

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(script.parent)
        main = importlib.import_module(script.stem).main
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, first(getattr(argparse.ArgumentParser, name)))
        patch.setattr("sys.argv", words[1:])
        with pytest.raises(Taken) as told:
            main()
    meant: argparse.Namespace = told.value.args[0]
    return meant

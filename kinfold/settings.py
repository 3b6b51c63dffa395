# SPDX-License-Identifier: Apache-2.0
"""The one decorator for everything a recipe can say: frozen, keyword-only, refuses what it does not know.

Types are strict: `true` is no number, `"on"` is no truth value, `"0.1"` is no float; a whole number is taken where
a float is expected, because `epochs: 200` and `base: 1` are what people write. YAML's own traps (`1e-6` is a string
to YAML 1.1) are removed where the YAML is read, in `kinfold.reading`.
"""

from __future__ import annotations

from typing import Annotated, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

T = TypeVar("T")
Count = Annotated[int, Field(ge=1)]
"""a number of things, at least one"""

_CONFIG = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
def settings(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only dataclass whose values are checked when it is made.

    Raises pydantic's `ValidationError` on an unknown name, a wrong type or a value outside its bounds.
    """
    made: type[T] = dataclass(frozen=True, kw_only=True, config=_CONFIG)(cls)  # type: ignore[assignment]
    return made

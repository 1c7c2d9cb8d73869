"""One check for the documented forms of JSON that commands write."""

from __future__ import annotations

import math
from typing import Any

Fields = dict[str, tuple[type, ...]]
"""Maps each key to its allowed types. An object must have all of these keys and no other."""


class NotFiniteError(ValueError):
    """A measured number is infinite or NaN, because what was measured has diverged."""


def check_fields(value: Any, fields: Fields, where: str) -> None:
    """Validates one object against its fields; numbers must be finite.

    Args:
      value: the object.
      fields: what it must hold.
      where: its place in the file, which begins the error message.

    Raises:
      NotFiniteError: a number is not finite.
      ValueError: anything else is not as documented; the message names the first such thing.
    """
    if not isinstance(value, dict) or set(value) != set(fields):
        found = sorted(value) if isinstance(value, dict) else repr(value)
        raise ValueError(f"{where}: got the keys {found}, expected {sorted(fields)}.")
    for name, types in fields.items():
        if not isinstance(value[name], types) or isinstance(value[name], bool):
            expected = " or ".join(t.__name__ for t in types)
            raise ValueError(f"{where}.{name}: got {value[name]!r}, expected {expected}.")
        if isinstance(value[name], float) and not math.isfinite(value[name]):
            raise NotFiniteError(f"{where}.{name}: got {value[name]}, expected a finite number.")

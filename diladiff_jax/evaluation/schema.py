"""One check for the documented forms of the JSON that commands write."""

from __future__ import annotations

import math
from typing import Any

Fields = dict[str, tuple[type, ...]]
"""Name -> the types that it may have. All names must be there, and no other."""


class NotFiniteError(ValueError):
    """A measure that is no finite number: what it is of has diverged."""


def check_fields(value: Any, fields: Fields, where: str) -> None:
    """Holds one object against its fields; numbers must be finite.

    Raises:
      NotFiniteError: a number that is not, after `where`.
      ValueError: naming the first thing that is not as documented, after `where`.
    """
    if not isinstance(value, dict) or set(value) != set(fields):
        raise ValueError(
            f"{where} has the keys {sorted(value) if isinstance(value, dict) else value!r}; it must have {sorted(fields)}"
        )
    for name, types in fields.items():
        if not isinstance(value[name], types) or isinstance(value[name], bool):
            raise ValueError(
                f"{where}.{name} is {value[name]!r}; it must be {' or '.join(t.__name__ for t in types)}"
            )
        if isinstance(value[name], float) and not math.isfinite(value[name]):
            raise NotFiniteError(f"{where}.{name} is {value[name]}; it must be finite")

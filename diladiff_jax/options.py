"""Settings as dataclasses: each one declared once, with its default, meaning and valid values.

An options class is a frozen dataclass whose fields are made by `setting`:

    @dataclasses.dataclass(frozen=True)
    class MDLMOptions(Options):
        weighting: str = setting("one", "weight of the masked tokens' loss", one_of("one", "bound"))

`config.py` builds the schema of an experiment, its checks, and the reference page of all settings
from these classes. Constructing one with an invalid value raises `OptionError`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import numpy as np

LARGEST = float(np.finfo(np.float32).max)


class OptionError(ValueError):
    """A setting with an invalid value: its `name`, its `value`, and what is `valid`."""

    def __init__(self, name: str, value: Any, valid: str) -> None:
        super().__init__(f"{name}: got {value!r}, expected {valid}")
        self.name, self.value, self.valid = name, value, valid


@dataclasses.dataclass(frozen=True)
class Rule:
    """A condition on one value, and words for the values that satisfy it."""

    holds: Callable[[Any], bool]
    words: str | Callable[[], str]

    @property
    def valid(self) -> str:
        """The words; those of an extensible table are composed when they are needed."""
        return self.words if isinstance(self.words, str) else self.words()


def one_of(*values: Any) -> Rule:
    """One of the given values."""
    return Rule(lambda value: value in values, "one of " + ", ".join(map(str, values)))


def key_of(table: Mapping[str, Any]) -> Rule:
    """A name in a table, including names that are added to it later."""
    return Rule(lambda value: value in table, lambda: "one of " + ", ".join(table))


def at_least(least: float) -> Rule:
    """A number of at least `least`."""
    return Rule(lambda value: value >= least, f"at least {least}")


def above(bound: float) -> Rule:
    """A number above `bound`."""
    return Rule(lambda value: value > bound, f"a number above {bound}")


def between(low: float, high: float) -> Rule:
    """A number from `low` to `high`, both included."""
    return Rule(lambda value: low <= value <= high, f"between {low} and {high}")


def fraction_below(bound: float) -> Rule:
    """A number in [0, bound)."""
    return Rule(lambda value: 0 <= value < bound, f"in [0, {bound})")


def in_float32(value: float) -> float:
    """The number that devices compute with: in float32, where the smallest numbers become 0."""
    with np.errstate(over="ignore"):
        used = float(np.float32(value))
    return used if abs(used) >= np.finfo(np.float32).tiny else 0.0


def setting(default: Any, help: str, rule: Rule | None = None) -> Any:
    """A dataclass field with a default, a one-line explanation, and the rule for its values."""
    return dataclasses.field(default=default, metadata={"help": help, "rule": rule})


@dataclasses.dataclass(frozen=True)
class Options:
    """Base of all options: checks every field's rule, then `conflicts`.

    Raises:
      OptionError: a value that its rule or a combination excludes.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            rule, value = field.metadata.get("rule"), getattr(self, field.name)
            if rule is not None and not rule.holds(value):
                raise OptionError(field.name, value, rule.valid)
            if isinstance(value, float):  # a bound must hold for the number that is computed with
                used = in_float32(value)
                if not math.isfinite(used):
                    raise OptionError(field.name, value, f"at most {LARGEST:.2g} in size")
                if rule is not None and not rule.holds(used):
                    raise OptionError(field.name, value, f"{rule.valid}; in float32 it is {used:g}")
        for name, valid in self.conflicts():
            raise OptionError(name, getattr(self, name), valid)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yields (setting, what would be valid) for combinations of settings that are invalid."""
        return iter(())

    @classmethod
    def of(cls, block: Mapping[str, Any]) -> Self:
        """The options in a block of the config, which may also hold settings of other classes."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: block[name] for name in names if name in block})

"""Bad input of every kind, as hypothesis strategies of whole command lines.

`tools/reliability/faults.py --inputs=N` runs N cases. The tests run a few, and hypothesis shrinks
those that fail.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import hypothesis
from bad_command_lines import command_lines
from bad_configs import configs
from bad_texts import corpora, prompts
from bad_workdirs import workdirs
from hypothesis import strategies as st
from input_case import Case


class Kind(NamedTuple):
    """A kind of bad input.

    Attributes:
      strategy: given the files of the base workdir, the strategy of its cases.
      percent: its share of all cases.
    """

    strategy: Callable[[Mapping[str, bytes]], st.SearchStrategy[Case]]
    percent: int


KINDS = {
    "bad config": Kind(configs, 25),
    "bad command line": Kind(command_lines, 35),
    "bad corpus": Kind(corpora, 25),
    "bad prompt": Kind(prompts, 5),
    "bad workdir": Kind(workdirs, 10),
}


def shares(total: int) -> dict[str, int]:
    """How many cases of each kind make `total`."""
    counts = {name: total * kind.percent // 100 for name, kind in KINDS.items()}
    first = next(iter(counts))
    return counts | {first: counts[first] + total - sum(counts.values())}


def sample_cases(kind: str, base: Mapping[str, bytes], number: int, seed: int) -> list[Case]:
    """The first `number` cases of a kind that hypothesis generates from a seed.

    Args:
      kind: one of `KINDS`.
      base: the files of the base workdir.
      number: how many cases.
      seed: determines the cases.
    """
    found: list[Case] = []
    if number:

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=number,
            database=None,
            deadline=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(KINDS[kind].strategy(base))
        def collect(case: Case) -> None:
            found.append(case)

        collect()
    return found

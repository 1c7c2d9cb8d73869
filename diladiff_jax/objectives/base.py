"""What every training objective has in common.

An objective is a frozen dataclass of networks and settings with two pure functions,
`init(key) -> params` and `loss(params, context, tokens, key, step) -> (loss, (metrics, statistics))`,
and `group(path)`, which names the optimizer group of a parameter. One train loop runs them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import flax.struct
import jax

Array = jax.Array
Params = Mapping[str, Any]
Metrics = dict[str, Array]


class Context(flax.struct.PyTreeNode):
    """What a loss reads besides its own parameters: frozen networks of earlier stages, and running statistics."""

    frozen: dict[str, Any] = flax.struct.field(default_factory=dict)
    statistics: dict[str, Any] = flax.struct.field(default_factory=dict)


class Part(NamedTuple):
    """Which microbatch of an update this is: `index` of `of`, its rows being every `of`-th row of the global batch.

    Draws of the microbatch come from `fold_in(key, index)`; only what belongs to the global batch, the offset of
    its stratified times, comes from the update's key itself.
    """

    index: Array | int = 0
    of: int = 1


WHOLE = Part()
"""The whole batch at once."""


class Objective(Protocol):
    """One training stage."""

    def init(self, key: Array) -> Params:
        """Fresh parameters of everything that this stage trains (boxed with logical axis names)."""
        ...

    def loss(
        self,
        params: Params,
        context: Context,
        tokens: Array,
        key: Array,
        step: Array,
        *,
        train: bool = True,
        part: Part = WHOLE,
    ) -> tuple[Array, tuple[Metrics, dict[str, Any]]]:
        """tokens int32 `[B, L]` -> scalar loss, metrics, and the statistics to carry on.

        `key` is the update's, the same for all its microbatches; see `Part`.
        """
        ...

    def group(self, path: tuple[str, ...]) -> str:
        """Optimizer group of the parameter at `path`: "frozen", or a name whose warm-up the config gives."""
        ...

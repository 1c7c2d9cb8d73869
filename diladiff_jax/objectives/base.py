"""What every training objective has in common.

An objective is a frozen dataclass of networks and options with two pure functions, `init` and
`loss`, and with `group`, which names the optimizer group of a parameter. One train loop runs all
objectives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import flax.struct
import jax
from jaxtyping import Array, Float, Int, PRNGKeyArray

Params = Mapping[str, Any]
Metrics = dict[str, Array]


class Context(flax.struct.PyTreeNode):
    """What a loss reads besides its own parameters.

    Attributes:
      frozen: parameters of networks of earlier stages, by name.
      statistics: running moments of features and latents.
    """

    frozen: dict[str, Any] = flax.struct.field(default_factory=dict)
    statistics: dict[str, Any] = flax.struct.field(default_factory=dict)


class Part(NamedTuple):
    """Which microbatch of an update this is: every `of`-th row of the global batch, from `index`.

    A microbatch draws from `fold_in(key, index)`. Only the offset of the stratified times, which
    belongs to the global batch, is drawn from the update's own key.
    """

    index: Array | int = 0
    of: int = 1


WHOLE = Part()
"""The whole batch at once."""

LossOutput = tuple[Float[Array, ""], tuple[Metrics, dict[str, Any]]]
"""The loss, and (metrics, the statistics for the next update)."""


class Objective(Protocol):
    """One training stage.

    An objective may also define
      `init_statistics() -> statistics`, if it keeps running moments;
      `text_encoder`, if all that its loss reads of a row of tokens is the row's latent, which may
        then be given in its place; and
      `expensive_branch_probability`, the share of updates that take the more expensive branch of a
        conditional (see `training.flops.model_flops`).
    """

    def init(self, key: PRNGKeyArray) -> Params:
        """Initial parameters of all that this stage trains, boxed with logical axis names."""
        ...

    def loss(
        self,
        params: Params,
        context: Context,
        tokens: Int[Array, "B L"] | Float[Array, "B N D"],
        key: PRNGKeyArray,
        step: Int[Array, ""] | int,
        *,
        train: bool = True,
        part: Part = WHOLE,
    ) -> LossOutput:
        """The loss of a batch.

        Args:
          params: of this stage.
          context: see `Context`.
          tokens: rows of text; or their latents, for an objective with a `text_encoder`.
          key: the update's, the same for all its microbatches; see `Part`.
          step: the update's number.
          train: False turns off dropout and augmentation and leaves the statistics alone.
          part: see `Part`.
        """
        ...

    def group(self, path: tuple[str, ...]) -> str:
        """Optimizer group of the parameter at `path`.

        "frozen" is never updated. Group NAME warms up over the config's `NAME_warmup` steps where
        the stage has that setting, else over `warmup`.
        """
        ...


def bernoulli_rows(key: PRNGKeyArray, p: float, x: Float[Array, "B ..."]) -> Array:
    """True for each example with probability p, shaped to select rows of `x`."""
    return jax.random.bernoulli(key, p, x.shape[:1] + (1,) * (x.ndim - 1))

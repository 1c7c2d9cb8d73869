"""Eyes on the loss: updates that were skipped because they were not finite, and spikes."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable

import jax
import numpy as np

SPIKE, MEMORY = 6.0, 100
"""A loss is a spike from so many standard deviations above its mean on, both over about so many updates."""


class TrainingError(RuntimeError):
    """Training cannot go on: one line that says why."""


class Watch:
    """Reads every update's metrics, in order.

    Args:
      folder: where the batch of the last skipped update is kept when training stops for it.
      most: so many updates in a row may be skipped; one more stops the training.
      say: is told of skipped updates and of spikes.
      skipped: updates of the stage that were skipped before.
    """

    def __init__(
        self,
        stage: str,
        folder: pathlib.Path,
        most: int,
        say: Callable[[str], None],
        *,
        skipped: int = 0,
    ) -> None:
        self._stage, self._folder, self._most, self._say = stage, folder, most, say
        self.in_a_row = self._count = 0
        self._mean = self._variance = 0.0
        self.skipped = skipped

    def look(
        self, step: int, metrics: dict[str, jax.Array], tokens: jax.Array
    ) -> dict[str, float] | None:
        """The metrics of update `step` as numbers, waiting for it; None if it was skipped.

        Raises:
          TrainingError: more than `most` in a row were skipped. The batch of this one is saved.
        """
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if values.pop("skipped"):
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            what = " and ".join(f"{name} {values[name]}" for name in ("loss", "gradient_norm"))
            if self.in_a_row > self._most:
                raise TrainingError(
                    f"{what} at step {step} of stage {self._stage}, and {self.in_a_row} updates in a row were skipped for the like; none of them "
                    f"was saved{self._kept(step, tokens)} (a lower learning rate or clipping may help: in a workdir of its own, the stages before by --init_from)"
                )
            self._say(f"{self._stage} {step}: {what}, update skipped ({self.skipped} so far)")
            return None
        self.in_a_row = 0
        self._spike(step, values["loss"])
        return values

    def _spike(self, step: int, loss: float) -> None:
        deviation = math.sqrt(self._variance)
        if self._count >= MEMORY and loss > self._mean + SPIKE * deviation:
            self._say(
                f"{self._stage} {step}: loss spikes to {loss:.4g}, where {self._mean:.4g} +- {deviation:.2g} was usual"
            )
        self._count += 1
        share = 1 / min(self._count, MEMORY)
        off = loss - self._mean
        self._mean += share * off
        self._variance = (1 - share) * (self._variance + share * off * off)

    def _kept(self, step: int, tokens: jax.Array) -> str:
        """Saves this process's rows of a batch; says where."""
        path = self._folder / f"step_{step}_process_{jax.process_index()}.npy"
        rows = {
            shard.index[0].start or 0: np.asarray(shard.data) for shard in tokens.addressable_shards
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(
                path, np.concatenate([rows[start] for start in sorted(rows)]), allow_pickle=False
            )
        except OSError as error:
            return f", its batch could not be kept ({error.strerror})"
        return f", its batch is {path}"

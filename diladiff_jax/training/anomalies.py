"""Updates that were skipped because they were not finite, and spikes of the loss."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable

import jax
import numpy as np

SPIKE_DEVIATIONS = 6.0
"""A loss this many standard deviations above its mean is a spike."""

SPIKE_WINDOW = 100
"""Updates over which mean and deviation are averaged."""


class TrainingError(RuntimeError):
    """Training cannot continue: one line that says why."""


class AnomalyMonitor:
    """Reads the metrics of every update, in order.

    Args:
      stage: the stage's name.
      folder: where the batch of the last skipped update is saved if training stops for it.
      max_skips: consecutive updates that may be skipped; one more stops the training.
      log: receives a line for each skipped update and each spike.
      skipped: updates of the stage that were skipped before.

    Attributes:
      skipped: all updates of the stage that were skipped.
      consecutive: how many were skipped in a row just now.
    """

    def __init__(
        self,
        stage: str,
        folder: pathlib.Path,
        max_skips: int,
        log: Callable[[str], None],
        *,
        skipped: int = 0,
    ) -> None:
        self._stage, self._folder, self._max_skips, self._log = stage, folder, max_skips, log
        self._count = 0
        self._mean = self._variance = 0.0
        self.consecutive = 0
        self.skipped = skipped

    def observe(
        self, step: int, metrics: dict[str, jax.Array], tokens: jax.Array
    ) -> dict[str, float] | None:
        """Waits for update `step` and returns its metrics; None if it was skipped.

        Raises:
          TrainingError: more than `max_skips` consecutive updates were skipped. The batch of this
            one is saved.
        """
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not values.pop("skipped"):
            self.consecutive = 0
            self._check_spike(step, values["loss"])
            return values
        self.skipped, self.consecutive = self.skipped + 1, self.consecutive + 1
        what = " and ".join(f"{name} {values[name]}" for name in ("loss", "gradient_norm"))
        if self.consecutive > self._max_skips:
            raise TrainingError(
                f"stage {self._stage}: {what} at step {step}, and {self.consecutive} consecutive "
                f"updates were skipped for that reason. None of them was saved"
                f"{self._save_batch(step, tokens)}. Try a lower learning rate or more clipping in "
                f"a new workdir, with --init_from for the earlier stages."
            )
        self._log(f"{self._stage} {step}: {what}, update skipped ({self.skipped} so far)")
        return None

    def _check_spike(self, step: int, loss: float) -> None:
        deviation = math.sqrt(self._variance)
        if self._count >= SPIKE_WINDOW and loss > self._mean + SPIKE_DEVIATIONS * deviation:
            self._log(
                f"{self._stage} {step}: loss spike, {loss:.4g} after a mean of {self._mean:.4g} "
                f"with standard deviation {deviation:.2g}"
            )
        self._count += 1
        share = 1 / min(self._count, SPIKE_WINDOW)
        off = loss - self._mean
        self._mean += share * off
        self._variance = (1 - share) * (self._variance + share * off * off)

    def _save_batch(self, step: int, tokens: jax.Array) -> str:
        """Saves this process's rows of a batch and says where."""
        path = self._folder / f"step_{step}_process_{jax.process_index()}.npy"
        rows = {shard.index[0].start or 0: shard.data for shard in tokens.addressable_shards}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            batch = np.concatenate([np.asarray(rows[start]) for start in sorted(rows)])
            np.save(path, batch, allow_pickle=False)
        except OSError as error:
            return f"; its batch could not be saved ({error.strerror})"
        return f"; its batch is {path}"

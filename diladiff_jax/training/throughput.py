"""Training speed: tokens per second per device, and model FLOPs utilization."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import jax

from diladiff_jax.parallel.chips import peak_flops


class Throughput:
    """Measures the rate of updates, excluding their compilation and everything inside `paused`."""

    def __init__(
        self, tokens: int, devices: int, flops: float | None = None, peak: float | None = None
    ) -> None:
        """Starts with a stopped clock.

        Args:
          tokens: tokens per update over all devices.
          devices: number of devices.
          flops: model FLOPs per update over all devices, from `flops.model_flops`.
          peak: peak FLOP/s of one device.
        """
        self._tokens, self._devices, self._flops, self._peak = tokens, devices, flops, peak
        self._began: float | None = None
        self._updates = 0

    def updated(self) -> None:
        """Counts a dispatched update. The first one compiles, so it only starts the clock."""
        if self._began is None:
            self._began = time.monotonic()
        else:
            self._updates += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock for the duration of the block."""
        stopped = time.monotonic()
        yield
        if self._began is not None:
            self._began += time.monotonic() - stopped

    def lap(self) -> dict[str, float]:
        """Returns the rates since the previous lap and starts a new one.

        Returns:
          `tokens_per_second_per_device`, and `model_flops_utilization` if the FLOPs and the peak
          are known. Empty if no update was timed.
        """
        if self._began is None or not self._updates:
            return {}
        now = time.monotonic()
        rate = self._updates / max(now - self._began, 1e-9)
        self._began, self._updates = now, 0
        rates = {"tokens_per_second_per_device": rate * self._tokens / self._devices}
        if self._flops and self._peak:
            rates["model_flops_utilization"] = rate * self._flops / (self._peak * self._devices)
        return rates


def local_peak() -> float | None:
    """Peak FLOP/s of this process's first device; None if it is not in the table."""
    return peak_flops(jax.devices()[0].device_kind)

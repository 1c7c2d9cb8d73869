"""How fast a run goes: tokens per second and device, and what share of the devices' published rate the model's own products are."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import jax

from diladiff_jax.preflight.roofline import CHIPS

# JAX's name of a device -> published dense bfloat16 FLOP/s of it, as the makers' documentation has them.
PEAKS: dict[str, float] = {
    "TPU v4": CHIPS["v4"].flops,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v5p": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "TPU7x": CHIPS["tpu7x"].flops / CHIPS["tpu7x"].devices,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Published FLOP/s of a device by the name that JAX gives it ("NVIDIA H100 80GB HBM3"), or None; the longest name that it begins with counts."""
    fitting = [name for name in PEAKS if device_kind.startswith(name)]
    return PEAKS[max(fitting, key=len)] if fitting else None


class Throughput:
    """Times updates, without their compilation and without what the loop does between them."""

    def __init__(
        self, tokens: int, devices: int, flops: float | None = None, peak: float | None = None
    ) -> None:
        """Args:
        tokens: of one update, over all devices.
        flops: the model's own products in one update (`flops.model_flops`).
        peak: FLOP/s of one device.
        """
        self._tokens, self._devices, self._flops, self._peak = tokens, devices, flops, peak
        self._began: float | None = None
        self._updates = 0

    def updated(self) -> None:
        """One more update was dispatched. The first, which compiles, only starts the clock."""
        if self._began is None:
            self._began = time.monotonic()
        else:
            self._updates += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done within is not training."""
        stopped = time.monotonic()
        yield
        if self._began is not None:
            self._began += time.monotonic() - stopped

    def lap(self) -> dict[str, float]:
        """The rates since the last lap: `tokens_per_second_per_device`, and `model_flops_utilization` where FLOPs and peak are known."""
        if self._began is None or not self._updates:
            return {}
        now = time.monotonic()
        rate = self._updates / max(now - self._began, 1e-9)
        self._began, self._updates = now, 0
        found = {"tokens_per_second_per_device": rate * self._tokens / self._devices}
        if self._flops and self._peak:
            found["model_flops_utilization"] = rate * self._flops / (self._peak * self._devices)
        return found


def local_peak() -> float | None:
    """`peak_flops` of the devices at hand."""
    return peak_flops(jax.devices()[0].device_kind)

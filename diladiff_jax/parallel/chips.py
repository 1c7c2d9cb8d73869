"""Published rates of accelerators: TPU generations in detail, and peak FLOP/s by device name."""

from __future__ import annotations

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published rates of one TPU chip.

    Attributes:
      flops: bfloat16 matrix products, FLOP/s.
      memory: capacity of the main memory (HBM), bytes.
      bandwidth: of the main memory, bytes/s.
      link: bandwidth of one link to a neighbouring chip in one direction, bytes/s. This is the
        published total over all links and both directions, halved, over two links per axis.
      axes: number of torus axes, 2 or 3.
      max_chips: largest number of chips in one slice.
      devices: JAX devices per chip; they share all of the above equally.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float
    axes: int
    max_chips: int
    devices: int = 1


CHIPS: dict[str, Chip] = {
    #               FLOP/s    memory     bytes/s   link    axes  max_chips
    "v4": Chip(275e12, 32 * GIB, 1.200e12, 50e9, 3, 4096),
    "v5e": Chip(197e12, 16 * GIB, 0.819e12, 50e9, 2, 256),
    "v5p": Chip(459e12, 95 * GIB, 2.765e12, 100e9, 3, 8960),
    "v6e": Chip(918e12, 32 * GIB, 1.638e12, 100e9, 2, 256),
    "tpu7x": Chip(2307e12, 192 * GIB, 7.380e12, 100e9, 3, 9216, devices=2),
}
"""TPU generation -> its chip, from Google's system architecture pages as of November 2026."""

PEAK_FLOPS: dict[str, float] = {
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
"""Prefix of JAX's `device_kind` -> published dense bfloat16 FLOP/s of one device."""


def peak_flops(device_kind: str) -> float | None:
    """Published dense bfloat16 FLOP/s of a device.

    Args:
      device_kind: JAX's name of the device, for example "NVIDIA H100 80GB HBM3". The longest
        matching prefix in `PEAK_FLOPS` counts.

    Returns:
      FLOP/s, or None for an unknown device.
    """
    matching = [prefix for prefix in PEAK_FLOPS if device_kind.startswith(prefix)]
    return PEAK_FLOPS[max(matching, key=len)] if matching else None

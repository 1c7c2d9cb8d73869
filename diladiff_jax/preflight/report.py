"""What a person reads of the documents that `document.compile_for_slice` returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

KNEE_SLOWDOWN = 1.1
"""The knee is the first slice whose time exceeds that of the first one by this factor."""


def describe(row: dict[str, Any]) -> str:
    """Describes one program in a few lines."""
    per = row["per_device"]
    mesh = " x ".join(f"{name} {size}" for name, size in row["mesh"].items())
    verdict = "fits" if row["fits"] else "DOES NOT FIT"
    lines = [
        f"{row['stage']} of {row['config']} on {row['topology']}, {row['devices']} devices"
        f" ({mesh}), batch {row['batch']}; per device:",
        f"  parameters    {_bytes(per['parameter_bytes'])}",
        f"  peak memory   {_bytes(per['peak_bytes'])} of {_bytes(per['capacity_bytes'])}:"
        f" {verdict}",
    ]
    if per["flops"] is None:
        return "\n".join(lines)
    lines += [
        f"  products      {per['flops']:.4g} FLOPs, of which the model needs"
        f" {per['model_flops']:.4g}",
        f"  main memory   {_bytes(per['bytes_accessed'])} read and written",
        *(
            f"  {kind:<22} {each['count']:8.0f} times {_bytes(each['bytes'])}"
            for kind, each in per["collectives"].items()
        ),
        *(
            f"  not counted   kernel {name}, {count:.0f} times"
            for name, count in per["uncounted_kernels"].items()
        ),
        f"  roofline      {_seconds(per['estimated_seconds'])}:"
        f" compute {_seconds(per['compute_seconds'])}, memory {_seconds(per['memory_seconds'])},"
        f" interconnect {_seconds(per['interconnect_seconds'])}"
        f" ({_seconds(per['exposed_interconnect_seconds'])} of it not overlapped)",
        f"  bound by      {per['bound_by']}; utilization {per['estimated_utilization']:.1%}",
    ]
    return "\n".join(lines)


def scaling_header() -> str:
    """The titles of a scaling table."""
    return (
        f"{'slice':<16}{'chips':>6}{'batch':>8}{'peak memory':>14}{'exchanged':>14}"
        f"{'interconnect':>14}{'step':>12}{'efficiency':>12}  bound by"
    )


def scaling_line(row: dict[str, Any], first: dict[str, Any]) -> str:
    """One slice of a scaling table; its efficiency is relative to the `first` slice."""
    per = row["per_device"]
    line = f"{row['topology']:<16}{row['chips']:>6}{row['batch']:>8}{_bytes(per['peak_bytes']):>14}"
    if per["flops"] is None:
        return line + "  does not fit"
    exchanged = sum(each["bytes"] for each in per["collectives"].values())
    base = first["per_device"]["estimated_seconds"]
    efficiency = f"{base / per['estimated_seconds']:.1%}" if base else ""
    return line + (
        f"{_bytes(exchanged):>14}{_seconds(per['interconnect_seconds']):>14}"
        f"{_seconds(per['estimated_seconds']):>12}{efficiency:>12}  {per['bound_by']}"
    )


def knee(rows: Sequence[dict[str, Any]]) -> str | None:
    """The first slice that takes `KNEE_SLOWDOWN` times as long as the first; None if none does."""
    times = [
        (row["topology"], row["per_device"]["estimated_seconds"])
        for row in rows
        if row["per_device"]["estimated_seconds"] is not None
    ]
    return next((name for name, time in times if time > KNEE_SLOWDOWN * times[0][1]), None)


def describe_knee(rows: Sequence[dict[str, Any]]) -> str:
    """The knee in a sentence."""
    found, longer = knee(rows), f"{KNEE_SLOWDOWN - 1:.0%} longer than {rows[0]['topology']}"
    if found is None:
        return f"no knee: no slice up to {rows[-1]['chips']} chips is estimated to take {longer}"
    return f"knee: {found} is the first slice estimated to take {longer}"


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"


def _seconds(value: float) -> str:
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"

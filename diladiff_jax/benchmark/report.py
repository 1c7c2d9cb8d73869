"""What a person reads of a benchmark: its lines and its plot."""

from __future__ import annotations

import pathlib
from typing import Any

from diladiff_jax.benchmark.decoding_flops import expected_busy_steps

Row = dict[str, Any]


def describe(document: dict[str, Any]) -> list[str]:
    """Returns the lines to print of a document of either suite."""
    if document["rows"][0]["suite"] == "training":
        return [_describe_update(row) for row in document["rows"]]
    lines = []
    for setting in dict.fromkeys(_setting(row) for row in document["rows"]):
        rows, latents, left_out, peers = (
            [row for row in document[part] if _setting(row) == setting]
            for part in ("rows", "latents", "left_out", "peers")
        )
        lines += _describe_batch(rows, latents)
        lines.append(_describe_ratios(rows, left_out))
        lines += [_describe_peer(row) for row in peers]
    for row in document["left_out"] + document["peers_left_out"]:
        reason = row.get("reason") or (
            f"it needs {row['held_bytes'] / 2**30:.1f} GiB, more memory than there is"
        )
        lines.append(
            f"batch {row['batch']}, {row['length']} tokens, {row['case']}: left out, because"
            f" {reason}"
        )
    return lines


def _setting(row: Row) -> tuple[int, int]:
    """What rows are grouped by: the length and the batch."""
    return row["length"], row["batch"]


def _describe_peer(row: Row) -> str:
    return (
        f"{row['case']:28} ({row['framework']}) {row['decode_seconds']:.2f} s"
        f" ({row['decode_seconds_low']:.2f} to {row['decode_seconds_high']:.2f}),"
        f" {row['tokens_per_second']:.0f} tokens/s, {_memory(row)};"
        f" {row['over_ours']:.2f} times as long as this library's decoding,"
        f" {row['over_ours_with_latents']:.2f} times as long as that with the student's latents"
    )


def _memory(row: Row) -> str:
    """The memory by the device's counter if it has one, else by the compiler's count."""
    measured, compiled = row["device_peak_bytes"], row["decode_memory_bytes"]
    found = compiled if measured is None else measured
    if found is None:
        return "memory unknown"
    return f"{found / 2**20:.0f} MiB{'' if measured is None else ' (measured)'}"


def _describe_update(row: Row) -> str:
    return (
        f"{row['case']:12} {1e3 * row['seconds']:9.1f} ms per update"
        f" ({1e3 * row['seconds_low']:.1f} to {1e3 * row['seconds_high']:.1f}):"
        f" loss {1e3 * row['loss_seconds']:.1f},"
        f" with gradient {1e3 * row['gradient_seconds']:.1f},"
        f" optimizer {1e3 * row['optimizer_seconds']:.1f};"
        f" {row['tokens_per_second']:.0f} tokens/s, {row['peak_memory_bytes'] / 2**20:.0f} MiB,"
        f" compiled in {row['compile_seconds_cold']:.1f} s"
        f" (from the cache: {row['compile_seconds_cached']:.1f} s),"
        f" {100 * row['fraction_of_matmul_rate']:.0f}% of the matmul rate"
    )


def _describe_batch(rows: list[Row], latents: list[Row]) -> list[str]:
    first = rows[0]
    head = f"batch {first['batch']}, {first['length']} tokens, {first['decode_steps']} steps"
    head += f", {first['dtype']}"
    if first["timed_steps"] < first["decode_steps"]:
        head += f", scaled from {first['timed_steps']} timed steps"
    lines = [head]
    for row in rows:
        lines.append(
            f"{row['case']:17} {row['decode_seconds']:9.2f} s decoding"
            f" ({row['decode_seconds_low']:.2f} to {row['decode_seconds_high']:.2f}),"
            f" {row['latent_seconds']:.2f} s latent, {row['tokens_per_second']:.0f} tokens/s,"
            f" {_memory(row)},"
            f" first result after {row['first_result_seconds']:.1f} s,"
            f" compiled in {row['compile_seconds_cold']:.1f} s"
            f" (from the cache: {row['compile_seconds_cached']:.1f} s),"
            f" {100 * row['fraction_of_matmul_rate']:.0f}% of the matmul rate,"
            f" {100 * row['tokens_as_first']:.2f}% of the tokens as {first['case']}"
        )
    for row in latents:
        lines.append(
            f"latents, {row['sampler']}: {row['seconds']:.2f} s for {row['steps']} steps"
            f" ({row['timed_steps']} timed)"
        )
    return lines


def _describe_ratios(rows: list[Row], left_out: list[Row]) -> str:
    """The ratios that the library is judged by, at one batch."""
    by_case = {row["case"]: row for row in rows}
    ours = by_case["ours"]
    busy = expected_busy_steps(ours["batch"] * ours["length"], ours["decode_steps"])
    step, maps = ours["decode_seconds"] / busy, ours["linear_maps_seconds"]
    products = maps + ours["attention_products_seconds"]
    ratios = [
        f"{slow} / {fast['case']} {by_case[slow]['decode_seconds'] / fast['decode_seconds']:.2f}"
        for slow in ("naive", "bisection")
        if slow in by_case
        for fast in rows[rows.index(ours) :]
    ]
    cold, cached = ours["compile_seconds_cold"], ours["compile_seconds_cached"]
    tracing = ours["tracing_seconds"]
    memory = {row["case"]: row["decode_memory_bytes"] for row in rows + left_out}
    return (
        f"{', '.join(ratios)}; a step of ours / the backbone's products {step / products:.2f},"
        f" / its linear maps only {step / maps:.2f};"
        f" the student's latents take {100 * ours['latent_seconds'] / ours['decode_seconds']:.1f}%"
        f" of the decoding time; memory {100 * memory['ours'] / memory['naive']:.0f}% of naive's;"
        f" compiling from the cache takes {100 * cached / cold:.0f}% of the first time,"
        f" without tracing {100 * (cached - tracing) / (cold - tracing):.0f}%"
    )


def plot(rows: list[Row], path: pathlib.Path) -> None:
    """Plots the seconds per text of every case on a logarithmic axis, with their range.

    Args:
      rows: the rows of one suite.
      path: the PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    first = rows[0]
    sampling = first["suite"] == "sampling"
    name = "decode_seconds" if sampling else "seconds"
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    labels = [_label(row, several_lengths=len(lengths) > 1) for row in rows]
    middle, low, high = (
        [row[key] / row["batch"] for row in rows] for key in (name, f"{name}_low", f"{name}_high")
    )
    ranges = [
        [m - x for m, x in zip(middle, low, strict=True)],
        [x - m for m, x in zip(middle, high, strict=True)],
    ]
    settings = list(dict.fromkeys(_setting(row) for row in rows))
    colors = [f"C{settings.index(_setting(row))}" for row in rows]
    figure, axis = pyplot.subplots(figsize=(7, 1 + 0.35 * len(rows)), layout="constrained")
    bars = axis.barh(labels, middle, xerr=ranges, color=colors)
    axis.bar_label(bars, [f" {m:.3g}" for m in middle])
    axis.set_xscale("log")
    axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    axis.margins(x=0.15)
    axis.invert_yaxis()
    tokens = " or ".join(map(str, lengths))
    what = f"of an update on {tokens} tokens"
    if sampling:
        what = f"to decode {tokens} tokens in {first['decode_steps']} steps"
    axis.set_xlabel(f"seconds {what}, per text; {first['size']} size")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _label(row: Row, *, several_lengths: bool) -> str:
    """What the plot calls a row."""
    if row["suite"] != "sampling":
        return row["case"]
    length = f", {row['length']} tokens" if several_lengths else ""
    return f"{row['case']}, batch {row['batch']}{length}"

"""What the rows of a sweep show: figures 2 and 13 to 16, tables 1 and 3 of the paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from diladiff_jax.evaluation.figures import (
    Axis,
    Figure,
    Series,
    Table,
    cells,
    figure,
    linear,
    log,
    series,
    table,
)
from diladiff_jax.evaluation.models import title
from diladiff_jax.evaluation.results import Row, milliseconds

QUALITY = {
    "valid": "share of fully valid documents",
    "gen_ppl": "generative perplexity",
    "mauve": "MAUVE",
    "entropy": "entropy (nats, within a sample)",
}
_SETTINGS = {"decode_steps": "decoding steps", "top_p": "nucleus"}


def model_series(
    rows: Sequence[Row], metric: str, x: Callable[[Row], float | None]
) -> list[Series]:
    """One series per model of `metric` against `x(row)`; rows without either are left out."""
    lines = []
    for name in dict.fromkeys(r["model"] for r in rows):
        points = [
            (value, r["metrics"][metric])
            for r in rows
            if r["model"] == name and metric in r["metrics"] and (value := x(r)) is not None
        ]
        if points:
            xs, ys = zip(*sorted(points, key=lambda point: point[0]), strict=True)
            lines.append(series(title(name), xs, ys))
    return lines


def speed_quality(rows: Sequence[Row]) -> list[Figure]:
    """Figures 2 and 16: each measure of quality against time."""
    figures = []
    for metric, label in QUALITY.items():
        lines = model_series(
            rows, metric, lambda r: None if r["seconds"] is None else milliseconds(r)
        )
        if lines:
            figures.append(
                figure(
                    f"speed_{metric}",
                    "figure 16" if metric == "entropy" else "figures 2 and 16",
                    f"Speed against {label}",
                    log("milliseconds per document"),
                    quality_axis(metric),
                    lines,
                    "latent and decoding, without compilation",
                )
            )
    return figures


def quality_by_setting(rows: Sequence[Row], setting: str, paper: str = "") -> list[Figure]:
    """Figures 13 to 15: each measure of quality against one setting.

    Args:
      rows: of `results.json`.
      setting: a column: "latent_steps", "decode_steps", "temperature" or "top_p".
      paper: which figure of the paper corresponds.
    """
    label = _SETTINGS.get(setting, setting.replace("_", " "))
    axis = log(label) if setting.endswith("steps") else linear(label)
    figures = []
    for metric, quality in QUALITY.items():
        lines = [
            line
            for line in model_series(rows, metric, lambda r: r[setting])
            if len(set(line["x"])) > 1
        ]
        if lines:
            name = f"{metric}_by_{setting}"
            heading = f"{capitalized(quality)} against {label}"
            figures.append(figure(name, paper, heading, axis, quality_axis(metric), lines))
    return figures


def main_table(rows: Sequence[Row]) -> Table:
    """Table 1: every sampled row with its measures of quality and their intervals."""
    metrics = [
        m
        for m in ("valid", "gen_ppl", "entropy", "mauve", "repetition")
        if any(m in r["metrics"] for r in rows)
    ]
    columns = ["model", "latent steps", "decoding steps", "temperature", "ms per document"]
    columns += [f"{m}{end}" for m in metrics for end in ("", " low", " high")]
    body = []
    for r in rows:
        if r["decode_steps"] is not None or r["model"] == "data":
            time = None if r["seconds"] is None else milliseconds(r)
            setting = [r["latent_steps"], r["decode_steps"], r["temperature"]]
            estimates = [c for m in metrics for c in cells(r["metrics"].get(m))]
            body.append([title(r["model"]), *setting, time, *estimates])
    return table("main", "table 1", "Main comparison", columns, body)


def autoencoder_table(rows: Sequence[Row]) -> Table:
    """Table 3: bound and recovery of the denoisers, and of the decoder given each row's latent."""
    return table(
        "autoencoder",
        "table 3",
        "Bound and recovery on held-out text",
        ("network", "bound ppl", "low", "high", "recovery", "low", "high"),
        [
            [
                title(r["model"].removesuffix(" bound")),
                *cells(r["metrics"].get("bound_ppl")),
                *cells(r["metrics"].get("recovery")),
            ]
            for r in rows
            if "recovery" in r["metrics"]
        ],
        "the autoencoder's bound is given the latent and does not include its cost",
    )


def quality_axis(metric: str) -> Axis:
    """The axis of a measure of quality; logarithmic for a perplexity."""
    return log(QUALITY[metric]) if metric == "gen_ppl" else linear(QUALITY[metric])


def capitalized(text: str) -> str:
    """Text with its first letter in upper case."""
    return text[:1].upper() + text[1:]

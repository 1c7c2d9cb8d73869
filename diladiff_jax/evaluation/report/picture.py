"""The picture of a sweep: quality against decoding steps, against time and against entropy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from diladiff_jax.evaluation.report import plots
from diladiff_jax.evaluation.results import Results, Row, corpus, milliseconds, quality_metric
from diladiff_jax.stages import MODELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

_QUALITY_AXES = {
    "valid": ("share of fully valid documents", "linear"),
    "gen_ppl": ("generative perplexity (lower is better)", "log"),
}


class _Panel(NamedTuple):
    label: str
    scale: str
    x: Callable[[Row], float]


_PANELS = (
    _Panel("decoding steps", "log", lambda row: row["decode_steps"]),
    _Panel("milliseconds per document (latent and decoding)", "log", milliseconds),
)
_ENTROPY_PANEL = _Panel(
    "entropy (nats, within a sample)", "linear", lambda row: _value(row, "entropy")
)


def _value(row: Row, metric: str) -> float:
    return row["metrics"][metric]["value"]


def draw(results: Results) -> Drawing:
    """Draws the picture of a sweep.

    Generative perplexity gets a panel against entropy too: a low perplexity is worth nothing if
    the entropy has fallen with it.
    """
    from matplotlib.figure import Figure as Drawing

    metric = quality_metric(results)
    label, scale = _QUALITY_AXES.get(metric, (metric, "linear"))
    panels = [*_PANELS, _ENTROPY_PANEL] if metric == "gen_ppl" else list(_PANELS)
    drawing = Drawing(figsize=(5.5 * len(panels), 4.8), layout="constrained")
    timed = [r for r in results["rows"] if r["seconds"] is not None]
    data = next(
        (r for r in results["rows"] if r["model"] == "data" and metric in r["metrics"]), None
    )
    all_axes = drawing.subplots(1, len(panels), sharey=True)
    for axes, panel in zip(all_axes, panels, strict=True):
        _draw_models(axes, panel, [r for r in timed if metric in r["metrics"]], metric)
        if scale == "log":
            plots.log_scale(axes, "y")
        if panel.scale == "log":
            plots.log_scale(axes, "x")
        axes.set_xlabel(panel.label)
        line: dict[str, Any] = dict(color=plots.INK, linewidth=0.8, linestyle="--")
        if data:
            axes.axhline(_value(data, metric), label="data", **line)
        if data and panel is _ENTROPY_PANEL:
            axes.axvline(_value(data, "entropy"), **line)
    plots.tick_values(all_axes[0], [r["decode_steps"] for r in timed])
    all_axes[0].set_ylabel(label)
    drawing.legend(
        *all_axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        fontsize=8,
        frameon=False,
    )
    samples = max(r["samples"] for r in timed)
    title = f"{corpus(results)}: {samples} samples per point, bars are 95% intervals"
    drawing.suptitle(title, fontsize=10)
    return drawing


def _draw_models(axes: Axes, panel: _Panel, timed: Sequence[Row], metric: str) -> None:
    for model in MODELS.values():
        rows = [r for r in timed if r["model"] == model.name]
        if not rows:
            continue
        x, y = [panel.x(r) for r in rows], [_value(r, metric) for r in rows]
        look: dict[str, Any] = dict(color=model.color, marker=model.marker, label=model.title)
        if model.control:
            axes.plot(x, y, linestyle=":", linewidth=1.4, markersize=3, **look)
        else:
            low, high = ([r["metrics"][metric][end] for r in rows] for end in ("low", "high"))
            bars = plots.error_bars(y, low, high)
            axes.errorbar(x, y, yerr=bars, capsize=2, linewidth=1.8, markersize=5, **look)

"""A sweep as files: `results.json` (checked against its schema), one table, one picture; and with its analyses as a page."""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from diladiff_jax.evaluation import figures
from diladiff_jax.evaluation.figures import NAMES
from diladiff_jax.evaluation.report import page, plots
from diladiff_jax.evaluation.schema import Fields, check_fields

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

SCHEMA: dict[str, Fields] = {
    "row": {
        "corpus": (str,),
        "model": (str,),
        "latent_steps": (int, type(None)),
        "decode_steps": (int, type(None)),
        "temperature": (float, type(None)),
        "top_p": (float, type(None)),
        "samples": (int,),
        "seconds": (float, type(None)),
        "tokens_per_second": (float, type(None)),
        "metrics": (dict,),
    },
    "metric": {"value": (float,), "low": (float,), "high": (float,)},
}
"""`results.json`: `{"setting": {...}, "rows": [row]}`; `metrics` maps a name to a metric. Rows without steps measure
data or networks, not samples; `seconds` are for all `samples`, without compilation."""

_MODELS = {"mdlm": "o", "mdlm_long": "s", "ladiff": "^", "diladiff": "D"}
_CONTROLS = ("prior_ddim", "prior_dpmpp_2m", "true_latent", "null_latent")
_AXES = {
    "valid": ("share of fully valid documents", "linear"),
    "gen_ppl": ("generative perplexity (lower is better)", "log"),
}


def check_results(results: Any) -> None:
    """Holds `results` against `SCHEMA`.

    Raises:
      ValueError: naming the first thing that is not as documented.
    """
    if not isinstance(results, dict) or set(results) != {"setting", "rows"}:
        raise ValueError("results must have the keys setting and rows")
    for i, row in enumerate(results["rows"]):
        check_fields(row, SCHEMA["row"], f"rows[{i}]")
        for name, metric in row["metrics"].items():
            check_fields(metric, SCHEMA["metric"], f"rows[{i}].metrics.{name}")


def quality_metric(results: dict[str, Any]) -> str:
    """ "valid" where an oracle judged, else "gen_ppl", else "entropy"."""
    names = {name for row in results["rows"] for name in row["metrics"]}
    return next(name for name in ("valid", "gen_ppl", "entropy") if name in names)


def table(results: dict[str, Any]) -> str:
    """All rows as aligned plain text, intervals in brackets."""
    preferred = (
        "valid",
        "agreement",
        "parses",
        "exact_nll",
        "distinct",
        "gen_ppl",
        "empty",
        "entropy",
        "repetition",
        "bound_ppl",
        "recovery",
    )
    present = {name for row in results["rows"] for name in row["metrics"]}
    names = [name for name in preferred if name in present]
    head = ["model", "latent", "decode", "ms/document", *names]
    lines = [head]
    for row in results["rows"]:
        per = "" if row["seconds"] is None else f"{1e3 * row['seconds'] / row['samples']:.2f}"
        cells = [row["model"], _blank(row["latent_steps"]), _blank(row["decode_steps"]), per]
        lines.append(cells + [_estimate(row["metrics"].get(name)) for name in names])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _blank(value: int | None) -> str:
    return "" if value is None else str(value)


def _estimate(metric: dict[str, float] | None) -> str:
    if metric is None:
        return ""
    digits = 3 if abs(metric["value"]) < 10 else 1
    return f"{metric['value']:.{digits}f} [{metric['low']:.{digits}f}, {metric['high']:.{digits}f}]"


def summary(results: dict[str, Any]) -> list[str]:
    """How was sampled, where not in the plain way, and the claim."""
    setting = results["setting"]
    plain = {"order": "random", "refresh_every": 1, "skip_layers": []}
    unusual = {
        name: setting[name] for name, value in plain.items() if setting.get(name, value) != value
    }
    if "skip_layers" in unusual:
        unusual["skip_from"] = setting["skip_from"]
    said = (
        [f"sampled with {', '.join(f'sampling.{name}={value}' for name, value in unusual.items())}"]
        if unusual
        else []
    )
    return said + _claim(results)


def _claim(results: dict[str, Any]) -> list[str]:
    """The paper's claim on these rows, stated either way: few steps against few steps, and speed at equal quality.

    A baseline's time is that of its fastest row whose interval holds its best value, and more decoding steps than
    tokens do not count; DiLaDiff's that of its fastest row whose whole interval is as good. Entropy alone
    is no quality: then nothing is claimed.
    """
    metric = quality_metric(results)
    if metric == "entropy":
        return ["no oracle and no scorer: nothing here measures quality (entropy alone does not)"]
    length = results["setting"].get("length", math.inf)
    sampled = [
        r
        for r in results["rows"]
        if r["seconds"] is not None and metric in r["metrics"] and r["decode_steps"] <= length
    ]
    sign = 1.0 if metric == "valid" else -1.0
    worst, best_end = ("low", "high") if metric == "valid" else ("high", "low")

    def of(model: str) -> list[dict[str, Any]]:
        return [r for r in sampled if r["model"] == model]

    def quality(row: dict[str, Any], end: str = "value") -> float:
        return sign * row["metrics"][metric][end]

    def said(row: dict[str, Any]) -> str:
        beside = (
            f" at entropy {row['metrics']['entropy']['value']:.2f}" if metric == "gen_ppl" else ""
        )
        return f"{row['metrics'][metric]['value']:.3f}{beside}"

    lines = []
    for steps in (2, 4, 8):
        pair = [
            next((r for r in of(model) if r["decode_steps"] == steps), None)
            for model in ("diladiff", "mdlm")
        ]
        if all(pair):
            lines.append(
                f"{metric} at {steps} decoding steps: DiLaDiff {said(pair[0])}, MDLM {said(pair[1])}"
            )
    for baseline in ("mdlm", "mdlm_long"):
        if not of(baseline) or not of("diladiff"):
            continue
        name, top = NAMES[baseline], max(of(baseline), key=quality)
        if metric == "valid" and quality(top) == 0:
            lines.append(f"{name} makes no valid document at any number of steps measured")
            continue
        as_good = min(
            (r for r in of(baseline) if quality(r, best_end) >= quality(top)),
            key=lambda r: r["seconds"],
        )
        text = f"{name} is best at {top['decode_steps']} steps ({metric} {said(top)}), and not clearly worse at {as_good['decode_steps']}; DiLaDiff "
        passing = [r for r in of("diladiff") if quality(r, worst) >= quality(top)]
        if passing:
            fast = min(passing, key=lambda r: r["seconds"])
            text += f"passes it at {fast['decode_steps']} {'step' if fast['decode_steps'] == 1 else 'steps'} ({said(fast)}), {as_good['seconds'] / fast['seconds']:.1f} times as fast as that"
        else:
            text += f"does not clearly pass it (best {said(max(of('diladiff'), key=quality))})"
        lines.append(text)
    return lines


def draw(results: dict[str, Any]) -> Drawing:
    """The picture: quality against decoding steps and against milliseconds a document; perplexity against entropy beside it."""
    from matplotlib.figure import Figure as Drawing

    metric = quality_metric(results)
    label, scale = _AXES.get(metric, (metric, "linear"))
    panels = [
        ("decoding steps", lambda r: r["decode_steps"]),
        (
            "milliseconds a document (latent and decoding)",
            lambda r: 1e3 * r["seconds"] / r["samples"],
        ),
    ]
    if metric == "gen_ppl":  # a low perplexity is worth nothing where the entropy has fallen too
        panels.append(
            ("entropy (nats, within a sample)", lambda r: r["metrics"]["entropy"]["value"])
        )
    figure = Drawing(figsize=(5.5 * len(panels), 4.8), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)

    def series(name: str) -> list[dict[str, Any]]:
        return [
            r
            for r in results["rows"]
            if r["model"] == name and r["seconds"] is not None and metric in r["metrics"]
        ]

    for name, marker in _MODELS.items():
        rows = series(name)
        values = [r["metrics"][metric]["value"] for r in rows]
        below = [
            max(0.0, v - r["metrics"][metric]["low"]) for v, r in zip(values, rows, strict=True)
        ]
        above = [
            max(0.0, r["metrics"][metric]["high"] - v) for v, r in zip(values, rows, strict=True)
        ]
        for axis, (_, x) in zip(axes, panels, strict=True):
            if rows:
                axis.errorbar(
                    [x(r) for r in rows],
                    values,
                    yerr=[below, above],
                    color=plots.COLORS[name],
                    marker=marker,
                    markersize=5,
                    linewidth=1.8,
                    capsize=2,
                    label=NAMES[name],
                )
    for name in _CONTROLS:
        rows = series(name)
        for axis, (_, x) in zip(axes, panels, strict=True):
            if rows:
                axis.plot(
                    [x(r) for r in rows],
                    [r["metrics"][metric]["value"] for r in rows],
                    color=plots.COLORS[name],
                    linestyle=":",
                    marker=".",
                    linewidth=1.4,
                    label=NAMES[name],
                )
    data = [r for r in results["rows"] if r["model"] == "data" and metric in r["metrics"]]
    for axis, (title, _) in zip(axes, panels, strict=True):
        if scale == "log":
            plots.log_scale(axis, "y")
        axis.set_xlabel(title)
        if data:
            axis.axhline(
                data[0]["metrics"][metric]["value"],
                color=plots.INK,
                linewidth=0.8,
                linestyle="--",
                label="data",
            )
    for axis in axes[:2]:
        plots.log_scale(axis, "x")
    plots.tick_values(axes[0], [r["decode_steps"] for r in results["rows"] if r["decode_steps"]])
    if metric == "gen_ppl" and data:
        axes[2].axvline(
            data[0]["metrics"]["entropy"]["value"], color=plots.INK, linewidth=0.8, linestyle="--"
        )
    axes[0].set_ylabel(label)
    handles, titles = axes[0].get_legend_handles_labels()
    figure.legend(handles, titles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    corpus, samples = (
        results["rows"][0]["corpus"],
        max(r["samples"] for r in results["rows"] if r["seconds"] is not None),
    )
    figure.suptitle(f"{corpus}: {samples} samples a point, bars are 95% intervals", fontsize=10)
    return figure


def write(results: dict[str, Any], directory: str | os.PathLike[str]) -> pathlib.Path:
    """Writes `results.json`, `table.txt` and `picture.png` (each aside, then renamed); returns the picture's path."""
    check_results(results)
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    lines = [table(results), "", *summary(results)]
    _write_text(directory / "results.json", json.dumps(results, indent=1) + "\n")
    _write_text(directory / "table.txt", "\n".join(lines) + "\n")
    aside = directory / ".picture.tmp.png"
    with plots.style():
        plots.save(draw(results), aside, "picture")
    aside.replace(directory / "picture.png")
    return directory / "picture.png"


def write_page(
    results: dict[str, Any],
    found: Mapping[str, Any],
    draws: Sequence[Mapping[str, Any]],
    directory: str | os.PathLike[str],
) -> pathlib.Path:
    """Writes `analyses.json`, its figures under `figures/` and `report.html` beside what `write` wrote; returns the page's path.

    Figures that the `analyses.json` of an earlier run names, and this one does not have, are removed.

    Args:
      found: `{"figures", "tables"}`, of `analyses`; see `figures.SCHEMA`.
      draws: what the page shows as samples, of `samples.draw`.

    Raises:
      ValueError: `found` is not of its form.
    """
    figures.check_analyses(found)
    directory = pathlib.Path(directory)
    folder = directory / "figures"
    kept = {figure["id"] for figure in found["figures"]}
    for old in _figure_ids(directory / "analyses.json") - kept:
        for kind in ("png", "svg"):
            (folder / f"{old}.{kind}").unlink(missing_ok=True)
    drawn = plots.write(found["figures"], folder)
    _write_text(directory / "analyses.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    with plots.style():
        picture = plots.as_svg(draw(results), "picture")
    _write_text(
        directory / "report.html",
        page.render(results, found, draws, picture, drawn, summary(results)),
    )
    return directory / "report.html"


def _figure_ids(path: pathlib.Path) -> set[str]:
    """Names of the figures of an earlier `analyses.json`; none where there is none, or it is not one."""
    try:
        found = json.loads(path.read_text())
        figures.check_analyses(found)
    except (OSError, ValueError):
        return set()
    return {figure["id"] for figure in found["figures"]}


def _write_text(path: pathlib.Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(
        text, encoding="utf-8", errors="replace"
    )  # a lone surrogate in a sample is no reason to lose the page
    aside.replace(path)

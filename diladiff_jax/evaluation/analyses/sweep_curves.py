"""What rows of `results.json` show, without a model: figures 2, 5, 9 and 13 to 16, tables 1 and 3 of the paper."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diladiff_jax.evaluation.figures import NAMES, Figure, Table, cells, figure, series, table
from diladiff_jax.evaluation.measures.intervals import Estimate
from diladiff_jax.evaluation.report.report import check_results

Row = Mapping[str, Any]

QUALITY = {
    "valid": "share of fully valid documents",
    "gen_ppl": "generative perplexity",
    "mauve": "MAUVE",
    "entropy": "entropy (nats, within a sample)",
}


def measured(
    rows: Sequence[Row], metric: str, x: Callable[[Row], float | None]
) -> list[dict[str, Any]]:
    """One series a model of `metric` against `x(row)`, in the order of x; rows without either are left out."""
    lines = []
    for name in dict.fromkeys(r["model"] for r in rows):
        points = sorted(
            (
                (x(r), r["metrics"][metric])
                for r in rows
                if r["model"] == name and metric in r["metrics"] and x(r) is not None
            ),
            key=lambda p: p[0],
        )
        if points:
            lines.append(
                series(NAMES.get(name, name), [p[0] for p in points], [p[1] for p in points])
            )
    return lines


def speed_quality(rows: Sequence[Row]) -> list[Figure]:
    """Figures 2 and 16: quality against seconds, one figure a measure of quality."""
    figures = []
    for metric, label in QUALITY.items():
        lines = measured(
            rows,
            metric,
            lambda r: None if r["seconds"] is None else 1e3 * r["seconds"] / r["samples"],
        )
        if lines:
            paper = "figures 2 and 16" if metric != "entropy" else "figure 16"
            scale = "log" if metric == "gen_ppl" else "linear"
            figures.append(
                figure(
                    f"speed_{metric}",
                    paper,
                    f"Speed against {label}",
                    "milliseconds a document",
                    label,
                    lines,
                    "latent and decoding, without compilation",
                    x_scale="log",
                    y_scale=scale,
                )
            )
    return figures


def against(rows: Sequence[Row], setting: str, paper: str = "") -> list[Figure]:
    """Figures 13 to 15: every measure of quality against one setting of the draw.

    Args:
      setting: a column of `results.json`: "latent_steps", "decode_steps", "temperature" or "top_p".
    """
    scale = "log" if setting.endswith("steps") else "linear"
    word = {"decode_steps": "decoding steps", "top_p": "nucleus"}.get(
        setting, setting.replace("_", " ")
    )
    figures = []
    for metric, label in QUALITY.items():
        lines = [
            line for line in measured(rows, metric, lambda r: r[setting]) if len(set(line["x"])) > 1
        ]
        if lines:
            figures.append(
                figure(
                    f"{metric}_by_{setting}",
                    paper,
                    f"{_capital(label)} against {word}",
                    word,
                    label,
                    lines,
                    x_scale=scale,
                    y_scale="log" if metric == "gen_ppl" else "linear",
                )
            )
    return figures


def main_table(rows: Sequence[Row]) -> Table:
    """Table 1: every sampled row with its measures of quality, intervals beside them."""
    names = [
        m
        for m in ("valid", "gen_ppl", "entropy", "mauve", "repetition")
        if any(m in r["metrics"] for r in rows)
    ]
    columns = ["model", "latent steps", "decoding steps", "temperature", "ms a document"] + [
        f"{m}{end}" for m in names for end in ("", " low", " high")
    ]
    body = []
    for r in rows:
        if r["decode_steps"] is not None or r["model"] == "data":
            per = None if r["seconds"] is None else 1e3 * r["seconds"] / r["samples"]
            body.append(
                [
                    NAMES.get(r["model"], r["model"]),
                    r["latent_steps"],
                    r["decode_steps"],
                    r["temperature"],
                    per,
                ]
                + [c for m in names for c in cells(r["metrics"].get(m))]
            )
    return table("main", "table 1", "Main comparison", columns, body)


def autoencoder_table(rows: Sequence[Row]) -> Table:
    """Table 3: bound on the perplexity and recovery, of the denoisers and of the decoder given each row's own latent."""
    columns = ("network", "bound ppl", "low", "high", "recovery", "low", "high")
    body = [
        [
            NAMES.get(name := r["model"].removesuffix(" bound"), name),
            *cells(r["metrics"].get("bound_ppl")),
            *cells(r["metrics"].get("recovery")),
        ]
        for r in rows
        if "recovery" in r["metrics"]
    ]
    return table(
        "autoencoder",
        "table 3",
        "Bound and recovery on held-out text",
        columns,
        body,
        "the autoencoder's bound is given its latent, whose own cost is not in it",
    )


def evaluated(workdir: str | pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The experiment and the `results.json` of a workdir that was evaluated into its own report folder.

    Raises:
      ValueError: a file is missing, or not what its command writes.
    """
    found = []
    for name in ("config.json", "report/results.json"):
        path = pathlib.Path(workdir) / name
        if not path.is_file():
            raise ValueError(
                f"{path} does not exist; run launch/train.py and launch/evaluate.py on {workdir} first"
            )
        try:
            found.append(json.loads(path.read_text()))
            (_compression if name == "config.json" else check_results)(found[-1])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} is not what its command writes ({error}); make it again"
            ) from error
    return found[0], found[1]


def compression_tradeoff(
    runs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
) -> list[Figure]:
    """Figures 5 and 9: compression and augmentation over several runs, each an experiment and its `results.json`.

    Figure 5: recovery, bound and what is then generated against compression L / N, a series for each augmentation.
    Figure 9: what is generated against recovery, a point a run.
    """
    points = []
    for config, results in runs:
        rows = results["rows"]
        held_out = next((r["metrics"] for r in rows if r["model"] == "autoencoder bound"), {})
        best: dict[str, Estimate] = {}
        for metric in QUALITY:
            sampled = [
                r["metrics"][metric]
                for r in rows
                if r["model"] in ("ladiff", "diladiff") and metric in r["metrics"]
            ]
            if sampled and metric != "entropy":
                best[metric] = (min if metric == "gen_ppl" else max)(
                    sampled, key=lambda e: e["value"]
                )
        points.append((*_compression(config), held_out | best))

    def lines(
        of_x: Callable[[tuple[float, str, dict[str, Estimate]]], float], y: str, needed: str
    ) -> list[dict[str, Any]]:
        groups: dict[str, list[tuple[float, Estimate]]] = {}
        for run in sorted((r for r in points if y in r[2] and needed in r[2]), key=of_x):
            groups.setdefault(run[1], []).append((of_x(run), run[2][y]))
        return [
            series(name, [p[0] for p in line], [p[1] for p in line])
            for name, line in groups.items()
        ]

    figures = []
    best_row = "the best row of LaDiff and DiLaDiff in each run"
    measures = {
        "recovery": ("share of masked tokens recovered", ""),
        "bound_ppl": ("bound on the perplexity", "given the latent"),
    }
    measures |= {
        metric: (label, best_row) for metric, label in QUALITY.items() if metric != "entropy"
    }
    for y, (label, note) in measures.items():
        if found := lines(lambda r: r[0], y, y):
            figures.append(
                figure(
                    f"compression_{y}",
                    "figure 5",
                    f"{_capital(label)} against compression",
                    "compression L / N",
                    label,
                    found,
                    note,
                    x_scale="log",
                )
            )
        if y in QUALITY and (found := lines(lambda r: r[2]["recovery"]["value"], y, "recovery")):
            figures.append(
                figure(
                    f"tradeoff_{y}",
                    "figure 9",
                    f"{_capital(label)} against what the autoencoder recovers",
                    "share of masked tokens recovered",
                    label,
                    found,
                    note,
                )
            )
    return figures


def _compression(config: Mapping[str, Any]) -> tuple[float, str]:
    """L / N, and the augmentation in words."""
    a = config["autoencoder"]
    return config["data"]["length"] / config["encoder"]["num_latents"], ", ".join(
        f"{key} {a[key]:g}" for key in ("noise", "p_feat", "p_lat", "p_drop")
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]

"""Compression and augmentation over several workdirs: figures 5 and 9 of the paper."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from diladiff_jax import files
from diladiff_jax.evaluation.analyses.sweep_curves import QUALITY, capitalized
from diladiff_jax.evaluation.figures import Figure, Series, figure, linear, log, series
from diladiff_jax.evaluation.measures.intervals import Estimate
from diladiff_jax.evaluation.models import latent_models
from diladiff_jax.evaluation.results import Results, check_results

_AUGMENTATION = ("noise", "p_feat", "p_lat", "p_drop")
_GENERATED = {metric: label for metric, label in QUALITY.items() if metric != "entropy"}


class _Run(NamedTuple):
    """One workdir: L / N, the augmentation in words, and estimates by measure."""

    compression: float
    augmentation: str
    measures: dict[str, Estimate]


def evaluated(workdir: str | pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config and `results.json` of a workdir that was evaluated into its own report folder.

    Raises:
      ValueError: a file is missing or damaged.
    """
    found = []
    for name in ("config.json", "report/results.json"):
        path = files.expand(workdir) / name
        if not path.is_file():
            raise ValueError(
                f"{path} does not exist. Run launch/train.py and launch/evaluate.py on {workdir}."
            )
        try:
            found.append(json.loads(path.read_text()))
            (_compression if name == "config.json" else check_results)(found[-1])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} is not what its command writes ({error}). Create it again."
            ) from error
    return found[0], found[1]


def compression_tradeoff(runs: Sequence[tuple[Mapping[str, Any], Results]]) -> list[Figure]:
    """Figures 5 and 9: what compression and augmentation cost and gain.

    Figure 5 has recovery, bound and generated quality against compression L / N, with a series for
    each augmentation. Figure 9 has generated quality against recovery, with a point for each run.

    Args:
      runs: config and `results.json` of each workdir, as of `evaluated`.
    """
    points = [_run(config, results) for config, results in runs]
    best_row = "the best row of a model with a latent in each run"
    measures = {
        "recovery": ("share of masked tokens recovered", ""),
        "bound_ppl": ("bound on the perplexity", "given the latent"),
    } | {metric: (label, best_row) for metric, label in _GENERATED.items()}
    figures = []
    for measure, (label, note) in measures.items():
        lines = _lines(points, lambda run: run.compression, measure)
        if lines:
            figures.append(
                figure(
                    f"compression_{measure}",
                    "figure 5",
                    f"{capitalized(label)} against compression",
                    log("compression L / N"),
                    linear(label),
                    lines,
                    note,
                )
            )
        with_recovery = [run for run in points if "recovery" in run.measures]
        lines = _lines(with_recovery, lambda run: run.measures["recovery"]["value"], measure)
        if measure in _GENERATED and lines:
            figures.append(
                figure(
                    f"tradeoff_{measure}",
                    "figure 9",
                    f"{capitalized(label)} against recovery of the autoencoder",
                    linear("share of masked tokens recovered"),
                    linear(label),
                    lines,
                    note,
                )
            )
    return figures


def _run(config: Mapping[str, Any], results: Results) -> _Run:
    """The autoencoder's measures of a run, and its best generated ones."""
    rows = results["rows"]
    measures = dict(next((r["metrics"] for r in rows if r["model"] == "autoencoder bound"), {}))
    for metric in _GENERATED:
        sampled = [
            r["metrics"][metric]
            for r in rows
            if r["model"] in latent_models() and metric in r["metrics"]
        ]
        if sampled:
            best = min if metric == "gen_ppl" else max
            measures[metric] = best(sampled, key=lambda estimate: estimate["value"])
    return _Run(*_compression(config), measures)


def _lines(runs: Sequence[_Run], x: Callable[[_Run], float], measure: str) -> list[Series]:
    """A series of `measure` against `x(run)` for each augmentation."""
    groups: dict[str, list[_Run]] = {}
    for run in sorted((r for r in runs if measure in r.measures), key=x):
        groups.setdefault(run.augmentation, []).append(run)
    return [
        series(name, map(x, group), [run.measures[measure] for run in group])
        for name, group in groups.items()
    ]


def _compression(config: Mapping[str, Any]) -> tuple[float, str]:
    """L / N, and the augmentation in words."""
    settings = config["autoencoder"]
    words = ", ".join(f"{name} {settings[name]:g}" for name in _AUGMENTATION)
    return config["data"]["length"] / config["encoder"]["num_latents"], words

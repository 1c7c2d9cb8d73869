"""The folder of a report: results, table and picture of the sweep, analyses, figures and page."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from diladiff_jax import files
from diladiff_jax.data import Prepared
from diladiff_jax.evaluation import analyses
from diladiff_jax.evaluation.figures import Findings, check_analyses
from diladiff_jax.evaluation.report import page, picture, plots
from diladiff_jax.evaluation.report.samples import sample_models
from diladiff_jax.evaluation.report.text import summary, table
from diladiff_jax.evaluation.results import Results, check_results
from diladiff_jax.files import atomic_file, atomic_write_text
from diladiff_jax.model import Model


def write(results: Results, folder: str | os.PathLike[str]) -> pathlib.Path:
    """Writes `results.json`, `table.txt` and `picture.png`.

    Returns:
      The path of the picture.

    Raises:
      NotFiniteError: a measured number is not finite; nothing is written.
      ValueError: `results` is not of its documented form; nothing is written.
    """
    check_results(results)
    folder = files.expand(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [table(results), "", *summary(results)]
    atomic_write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    atomic_write_text(folder / "table.txt", "\n".join(lines) + "\n")
    with plots.style():
        drawing = picture.draw(results)
    plots.write_png(drawing, folder / "picture.png")
    return folder / "picture.png"


def write_page(
    results: Results,
    found: Findings,
    samples: Sequence[Mapping[str, Any]],
    folder: str | os.PathLike[str],
) -> pathlib.Path:
    """Writes `analyses.json`, its figures under `figures/`, and `report.html`.

    Removes figures that an earlier `analyses.json` in the folder names and this one does not.

    Args:
      results: the content of `results.json`.
      found: of `analyses.analyse` or `analyses.analyse_rows`.
      samples: what the page shows as samples, of `samples.sample_models`.
      folder: where `write` has written.

    Returns:
      The path of the page.

    Raises:
      ValueError: `found` is not of its documented form; nothing is written.
    """
    content = found.as_json()
    check_analyses(content)
    folder = files.expand(folder)
    kept = {figure["id"] for figure in found.figures}
    for old in _figure_ids(folder / "analyses.json") - kept:
        for kind in ("png", "svg"):
            (folder / "figures" / f"{old}.{kind}").unlink(missing_ok=True)
    svgs = plots.write(found.figures, folder / "figures")
    atomic_write_text(
        folder / "analyses.json", json.dumps(content, indent=1, allow_nan=False) + "\n"
    )
    with plots.style():
        overview = plots.as_svg(picture.draw(results), "picture")
    text = page.render(results, found, samples, overview, svgs, summary(results))
    # A sample may hold a lone surrogate, which UTF-8 cannot: write a question mark for it.
    with atomic_file(folder / "report.html", errors="replace") as out:
        out.write(text)
    return folder / "report.html"


def write_report(
    model: Model,
    prepared: Prepared,
    results: Results,
    folder: str | os.PathLike[str],
    *,
    analysis_samples: int | None = None,
    others: Sequence[tuple[Mapping[str, Any], Results]] = (),
) -> pathlib.Path:
    """Writes the whole report of a sweep: `write`, the analyses, and `write_page`.

    Args:
      model: the workdir's models.
      prepared: its data.
      results: of `evaluate`. They are written before the analyses, which may fail.
      folder: where to write.
      analysis_samples: held-out rows, latents and sampled texts of each analysis of the trained
        model; None leaves these analyses out.
      others: config and results of other workdirs, for the figures of compression.

    Returns:
      The path of the page.

    Raises:
      NotFiniteError: a measured number is not finite; nothing is written.
      OSError: a file cannot be written.
    """
    write(results, folder)
    if analysis_samples is None:
        found = analyses.analyse_rows(model, results)
    else:
        found = analyses.analyse(model, prepared, results, samples=analysis_samples)
    if others:
        runs = [(model.config.to_dict(), results), *others]
        found.figures += analyses.compression_tradeoff(runs)
    samples = sample_models(model, seed=model.config.evaluation.seed)
    return write_page(results, found, samples, folder)


def _figure_ids(path: pathlib.Path) -> set[str]:
    """Ids of the figures of an earlier `analyses.json`; none if there is no valid one."""
    try:
        found = json.loads(path.read_text())
        check_analyses(found)
    except (OSError, ValueError):
        return set()
    return {figure["id"] for figure in found["figures"]}

"""The folder of a report: results, table and picture of the sweep, analyses, figures and page."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from diladiff_jax.evaluation.figures import Findings, check_analyses
from diladiff_jax.evaluation.report import page, picture, plots
from diladiff_jax.evaluation.report.summary import summary, table
from diladiff_jax.evaluation.results import Results, check_results
from diladiff_jax.files import atomic_file, atomic_write_text


def write(results: Results, folder: str | os.PathLike[str]) -> pathlib.Path:
    """Writes `results.json`, `table.txt` and `picture.png`.

    Returns:
      The path of the picture.

    Raises:
      NotFiniteError: a measured number is not finite; nothing is written.
      ValueError: `results` is not of its documented form; nothing is written.
    """
    check_results(results)
    folder = pathlib.Path(folder)
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
    folder = pathlib.Path(folder)
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


def _figure_ids(path: pathlib.Path) -> set[str]:
    """Ids of the figures of an earlier `analyses.json`; none if there is no valid one."""
    try:
        found = json.loads(path.read_text())
        check_analyses(found)
    except (OSError, ValueError):
        return set()
    return {figure["id"] for figure in found["figures"]}

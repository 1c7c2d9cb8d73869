"""The one form of every figure and table: plain data that JSON holds and any plot or page can render.

    figure = {"id", "paper", "title", "x": {"label", "scale"}, "y": {"label", "scale"}, "series": [series], "note"}
    series = {"name", "x": [float], "y": [float], "low": [float] | None, "high": [float] | None}
    table  = {"id", "paper", "title", "columns": [str], "rows": [[str | float | int | None]], "note"}

`paper` names the figure or table of arXiv 2605.23605 that it answers to ("" where there is none); `low` and `high` are 95% intervals
over samples; scales are "linear" or "log".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diladiff_jax.evaluation.intervals import Estimate

Figure = dict[str, Any]
Table = dict[str, Any]


def series(name: str, x: Sequence[float], y: Sequence[Estimate] | Sequence[float]) -> dict[str, Any]:
    """A line of a figure: estimates with their intervals, or exact numbers without."""
    exact = not y or not isinstance(y[0], dict)
    return {
        "name": name,
        "x": [float(v) for v in x],
        "y": [float(v if exact else v["value"]) for v in y],
        "low": None if exact else [float(v["low"]) for v in y],
        "high": None if exact else [float(v["high"]) for v in y],
    }


def figure(
    id: str, paper: str, title: str, x: str, y: str, lines: Sequence[dict[str, Any]], note: str = "", *, x_scale: str = "linear", y_scale: str = "linear"
) -> Figure:
    """A figure; `x` and `y` are the labels of its axes, with units."""
    return {
        "id": id, "paper": paper, "title": title, "x": {"label": x, "scale": x_scale}, "y": {"label": y, "scale": y_scale},
        "series": list(lines), "note": note,
    }


def table(id: str, paper: str, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> Table:
    """A table.

    Raises:
      ValueError: a row that is not as long as the columns.
    """
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"table {id} has {len(columns)} columns and a row of {len(row)}: {row}")
    return {"id": id, "paper": paper, "title": title, "columns": list(columns), "rows": [list(row) for row in rows], "note": note}


def cells(estimate: Estimate | None) -> list[float | None]:
    """value, low and high as three cells; empty ones where nothing was measured."""
    return [None] * 3 if estimate is None else [float(estimate[end]) for end in ("value", "low", "high")]

"""The one form of every figure and table: plain data that JSON holds and any plot or page can render.

    figure = {"id", "paper", "title", "x": {"label", "scale"}, "y": {"label", "scale"}, "series": [series], "note"}
    series = {"name", "x": [float], "y": [float], "low": [float] | None, "high": [float] | None}
    table  = {"id", "paper", "title", "columns": [str], "rows": [[str | float | int | None]], "note"}

`paper` names the figure or table of arXiv 2605.23605 that it answers to ("" where there is none); `low` and `high` are 95% intervals
over samples; scales are "linear" or "log".
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from diladiff_jax.evaluation.measures.intervals import Estimate
from diladiff_jax.evaluation.schema import Fields, check_fields

Figure = dict[str, Any]
Table = dict[str, Any]

NAMES = {
    "mdlm": "MDLM",
    "mdlm_long": "MDLM, whole decoder budget",
    "ladiff": "LaDiff",
    "diladiff": "DiLaDiff",
    "prior_ddim": "prior, undistilled, DDIM",
    "prior_dpmpp_2m": "prior, undistilled, DPM-Solver++",
    "true_latent": "decoder, true latents",
    "null_latent": "decoder, null latent",
}
"""What series and tables call the models and controls of a sweep."""

SCHEMA: dict[str, Fields] = {
    "figure": {
        "id": (str,),
        "paper": (str,),
        "title": (str,),
        "x": (dict,),
        "y": (dict,),
        "series": (list,),
        "note": (str,),
    },
    "axis": {"label": (str,), "scale": (str,)},
    "series": {
        "name": (str,),
        "x": (list,),
        "y": (list,),
        "low": (list, type(None)),
        "high": (list, type(None)),
    },
    "table": {
        "id": (str,),
        "paper": (str,),
        "title": (str,),
        "columns": (list,),
        "rows": (list,),
        "note": (str,),
    },
}
"""`analyses.json`: `{"figures": [figure], "tables": [table]}`, no id twice; ids are of letters, digits and underscores, for files are named by them."""


def series(
    name: str, x: Sequence[float], y: Sequence[Estimate] | Sequence[float]
) -> dict[str, Any]:
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
    id: str,
    paper: str,
    title: str,
    x: str,
    y: str,
    lines: Sequence[dict[str, Any]],
    note: str = "",
    *,
    x_scale: str = "linear",
    y_scale: str = "linear",
) -> Figure:
    """A figure; `x` and `y` are the labels of its axes, with units."""
    return {
        "id": id,
        "paper": paper,
        "title": title,
        "x": {"label": x, "scale": x_scale},
        "y": {"label": y, "scale": y_scale},
        "series": list(lines),
        "note": note,
    }


def table(
    id: str,
    paper: str,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    note: str = "",
) -> Table:
    """A table.

    Raises:
      ValueError: a row that is not as long as the columns.
    """
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(
                f"table {id} has {len(columns)} columns and a row of {len(row)}: {row}"
            )
    return {
        "id": id,
        "paper": paper,
        "title": title,
        "columns": list(columns),
        "rows": [list(row) for row in rows],
        "note": note,
    }


def cells(estimate: Estimate | None) -> list[float | None]:
    """value, low and high as three cells; empty ones where nothing was measured."""
    return (
        [None] * 3
        if estimate is None
        else [float(estimate[end]) for end in ("value", "low", "high")]
    )


def check_analyses(found: Any) -> None:
    """Holds the content of `analyses.json` against `SCHEMA`.

    Raises:
      ValueError: naming the first thing that is not as documented.
    """
    if not isinstance(found, dict) or set(found) != {"figures", "tables"}:
        raise ValueError("analyses must have the keys figures and tables")
    for i, form in enumerate(found["figures"]):
        where = f"figures[{i}]"
        check_fields(form, SCHEMA["figure"], where)
        for axis in ("x", "y"):
            check_fields(form[axis], SCHEMA["axis"], f"{where}.{axis}")
            if form[axis]["scale"] not in ("linear", "log"):
                raise ValueError(
                    f"{where}.{axis}.scale is {form[axis]['scale']!r}; it must be linear or log"
                )
        if not form["series"]:
            raise ValueError(f"{where}.series is empty; a figure has at least one")
        for j, line in enumerate(form["series"]):
            check_fields(line, SCHEMA["series"], f"{where}.series[{j}]")
            _check_numbers(line, f"{where}.series[{j}]")
    for i, form in enumerate(found["tables"]):
        where = f"tables[{i}]"
        check_fields(form, SCHEMA["table"], where)
        if not all(isinstance(name, str) for name in form["columns"]):
            raise ValueError(f"{where}.columns is {form['columns']!r}; it must be text")
        for j, row in enumerate(form["rows"]):
            if len(row) != len(form["columns"]):
                raise ValueError(
                    f"{where}.rows[{j}] has {len(row)} cells; there are {len(form['columns'])} columns"
                )
            for cell in row:
                if not (cell is None or isinstance(cell, str) or _is_number(cell)):
                    raise ValueError(
                        f"{where}.rows[{j}] holds {cell!r}; a cell is text, a finite number or null"
                    )
    ids = [form["id"] for form in [*found["figures"], *found["tables"]]]
    for name in ids:
        if not re.fullmatch(r"\w+", name, re.ASCII) or ids.count(name) > 1:
            raise ValueError(
                f"the id {name!r} stands twice or is not of letters, digits and underscores"
            )


def _check_numbers(line: dict[str, Any], where: str) -> None:
    if not line["x"]:
        raise ValueError(f"{where} has no points")
    for name in ("x", "y", "low", "high"):
        if line[name] is None:
            continue
        if len(line[name]) != len(line["x"]):
            raise ValueError(
                f"{where}.{name} has {len(line[name])} numbers for {len(line['x'])} points"
            )
        for value in line[name]:
            if not _is_number(value):
                raise ValueError(f"{where}.{name} holds {value!r}; it must hold finite numbers")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

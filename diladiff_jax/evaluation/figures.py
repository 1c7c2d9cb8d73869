"""The documented form of figures and tables: plain data for JSON, plots and pages.

    figure = {"id", "paper", "title", "x": axis, "y": axis, "series": [series], "note"}
    axis   = {"label": str, "scale": "linear" | "log"}
    series = {"name", "x": [float], "y": [float], "low": [float] | None, "high": [float] | None}
    table  = {"id", "paper", "title", "columns": [str], "rows": [[cell]], "note"}
    cell   = str | float | int | None

`paper` names the figure or table of arXiv 2605.23605 that corresponds, or is "". `low` and `high`
are 95% intervals over samples. `analyses.json` is `{"figures": [figure], "tables": [table]}`; ids
are unique and consist of letters, digits and underscores, because files are named after them.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

from diladiff_jax.evaluation.measures.intervals import Estimate
from diladiff_jax.evaluation.schema import Fields, check_fields


class Axis(TypedDict):
    """An axis: its label, with the unit, and its scale, "linear" or "log"."""

    label: str
    scale: str


class Series(TypedDict):
    """One line of a figure; `low` and `high` are None for exact numbers."""

    name: str
    x: list[float]
    y: list[float]
    low: list[float] | None
    high: list[float] | None


class Figure(TypedDict):
    """A figure, see the module."""

    id: str
    paper: str
    title: str
    x: Axis
    y: Axis
    series: list[Series]
    note: str


class Table(TypedDict):
    """A table, see the module."""

    id: str
    paper: str
    title: str
    columns: list[str]
    rows: list[list[Any]]
    note: str


@dataclasses.dataclass
class Findings:
    """The figures and tables of an analysis, or of several."""

    figures: list[Figure] = dataclasses.field(default_factory=list)
    tables: list[Table] = dataclasses.field(default_factory=list)

    def extend(self, other: Findings) -> None:
        """Appends the figures and tables of `other`."""
        self.figures.extend(other.figures)
        self.tables.extend(other.tables)

    def as_json(self) -> dict[str, Any]:
        """The content of `analyses.json`."""
        return {"figures": self.figures, "tables": self.tables}


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


def linear(label: str) -> Axis:
    """An axis with a linear scale."""
    return {"label": label, "scale": "linear"}


def log(label: str) -> Axis:
    """An axis with a logarithmic scale."""
    return {"label": label, "scale": "log"}


def series(name: str, x: Iterable[float], y: Sequence[Estimate] | Sequence[float]) -> Series:
    """A line of a figure.

    Args:
      name: for the legend.
      x: where the points are.
      y: estimates with intervals, or exact numbers.
    """
    estimates = [v for v in y if isinstance(v, dict)]
    exact = [float(v) for v in y if not isinstance(v, dict)]
    return {
        "name": name,
        "x": [float(v) for v in x],
        "y": exact or [float(v["value"]) for v in estimates],
        "low": None if exact or not y else [float(v["low"]) for v in estimates],
        "high": None if exact or not y else [float(v["high"]) for v in estimates],
    }


def figure(
    id: str, paper: str, title: str, x: Axis, y: Axis, lines: Sequence[Series], note: str = ""
) -> Figure:
    """A figure of the documented form."""
    return {
        "id": id,
        "paper": paper,
        "title": title,
        "x": x,
        "y": y,
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
    """A table of the documented form.

    Raises:
      ValueError: a row is not as long as the columns.
    """
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"table {id}: got a row of {len(row)}, expected {len(columns)}: {row}")
    return {
        "id": id,
        "paper": paper,
        "title": title,
        "columns": list(columns),
        "rows": [list(row) for row in rows],
        "note": note,
    }


def cells(estimate: Estimate | None) -> list[float | None]:
    """The value, low and high of an estimate as three cells, empty if there is none."""
    if estimate is None:
        return [None] * 3
    return [float(estimate["value"]), float(estimate["low"]), float(estimate["high"])]


def check_analyses(found: Any) -> None:
    """Validates the content of `analyses.json`.

    Raises:
      ValueError: something is not as documented; the message names the first such thing.
    """
    if not isinstance(found, dict) or set(found) != {"figures", "tables"}:
        raise ValueError("analyses: got other keys, expected the keys figures and tables.")
    for i, form in enumerate(found["figures"]):
        _check_figure(form, f"figures[{i}]")
    for i, form in enumerate(found["tables"]):
        _check_table(form, f"tables[{i}]")
    ids = [form["id"] for form in [*found["figures"], *found["tables"]]]
    for name in ids:
        if not re.fullmatch(r"\w+", name, re.ASCII):
            raise ValueError(f"id: got {name!r}, expected letters, digits and underscores.")
        if ids.count(name) > 1:
            raise ValueError(f"id: got {name!r} twice, expected unique ids.")


def _check_figure(form: Any, where: str) -> None:
    check_fields(form, SCHEMA["figure"], where)
    for name in ("x", "y"):
        check_fields(form[name], SCHEMA["axis"], f"{where}.{name}")
        scale = form[name]["scale"]
        if scale not in ("linear", "log"):
            raise ValueError(f"{where}.{name}.scale: got {scale!r}, expected linear or log.")
    if not form["series"]:
        raise ValueError(f"{where}.series: got none, expected at least one.")
    for j, line in enumerate(form["series"]):
        check_fields(line, SCHEMA["series"], f"{where}.series[{j}]")
        _check_numbers(line, f"{where}.series[{j}]")


def _check_table(form: Any, where: str) -> None:
    check_fields(form, SCHEMA["table"], where)
    if not all(isinstance(name, str) for name in form["columns"]):
        raise ValueError(f"{where}.columns: got {form['columns']!r}, expected text.")
    for j, row in enumerate(form["rows"]):
        if len(row) != len(form["columns"]):
            count = len(form["columns"])
            raise ValueError(f"{where}.rows[{j}]: got {len(row)} cells, expected {count} columns.")
        for cell in row:
            if not (cell is None or isinstance(cell, str) or _is_number(cell)):
                raise ValueError(
                    f"{where}.rows[{j}]: got {cell!r}, expected text, a finite number or null."
                )


def _check_numbers(line: dict[str, Any], where: str) -> None:
    if not line["x"]:
        raise ValueError(f"{where}: got no points, expected at least one.")
    for name in ("x", "y", "low", "high"):
        if line[name] is None:
            continue
        if len(line[name]) != len(line["x"]):
            raise ValueError(
                f"{where}.{name}: got {len(line[name])} numbers, expected {len(line['x'])}."
            )
        for value in line[name]:
            if not _is_number(value):
                raise ValueError(f"{where}.{name}: got {value!r}, expected a finite number.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

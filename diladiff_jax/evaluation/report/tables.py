"""Tables as the report's page shows them: cells as text, estimates with their intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from diladiff_jax.evaluation.figures import Figure, Table
from diladiff_jax.evaluation.report.text import interval_words

_OUT_OF_REACH = "out of reach"  # begins the cell that says why a row does not compare
_LONG_TEXT = 30
_MOST_POINTS = 40


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell or column head: its text (None if empty), interval "low, high" or "", and classes."""

    text: str | None
    interval: str = ""
    classes: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """The cells of a row, and its classes."""

    cells: list[Cell]
    classes: str


@dataclasses.dataclass(frozen=True)
class View:
    """What the template needs to show a table."""

    id: str
    title: str
    paper: str
    note: str
    columns: list[Cell]
    rows: list[Row]


def view(table: Table) -> View:
    """Lays out a table; the columns of a value, its low and its high end become one."""
    groups = _column_groups(table["columns"])
    numeric = [_is_numeric(table, group[0]) for group in groups]
    columns = [
        Cell(table["columns"][group[0]].replace("_", " "), classes="number" if is_number else "")
        for group, is_number in zip(groups, numeric, strict=True)
    ]
    names = [row[0] for row in table["rows"]]
    repeats = len(set(names)) < len(names)
    rows = []
    for i, row in enumerate(table["rows"]):
        cells = [_cell(row, *pair) for pair in zip(groups, numeric, strict=True)]
        cells[0] = dataclasses.replace(cells[0], classes="number" if numeric[0] else "")
        # A rule separates rows of one name from those of the next.
        classes = ["first"] if repeats and i > 0 and names[i] != names[i - 1] else []
        classes += ["beyond"] if out_of_reach(row) else []
        rows.append(Row(cells, " ".join(classes)))
    return View(table["id"], table["title"], table["paper"], table["note"], columns, rows)


def numbers(figure: Figure) -> View:
    """The points of a figure as a table; of a curve with many points, every few."""
    rows, thinned = [], False
    for line in figure["series"]:
        stride = -(-len(line["x"]) // _MOST_POINTS)
        thinned |= stride > 1
        for i in range(0, len(line["x"]), stride):
            low, high = (None if ends is None else ends[i] for ends in (line["low"], line["high"]))
            rows.append([line["name"], line["x"][i], line["y"][i], low, high])
    return view(
        {
            "id": f"{figure['id']}_numbers",
            "paper": "",
            "title": figure["title"],
            "columns": ["series", figure["x"]["label"], figure["y"]["label"], "low", "high"],
            "rows": rows,
            "note": "Some of the points; analyses.json has all of them." if thinned else "",
        }
    )


def out_of_reach(row: Sequence[Any]) -> bool:
    """Whether a row of a published table says that this run cannot be compared with it."""
    return any(isinstance(cell, str) and cell.startswith(_OUT_OF_REACH) for cell in row)


def number(value: float) -> str:
    """A number with as many digits as a reader needs."""
    if value == int(value):
        return f"{int(value)}"
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"


def _column_groups(columns: Sequence[str]) -> list[tuple[int, ...]]:
    """Indices of the columns, those of one estimate together."""
    groups: list[tuple[int, ...]] = []
    i = 0
    while i < len(columns):
        ends = columns[i + 1 : i + 3]
        estimate = ends in (["low", "high"], [f"{columns[i]} low", f"{columns[i]} high"])
        groups.append((i, i + 1, i + 2) if estimate else (i,))
        i += len(groups[-1])
    return groups


def _is_numeric(table: Table, column: int) -> bool:
    return all(row[column] is None or isinstance(row[column], int | float) for row in table["rows"])


def _cell(row: Sequence[Any], group: Sequence[int], numeric: bool) -> Cell:
    value, *ends = (row[i] for i in group)
    classes = "number" if numeric else ""
    if isinstance(value, str):
        return Cell(value, classes="words" if len(value) > _LONG_TEXT else classes)
    if value is None:
        return Cell(None, classes=classes)
    if not ends or None in ends:
        return Cell(number(value), classes=classes)
    digits = 3 if abs(value) < 10 else 1  # as in table.txt, and the same down a column
    low, high = ends
    interval = interval_words(low, high, digits)
    return Cell(f"{value:.{digits}f}", interval, classes)

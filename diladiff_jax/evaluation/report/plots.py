"""Figures of the one form (`forms`) as PNG and SVG files, and as SVG inside a page that follows its colours."""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from diladiff_jax.evaluation.figures import NAMES, Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure as Drawing

COLORS = {
    "mdlm": "#7b7b7b",
    "mdlm_long": "#404040",
    "ladiff": "#3b75af",
    "diladiff": "#c8442d",
    "prior_ddim": "#b5761b",
    "prior_dpmpp_2m": "#7d7a12",
    "true_latent": "#3f8a57",
    "null_latent": "#9a5fb0",
}
"""One colour a model wherever it is drawn, dark enough to be told from white."""
INK, GRID = "#1b1f24", "#d3d7dc"

_OTHERS = [
    COLORS[name]
    for name in (
        "ladiff",
        "diladiff",
        "true_latent",
        "null_latent",
        "prior_ddim",
        "prior_dpmpp_2m",
        "mdlm",
        "mdlm_long",
    )
]
_MARKERS = "oD^svPXd"
_DENSE = 40  # from so many points on, a line is a curve, and markers would hide it

_STYLE = {
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.linewidth": 0.7,
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and set in the page's own font
    "font.family": ["DejaVu Sans"],
}


def style() -> contextlib.AbstractContextManager[None]:
    """The look of every drawing of a report, for a `with` block."""
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def draw(figure: Figure) -> Drawing:
    """One figure as a matplotlib drawing, intervals as bars; not on any screen, and leaving matplotlib's own state alone."""
    from matplotlib.figure import Figure as Drawing

    names = {title: name for name, title in NAMES.items()}
    with style():
        drawing = Drawing(figsize=(6.2, 4.3), layout="constrained")
        axes = drawing.subplots()
        for i, line in enumerate(figure["series"]):
            color = COLORS.get(names.get(line["name"], ""), _OTHERS[i % len(_OTHERS)])
            marker = None if len(line["x"]) > _DENSE else _MARKERS[i % len(_MARKERS)]
            look = dict(color=color, label=line["name"], linewidth=1.8, marker=marker, markersize=5)
            if line["low"] is None:
                axes.plot(line["x"], line["y"], **look)
            else:
                below = [max(0.0, y - low) for y, low in zip(line["y"], line["low"], strict=True)]
                above = [
                    max(0.0, high - y) for y, high in zip(line["y"], line["high"], strict=True)
                ]
                axes.errorbar(
                    line["x"], line["y"], yerr=[below, above], capsize=2, elinewidth=1, **look
                )
        for axis in ("x", "y"):
            if figure[axis]["scale"] == "log":
                log_scale(axes, axis)
        tick_values(axes, [x for line in figure["series"] for x in line["x"]])
        axes.set_xlabel(figure["x"]["label"])
        axes.set_ylabel("\n".join(_wrapped(figure["y"]["label"], 46)))
        axes.set_title("\n".join(_wrapped(figure["title"], 64)), fontsize=10.5)
        if len(figure["series"]) > 1:
            drawing.legend(
                *axes.get_legend_handles_labels(),
                loc="outside lower center",
                ncols=2 if len(figure["series"]) < 7 else 3,
                frameon=False,
                fontsize=8.5,
            )
    return drawing


def log_scale(axes: Axes, name: str) -> None:
    """Makes axis "x" or "y" logarithmic, with ticks in plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis: Axis = getattr(axes, f"{name}axis")
    getattr(axes, f"set_{name}scale")("log")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_formatter(NullFormatter())


def tick_values(axes: Axes, values: Sequence[float]) -> None:
    """Puts the ticks of the x axis where its points are, if these are few: numbers of steps, temperatures."""
    from matplotlib.ticker import NullLocator

    few = sorted(set(values))
    if len(few) <= 5 or (len(few) <= 12 and all(v == int(v) for v in few)):
        axes.set_xticks(few, [f"{v:g}" for v in few])
        axes.xaxis.set_minor_locator(NullLocator())


def _wrapped(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width) or [""]


def write(figures: Sequence[Figure], folder: str | os.PathLike[str]) -> dict[str, str]:
    """Each figure as `folder/ID.png` and `folder/ID.svg`, written aside and renamed; returns the SVG's text by id, for `inline`."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {}
    for figure in figures:
        drawing, name = draw(figure), figure["id"]
        for kind in ("png", "svg"):
            aside = folder / f".{name}.tmp.{kind}"
            save(drawing, aside, name)
            if kind == "svg":
                texts[name] = aside.read_text(encoding="utf-8")
            aside.replace(folder / f"{name}.{kind}")
    return texts


def save(drawing: Drawing, file: Any, salt: str, **options: Any) -> None:
    """Saves a drawing to a path or file object, by the kind that its name or `format` says; the same drawing gives the same bytes."""
    import matplotlib

    vector = str(options.get("format", file)).endswith("svg")
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": salt}):
        drawing.savefig(file, dpi=150, metadata={"Date": None} if vector else None, **options)


def as_svg(drawing: Drawing, salt: str) -> str:
    """The text of a drawing as an SVG file."""
    file = io.StringIO()
    save(drawing, file, salt, format="svg")
    return file.getvalue()


def inline(text: str, id: str) -> str:
    """The text of an SVG file of `save` as an element for a page: transparent, its colours the page's variables, its ids its own.

    The variables are `--ink`, `--grid` and one a model, as `--mdlm`; the page defines them, for light and for dark.
    """
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{id}-", text)
    text = re.sub(
        r'(<svg[^>]*?) width="[^"]*"',
        r"\1",
        re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1),
        count=1,
    )
    text = text.replace("fill: #ffffff", "fill: none")
    for name, color in ({"ink": INK, "grid": GRID} | COLORS).items():
        text = text.replace(color, f"var(--{name.replace('_', '-')})")
    return text.strip()

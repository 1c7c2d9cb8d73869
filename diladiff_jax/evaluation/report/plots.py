"""Figures of the documented form (`figures`) as PNG and SVG files, and as SVG inside a page."""

from __future__ import annotations

import contextlib
import io
import os
import re
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from diladiff_jax import files
from diladiff_jax.evaluation.figures import Figure, Series
from diladiff_jax.files import atomic_file, atomic_write_text
from diladiff_jax.stages import MODELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure as Drawing

INK, GRID = "#1b1f24", "#d3d7dc"
_DARK = {"ink": "#e6e9ec", "grid": "#3a4149"}

_DENSE = 40  # a line with more points is a curve, which markers would hide

_STYLE: Any = {
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
    "svg.fonttype": "none",  # text stays text: screen readers, search and the page's font apply
    "font.family": ["DejaVu Sans"],
}


def css_variable(name: str) -> str:
    """The page's CSS variable for the color of a model, of "ink" or of "grid"."""
    return f"--{name.replace('_', '-')}"


def css_variables(*, dark: bool) -> dict[str, str]:
    """CSS variables of every color in a drawing: of ink, of grid lines and of each model."""
    colors = dict(_DARK) if dark else {"ink": INK, "grid": GRID}
    colors |= {m.name: m.dark_color if dark else m.color for m in MODELS.values()}
    return {css_variable(name): color for name, color in colors.items()}


def style() -> contextlib.AbstractContextManager[None]:
    """A context in which drawings have the report's look."""
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def draw(figure: Figure) -> Drawing:
    """Draws one figure, with intervals as bars. Opens no window and keeps matplotlib's state."""
    from matplotlib.figure import Figure as Drawing

    with style():
        drawing = Drawing(figsize=(6.2, 4.3), layout="constrained")
        axes = drawing.subplots()
        for i, line in enumerate(figure["series"]):
            _draw_line(axes, line, i)
        for name in ("x", "y"):
            if figure[name]["scale"] == "log":
                log_scale(axes, name)
        tick_values(axes, [x for line in figure["series"] for x in line["x"]])
        axes.set_xlabel(figure["x"]["label"])
        axes.set_ylabel(textwrap.fill(figure["y"]["label"], 46))
        axes.set_title(textwrap.fill(figure["title"], 64), fontsize=10.5)
        if len(figure["series"]) > 1:
            drawing.legend(
                *axes.get_legend_handles_labels(),
                loc="outside lower center",
                ncols=2 if len(figure["series"]) < 7 else 3,
                frameon=False,
                fontsize=8.5,
            )
    return drawing


def _draw_line(axes: Axes, line: Series, index: int) -> None:
    # Series that are not models take the models' looks in turn, the grey ones of MDLM last.
    in_turn = sorted(MODELS.values(), key=lambda m: not m.has_latent)
    named = (m for m in MODELS.values() if m.title == line["name"])
    model = next(named, in_turn[index % len(in_turn)])
    look: dict[str, Any] = dict(label=line["name"], linewidth=1.8, markersize=5)
    look |= dict(color=model.color, marker=model.marker if len(line["x"]) <= _DENSE else None)
    if line["low"] is None or line["high"] is None:
        axes.plot(line["x"], line["y"], **look)
    else:
        bars = error_bars(line["y"], line["low"], line["high"])
        axes.errorbar(line["x"], line["y"], yerr=bars, capsize=2, elinewidth=1, **look)


def error_bars(
    values: Sequence[float], low: Sequence[float], high: Sequence[float]
) -> list[list[float]]:
    """Lengths of error bars below and above values, as matplotlib takes them."""
    return [
        [max(0.0, v - end) for v, end in zip(values, low, strict=True)],
        [max(0.0, end - v) for v, end in zip(values, high, strict=True)],
    ]


def log_scale(axes: Axes, name: str) -> None:
    """Makes axis "x" or "y" logarithmic, with ticks in plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis: Axis = getattr(axes, f"{name}axis")
    getattr(axes, f"set_{name}scale")("log")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_formatter(NullFormatter())


def tick_values(axes: Axes, values: Sequence[float]) -> None:
    """Puts x ticks exactly at the points if these are few, as with step counts or temperatures."""
    from matplotlib.ticker import NullLocator

    few = sorted(set(values))
    if len(few) <= 5 or (len(few) <= 12 and all(v == int(v) for v in few)):
        axes.set_xticks(few, [f"{v:g}" for v in few])
        axes.xaxis.set_minor_locator(NullLocator())


def write(figures: Sequence[Figure], folder: str | os.PathLike[str]) -> dict[str, str]:
    """Writes each figure as `folder/ID.png` and `folder/ID.svg`.

    Returns:
      The text of each SVG file by figure id, for `inline`.

    Raises:
      OSError: a file cannot be written.
    """
    folder = files.expand(folder)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {}
    for figure in figures:
        drawing, name = draw(figure), figure["id"]
        write_png(drawing, folder / f"{name}.png")
        texts[name] = as_svg(drawing, name)
        atomic_write_text(folder / f"{name}.svg", texts[name])
    return texts


def write_png(drawing: Drawing, path: str | os.PathLike[str]) -> None:
    """Writes a drawing as a PNG file. Raises OSError if that fails."""
    with atomic_file(path, "wb") as out, style():
        drawing.savefig(out, dpi=150, format="png")


def as_svg(drawing: Drawing, salt: str) -> str:
    """A drawing as the text of an SVG file.

    Args:
      drawing: the drawing.
      salt: seeds the ids in the file, so that the same drawing always gives the same text.
    """
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": salt}):
        drawing.savefig(file, dpi=150, format="svg", metadata={"Date": None})
    return file.getvalue()


def inline(text: str, id: str) -> str:
    """Turns an SVG file of `as_svg` into an element for a page.

    The background becomes transparent, the colors become the page's CSS variables (see
    `css_variables`), and ids get a prefix.

    Args:
      text: of the SVG file.
      id: the prefix, unique on the page.
    """
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{id}-", text)
    for size in ("height", "width"):
        text = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", text, count=1)
    text = text.replace("fill: #ffffff", "fill: none")
    for variable, color in css_variables(dark=False).items():
        text = text.replace(color, f"var({variable})")
    return text.strip()

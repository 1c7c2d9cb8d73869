"""The report as one HTML file that needs no network, no other file and no script but its own.

The templates escape every text. Only the drawings, which matplotlib has escaped, are inserted as
they are.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup, escape

from diladiff_jax.evaluation.figures import Figure, Findings
from diladiff_jax.evaluation.models import title
from diladiff_jax.evaluation.report import plots, tables
from diladiff_jax.evaluation.results import Results, corpus

MEASURES = {
    "valid": "share of documents that the grammar could have written",
    "agreement": "share of a document's agreements between details that are kept",
    "exact_nll": "exact negative log-likelihood of the valid documents, in nats per document",
    "detail_entropy": "entropy of the valid documents' details (who, what, where), in nats",
    "gen_ppl": "generative perplexity under the scorer; means little without the entropy beside it",
    "entropy": "unigram entropy within a sample, in nats",
    "mauve": "MAUVE against held-out text",
    "repetition": "share of a sample's 3-grams that repeat an earlier one",
    "bound_ppl": "bound on the perplexity of held-out text",
    "recovery": "share of masked tokens recovered",
}
_SECTIONS = {
    "results": "What was measured",
    "samples": "Samples side by side",
    "decoding": "Decoding, step by step",
    "paper": "Compared with the paper",
    "figures": "Figures",
    "tables": "Further tables",
}
_MAIN_TABLES = ("main", "autoencoder")
_PUBLISHED = "published_"  # begins the ids of tables that compare with the paper


def render(
    results: Results,
    found: Findings,
    samples: Sequence[Mapping[str, Any]],
    picture: str,
    svgs: Mapping[str, str],
    claims: Sequence[str],
) -> str:
    """The HTML of the page.

    Args:
      results: the content of `results.json`.
      found: figures and tables; the page shows all of them.
      samples: of `samples.sample_models`; empty if no model is trained.
      picture: the picture of the sweep as the text of an SVG file.
      svgs: each figure as the text of an SVG file, by id.
      claims: sentences of `summary`.
    """
    published = [t for t in found.tables if t["id"].startswith(_PUBLISHED)]
    main = [t for t in found.tables if t["id"] in _MAIN_TABLES]
    further = [t for t in found.tables if t not in published and t not in main]
    empty = {
        name
        for name, content in (("paper", published), ("figures", found.figures), ("tables", further))
        if not content
    }
    label = "Quality against decoding steps and against time; the table below has the numbers"
    rows = [row for table in published for row in table["rows"]]
    return (
        _environment()
        .get_template("page.html")
        .render(
            title=f"DiLaDiff on {corpus(results)}",
            lede=_lede(results),
            claims=claims,
            setting={name: _setting_value(value) for name, value in results["setting"].items()},
            measures=_measures(results),
            sections=[{"id": k, "title": v} for k, v in _SECTIONS.items() if k not in empty],
            colors={dark: plots.css_variables(dark=dark) for dark in (False, True)},
            picture=_image(picture, "picture", label),
            samples=samples,
            published=len(rows),
            beyond=sum(map(tables.out_of_reach, rows)),
            figures=[_figure(figure, svgs[figure["id"]]) for figure in found.figures],
            tables={
                "main": [tables.view(t) for t in main],
                "published": [tables.view(t) for t in published],
                "further": [tables.view(t) for t in further],
            },
        )
    )


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("diladiff_jax.evaluation.report", "template"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    # ASCII, so that the JSON survives a file written with replacements; NaN is not JSON.
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": True, "allow_nan": False}
    environment.filters["css_variable"] = plots.css_variable
    environment.filters["number"] = tables.number
    environment.filters["sentence"] = _sentence
    return environment


def _figure(figure: Figure, svg: str) -> dict[str, Any]:
    """What the template needs to show a figure, with its numbers as a table to unfold."""
    names = ", ".join(line["name"] for line in figure["series"])
    label = f"{figure['title']}: {figure['y']['label']} against {figure['x']['label']}, of {names}"
    parts = [figure["note"], f"{figure['paper']} of the paper" if figure["paper"] else ""]
    return {
        "id": figure["id"],
        "svg": _image(svg, figure["id"], label),
        "caption": " ".join(f"{_sentence(part.rstrip('.'))}." for part in parts if part),
        "numbers": tables.numbers(figure),
    }


def _image(svg: str, id: str, label: str) -> Markup:
    """An SVG file as an element, which screen readers announce as one image with a label."""
    element = plots.inline(svg, id)
    return Markup(element.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))


def _lede(results: Results) -> str:
    length = results["setting"].get("length", "?")
    sampled = [r for r in results["rows"] if r["decode_steps"] is not None]
    text = f"Texts of {length} tokens"
    if sampled:
        models = "; ".join(dict.fromkeys(title(r["model"]) for r in sampled))
        steps = ", ".join(map(str, sorted({r["decode_steps"] for r in sampled})))
        count = max(r["samples"] for r in sampled)
        text = f"{count} texts of {length} tokens per row, at {steps} decoding steps, by: {models}"
    return f"{text}. Brackets and bars are 95% intervals over samples."


def _setting_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {number}" for name, number in value.items())
    return "none" if value is None or value == [] else value


def _measures(results: Results) -> dict[str, str]:
    measured = {name for row in results["rows"] for name in row["metrics"]}
    return {name: meaning for name, meaning in MEASURES.items() if name in measured}


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]

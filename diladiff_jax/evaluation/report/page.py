"""The report as one HTML file that needs nothing beside it: no network, no other file, no script but its own.

`render` lays out what `report` hands it. Every text from outside (samples, corpus names, notes) passes `_text` or `embedded`.
"""

from __future__ import annotations

import html
import importlib.resources
import json
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from diladiff_jax.evaluation.figures import NAMES, Figure, Table
from diladiff_jax.evaluation.report import plots

MEASURES = {
    "valid": "share of documents that the grammar could have written",
    "agreement": "share of agreements between details that are kept",
    "exact_nll": "exact negative log-likelihood of the valid ones, nats a document",
    "gen_ppl": "generative perplexity under the scorer; means little without the entropy beside it",
    "entropy": "unigram entropy within a sample, nats",
    "mauve": "MAUVE against held-out text",
    "repetition": "share of a sample's 3-grams that stood in it before",
    "bound_ppl": "bound on the perplexity of held-out text",
    "recovery": "share of masked tokens recovered",
}
_COMPARISONS = "published_"  # how ids of tables beside the paper's figures begin
_BEYOND = "out of reach"
_MOST_POINTS = 40


def render(
    results: Mapping[str, Any],
    found: Mapping[str, Any],
    draws: Sequence[Mapping[str, Any]],
    picture: str,
    drawn: Mapping[str, str],
    claims: Sequence[str],
) -> str:
    """The page.

    Args:
      results: the content of `results.json`.
      found: `{"figures", "tables"}`; every one of them is on the page.
      draws: samples, of `samples.draw`; none where no model is trained.
      picture: the text of the picture as an SVG file.
      drawn: the text of each figure as an SVG file, by its id; of `plots.write`.
      claims: sentences of `report.summary`.
    """
    tables = found["tables"]
    main = [t for t in tables if t["id"] in ("main", "autoencoder")]
    beside = [t for t in tables if t["id"].startswith(_COMPARISONS)]
    others = [t for t in tables if t not in main and t not in beside]
    sections = [
        (
            "results",
            "What was measured",
            f'<figure class="picture scroll" tabindex="0" role="group" aria-label="The picture">{_labelled(plots.inline(picture, "picture"), "Quality against decoding steps and against time; the table below has the numbers")}</figure>'
            + "".join(map(table_html, main)),
        ),
        ("samples", "Samples side by side", samples_html(draws)),
        (
            "decoding",
            "Decoding, step by step",
            _template("viewer.html") if draws else "<p>No model is trained here.</p>",
        ),
        ("paper", "Beside the paper's figures", _reach(beside) + "".join(map(table_html, beside))),
        (
            "figures",
            "Figures",
            f'<div class="figures">{"".join(figure_html(form, drawn[form["id"]]) for form in found["figures"])}</div>',
        ),
        ("tables", "Further tables", "".join(map(table_html, others))),
    ]
    sections = [section for section in sections if section[2]]
    return string.Template(_template("page.html")).substitute(
        title=_text(f"DiLaDiff on {_corpus(results)}"),
        lede=_lede(results),
        claims="".join(
            ["<ul class='claims'>", *(f"<li>{_text(claim)}</li>" for claim in claims), "</ul>"]
        )
        if claims
        else "",
        setting=_setting(results),
        nav="<ul>"
        + "".join(f'<li><a href="#{id}">{_text(title)}</a></li>' for id, title, _ in sections)
        + "</ul>",
        sections="\n".join(
            f'<section aria-labelledby="{id}"><h2 id="{id}">{_text(title)}</h2>\n{body}\n</section>'
            for id, title, body in sections
        ),
        decoding=embedded(list(draws)),
        style=_template("style.css"),
        script=_template("viewer.js"),
    )


def embedded(value: Any) -> str:
    """JSON for a `<script type="application/json">` element: nothing in it can end the element, or begin a comment."""
    return (
        json.dumps(value, ensure_ascii=True, allow_nan=False)
        .replace("<", "\\u003c")
        .replace(">", "\\u003e")
        .replace("&", "\\u0026")
    )


def table_html(form: Table, heading: bool = True) -> str:
    """One table, under its title unless told not; three columns of a value, its low and its high end become one, `value [low, high]`."""
    groups = _grouped(form["columns"])
    heads = "".join(
        f'<th scope="col"{_class("number" if _numeric(form, g) else "")}>{_text(_head(form["columns"][g[0]]))}</th>'
        for g in groups
    )
    leads = [row[groups[0][0]] for row in form["rows"]]
    grouped = len(set(leads)) < len(leads)  # rows of one name stand together
    body, before = [], None
    for row in form["rows"]:
        lead, *rest = groups
        beyond = any(isinstance(cell, str) and cell.startswith(_BEYOND) for cell in row)
        classes = " ".join(
            name
            for name, on in (
                ("first", grouped and row[lead[0]] != before and before is not None),
                ("beyond", beyond),
            )
            if on
        )
        before = row[lead[0]]
        cells = [
            f'<th scope="row"{_class("number" if _numeric(form, lead) else "")}>{_cell(row, lead)}</th>'
        ]
        for group in rest:
            long = isinstance(row[group[0]], str) and len(row[group[0]]) > 30
            cells.append(
                f"<td{_class('number' if _numeric(form, group) else 'words' if long else '')}>{_cell(row, group)}</td>"
            )
        body.append(f"<tr{_class(classes)}>{''.join(cells)}</tr>")
    title = f"<h3>{_text(form['title'])}{_paper(form)}</h3>" if heading else ""
    return (
        f'{title}<div class="scroll" tabindex="0" role="region" aria-label="{_text(form["title"])}" id="table-{_text(form["id"])}">'
        f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table></div>{_note(form)}\n"
    )


def figure_html(form: Figure, svg: str) -> str:
    """One figure, its SVG file in the page, and its numbers as a table to unfold; of a curve of many points, some."""
    lines = [line["name"] for line in form["series"]]
    label = (
        f"{form['title']}: {form['y']['label']} against {form['x']['label']}, of {', '.join(lines)}"
    )
    rows, thinned = [], False
    for line in form["series"]:
        every = -(-len(line["x"]) // _MOST_POINTS)
        thinned |= every > 1
        for i in range(0, len(line["x"]), every):
            ends = (None, None) if line["low"] is None else (line["low"][i], line["high"][i])
            rows.append([line["name"], line["x"][i], line["y"][i], *ends])
    numbers = {
        "id": f"{form['id']}_numbers",
        "paper": "",
        "title": form["title"],
        "columns": ["series", form["x"]["label"], form["y"]["label"], "low", "high"],
        "rows": rows,
        "note": "Some of the points; all are in analyses.json." if thinned else "",
    }
    note = f"{_upper(form['note'].rstrip('.'))}. " if form["note"] else ""
    return (
        f'<figure id="figure-{_text(form["id"])}" role="group">{_labelled(plots.inline(svg, form["id"]), label)}'
        f"<figcaption>{_text(note)}{_text(_upper(form['paper']) + ' of the paper.' if form['paper'] else '')}</figcaption>"
        f"<details><summary>Numbers</summary>{table_html(numbers, heading=False)}</details></figure>\n"
    )


def samples_html(draws: Sequence[Mapping[str, Any]]) -> str:
    """The samples of all models, a row a seed, each with its entropy and the oracle's verdict where there is one."""
    if not draws:
        return "<p>No model is trained here.</p>"
    steps = ", ".join(
        f"{d['title']} {d['latent_steps']} latent steps" for d in draws if d["latent_steps"]
    )
    first = draws[0]
    said = f"Seed {first['samples'][0]['seed']}, not chosen: the first {len(first['samples'])} of each model, without a prompt; {first['decode_steps']} decoding steps, temperature {_number(first['temperature'])}, nucleus {_number(first['top_p'])}"
    parts = [f'<p class="note">{_text(said + ("; " + steps if steps else ""))}.</p>']
    for i, sample in enumerate(first["samples"]):
        cards = "".join(_card(drawn, drawn["samples"][i]) for drawn in draws)
        parts.append(f'<h3>Sample {sample["index"] + 1}</h3><div class="seed">{cards}</div>')
    return "\n".join(parts)


def _card(drawn: Mapping[str, Any], sample: Mapping[str, Any]) -> str:
    valid = sample["valid"]
    mark = (
        ""
        if valid is None
        else '<span class="mark good">&#x2713; valid</span>, '
        if valid
        else f'<span class="mark bad">&#x2717; not valid</span> ({_text(sample["fault"])}), '
    )
    return (
        f'<article class="sample" style="--model: var(--{drawn["model"].replace("_", "-")})"><h4>{_text(drawn["title"])}</h4>'
        f'<p class="text">{_text(sample["text"])}</p><p class="note">{mark}entropy {sample["entropy"]:.2f} nats</p></article>'
    )


def _lede(results: Mapping[str, Any]) -> str:
    rows = results["rows"]
    sampled = [r for r in rows if r["decode_steps"] is not None]
    parts = [f"Texts of {results['setting'].get('length', '?')} tokens"]
    if sampled:
        models = "; ".join(dict.fromkeys(NAMES.get(r["model"], r["model"]) for r in sampled))
        steps = sorted({r["decode_steps"] for r in sampled})
        parts = [
            f"{max(r['samples'] for r in sampled)} texts of {results['setting'].get('length', '?')} tokens a row at {', '.join(map(str, steps))} decoding steps, by: {models}"
        ]
    return _text(f"{parts[0]}. Brackets and bars are 95% intervals over samples.")


def _setting(results: Mapping[str, Any]) -> str:
    def pairs(entries: Mapping[str, Any]) -> str:
        return (
            '<dl class="pairs">'
            + "".join(
                f"<dt>{_text(name.replace('_', ' '))}</dt><dd>{_text(value)}</dd>"
                for name, value in entries.items()
            )
            + "</dl>"
        )

    def said(value: Any) -> Any:
        if isinstance(value, Mapping):
            return ", ".join(f"{k} {v}" for k, v in value.items())
        return "none" if value is None or value == [] else value

    measured = {name for row in results["rows"] for name in row["metrics"]}
    meanings = {name: meaning for name, meaning in MEASURES.items() if name in measured}
    return pairs({name: said(value) for name, value in results["setting"].items()}) + pairs(
        meanings
    )


def _reach(tables: Iterable[Table]) -> str:
    """How many published rows this run could not have reached, before the tables that say it row by row."""
    rows = [row for form in tables for row in form["rows"]]
    if not rows:
        return ""
    beyond = sum(
        any(isinstance(cell, str) and cell.startswith(_BEYOND) for cell in row) for row in rows
    )
    said = f"Row by row, the paper's number and this run's. {beyond} of {len(rows)} rows are out of reach of this run and are set in grey: "
    why = "its corpus or length is another one, or the method is not part of this project. Such numbers stand side by side for orientation, and are no comparison."
    return f"<p>{_text(said + why if beyond else f'Row by row, the paper has {len(rows)} numbers; the last column says of each whether it compares.')}</p>"


def _grouped(columns: Sequence[str]) -> list[tuple[int, ...]]:
    """Indices of the columns, those of one estimate together."""
    groups: list[tuple[int, ...]] = []
    i = 0
    while i < len(columns):
        ends = columns[i + 1 : i + 3]
        estimate = ends in (["low", "high"], [f"{columns[i]} low", f"{columns[i]} high"])
        groups.append((i, i + 1, i + 2) if estimate else (i,))
        i += len(groups[-1])
    return groups


def _numeric(form: Table, group: Sequence[int]) -> bool:
    return all(
        row[group[0]] is None or isinstance(row[group[0]], int | float) for row in form["rows"]
    )


def _cell(row: Sequence[Any], group: Sequence[int]) -> str:
    value, *ends = (row[i] for i in group)
    if value is None:
        return '<span class="hidden">none</span>'
    if isinstance(value, str):
        return _text(value)
    if not ends or None in ends:
        return _number(value)
    digits = 3 if abs(value) < 10 else 1  # as in table.txt, and the same down a column
    return f"{value:.{digits}f} <small>[{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]</small>"


def _number(value: float) -> str:
    if isinstance(value, int) or value == int(value):
        return f"{int(value)}"
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"


def _head(name: str) -> str:
    return name.replace("_", " ")


def _paper(form: Table) -> str:
    return (
        f' <span class="paper">({_text(form["paper"])} of the paper)</span>'
        if form["paper"]
        else ""
    )


def _note(form: Table) -> str:
    return f'<p class="note">{_text(_upper(form["note"]))}</p>' if form["note"] else ""


def _labelled(svg: str, label: str) -> str:
    """An `<svg>` element as one image with a name for who cannot see it."""
    return svg.replace("<svg", f'<svg role="img" aria-label="{_text(label)}"', 1)


def _class(names: str) -> str:
    return f' class="{names}"' if names else ""


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _corpus(results: Mapping[str, Any]) -> str:
    return results["rows"][0]["corpus"] if results["rows"] else "an unknown corpus"


def _template(name: str) -> str:
    return (
        importlib.resources.files("diladiff_jax.evaluation.report")
        .joinpath("template", name)
        .read_text(encoding="utf-8")
    )

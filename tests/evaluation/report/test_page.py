"""The report's page and figures: everything lands on it, and all text stays text."""

import html.parser
import json
import pathlib
import re
import tomllib
import xml.etree.ElementTree

import pytest
from report_inputs import HOSTILE, make_found, make_results, make_samples

from diladiff_jax.evaluation import figures, report
from diladiff_jax.evaluation.analyses import published, sweep_curves
from diladiff_jax.evaluation.report import page, plots
from diladiff_jax.stages import MODELS

ROOT = pathlib.Path(__file__).parents[3]


class Read(html.parser.HTMLParser):
    """What a browser makes of a page: elements with attributes, text, and content of scripts."""

    VOID = frozenset({"meta", "link", "input", "br", "img", "hr"})

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.scripts, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts[-1] += data
        elif self.open[-1:] != ["style"]:
            self.words.append(data)


def test_text_of_any_kind_stays_text(folder):
    """A sample that would end the script, begin a comment or expand in the template is just shown.

    It reaches the viewer unchanged.
    """
    read = Read((folder / "report.html").read_text())
    assert len(read.scripts) == 2 and json.loads(read.scripts[0]) == make_samples()
    assert not [tag for tag, _ in read.elements if tag in ("b", "i")]
    shown = [words for words in read.words if HOSTILE in words]
    assert len(shown) >= 3, "in a table's cell, and in a sample of each model"
    assert not re.search("[<>&]", read.scripts[0])


def test_a_lone_surrogate_becomes_a_question_mark(tmp_path):
    """UTF-8 cannot encode it."""
    shown = make_samples()
    shown[0]["samples"][0]["text"] = "half \ud83e a fox"
    path = report.write_page(make_results(), figures.Findings(), shown, tmp_path)
    assert "half ? a fox" in path.read_text()


def test_every_figure_and_table_is_on_the_page_and_in_files(folder):
    """Figures are SVG on the page, and PNG and SVG beside it; analyses.json is as documented."""
    results = make_results()
    found = make_found(results)
    assert json.loads((folder / "analyses.json").read_text()) == found.as_json()
    figures.check_analyses(found.as_json())
    text = (folder / "report.html").read_text()
    read = Read(text)
    ids = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert sorted(p.name for p in (folder / "figures").iterdir()) == sorted(
        f"{f['id']}.{kind}" for f in found.figures for kind in ("png", "svg")
    )
    for figure in found.figures:
        assert f"figure-{figure['id']}" in ids and text.count(f'id="{figure["id"]}-figure_1"') == 1
        assert (folder / "figures" / f"{figure['id']}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        svg = xml.etree.ElementTree.parse(folder / "figures" / f"{figure['id']}.svg")
        words = " ".join(
            "".join(e.itertext()) for e in svg.iter("{http://www.w3.org/2000/svg}text")
        )
        assert figure["x"]["label"] in words and all(
            line["name"] in words for line in figure["series"] if len(figure["series"]) > 1
        )
    for table in found.tables:
        (part,) = re.findall(rf'<div[^>]* id="table-{table["id"]}">.*?</table>', text, re.DOTALL)
        assert part.count("<tr") == len(table["rows"]) + 1
    assert "0.123 <small>[0.100, 0.200]</small>" in text and ">1234.6<" in text and ">-3<" in text


def test_the_page_needs_nothing_beside_it(folder):
    """Its only addresses are anchors and `data:`, and its policy would stop a request."""
    read = Read((folder / "report.html").read_text())
    for tag, attributes in read.elements:
        for name in ("src", "href", "xlink:href", "action", "srcset", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    style = (ROOT / "diladiff_jax/evaluation/report/template/style.css").read_text()
    assert "url(" not in style and "@import" not in style
    policy = next(
        a["content"] for tag, a in read.elements if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'")


def test_a_page_without_a_trained_model_says_so():
    """It has no viewer that could break."""
    results = {"setting": {}, "rows": []}
    read = Read(page.render(results, figures.Findings(), [], "<svg></svg>", {}, []))
    assert "No model is trained here." in read.words and json.loads(read.scripts[0]) == []
    assert not [a for _, a in read.elements if a.get("id") == "viewer"]


def test_published_rows_out_of_reach_are_counted_and_marked(folder):
    """On another corpus these are all, whether this run has a number beside them or not."""
    text = (folder / "report.html").read_text()
    rows = [
        row
        for table in make_found(make_results()).tables
        if table["id"].startswith("published_")
        for row in table["rows"]
    ]
    assert f"{len(rows)} of {len(rows)} rows are out of reach of this run" in text and text.count(
        'beyond"'
    ) == len(rows)
    results = make_results()
    results["setting"]["length"] = 1024
    for row in results["rows"]:
        row["corpus"] = "openwebtext"
    compared = published.main_comparison(results)
    text = page.render(results, figures.Findings([], [compared]), [], "<svg></svg>", {}, [])
    beyond = [row for row in compared["rows"] if "another method" in row[-1]]
    assert 0 < len(beyond) < len(compared["rows"])
    assert f"{len(beyond)} of {len(compared['rows'])} rows are out of reach" in text


def test_figures_of_an_earlier_run_are_removed_and_other_files_stay(tmp_path):
    """A run without the analyses leaves no figure of one that had them."""
    results = make_results()
    drawn = make_found(results).figures
    report.write_page(results, figures.Findings(drawn[:2]), [], tmp_path)
    (tmp_path / "figures" / "mine.png").write_text("mine")
    report.write_page(results, figures.Findings(drawn[:1]), [], tmp_path)
    kept = drawn[0]["id"]
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {
        "mine.png",
        f"{kept}.png",
        f"{kept}.svg",
    }


def test_every_color_is_defined_in_both_schemes_and_differs_between_them(tmp_path):
    """The page takes colors of models from their records, so that no line loses its stroke."""
    results = make_results(tuple(MODELS))
    found = figures.Findings(sweep_curves.speed_quality(results["rows"]))
    text = report.write_page(results, found, make_samples(), tmp_path).read_text()
    light, dark = (
        dict(re.findall(r"(--[\w-]+): (#\w+);", block))
        for block in re.findall(r":root {(.*?)}", text, re.DOTALL)
    )
    set_inline = {"--model", "--width"}
    used = set(re.findall(r"var\((--[\w-]+)", text)) - set_inline
    assert {plots.css_variable(name) for name in MODELS} < used
    assert used <= set(light) and set(light) == set(dark)
    for name, model in MODELS.items():
        variable = plots.css_variable(name)
        assert (light[variable], dark[variable]) == (model.color, model.dark_color)
        assert f"stroke: var({variable})" in text
    assert not [name for name in light if light[name] == dark[name]]


def test_the_same_numbers_draw_the_same_file():
    """Byte for byte: the file has no date and no random id."""
    figure = make_found(make_results()).figures[0]
    first, second = (plots.as_svg(plots.draw(figure), figure["id"]) for _ in range(2))
    assert first == second and len(first) > 2000


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: f.pop("tables"), "keys figures and tables"),
        (lambda f: f["figures"][0].pop("note"), r"figures\[0\]: got the keys"),
        (
            lambda f: f["figures"][0]["x"].update(scale="cubic"),
            "scale: got 'cubic', expected linear or log",
        ),
        (lambda f: f["figures"][0].update(series=[]), r"figures\[0\].series: got none"),
        (lambda f: f["figures"][0]["series"][0]["y"].pop(), r"y: got 2 numbers, expected 3"),
        (
            lambda f: f["figures"][0]["series"][0]["low"].__setitem__(0, float("nan")),
            "low: got nan, expected a finite",
        ),
        (lambda f: f["figures"][0]["series"][0]["x"].__setitem__(0, True), "x: got True"),
        (lambda f: f["tables"][0]["rows"][0].pop(), "columns"),
        (
            lambda f: f["tables"][0]["rows"][0].__setitem__(0, float("inf")),
            "got inf, expected",
        ),
        (lambda f: f["tables"][0].update(title=3), r"tables\[0\].title: got 3, expected str"),
        (lambda f: f["tables"][1].update(id=f["figures"][0]["id"]), "twice, expected unique ids"),
        (lambda f: f["figures"][0].update(id="../x"), "id: got '../x'"),
    ],
)
def test_invalid_analyses_are_rejected_with_their_place(damage, words):
    found = json.loads(json.dumps(make_found(make_results()).as_json()))
    damage(found)
    with pytest.raises(ValueError, match=words):
        figures.check_analyses(found)


def test_the_templates_are_part_of_the_package():
    """They are installed with the library."""
    given = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]["diladiff_jax.evaluation.report"]
    package = ROOT / "diladiff_jax" / "evaluation" / "report"
    packed = {p for pattern in given for p in package.glob(pattern)}
    assert {p.name for p in packed} >= {"page.html", "macros.html", "viewer.js", "style.css"}
    assert packed == set((package / "template").iterdir())

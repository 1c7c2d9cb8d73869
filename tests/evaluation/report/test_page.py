"""The report's page and figures: everything lands on it, all text stays text, the viewer works."""

import html.parser
import io
import json
import pathlib
import re
import tomllib
import xml.etree.ElementTree

import matplotlib.image
import numpy as np
import pytest

from diladiff_jax.data import TokenizerOptions, tokenizers
from diladiff_jax.evaluation import figures, report
from diladiff_jax.evaluation.analyses import published, sweep_curves
from diladiff_jax.evaluation.report import page, plots, samples
from diladiff_jax.stages import MODELS

ROOT = pathlib.Path(__file__).parents[3]
HOSTILE = (
    "</script><script>document.title='owned'</script><!-- \"quoted\" 'single' & <b>bold</b>"
    " \u2028 \u202e 🦊 \x00 ]]> $title ${style} {{ title }} {% raw %} {# note #}"
)
STEPS, LENGTH = 4, 9


def estimate(value, half=0.1):
    return {"value": value, "low": value - half, "high": value + half}


def make_results(models=("mdlm", "diladiff")):
    """Models at three numbers of steps, data and a bound, with an oracle and a scorer."""
    rows = [("data", None, 1.0), ("autoencoder bound", None, None)]
    rows += [
        (model, steps, quality * steps / 8)
        for model, quality in zip(models, np.linspace(0.2, 0.8, len(models)), strict=True)
        for steps in (2, 4, 8)
    ]
    return {
        "setting": {
            "length": LENGTH,
            "seed": 0,
            "trained_steps": {"mdlm": 6, "scorer": 0},
            "scorer": None,
            "device": "cpu <&>",
        },
        "rows": [
            {
                "corpus": "stories",
                "model": model,
                "latent_steps": 5 if model == "diladiff" else None,
                "decode_steps": steps,
                "temperature": steps and 1.0,
                "top_p": steps and 0.9,
                "samples": 64,
                "seconds": steps and 0.1 * steps,
                "tokens_per_second": steps and 100.0,
                "metrics": {"bound_ppl": estimate(3.0), "recovery": estimate(0.6)}
                if valid is None
                else {
                    "valid": estimate(valid),
                    "entropy": estimate(2.5),
                    "gen_ppl": estimate(30.0, 4.0),
                },
            }
            for model, steps, valid in rows
        ],
    }


def make_found(results):
    """Figures with and without intervals, on both scales, of few and many points; odd tables."""
    rows, curve = results["rows"], np.linspace(0, 1, 101)
    drawn = [
        *sweep_curves.speed_quality(rows),
        *sweep_curves.quality_by_setting(rows, "decode_steps", "figures 13 to 15"),
        figures.figure(
            "curve",
            "figure 6",
            'A curve of "many" points <&>',
            figures.linear("time t"),
            figures.linear("alpha(t)"),
            [figures.series("d = 2", curve, (1 - curve).tolist())],
            "a note <i>",
        ),
        figures.figure(
            "steep",
            "",
            "Log on both",
            figures.log("u"),
            figures.log("v"),
            [
                figures.series(
                    "measured", [0.01, 0.5, 30], [estimate(2.0), estimate(20.0), estimate(300.0)]
                )
            ],
        ),
    ]
    tables = [
        sweep_curves.main_table(rows),
        sweep_curves.autoencoder_table(rows),
        published.main_comparison(results),
        published.autoencoder_comparison(results, 2.0),
        figures.table(
            "odd",
            "",
            "Odd cells",
            ("name", "value", "low", "high", "count", "words"),
            [
                ["a", 0.123456, 0.1, 0.2, 7, HOSTILE],
                ["b", None, None, None, None, ""],
                ["c", 1234.5678, None, None, -3, "x" * 40],
            ],
            "note",
        ),
    ]
    return figures.Findings(drawn, tables)


def make_samples():
    """Two models with two samples each, with an end of text, a line break and hostile text."""
    tokens = [
        [" Mia", " won", " a", " red", " kite", ".", "\n", HOSTILE, None],
        ["na", "ïve", " 🦊", " fox", ".", None, None, None, None],
    ]
    orders = [[0, 2, 1, 3, 1, 0, 2, 1, 3], [-1, 0, 1, 2, 3, 3, 3, 3, 0]]
    return [
        {
            "model": model,
            "title": MODELS[model].title,
            "latent_steps": latent,
            "decode_steps": STEPS,
            "temperature": 1.0,
            "top_p": 0.9,
            "samples": [
                {
                    "index": i,
                    "seed": 3,
                    "text": "".join(t or "" for t in tokens[i]),
                    "entropy": 2.125,
                    "valid": valid,
                    "fault": "" if valid else "breaks name",
                    "tokens": tokens[i],
                    "unmasked_at": orders[i],
                }
                for i, valid in enumerate((True, False))
            ],
        }
        for model, latent in (("mdlm", None), ("diladiff", 5))
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as evaluate.py writes it."""
    folder = tmp_path_factory.mktemp("report")
    results = make_results()
    found = make_found(results)
    report.write(results, folder)
    assert report.write_page(results, found, make_samples(), folder) == folder / "report.html"
    return folder


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


@pytest.fixture(scope="module", params=["unigram", "wordpiece"])
def tokenizer(request, tmp_path_factory):
    if request.param == "unigram":
        options = TokenizerOptions(kind="unigram", vocab_size=300)
        return tokenizers.train(["the red kite won at the mill. "] * 50, options)
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text(
        "\n".join(
            [
                "[PAD]",
                "[UNK]",
                "[CLS]",
                "[SEP]",
                "[MASK]",
                "the",
                "red",
                "ki",
                "##te",
                "##s",
                ".",
                ",",
            ]
        )
    )
    return tokenizers.from_vocabulary(path, "wordpiece")


def test_tokens_are_written_as_in_the_text(tokenizer):
    """Joined they are the decoded text; end-of-text is None and starts a new text."""
    text = (
        "the red kites, the kite."
        if tokenizer.kind == "wordpiece"
        else "the red kite, naïve 🦊 at the mill. " * 3
    )
    ids = tokenizer.encode(text)
    row = np.concatenate(
        [ids, [tokenizer.eot_id], tokenizer.encode("the red"), [tokenizer.eot_id] * 2]
    )
    written = samples.written_tokens(tokenizer, row)
    assert (
        len(written) == len(row)
        and [w is None for w in written] == (row == tokenizer.eot_id).tolist()
    )
    first = "".join(w for w in written[: len(ids)]).replace("\ufffd", "")
    assert first == tokenizer.decode(ids) and "".join(written[len(ids) + 1 : -2]) == "the red"


@pytest.fixture
def opened(folder, browser):
    """The report opened in a browser with a mouse, and what its console and requests report."""
    page, reports = browser.new_page(), []
    page.on("console", lambda message: reports.append(message.text))
    page.on("pageerror", lambda error: reports.append(str(error)))
    page.on("requestfailed", lambda request: reports.append(request.url))
    page.goto((folder / "report.html").as_uri())
    yield page, reports
    page.close()


def expect(page, sample, step):
    """Checks that after a step the tokens of `unmasked_at` are shown and the new ones marked."""
    shown = page.eval_on_selector_all(
        "#viewer-tokens .token",
        """all => all.map(e => [
            e.textContent, e.classList.contains("masked"), e.classList.contains("new")])""",
    )
    for (text, masked, new), token, when in zip(
        shown, sample["tokens"], sample["unmasked_at"], strict=True
    ):
        assert masked == (when >= step) and new == (when == step - 1 and step > 0)
        written = "\u220e" if token is None else token.replace("\n", "\u21b5").strip(" ")
        assert text == ("" if masked else written)
    assert page.text_content("#viewer-status").startswith(f"Step {step} of {STEPS}")
    assert page.input_value("#viewer-step") == str(step)


def test_buttons_keys_and_lists_step_through_the_decoding(opened):
    """With real clicks and keys. Nothing is requested from a network or reported in the console."""
    page, reports = opened
    shown = make_samples()
    first, second = shown[1]["samples"]  # the best model, last in the list, is shown first
    expect(page, first, 0)
    assert page.is_disabled("#viewer-previous")
    for step in range(1, STEPS + 1):
        page.click("#viewer-next")
        expect(page, first, step)
    assert page.is_disabled("#viewer-next")
    assert "A valid document." in page.text_content("#viewer-status")
    page.click("#viewer-previous")
    expect(page, first, STEPS - 1)
    page.click("#viewer-first")
    expect(page, first, 0)
    page.click("#viewer-last")
    expect(page, first, STEPS)
    page.press("#viewer-tokens", "ArrowLeft")
    page.press("#viewer-tokens", "ArrowLeft")
    expect(page, first, STEPS - 2)
    page.press("#viewer-tokens", "ArrowRight")
    expect(page, first, STEPS - 1)
    page.press("#viewer-step", "ArrowLeft")  # the slider takes its own keys: one step, not two
    expect(page, first, STEPS - 2)
    page.select_option("#viewer-sample", label="2")
    expect(page, second, 0)  # a given token is shown before the first step
    page.select_option("#viewer-model", label="MDLM")
    page.click("#viewer-play")
    page.get_by_text("Not valid: breaks name.").wait_for()
    expect(page, shown[0]["samples"][1], STEPS)
    assert page.title() == "DiLaDiff on stories"
    assert reports == []


def test_the_page_follows_the_color_scheme(opened):
    """What is shown is light on a light page and dark on a dark one, and never blank."""
    page, _ = opened
    page.evaluate("document.getElementById('decoding').scrollIntoView({behavior: 'instant'})")
    shots = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        shot = matplotlib.image.imread(io.BytesIO(page.screenshot()), format="png")[..., :3]
        assert shot.shape[0] > 300 and shot.shape[1] > 300 and shot.std() > 0.05
        shots[scheme] = shot
    assert shots["light"].mean() > 0.8 and shots["dark"].mean() < 0.3


def test_the_page_does_not_scroll_sideways_on_a_phone(folder, browser):
    """Wide tables scroll by themselves."""
    phone = browser.new_page(
        viewport={"width": 375, "height": 700}, device_scale_factor=2, is_mobile=True
    )
    phone.goto((folder / "report.html").as_uri())
    assert phone.evaluate("document.documentElement.scrollWidth") <= 375
    phone.close()

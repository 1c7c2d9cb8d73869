"""The report's page and figures: every form lands, text of any kind stays text, and the viewer works in a browser."""

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
from headless import Browser, programs

from diladiff_jax.data import TokenizerOptions, tokenizers
from diladiff_jax.evaluation import figures
from diladiff_jax.evaluation.analyses import published, sweep_curves
from diladiff_jax.evaluation.report import page, plots, report, samples

ROOT = pathlib.Path(__file__).parents[3]
HOSTILE = "</script><script>document.title='owned'</script><!-- \"quoted\" 'single' & <b>bold</b> \u2028 \u202e 🦊 \x00 ]]> $title ${style}"
STEPS, LENGTH = 4, 9


def estimate(value, half=0.1):
    return {"value": value, "low": value - half, "high": value + half}


def make_results():
    """Two models at three numbers of steps, data and a bound, with an oracle and a scorer."""
    rows = [("data", None, 1.0), ("autoencoder bound", None, None)]
    rows += [
        (model, steps, quality * steps / 8)
        for model, quality in (("mdlm", 0.2), ("diladiff", 0.8))
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
    """Figures with and without intervals, on both scales, of few and of many points; tables with every kind of cell."""
    rows, curve = results["rows"], np.linspace(0, 1, 101)
    drawn = [
        *sweep_curves.speed_quality(rows),
        *sweep_curves.against(rows, "decode_steps", "figures 13 to 15"),
        figures.figure(
            "curve",
            "figure 6",
            'A curve of "many" points <&>',
            "time t",
            "alpha(t)",
            [figures.series("d = 2", curve, (1 - curve).tolist())],
            "a note <i>",
        ),
        figures.figure(
            "steep",
            "",
            "Log on both",
            "u",
            "v",
            [
                figures.series(
                    "measured", [0.01, 0.5, 30], [estimate(2.0), estimate(20.0), estimate(300.0)]
                )
            ],
            x_scale="log",
            y_scale="log",
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
    return {"figures": drawn, "tables": tables}


def make_draws():
    """Two models with two samples each: words, an end of text, a line break, hostile text, a given position."""
    tokens = [
        [" Mia", " won", " a", " red", " kite", ".", "\n", HOSTILE, None],
        ["na", "ïve", " 🦊", " fox", ".", None, None, None, None],
    ]
    orders = [[0, 2, 1, 3, 1, 0, 2, 1, 3], [-1, 0, 1, 2, 3, 3, 3, 3, 0]]
    return [
        {
            "model": model,
            "title": figures.NAMES[model],
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
    """A folder as evaluate.py writes it, and what went into it."""
    folder = tmp_path_factory.mktemp("report")
    results = make_results()
    found = make_found(results)
    report.write(results, folder)
    assert report.write_page(results, found, make_draws(), folder) == folder / "report.html"
    return folder


class Read(html.parser.HTMLParser):
    """What a browser would make of a page: elements with their attributes, text by element, raw content of scripts."""

    VOID = {"meta", "link", "input", "br", "img", "hr"}

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
    """A sample that would close the script, begin a comment or fill in the template is shown as it is and reaches the viewer unchanged."""
    read = Read((folder / "report.html").read_text())
    assert len(read.scripts) == 2 and json.loads(read.scripts[0]) == make_draws()
    assert not [tag for tag, _ in read.elements if tag in ("b", "i")]
    assert (
        len([words for words in read.words if HOSTILE in words]) >= 3
    )  # a table's cell, and a sample of each model
    assert page.embedded("</script>") == '"\\u003c/script\\u003e"'


def test_a_lone_surrogate_does_not_cost_the_page(tmp_path):
    """No UTF-8 holds it; a question mark stands for it."""
    draws = make_draws()
    draws[0]["samples"][0]["text"] = "half \ud83e a fox"
    results = make_results()
    text = report.write_page(results, {"figures": [], "tables": []}, draws, tmp_path).read_text()
    assert "half ? a fox" in text


def test_every_form_lands_on_the_page_and_in_files(folder):
    """Each figure as SVG on the page and as PNG and SVG beside it, each table with all its rows, and analyses.json as documented."""
    results = make_results()
    found = make_found(results)
    assert json.loads((folder / "analyses.json").read_text()) == found
    figures.check_analyses(found)
    text = (folder / "report.html").read_text()
    read = Read(text)
    ids = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert sorted(p.name for p in (folder / "figures").iterdir()) == sorted(
        f"{f['id']}.{kind}" for f in found["figures"] for kind in ("png", "svg")
    )
    for figure in found["figures"]:
        assert f"figure-{figure['id']}" in ids and text.count(f'id="{figure["id"]}-figure_1"') == 1
        assert (folder / "figures" / f"{figure['id']}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        svg = xml.etree.ElementTree.parse(folder / "figures" / f"{figure['id']}.svg")
        words = " ".join(
            "".join(e.itertext()) for e in svg.iter("{http://www.w3.org/2000/svg}text")
        )
        assert figure["x"]["label"] in words and all(
            line["name"] in words for line in figure["series"] if len(figure["series"]) > 1
        )
    for table in found["tables"]:
        (part,) = re.findall(rf'<div[^>]* id="table-{table["id"]}">.*?</table>', text, re.DOTALL)
        assert part.count("<tr") == len(table["rows"]) + 1
    assert "0.123 <small>[0.100, 0.200]</small>" in text and ">1234.6<" in text and ">-3<" in text


def test_the_page_needs_nothing_beside_it(folder):
    """No address but anchors and data: and the names of XML's own dialects; and its policy would stop a request."""
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


def test_a_page_without_samples_or_analyses():
    """Nothing trained: the page says so, and has no viewer to break."""
    read = Read(
        page.render(
            {"setting": {}, "rows": []}, {"figures": [], "tables": []}, [], "<svg></svg>", {}, []
        )
    )
    assert "No model is trained here." in read.words and json.loads(read.scripts[0]) == []
    assert not [a for _, a in read.elements if a.get("id") == "viewer"]


def test_rows_out_of_reach_are_counted_and_marked(folder):
    """Every published row of a run on another corpus, whether this run has a number beside it or not."""
    text = (folder / "report.html").read_text()
    rows = [
        row
        for table in make_found(make_results())["tables"]
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
    compared = {"figures": [], "tables": [published.main_comparison(results)]}
    text = page.render(results, compared, [], "<svg></svg>", {}, [])
    beyond = [row for row in compared["tables"][0]["rows"] if "another method" in row[-1]]
    assert (
        0 < len(beyond) < len(compared["tables"][0]["rows"])
        and f"{len(beyond)} of {len(compared['tables'][0]['rows'])} rows" in text
    )


def test_figures_of_an_earlier_run_go_and_other_files_stay(tmp_path):
    """A run without the analyses leaves no figure of one that had them."""
    results = make_results()
    found = make_found(results)
    few = {"figures": found["figures"][:1], "tables": []}
    report.write_page(results, {"figures": found["figures"][:2], "tables": []}, [], tmp_path)
    (tmp_path / "figures" / "mine.png").write_text("mine")
    report.write_page(results, few, [], tmp_path)
    kept = few["figures"][0]["id"]
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {
        "mine.png",
        f"{kept}.png",
        f"{kept}.svg",
    }


def test_the_same_numbers_draw_the_same_file():
    """Byte for byte: no date, no random id."""
    figure = make_found(make_results())["figures"][0]
    first, second = (plots.as_svg(plots.draw(figure), figure["id"]) for _ in range(2))
    assert first == second and len(first) > 2000


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: f.pop("tables"), "keys figures and tables"),
        (lambda f: f["figures"][0].pop("note"), r"figures\[0\] has the keys"),
        (
            lambda f: f["figures"][0]["x"].update(scale="cubic"),
            "scale is 'cubic'; it must be linear or log",
        ),
        (lambda f: f["figures"][0].update(series=[]), r"figures\[0\].series is empty"),
        (lambda f: f["figures"][0]["series"][0]["y"].pop(), r"y has 2 numbers for 3 points"),
        (
            lambda f: f["figures"][0]["series"][0]["low"].__setitem__(0, float("nan")),
            "low holds nan; it must hold finite",
        ),
        (lambda f: f["figures"][0]["series"][0]["x"].__setitem__(0, True), "x holds True"),
        (lambda f: f["tables"][0]["rows"][0].pop(), "columns"),
        (lambda f: f["tables"][0]["rows"][0].__setitem__(0, float("inf")), "holds inf; a cell is"),
        (lambda f: f["tables"][0].update(title=3), r"tables\[0\].title is 3; it must be str"),
        (lambda f: f["tables"][1].update(id=f["figures"][0]["id"]), "stands twice"),
        (lambda f: f["figures"][0].update(id="../x"), "the id '../x'"),
    ],
)
def test_analyses_of_another_form_are_refused(damage, words):
    """One line that names the place."""
    found = json.loads(json.dumps(make_found(make_results())))
    damage(found)
    with pytest.raises(ValueError, match=words):
        figures.check_analyses(found)


def test_the_template_is_part_of_the_package():
    """The page's files are installed with the library, wherever it is installed from."""
    given = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]["diladiff_jax.evaluation.report"]
    package = ROOT / "diladiff_jax" / "evaluation" / "report"
    packed = {p for pattern in given for p in package.glob(pattern)}
    assert {p.name for p in packed} >= {
        "page.html",
        "viewer.html",
        "viewer.js",
        "style.css",
    } and packed == set((package / "template").iterdir())


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


def test_tokens_are_written_as_they_stand_in_the_text(tokenizer):
    """Put together they are the decoded text; end-of-text is None, and what follows it begins anew."""
    text = (
        "the red kites, the kite."
        if tokenizer.kind == "wordpiece"
        else "the red kite, naïve 🦊 at the mill. " * 3
    )
    ids = tokenizer.encode(text)
    row = np.concatenate(
        [ids, [tokenizer.eot_id], tokenizer.encode("the red"), [tokenizer.eot_id] * 2]
    )
    written = samples.surfaces(tokenizer, row)
    assert (
        len(written) == len(row)
        and [w is None for w in written] == (row == tokenizer.eot_id).tolist()
    )
    first = "".join(w for w in written[: len(ids)]).replace("\ufffd", "")
    assert first == tokenizer.decode(ids) and "".join(written[len(ids) + 1 : -2]) == "the red"


needs_browser = pytest.mark.skipif(
    programs() is None,
    reason="no chromium with chromedriver here (on Debian: apt-get install chromium chromium-driver)",
)


@needs_browser
def test_decoding_is_stepped_through_in_a_browser(folder, tmp_path):
    """Real clicks and keys: after step k exactly the tokens that unmasked_at says are in the page, the new ones marked; nothing is asked of a network."""
    draws = make_draws()
    with Browser(tmp_path / "profile") as browser:
        browser.open(folder / "report.html")

        def positions():
            return browser.run(
                "return [...document.querySelectorAll('#viewer-tokens .token')].map(e => [e.textContent, e.classList.contains('masked'), e.classList.contains('new')])"
            )

        def expect(sample, step):
            for (text, masked, new), token, when in zip(
                positions(), sample["tokens"], sample["unmasked_at"], strict=True
            ):
                assert masked == (when >= step) and new == (when == step - 1 and step > 0)
                assert text == (
                    ""
                    if masked
                    else "\u220e"
                    if token is None
                    else token.replace("\n", "\u21b5").strip(" ")
                )
            assert browser.run(
                "return document.getElementById('viewer-status').textContent"
            ).startswith(f"Step {step} of {STEPS}")
            assert browser.run("return document.getElementById('viewer-step').value") == str(step)

        first, second = draws[1]["samples"]  # the best model, last in the list, is shown first
        expect(first, 0)
        assert browser.run("return document.getElementById('viewer-previous').disabled")
        for step in range(1, STEPS + 1):
            browser.click("#viewer-next")
            expect(first, step)
        assert browser.run("return document.getElementById('viewer-next').disabled")
        assert "A valid document." in browser.run(
            "return document.getElementById('viewer-status').textContent"
        )
        browser.click("#viewer-previous")
        expect(first, STEPS - 1)
        browser.click("#viewer-first")
        expect(first, 0)
        browser.click("#viewer-last")
        expect(first, STEPS)
        browser.keys("#viewer-tokens", "\ue012\ue012")
        expect(first, STEPS - 2)
        browser.keys("#viewer-tokens", "\ue014")
        expect(first, STEPS - 1)
        browser.keys("#viewer-step", "\ue012")  # the slider takes its own keys: one step, not two
        expect(first, STEPS - 2)
        browser.keys("#viewer-sample", "2")
        expect(second, 0)  # a given token stands there before the first step
        browser.keys("#viewer-model", "M")
        assert (
            browser.run("return document.getElementById('viewer-model').selectedOptions[0].text")
            == "MDLM"
        )
        browser.click("#viewer-play")
        browser.wait(
            "return document.getElementById('viewer-status').textContent.includes('Not valid: breaks name.')"
        )
        expect(draws[0]["samples"][1], STEPS)

        assert browser.run("return document.title") == "DiLaDiff on stories"
        assert not browser.log()
        browser.run("document.getElementById('decoding').scrollIntoView({behavior: 'instant'})")
        shots = {}
        for scheme in ("light", "dark"):
            browser.command(
                "Emulation.setEmulatedMedia",
                features=[{"name": "prefers-color-scheme", "value": scheme}],
            )
            shots[scheme] = matplotlib.image.imread(io.BytesIO(browser.screenshot()), format="png")[
                ..., :3
            ]
        for shot in shots.values():
            assert shot.shape[0] > 300 and shot.shape[1] > 300 and shot.std() > 0.05
        assert shots["light"].mean() > 0.8 and shots["dark"].mean() < 0.3
        # On a phone the page does not scroll sideways; wide tables do so by themselves.
        browser.command(
            "Emulation.setDeviceMetricsOverride",
            width=375,
            height=700,
            deviceScaleFactor=2,
            mobile=True,
        )
        assert browser.run("return document.documentElement.scrollWidth <= 375")

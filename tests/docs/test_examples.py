"""The Python examples of the pages run, on the workdir that the tests train."""

import pytest
from docs.pages import PAGES, parse

import diladiff_jax as dl
from diladiff_jax.data import corpora


def examples(name):
    """The page's `python` blocks, without those marked `python no-run: REASON`."""
    blocks = [f for f in parse(name).fences if f.info.split()[:1] == ["python"]]
    for block in blocks:
        if block.info != "python":
            words, _, reason = block.info.partition(":")
            assert words == "python no-run" and reason.strip(), (
                f"{name}, line {block.line}: got `{block.info}`, expected `python` or "
                "`python no-run: REASON`"
            )
    return [block for block in blocks if block.info == "python"]


@pytest.fixture(scope="module")
def model(trained):
    """One model for all pages, so that each of its programs is compiled once."""
    return dl.load(trained)


@pytest.fixture
def opened_by_the_examples(trained, model, tmp_path, monkeypatch):
    """Whatever workdir an example opens is the trained one, and what it writes is temporary."""
    from diladiff_jax.storage import config_file

    load, load_config = dl.load, config_file.load

    def opened(path, **options):
        return load(trained, **options) if options else model

    monkeypatch.setattr(dl, "load", opened)
    monkeypatch.setattr(
        config_file,
        "load",
        lambda path: load_config(trained if str(path).startswith("runs/") else path),
    )
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tables_as_before():
    """What examples register is forgotten afterwards."""
    tables = (dl.STAGES, dl.MODELS, dl.sampling.SOLVERS, dl.sampling.ORDERS, corpora.CORPORA)
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


@pytest.mark.parametrize("name", [name for name in PAGES if examples(name)])
def test_the_examples_of_a_page_run(name, opened_by_the_examples, tables_as_before):
    """In order, with the names that the earlier ones of the page have defined."""
    names = {"__name__": "__main__"}
    for block in examples(name):
        code = "\n" * (block.line - 1) + block.text  # errors show the line of the page
        exec(compile(code, name, "exec"), names)


def test_the_library_takes_ten_lines_in_the_readme(opened_by_the_examples):
    (example,) = examples("README.md")
    assert len([line for line in example.text.splitlines() if line.strip()]) <= 10
    names = {}
    exec(compile(example.text, "README.md", "exec"), names)
    assert len(names["texts"]) == 8
    assert names["z"].shape == (1, 4, 8)
    assert len(names["again"]) == len(names["filled"]) == 1

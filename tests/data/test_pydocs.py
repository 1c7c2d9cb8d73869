"""The corpus from Python's own documentation: its prose filter, its sources and its errors."""

import sys
import sysconfig

import pytest

from diladiff_jax.data.corpora import pydocs
from diladiff_jax.data.errors import DataError


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return list(pydocs.documents())


def test_it_is_large_and_made_of_distinct_documents(corpus):
    assert len(corpus) > 300
    assert sum(map(len, corpus)) > 1_000_000
    assert len(set(corpus)) == len(corpus)


def test_it_is_prose(corpus):
    for text in corpus:
        assert len(text.split()) >= 8
        assert ">>>" not in text and "\r" not in text
        assert all(len(p.split()) > 1 and p == " ".join(p.split()) for p in text.split("\n\n"))
    words = " ".join(corpus).split()
    # In English, about one word in twenty is "the".
    assert 0.04 < words.count("the") / len(words) < 0.1
    assert sum(word.strip("\"'(`*.,;:!?)").isalpha() for word in words) > 0.85 * len(words)


def test_it_has_all_its_sources(corpus):
    text = "\n\n".join(corpus)
    assert "Configuration file parser." in text  # configparser, from its source
    assert "Return whether an object is an instance of a class" in text  # compiled in
    if sys.modules.get("pydoc_data.topics"):
        assert "The standard type hierarchy" in text


@pytest.mark.slow
def test_it_is_the_same_every_time(corpus):
    assert list(pydocs.documents()) == corpus


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("", ""),
        ("Sorts\n    in place.\n\n    Twice.\n    So.", "Sorts in place.\n\nTwice. So."),
        ("Adds, as in\n>>> add(1, 2)\n3\n\nThat is all.", "Adds, as in\n\nThat is all."),
        ("Main ideas\n==========\nThey are few.", "Main ideas\n\nThey are few."),
        ("A loop:\n\n    for x in range(3):\n        f(x)\n\nIt ends.", "A loop:\n\nIt ends."),
        ("import this module\n\nNow what?", "Now what?"),
        ('assert_stmt ::= "assert" expression\n\nIt is a statement.', "It is a statement."),
        ("| option | what it means for you |", ""),
    ],
)
def test_only_prose_is_kept(docstring, expected):
    assert pydocs.prose(docstring) == expected


def library(monkeypatch, root, files):
    """Makes `files`, a mapping from path to source, the only documentation."""
    for name, source in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(root))
    monkeypatch.setattr(sys, "builtin_module_names", ())
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)  # as if not installed


def docstring_of(what: str) -> str:
    return f"The docstring of the {what} has at least eight words."


def test_a_module_is_one_document_in_source_order_and_is_not_run(monkeypatch, tmp_path):
    source = f'''"""{docstring_of("module")}"""
raise SystemExit("the module was imported")
class A:
    """{docstring_of("class")}"""
    def f(self):
        """{docstring_of("method")}"""
        def inner():
            """{docstring_of("inner function")}"""
    def g(self):
        """Too short."""
if A:
    async def h():
        """{docstring_of("coroutine")}"""
def again():
    """{docstring_of("class")}"""
'''
    library(
        monkeypatch,
        tmp_path,
        {
            "b.py": source,
            "a/z.py": f'"""{docstring_of("package")}"""',
            "c.py": f'"""{docstring_of("module")}"""',
            "broken.py": f'"""{docstring_of("broken file")}"""\nprint "2"',
            "latin.py": "pass",
            "test/t.py": f'"""{docstring_of("test")}"""',
            "site-packages/s.py": f'"""{docstring_of("package of others")}"""',
            "json/tests/t.py": f'"""{docstring_of("nested test")}"""',
        },
    )
    latin = b'# coding: latin-1\n"""Of a caf\xe9 with at least eight words in all."""'
    (tmp_path / "latin.py").write_bytes(latin)
    names = ("module", "class", "method", "inner function", "coroutine")
    assert list(pydocs.documents()) == [
        docstring_of("package"),
        "\n\n".join(map(docstring_of, names)),
        "Of a café with at least eight words in all.",
    ]


@pytest.mark.parametrize("folder", [".", "no such folder"])
def test_a_python_without_sources_is_rejected_in_one_line(monkeypatch, tmp_path, folder):
    library(monkeypatch, tmp_path / folder, {})
    with pytest.raises(DataError, match="no Python sources under") as error:
        next(pydocs.documents())
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)

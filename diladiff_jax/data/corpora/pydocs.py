"""A corpus that exists wherever this code runs: the documentation of the running Python.

It has three sources, in this order. Each is sorted, so an interpreter always gives the same
corpus:

- the docstrings of the standard library, one document per module, parsed from the source files;
- the docstrings of the modules built into the interpreter, one document per module;
- the language reference that `help` shows, one document per topic, if it is installed.

Only prose is kept, one line per paragraph and an empty line between paragraphs. Doctests, code,
grammars, tables and very short docstrings ("Return self.") are dropped.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import re
import sys
import sysconfig
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

from diladiff_jax.data.corpora.base import Reader, StreamCorpus
from diladiff_jax.data.errors import DataError
from diladiff_jax.data.options import DataOptions

# Tests, vendored copies, generated tables, and programs whose docstrings have no readers.
_SKIPPED_FOLDERS = frozenset(
    [
        "__phello__",
        "__pycache__",
        "_bundled",
        "_pyrepl",
        "dist-packages",
        "encodings",
        "idle_test",
        "lib-dynload",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    ]
)
_MIN_WORDS = 8  # per docstring; shorter ones mostly repeat the name that they document
_MIN_PLAIN = 0.65  # the fraction of a paragraph's tokens that must be plain words

# Letters, maybe hyphenated or with an apostrophe, in quotes or brackets (\u2018 to \u201d are the
# typographic quotes), with punctuation.
_PLAIN_WORD = re.compile(
    r"""["'(`\u2018\u201c]* [A-Za-z]+ (?:['\u2019/-][A-Za-z]+)*
    ["')`\u2019\u201d]* [.,;:!?]* [")\u2019\u201d]*""",
    re.VERBOSE,
)
# A line of one repeated symbol underlines a heading.
_RULE = re.compile(r"^\s*([^\w\s])\1{2,}\s*$", re.MULTILINE)
# Statements that consist of plain words, and tables.
_CODE = re.compile(r"async |class |def |for .*:$|from .* import |if .*:$|import |with .*:$|[|+]")


def documents() -> Iterator[str]:
    """Yields the documents. Every docstring appears once.

    Raises:
      DataError: the standard library of this Python has no source files.
    """
    seen: set[str] = set()
    for docstrings in itertools.chain(_library(), _builtins(), _topics()):
        fresh = []
        for docstring in docstrings:
            text = prose(docstring)
            if len(text.split()) >= _MIN_WORDS and text not in seen:
                seen.add(text)
                fresh.append(text)
        if fresh:
            yield "\n\n".join(fresh)


def prose(docstring: str) -> str:
    """The paragraphs of a docstring that are prose, one per line, with empty lines between."""
    paragraphs = re.split(r"\n\s*\n", _RULE.sub("", inspect.cleandoc(docstring)))
    # A doctest extends to the end of its paragraph, and words may come before it.
    lines = [paragraph.partition(">>>")[0].split() for paragraph in paragraphs]
    return "\n\n".join(" ".join(words) for words in lines if _is_prose(words))


def _is_prose(words: list[str]) -> bool:
    """Whether a paragraph reads as English rather than as code, a grammar or a table."""
    plain = sum(_PLAIN_WORD.fullmatch(word) is not None for word in words)
    enough = len(words) > 1 and plain >= _MIN_PLAIN * len(
        words
    )  # a single word is a heading at best
    return enough and not _CODE.match(" ".join(words))


def _library() -> Iterator[list[str]]:
    """The docstrings of each module of the standard library, without importing it."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        path
        for path in root.rglob("*.py")
        if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts)
    ]
    if not files:
        raise DataError(
            f"data.corpus=pydocs: no Python sources under {root}, expected the standard library. "
            "Use a Python that is installed with its .py files."
        )
    for path in sorted(files, key=lambda path: path.relative_to(root).parts):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about invalid escapes, for example
                tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):  # unreadable, or a template rather than a module
            continue
        yield list(_docstrings(tree))


def _docstrings(node: ast.AST) -> Iterator[str]:
    """The docstrings of a syntax tree in source order."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        yield ast.get_docstring(node, clean=False) or ""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.stmt, ast.excepthandler)):
            yield from _docstrings(child)


def _builtins() -> Iterator[list[str]]:
    """The docstrings of each module that is compiled into the interpreter."""
    for name in sorted(sys.builtin_module_names):
        try:
            module = importlib.import_module(name)
        except ImportError:  # not supported on this platform
            continue
        # Compiled functions only: what Python code adds (a hook, for example) varies by run.
        members = [
            member
            for _, member in sorted(vars(module).items())
            if isinstance(member, (type, types.BuiltinFunctionType))
        ]
        documented = [module]
        for member in members:
            documented += [member, *_attributes(member)]
        docstrings = (getattr(item, "__doc__", None) for item in documented)
        yield [docstring for docstring in docstrings if isinstance(docstring, str)]


def _attributes(owner: object) -> list[object]:
    """The methods and properties of a class, sorted by name; none for a function."""
    if not isinstance(owner, type):
        return []
    return [
        attribute
        for _, attribute in sorted(vars(owner).items())
        if inspect.isroutine(attribute) or inspect.isdatadescriptor(attribute)
    ]


def _topics() -> Iterator[list[str]]:
    """The topics of the language reference; none if Python is installed without them."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError):
        return
    for _, text in sorted(topics.items()):
        yield [text]


class PythonDocs(StreamCorpus):
    """The documentation of the running Python."""

    def open(self, options: DataOptions) -> Reader:
        del options
        return documents

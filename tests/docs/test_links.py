"""What the pages point to exists."""

import ast
import functools
import re

import pytest
from docs.pages import PAGES, ROOT, parse
from test_imports import ALLOWED

OURS = ("diladiff_jax", "launch", "configs", "tests", "tools", "docs")


@functools.cache
def defined(path):
    """Names that a Python file defines: functions, classes, `Class.method`, and assigned names."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)}
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize("name", PAGES)
def test_relative_links_lead_to_files_and_headings(name):
    for target, _ in parse(name).links:
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), f"{name} links to {target}, which does not exist"
        if anchor:
            anchors = parse(path.resolve().relative_to(ROOT).as_posix()).anchors
            assert anchor in anchors, f"{name} links to {target}; that page has {sorted(anchors)}"


@pytest.mark.parametrize("name", PAGES)
def test_a_link_to_code_names_what_that_file_defines(name):
    for target, text in parse(name).links:
        if target.endswith(".py") and re.fullmatch(r"[A-Za-z_][\w.]*", text):
            path = ((ROOT / name).parent / target).resolve()
            assert text in defined(path), f"{name} links {text} to {target}, which has no such name"


@pytest.mark.parametrize("name", PAGES)
def test_paths_in_inline_code_exist(name):
    for span in parse(name).spans:
        path = span.partition("[")[0].partition(" ")[0]
        if path.split("/")[0] in OURS and re.fullmatch(r"[\w./-]+/[\w./-]*", path):
            assert (ROOT / path).exists(), f"{name} names {path}, which does not exist"


def test_every_page_is_in_the_index_and_in_the_readme():
    pages = {name for name in PAGES if name.startswith("docs/")} - {"docs/README.md"}
    index = {f"docs/{target}" for target, _ in parse("docs/README.md").links}
    assert pages <= index
    assert pages <= {target for target, _ in parse("README.md").links}


def test_the_readme_has_at_most_150_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_table_of_imports_is_the_one_that_is_enforced():
    rows = parse("docs/architecture.md").rows
    table = {row[0][0]: set(row[1]) for row in rows if row[0] and row[0][0] in ALLOWED}
    lines = (
        f"| `{room}` | {', '.join(f'`{n}`' for n in sorted(may)) or 'nothing of the library'} |"
        for room, may in ALLOWED.items()
    )
    assert table == ALLOWED, "write in docs/architecture.md:\n" + "\n".join(lines)


def test_the_messages_of_the_troubleshooting_page_are_in_the_code():
    code = [
        node.value
        for folder in ("diladiff_jax", "launch")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ] + [path.read_text() for path in (ROOT / "launch").rglob("*.sh")]
    quoted = [text for row in parse("docs/troubleshooting.md").rows for text in row[0]]
    assert len(quoted) > 30
    unknown = [text for text in quoted if not any(text in constant for constant in code)]
    assert not unknown, f"no message contains {unknown}"

"""The documentation pages, parsed: links, anchors, code and tables."""

import dataclasses
import functools
import pathlib
import re

from markdown_it import MarkdownIt

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md")
    for path in ROOT.glob(pattern)
)


@dataclasses.dataclass(frozen=True)
class Fence:
    """A fenced block: its info string, its text, and the line of the page where its text starts."""

    info: str
    text: str
    line: int


@dataclasses.dataclass(frozen=True)
class Page:
    """What the tests need of a page."""

    links: tuple[tuple[str, str], ...]  # (target, text)
    anchors: frozenset[str]
    fences: tuple[Fence, ...]
    spans: tuple[str, ...]  # inline code
    rows: tuple[tuple[tuple[str, ...], ...], ...]  # of tables: cells, each the code spans in it


@functools.cache
def parse(name):
    """The page at a path relative to the checkout."""
    tokens = MarkdownIt().enable("table").parse((ROOT / name).read_text())
    links, headings, fences, spans, rows = [], [], [], [], []
    for before, token in zip([None, *tokens], tokens, strict=False):
        if token.type in ("fence", "code_block"):
            fences.append(Fence(token.info.strip(), token.content, token.map[0] + 2))
        elif token.type == "tr_open":
            rows.append([])
        elif token.type == "inline":
            code = [child.content for child in token.children if child.type == "code_inline"]
            spans += code
            links += _links(token.children)
            if before.type == "heading_open":
                headings.append("".join(child.content for child in token.children))
            if before.type == "td_open":
                rows[-1].append(tuple(code))
    return Page(
        tuple(links),
        frozenset(_anchors(headings)),
        tuple(fences),
        tuple(spans),
        tuple(tuple(row) for row in rows if row),
    )


def _links(children):
    for i, child in enumerate(children):
        if child.type == "image":
            yield child.attrs["src"], child.content
        elif child.type == "link_open":
            end = next(j for j in range(i, len(children)) if children[j].type == "link_close")
            yield child.attrs["href"], "".join(c.content for c in children[i + 1 : end])


def _anchors(headings):
    """GitHub's: lower case, without punctuation, hyphens for spaces, numbered where repeated."""
    seen = {}
    for heading in headings:
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        count = seen[slug] = seen.get(slug, -1) + 1
        yield f"{slug}-{count}" if count else slug

import gzip
import hashlib
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from diladiff_jax.data import DataError
from diladiff_jax.data.file_selection import describe, matching, select
from diladiff_jax.data.text_files import documents

DOCS = ["one\ntwo", "  three é 🦊", "four"]
TXT = "one\ntwo\n<|endoftext|>\n  three é 🦊\n<|endoftext|>\n\n<|endoftext|>\nfour\n".encode()
JSONL = "".join(json.dumps({"id": i, "body": d}) + "\n" for i, d in enumerate(DOCS)).encode()
frame = zstandard.ZstdCompressor().compress
# Without mtime=0, gzip writes the time, and parallel workers would collect different tests.


@pytest.mark.parametrize(
    "name, data",
    [
        ("a.txt", TXT),
        ("a.txt", b"\xef\xbb\xbf" + TXT),
        ("a.txt.gz", gzip.compress(TXT, mtime=0)),
        ("a.txt.xz", lzma.compress(TXT)),
        ("a.txt.zst", frame(TXT)),
        ("a.TXT.zst", frame(TXT[:20]) + frame(TXT[20:])),
        ("a.jsonl", JSONL),
        ("a.jsonl.gz", gzip.compress(JSONL, mtime=0)),
        ("a.jsonl.xz", lzma.compress(JSONL)),
        ("a.jsonl.zst", frame(JSONL)),
        ("a.jsonl", JSONL.replace(b"\n", b"\n\n")),
    ],
)
def test_every_format_is_read(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert list(documents(str(tmp_path / name), "body")) == DOCS
    assert list(documents(str(tmp_path), "body")) == DOCS


def test_parquet_is_read(tmp_path):
    pyarrow.parquet.write_table(
        pyarrow.table({"body": [*DOCS, ""], "n": [1, 2, 3, 4]}), tmp_path / "a.parquet"
    )
    assert list(documents(str(tmp_path), "body")) == DOCS


def test_folders_and_globs_are_read_in_sorted_order(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt", "notes.md", "a.txt.bak"):
        (tmp_path / name).write_text(name)
    assert list(documents(str(tmp_path))) == ["a.txt", "b.txt", "sub/c.txt"]
    assert list(documents(str(tmp_path / "*.txt"))) == ["a.txt", "b.txt"]
    assert [p.name for p in matching(str(tmp_path / "**" / "c.*"))] == ["c.txt"]


def test_a_text_file_without_separators_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\r\n\r\nb <|endoftext|> c\n")
    assert list(documents(str(tmp_path))) == ["a\r\n\r\nb <|endoftext|> c"]


@pytest.mark.parametrize(
    "name, data, where",
    [
        ("a.txt", b"fine\nb\xffd\n", "a.txt, line 2"),
        ("a.txt", b"fine\nb\0d\n", "a.txt, line 2: holds NUL bytes"),
        ("a.txt.gz", gzip.compress(TXT, mtime=0)[:-9], "a.txt.gz"),
        ("a.txt.gz", b"plain", "a.txt.gz"),
        (
            "a.txt.gz",
            (packed := gzip.compress(TXT, mtime=0))[:12] + bytes(20) + packed[32:],
            "a.txt.gz",
        ),
        ("a.txt.xz", b"plain", "a.txt.xz"),
        ("a.txt.zst", b"plain", "a.txt.zst"),
        ("a.jsonl", JSONL + b"{oops\n", "a.jsonl, line 4"),
        ("a.jsonl", JSONL + b'{"text": "x"}\n', "a.jsonl, line 4"),
        ("a.jsonl", b'{"body": 3}\n', "a.jsonl, line 1"),
        ("a.jsonl", b"[1]\n", "a.jsonl, line 1: got a list, expected an object"),
        ("a.jsonl", b"[" * 20_000 + b"\n", "a.jsonl, line 1: not JSON"),
        ("a.jsonl", b"9" * 5000 + b"\n", "a.jsonl, line 1: not JSON"),
        ("a.parquet", b"plain", "a.parquet"),
        ("a.pdf", b"plain", "a.pdf"),
    ],
)
def test_bad_files_are_rejected_in_one_line(tmp_path, name, data, where):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as error:
        list(documents(str(tmp_path / name), "body"))
    assert where in str(error.value) and "\n" not in str(error.value)


def test_bad_columns_and_absent_files_are_rejected(tmp_path):
    pyarrow.parquet.write_table(
        pyarrow.table({"body": ["a", None], "n": [1, 2]}), tmp_path / "a.parquet"
    )
    for files, field, where in (
        (tmp_path, "text", "no column 'text'"),
        (tmp_path, "n", "row 1"),
        (tmp_path / "absent", "body", "matches no file"),
        ("", "body", "data.files: got ''"),
    ):
        with pytest.raises(DataError, match=where) as error:
            list(documents(str(files), field))
        assert "\n" not in str(error.value)


# Rows without a text, nested fields, and encodings.


def test_rows_without_a_text_are_skipped_and_counted(tmp_path, caplog):
    """Nulls in JSON Lines (the field, what it is in, or the row) and in Parquet."""
    rows = [{"a": {"b": "x"}}, {"a": {"b": None}}, {"a": None}, None, {"a": {"b": "y"}}]
    (tmp_path / "j.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(
        pyarrow.table({"a": pyarrow.array([{"b": "u"}, {"b": None}, None, {"b": "v"}])}),
        tmp_path / "p.parquet",
    )
    with caplog.at_level("INFO", "diladiff_jax"):
        for _ in range(2):  # each split reads the files again
            assert list(documents(str(tmp_path), "a.b")) == ["x", "y", "u", "v"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'j.jsonl'}: 3 lines without a text in 'a.b' skipped (the first is line 2)",
        f"{tmp_path / 'p.parquet'}: 2 rows without a text in 'a.b' skipped (the first is row 2)",
    ]


@pytest.mark.parametrize(
    ("record", "field", "text"),
    [
        ({"a": {"b": "x"}}, "a.b", "x"),
        ({"a.b": "exact", "a": {"b": "nested"}}, "a.b", "exact"),
        ({"a": {"b": {"c": "deep"}}}, "a.b.c", "deep"),
        ({"turns": ["one", None, "two"]}, "turns", "one\ntwo"),
        ({"turns": [{"text": "one"}, {"text": None}, {"text": "two"}]}, "turns.text", "one\ntwo"),
    ],
)
def test_a_field_may_be_nested_or_a_list(tmp_path, record, field, text):
    """In both formats; a field whose name has a dot is found as it is."""
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "b.parquet")
    assert list(documents(str(tmp_path), field)) == [text, text]


@pytest.mark.parametrize(
    ("record", "field", "words"),
    [
        ({"body": "x"}, "text", r"no field 'text' \(found body\)\. Set data\.field"),
        ({"text": {"en": "x", "de": "y"}}, "text", r"holds an object \(it has en, de\).* a\.b is"),
        ({"a": {"b": 3}}, "a.b", "field 'b' holds a number, expected text"),
        ({"a": "x"}, "a.b", "got text, expected an object with the field 'b'"),
        ({"a": [True]}, "a", "holds true or false, expected text or a list"),
        ({"a": "x\ud800"}, "a", "lone surrogate at character 1 of field 'a'.* Remove the line"),
    ],
)
def test_a_wrong_field_is_reported_with_file_line_and_remedy(tmp_path, record, field, words):
    (tmp_path / "a.jsonl").write_text("\n" + json.dumps(record) + "\n")
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2: .*{words}") as error:
        list(documents(str(tmp_path), field))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: text.encode("utf-16"),
        lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
        lambda text: text.encode("utf-32"),
        lambda text: gzip.compress(text.encode("utf-16"), mtime=0),
    ],
    ids=["UTF-16", "UTF-16 BE", "UTF-32", "UTF-16 in gzip"],
)
def test_text_with_a_byte_order_mark_is_read(tmp_path, encode):
    """As Windows programs save it. Only a newline ends a line."""
    text = "one\u2028still\r\n<|endoftext|>\r\n  \N{FOX FACE}"
    packed = encode(text)
    suffix = ".gz" if packed.startswith(b"\x1f\x8b") else ""
    (tmp_path / f"a.txt{suffix}").write_bytes(packed)
    assert list(documents(str(tmp_path))) == ["one\u2028still", "  \N{FOX FACE}"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("text".encode("utf-16-le"), "If it is UTF-16 without a byte-order mark, convert it"),
        ("text".encode("utf-16") + b"x", "line 1: not UTF-16.* Convert the file"),
        ("text".encode("utf-16") + b"\x00\xd8", "line 1: not UTF-16.* Convert the file"),
    ],
)
def test_damaged_utf_16_is_reported_as_such(tmp_path, data, words):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(DataError, match=rf"a\.txt, {words}|a\.txt, line 1: .*{words}"):
        list(documents(str(tmp_path)))


# Which files are read.


@pytest.fixture
def corpus(tmp_path):
    """One text, and what notebooks, archives, systems and links put beside it."""
    folder = tmp_path / "corpus"
    for name in (
        "a.txt",
        ".ipynb_checkpoints/a-checkpoint.txt",
        "__MACOSX/._a.txt",
        "__MACOSX/b.txt",
        ".hidden.txt",
        "$RECYCLE.BIN/c.txt",
        "notes.md",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("\0" if "_a.txt" in name else name)
    return folder


def test_hidden_and_system_files_are_left_out_and_counted(corpus):
    selection = select(str(corpus))
    assert selection.paths == (corpus / "a.txt",)
    assert selection.left_out == {
        "hidden, or added by the operating system": 4,
        "format .md": 1,
    }
    assert matching(str(corpus / "**" / "*.txt")) == [corpus / "a.txt"]
    hidden = corpus / ".ipynb_checkpoints"  # named by the user, so it is what the user means
    assert [path.name for path in matching(str(hidden))] == ["a-checkpoint.txt"]
    assert matching(str(corpus / ".hidden.txt")) == [corpus / ".hidden.txt"]


def test_links_are_followed_once(corpus, tmp_path):
    """A linked folder is read; a circle, a second link and another name of a file are not."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "o.txt").write_text("o")
    (corpus / "linked").symlink_to(other)
    (corpus / "linked again").symlink_to(other)
    (corpus / "circle").symlink_to(corpus)
    (corpus / "b.txt").symlink_to(corpus / "a.txt")
    (corpus / "c.txt").hardlink_to(corpus / "a.txt")
    (corpus / "dangling.txt").symlink_to(corpus / "nothing.txt")
    assert matching(str(corpus)) == [corpus / "a.txt", corpus / "linked" / "o.txt"]
    assert matching(str(corpus / "?.txt")) == [corpus / "a.txt"]


@pytest.mark.parametrize("name", ["my [draft] text.txt", "what?.txt", "a*b.txt", "[ab].txt"])
def test_a_path_that_exists_is_never_a_pattern(tmp_path, name):
    """A file, a folder, and a glob below such a folder."""
    (tmp_path / name).write_text("x")
    (tmp_path / "a.txt").write_text("y")
    assert matching(str(tmp_path / name)) == [tmp_path / name]
    folder = tmp_path / name.removesuffix(".txt")
    folder.mkdir()
    (folder / "inner.txt").write_text("z")
    assert matching(str(folder)) == [folder / "inner.txt"]
    assert matching(str(folder / "*.txt")) == [folder / "inner.txt"]


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("x")
    assert matching("~/a.txt") == matching("~") == matching("~/*.txt") == [tmp_path / "a.txt"]


def test_the_log_lists_the_files_with_their_digests(corpus):
    """Two preparations from the same bytes have the same last line."""
    first = list(describe(select(str(corpus))))
    digest = hashlib.sha256(b"a.txt").hexdigest()[:12]
    assert first[0] == f"corpus: {corpus / 'a.txt'} (5 bytes, sha256 {digest})"
    assert first[1] == "corpus: 4 left out (hidden, or added by the operating system)"
    (corpus / "a.txt").write_text("other")
    assert list(describe(select(str(corpus))))[-1] != first[-1]

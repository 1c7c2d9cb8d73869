import gzip
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from diladiff_jax.data import DataError
from diladiff_jax.data.text_files import documents, matching

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
        ("a.jsonl", b"[1]\n", "a.jsonl, line 1"),
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
        (tmp_path, "body", "row 2"),
        (tmp_path, "n", "row 1"),
        (tmp_path / "absent", "body", "matches no file"),
        ("", "body", "data.files: got ''"),
    ):
        with pytest.raises(DataError, match=where) as error:
            list(documents(str(files), field))
        assert "\n" not in str(error.value)

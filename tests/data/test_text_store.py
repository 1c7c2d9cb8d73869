"""The text of a corpus, written and read back."""

import dataclasses
import json

import pytest

from diladiff_jax.data import DataError, DataOptions, corpora, text_store


@pytest.fixture
def options(tmp_path):
    (tmp_path / "in").mkdir()
    documents = [f"document {i} says é" for i in range(200)]
    (tmp_path / "in" / "a.txt").write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    return DataOptions(
        corpus="text_files",
        files=str(tmp_path / "in"),
        validation_fraction=0.2,
        scorer_fraction=0.1,
    )


def test_text_is_written_and_read_back(options, tmp_path):
    folder = tmp_path / "text"
    text_store.build(options, folder)
    assert list(folder.rglob("*.array_record*"))
    assert text_store.splits_in(folder) == corpora.SPLITS
    for split, begin in corpora.splits(options).items():
        documents, stored = list(begin()), text_store.Documents(folder, split)
        assert len(stored) == len(documents) and list(stored) == documents
        assert stored[5] == documents[5] and stored[-1] == documents[-1]
        assert stored.__getitems__([2, 0]) == [documents[2], documents[0]]
        assert list(stored.batches(7))[1] == documents[7:14]
        with pytest.raises(IndexError):
            stored[len(documents)]


@pytest.mark.parametrize("case", ["too few documents", "blank", "lone surrogate"])
def test_empty_splits_and_invalid_text_are_rejected_in_one_line(options, tmp_path, case):
    (tmp_path / "other").mkdir()
    other = {"files": str(tmp_path / "other")}
    if case == "too few documents":
        change, message = {"max_documents": 1}, "got no document"
    elif case == "blank":
        (tmp_path / "other" / "a.txt").write_text("\n \n\n")
        change, message = other, "other' holds no text"
    else:
        (tmp_path / "other" / "a.jsonl").write_text(json.dumps({"text": "a\ud800"}))
        change, message = other, "lone surrogate"
    with pytest.raises(DataError, match=message) as error:
        text_store.build(dataclasses.replace(options, **change), tmp_path / "text")
    assert "\n" not in str(error.value) and not text_store.is_built(tmp_path / "text")

"""What a tokenizer is trained on: all parts of a corpus, within bounds, with progress."""

import itertools
import logging
import re
import time

import pytest

from diladiff_jax.data import DataError, TokenizerOptions, tokenizers
from diladiff_jax.data.tokenizers import spread_sample, training


class Corpus:
    """Documents in memory, as `text_store.Documents` offers them."""

    def __init__(self, texts):
        self._texts = texts

    def __len__(self):
        return len(self._texts)

    def __getitems__(self, indices):
        return [self._texts[i] for i in indices]


def test_a_small_corpus_is_taken_whole_and_in_order():
    for count in (0, 1, 2, 7, 1500):
        texts = [f"text {i}" for i in range(count)]
        assert spread_sample(Corpus(texts)) == texts


@pytest.mark.parametrize("first", [0, 1], ids=["the long source first", "the long source last"])
def test_every_source_is_sampled_by_its_share_wherever_it_is(first):
    """Two sources one after the other, each of which has more text than is read."""
    sources = [["book " * 1000] * 300, ["wiki " * 20] * 30_000]
    texts = sources[first] + sources[1 - first]
    found = spread_sample(Corpus(texts), max_characters=600_000)
    characters = {name: sum(t.count(name) * 5 for t in found) for name in ("book", "wiki")}
    assert sum(characters.values()) == pytest.approx(600_000, rel=0.05)
    assert 0.2 < characters["book"] / characters["wiki"] < 2  # 0.5 in the corpus
    assert found == spread_sample(Corpus(texts), max_characters=600_000)


def test_one_very_long_document_leaves_room_for_the_others():
    """It is cut to a 64th of the characters, in parts from all over it."""
    long = "".join(f"{i:07d} " for i in range(100_000))
    found = spread_sample(Corpus([long] + ["short text. "] * 5000), max_characters=64_000)
    assert len(found) > 4000 and len(found[0]) <= 1100
    numbers = [int(n) for n in re.findall(r"\d{7}", found[0])]
    assert min(numbers) < 200 and max(numbers) > 80_000


def test_the_number_of_documents_is_limited():
    found = spread_sample(Corpus([str(i) for i in range(10_000)]), max_documents=100)
    places = [int(text) for text in found]
    assert len(places) == 100 and places == sorted(places)
    assert max(b - a for a, b in itertools.pairwise(places)) < 200


def test_prepared_text_trains_on_all_sources(tmp_path, monkeypatch):
    """A folder of two files; the limit is a tenth of the first."""
    from diladiff_jax.data import DataOptions, prepare

    monkeypatch.setattr(
        tokenizers, "spread_sample", lambda corpus: spread_sample(corpus, max_characters=20_000)
    )
    (tmp_path / "text").mkdir()
    for name, word in (("a_children.txt", "kitten"), ("b_wiki.txt", "parliament")):
        documents = [f"the {word} number {i} sleeps." for i in range(3000)]
        (tmp_path / "text" / name).write_text("\n<|endoftext|>\n".join(documents))
    data = DataOptions(corpus="text_files", files=str(tmp_path / "text"), length=16)
    prepared = prepare(data, TokenizerOptions(kind="bpe", vocab_size=512), tmp_path / "w")
    for text in ("the kitten number", "the parliament number"):
        assert len(prepared.tokenizer.encode(text)) <= 5, text  # not letter by letter


def test_a_long_training_reports_its_progress(monkeypatch, caplog):
    monkeypatch.setattr(training, "_SECONDS", 0.05)
    with caplog.at_level(logging.INFO, "diladiff_jax"), training._reported("training"):
        time.sleep(0.3)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "training" and lines[1].startswith("training: 0 s") and len(lines) > 2


@pytest.mark.parametrize("size", [300, 1000, 3000])
def test_a_vocabulary_too_small_for_the_characters_names_the_size_it_needs(size):
    """The advice is a setting that exists, and it works."""
    characters = [chr(0x4E00 + i) for i in range(size + 200)]
    texts = ["".join(characters)] * 3
    options = TokenizerOptions(vocab_size=512 if size < 512 else size)
    with pytest.raises(DataError, match=r"^tokenizer\.vocab_size: got \d+, expected") as error:
        tokenizers.train(texts if size > 400 else texts * 2, options)
    needed = int(re.search(r"at least (\d+)", str(error.value))[1])
    tokenizers.train(texts, TokenizerOptions(kind="bpe", vocab_size=needed))

"""Shared n-grams and nearest documents, against sets of tuples of words."""

import re

import numpy as np
import pytest

from diladiff_jax.evaluation.measures import memorization as lib
from diladiff_jax.evaluation.measures.memorization import memorization


def ngrams(text, n):
    """Tuples of words, in order."""
    found = re.findall(r"[a-z]+", text.lower())
    return [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]


def random_texts(rng, count):
    """Texts over a few words, so that many n-grams are shared."""
    return [" ".join(rng.choice(list("abc"), size=rng.integers(0, 40))) for _ in range(count)]


@pytest.mark.parametrize("batch", [1, 7, 1024])
def test_it_agrees_with_sets_of_tuples(monkeypatch, batch):
    """For any number of documents that are compared at a time."""
    monkeypatch.setattr(lib, "_BATCH", batch)
    rng = np.random.default_rng(0)
    texts, training = random_texts(rng, 12), random_texts(rng, 30)
    found = memorization(texts, iter(training))
    known = {gram for document in training for gram in ngrams(document, 8)}
    for i, text in enumerate(texts):
        grams, parts = ngrams(text, 8), set(ngrams(text, 3))
        assert found.total[i] == len(grams)
        assert found.copied[i] == sum(gram in known for gram in grams)
        shared = [len(parts & set(ngrams(document, 3))) for document in training]
        assert found.overlap[i] == pytest.approx(max(shared) / max(1, len(parts)))
        assert found.nearest[i] == (training[int(np.argmax(shared))] if max(shared) else "")


def test_neither_case_nor_spacing_nor_punctuation_hides_a_copy():
    document = "Once upon a time, there was a cat's hat; it was 3 feet tall."
    text = "once  upon a\ntime there was a cat's hat -- It was 3 feet tall"
    found = memorization([text], [document])
    assert found.copied[0] == found.total[0] == 7 and found.overlap[0] == 1
    assert found.nearest == [document]


def test_text_that_shares_nothing_has_no_nearest_document():
    found = memorization(["one two three four", "", "a b"], ["five six seven eight", ""])
    assert found.nearest == [""] * 3 and not found.overlap.any() and not found.total.any()
    assert "copied_8grams" not in found.measures()
    assert memorization(["one two three"], []).overlap.tolist() == [0]

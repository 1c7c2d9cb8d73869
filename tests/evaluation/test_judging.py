"""The result of a judge: its documented form, its conventions, and what it says of few texts."""

import jax
import numpy as np
import pytest
from tiny_llama import write_gguf

from diladiff_jax.evaluation import judging
from diladiff_jax.evaluation.measures import mauve, text
from diladiff_jax.evaluation.report import scores_table
from diladiff_jax.storage import scorers

TEXTS = ["the cat 19", "the hat and the bat and the hat", "", "9 the<|endoftext|>hat"]


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    path = write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")
    return judging.Judge(scorers.load_scorer(str(path)), batch=2, max_tokens=20)


def test_a_result_has_the_documented_form(judge):
    result = judge.judge(TEXTS, TEXTS[:2], ["the hat and the bat and the hat of the cat"])
    judging.check_scores(result)
    assert [row["name"] for row in result["rows"]] == ["texts", "reference"]
    assert result["scorer"]["max_tokens"] == 20 and len(result["scorer"]["sha256"]) == 64
    measured = {name for row in result["rows"] for name in row["metrics"]}
    assert {name.rpartition("_")[0] if "distinct" in name else name for name in measured} == {
        "gen_ppl",
        "empty",
        "entropy",
        "repetition",
        "distinct",
        "copied_8grams",
        "nearest_overlap",
    }
    assert result["nearest"][0]["index"] == 1 and result["nearest"][0]["overlap"] == 1
    del result["notes"]
    with pytest.raises(ValueError, match="scores: got the keys"):
        judging.check_scores(result)


def test_the_measures_are_those_of_the_scorers_ids(judge):
    (row,) = judge.judge(TEXTS)["rows"]
    ids = judge._scorer.encode(TEXTS)
    assert row["tokens"] == sum(map(len, ids)) and row["counted"] == row["tokens"]
    assert row["metrics"]["entropy"]["value"] == pytest.approx(
        np.mean([text.unigram_entropy(each) for each in ids])
    )
    assert row["metrics"]["empty"]["value"] == 0.25


def test_perplexity_is_exp_of_the_mean_nll_under_the_network(judge):
    """Text by text, without padding, after an end-of-text."""
    scorer, total, count = judge._scorer, 0.0, 0
    params, end = scorer._params, scorer.end_id
    network = scorer._score_rows.__wrapped__.args[0]
    for ids in scorer.encode([t for t in TEXTS if t]):
        logits = network.apply({"params": params}, np.array([[end, *ids[:-1]]]))[0]
        log_p = jax.nn.log_softmax(logits.astype(np.float32))
        total -= float(log_p[np.arange(len(ids)), ids].sum())
        count += len(ids)
    (row,) = judge.judge(TEXTS)["rows"]
    assert row["metrics"]["gen_ppl"]["value"] == pytest.approx(np.exp(total / count), rel=1e-4)


def test_an_interval_of_one_value_repeated_is_too_few_texts(judge):
    for texts in (TEXTS[:1], [TEXTS[0]] * 5):
        result = judge.judge(texts)
        metric = result["rows"][0]["metrics"]["gen_ppl"]
        assert metric["low"] is None and metric["high"] is None
        line = next(x for x in scores_table(result).splitlines() if x.startswith("gen_ppl  "))
        assert f"{metric['value']:.1f} [too few texts]" in line


def test_few_texts_have_no_mauve_and_a_note_that_says_so(judge):
    result = judge.judge(TEXTS, TEXTS)
    assert result["mauve"] is None
    assert result["notes"] == [
        "no MAUVE: got 3 texts and 3 of the reference, expected at least 20 of each"
    ]
    assert "note: no MAUVE" in scores_table(result)


def test_mauve_compares_the_features_of_texts_and_reference(judge, monkeypatch):
    seen = []

    def found(data, model):
        seen.extend([data, model])
        return {"value": 0.5, "low": 0.4, "high": 0.6}

    monkeypatch.setattr(mauve, "mauve", found)
    texts, reference = [f"the {i} hats" for i in range(25)], [f"a {i} cat" for i in range(21)]
    result = judge.judge(texts, [*reference, ""])
    assert result["mauve"]["value"] == 0.5 and "0.500 [0.400, 0.600]" in scores_table(result)
    np.testing.assert_allclose(seen[0], judge._scorer.score(reference).features, atol=1e-5)
    np.testing.assert_allclose(seen[1], judge._scorer.score(texts).features, atol=1e-5)


def test_progress_counts_all_texts(judge):
    done = []
    judge.judge(TEXTS, TEXTS[:3], progress=done.append)
    assert done == sorted(done) and done[-1] == 7

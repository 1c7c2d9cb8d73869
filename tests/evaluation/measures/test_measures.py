"""Measures against cases with known answers."""

import dataclasses
import itertools
import math
from math import factorial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diladiff_jax.data import TokenizerOptions, stories, tokenizers
from diladiff_jax.evaluation.measures import intervals, likelihood, text
from diladiff_jax.evaluation.measures.batches import map_batches
from diladiff_jax.nn.transformer import TokenDenoiser


def test_batches_return_every_row_once_and_in_order():
    """The last batch wraps around, so that all calls have one size; its repeats are dropped."""
    sizes = []

    def function(rows):
        sizes.append(len(rows))
        return {"row": rows, "twice": np.stack([rows, 2 * rows])[:, None]}

    found = map_batches(lambda rows: function(rows)["row"], 7, 3)
    np.testing.assert_array_equal(found, np.arange(7))
    found = map_batches(lambda rows: function(rows)["twice"], 2, 5, axis=2)
    assert found.tolist() == [[[0, 1]], [[0, 2]]]
    assert sizes == [3, 3, 3, 2]


def test_the_interval_of_a_proportion_solves_the_score_equation():
    """|p_hat - p| = z sqrt(p (1 - p) / n), also for 0 of n."""
    for k, n in ((0, 50), (7, 50), (50, 50)):
        e = intervals.proportion(np.arange(n) < k)
        assert e["value"] == k / n and 0 <= e["low"] <= e["value"] <= e["high"] <= 1
        for p in (e["low"], e["high"]):
            if 0 < p < 1:
                assert abs(k / n - p) == pytest.approx(
                    1.959964 * np.sqrt(p * (1 - p) / n), rel=1e-5
                )
    assert intervals.proportion(np.zeros(50))["high"] > 0.05


def test_bootstrap_intervals_cover_the_mean():
    """95% intervals cover it in 95% of 300 repeats.

    Coverage below 90% or above 99% has a probability under 1e-3.
    """
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(300):
        e = intervals.bootstrap(np.mean, rng.normal(3.0, 2.0, 100), resamples=300, seed=i)
        hits += e["low"] <= 3.0 <= e["high"]
    assert 0.90 <= hits / 300 <= 0.99


def test_a_single_sample_is_its_own_interval():
    e = intervals.mean(np.array([3.0]))
    assert (e["low"], e["value"], e["high"]) == (3.0, 3.0, 3.0)


def test_the_samples_of_a_ratio_are_resampled_jointly():
    """Numerator and denominator are equal, so that every resample has the ratio 1."""
    x = np.random.default_rng(0).uniform(1, 9, 50)
    e = intervals.ratio(x, x)
    assert (e["low"], e["value"], e["high"]) == (1.0, 1.0, 1.0)


def test_ratios_are_of_sums():
    """Sum over sum, not a mean of ratios; and its exponential, which weights by tokens."""
    numerator, denominator = np.array([1.0, 9.0]), np.array([1.0, 3.0])
    assert intervals.ratio(numerator, denominator)["value"] == 2.5
    assert intervals.ratio_exp(numerator, denominator)["value"] == pytest.approx(np.exp(10 / 4))


def test_entropy_and_repetition_of_simple_rows():
    """The entropy of n different ids is log n; repeated trigrams are counted."""
    assert text.unigram_entropy(np.arange(7)) == pytest.approx(np.log(7))
    assert text.unigram_entropy(np.zeros(7)) == 0
    assert text.repetition(np.arange(10)) == 0
    assert text.repetition(np.zeros(10)) == pytest.approx(1 - 1 / 8)
    assert text.repetition(np.array([1, 2])) == 0


def test_distinct_n_matches_a_manual_count():
    """a b a b | a b c has 3 different of 7 unigrams, 3 of 5 bigrams, 3 of 3 trigrams.

    No n-gram crosses rows or includes padding.
    """
    rows = np.array([[1, 2, 1, 2], [1, 2, 3, 0]])
    found = text.distinct_measures(rows, eot_id=0)
    assert [found[f"distinct_{n}"]["value"] for n in (1, 2, 3, 4)] == [3 / 7, 3 / 5, 1.0, 1.0]
    assert set(text.token_measures(rows, 0)) == {"entropy", "repetition", *found}
    assert (
        text.distinct_n([np.array([1])], 2) is None
        and text.distinct_measures(np.zeros((2, 3), int), 0) == {}
    )


def test_the_jackknife_of_a_mean_is_its_standard_error():
    """With groups of one sample. A statistic that never varies has an interval of width zero."""
    x = np.random.default_rng(0).normal(size=50)
    e = intervals.jackknife(lambda kept: x[kept].mean(), 50, groups=50)
    assert e["high"] - e["value"] == pytest.approx(1.959964 * x.std(ddof=1) / np.sqrt(50))
    unique = text.distinct_n(np.arange(200).reshape(40, 5), 2)
    assert (unique["low"], unique["value"], unique["high"]) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="at least 2"):
        intervals.jackknife(lambda kept: 1.0, 1)


def test_the_oracle_accepts_its_own_language_only():
    """Its stories are valid with an exact NLL near the entropy; broken ones have no exact NLL."""
    good = list(stories.documents(400, 3))
    measures = text.oracle_measures(good)
    assert (
        measures["valid"]["value"]
        == measures["agreement"]["value"]
        == measures["distinct"]["value"]
        == 1
    )
    # The mean of 400 documents within 5 standard errors: a false alarm is rarer than 1e-6.
    spread = np.std([-stories.log_likelihood(d) for d in good]) / 20
    assert measures["exact_nll"]["value"] == pytest.approx(stories.entropy(), abs=5 * spread)
    # Eight details of at most 20 values each; their estimates from 400 documents have standard
    # errors below 0.02 each.
    assert measures["detail_entropy"]["value"] == pytest.approx(stories.detail_entropy(), abs=0.2)
    bad = text.oracle_measures([d + " again" for d in good])
    assert bad["valid"]["value"] == 0 and "exact_nll" not in bad


def test_detail_entropy_sees_what_validity_does_not():
    """Valid stories of one family of details have little entropy; the language's is exact."""
    uniform = 4 * math.log(20) + math.log(16) + 3 * math.log(2)  # 4 of 20, colours, 3 of two
    assert stories.detail_entropy() == pytest.approx(uniform)
    colours = ("red", "blue", "green", "grey")
    same = [
        f"Tom found two {c} kites at the harbour. He sold them to Mia. Mia keeps the {c} kites"
        f" from the harbour."
        for c in colours * 30
    ]
    assert "detail_entropy" not in text.oracle_measures(same[:99])
    measures = text.oracle_measures(same)
    assert measures["valid"]["value"] == 1
    assert measures["detail_entropy"]["value"] == pytest.approx(math.log(4) + 3 / 240)


JOINT = np.random.default_rng(1).dirichlet(np.full(27, 0.4)).reshape(3, 3, 3)
MASK, LENGTH, NO_EOT = 3, 3, -1


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What measures read of a tokenizer: three ids of text and a mask, without an end-of-text."""

    mask_id: int = MASK
    eot_id: int = NO_EOT
    sampleable: np.ndarray = dataclasses.field(default_factory=lambda: np.arange(4) < MASK)


def posterior_logits(_, x_t, condition=None):
    """Exact conditionals log p(x^l | unmasked tokens) of JOINT, `[B, 3, 4]`."""
    joint = jnp.asarray(JOINT)

    def one(row):
        weight = joint
        for axis in range(LENGTH):
            shape = tuple(3 if a == axis else 1 for a in range(LENGTH))
            keep = (jnp.arange(3) == row[axis]) | (row[axis] == MASK)
            weight = weight * keep.reshape(shape)
        marginals = [
            weight.sum(axis=tuple(a for a in range(LENGTH) if a != axis)) for axis in range(LENGTH)
        ]
        logits = jnp.log(jnp.stack(marginals) / weight.sum() + 1e-30)
        return jnp.concatenate([logits, jnp.zeros((LENGTH, 1))], axis=1)

    return jax.vmap(one)(x_t)


@pytest.mark.parametrize("estimator", ["count", "ratio"])
def test_bound_is_tight_for_exact_conditionals(estimator):
    """The bound of a model of exact conditionals is -log p(x); many draws agree within 1%."""
    rng = np.random.default_rng(0)
    flat = rng.choice(27, size=64, p=JOINT.ravel())
    tokens = np.stack(np.unravel_index(flat, (3, 3, 3)), axis=1).astype(np.int32)
    exact = np.exp(-np.log(JOINT.ravel()[flat]).mean() / LENGTH)
    found = likelihood.bound_and_recovery(
        likelihood.Denoiser(posterior_logits, None),
        tokens,
        jax.random.key(0),
        Vocabulary(),
        draws=2000,
        batch=40,
        estimator=estimator,
    )
    assert found["bound_ppl"]["value"] == pytest.approx(exact, rel=0.01)


def test_recovery_matches_enumeration():
    """Over masks at t ~ U(0, 1], a subset of k of 3 tokens has the weight B(k + 1, 4 - k)."""
    tokens = np.array([[0, 1, 2], [2, 2, 0]], np.int32)
    hits = total = 0.0
    for row, pattern in itertools.product(tokens, itertools.product([0, 1], repeat=3)):
        k = sum(pattern)
        weight = factorial(k) * factorial(3 - k) / factorial(4)
        masked = np.where(pattern, MASK, row)[None]
        guess = np.argmax(
            np.asarray(posterior_logits(None, jnp.asarray(masked)))[0, :, :3], axis=-1
        )
        hits += weight * np.sum((guess == row) * np.array(pattern))
        total += weight * k
    found = likelihood.bound_and_recovery(
        likelihood.Denoiser(posterior_logits, None),
        tokens,
        jax.random.key(1),
        Vocabulary(),
        draws=6000,
        batch=2,
    )
    assert found["recovery"]["value"] == pytest.approx(hits / total, abs=0.015)


def test_generative_perplexity_of_a_uniform_scorer_is_the_number_of_ids():
    """A scorer with a zero head gives every allowed id the same probability."""
    scorer = TokenDenoiser(8, 5, 8, 1, 2, causal=True, zero_head=True)
    params = nn.unbox(scorer.init(jax.random.key(0), jnp.zeros((1, 5), jnp.int32)))["params"]
    tokens = np.random.default_rng(0).integers(0, 6, (7, 5)).astype(np.int32)
    vocabulary = Vocabulary(mask_id=6, eot_id=7, sampleable=np.arange(8) < 6)
    e = likelihood.generative_perplexity(scorer, params, tokens, vocabulary, batch=3)
    assert e["value"] == pytest.approx(6.0, rel=1e-5) and e["low"] == pytest.approx(6.0, rel=1e-5)


def test_padding_belongs_to_the_likelihood_but_is_not_counted():
    """Tokens are counted up to the first end-of-text; the likelihood is over the whole row."""
    rows = np.array([[1, 2, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 2, 0, 1, 0]], np.int32)
    counted = likelihood.content_positions(rows, 0)
    np.testing.assert_array_equal(
        counted, [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 1, 1]]
    )

    def uniform(params, x_t, condition):
        return jnp.zeros((*x_t.shape, 4))

    found = likelihood.bound_and_recovery(
        likelihood.Denoiser(uniform, None),
        rows,
        jax.random.key(0),
        Vocabulary(eot_id=0),
        draws=4,
        batch=3,
    )
    # Every token costs log 3 whatever is masked, so the estimate has no variance: the cost of 18
    # tokens over 14 counted ones.
    assert found["bound_ppl"]["value"] == pytest.approx(3.0 ** (18 / counted.sum()), rel=1e-5)
    assert found["recovery"]["value"] == pytest.approx(1 / 3, rel=1e-5)


def test_retokenized_rows_hold_the_text_and_not_its_pieces():
    """A word spelled byte by byte becomes the word; documents keep their ends; rows stay at L."""
    tokenizer = tokenizers.train(
        ["the red boat sails to the mill", "a rare word at the end"] * 50,
        TokenizerOptions(kind="unigram", vocab_size=288),
    )
    whole, eot = tokenizer.encode("the red boat").tolist(), tokenizer.eot_id
    ids = {piece: i for i, piece in enumerate(tokenizer.pieces(np.arange(tokenizer.vocab_size)))}
    letters = [ids[f"<0x{byte:02X}>"] for byte in b"the red boat"]
    assert letters != whole and tokenizer.decode(letters) == "the red boat"
    length = 2 * len(letters)
    rows = np.full((2, length), eot, np.int32)
    rows[0, : len(letters)] = letters
    rows[0, len(letters) + 1 : len(letters) + 1 + len(whole)] = whole
    rows[1] = (letters * 2)[:length]
    out = likelihood.retokenize(rows, tokenizer)
    expected = [*whole, eot, *whole]
    assert out[0].tolist() == expected + [eot] * (length - len(expected))
    assert tokenizer.decode(out[1]) == tokenizer.decode(rows[1]) and out.shape == rows.shape

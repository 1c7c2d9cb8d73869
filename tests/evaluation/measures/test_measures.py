"""Every measure against a case whose answer is known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diladiff_jax.data import stories
from diladiff_jax.evaluation.measures import intervals, likelihood, text


def test_wilson_interval():
    """The score interval solves |p_hat - p| = z sqrt(p (1 - p) / n), at 0 of n too."""
    for k, n in ((0, 50), (7, 50), (50, 50)):
        e = intervals.share(np.arange(n) < k)
        assert e["value"] == k / n and 0 <= e["low"] <= e["value"] <= e["high"] <= 1
        for p in (e["low"], e["high"]):
            if 0 < p < 1:
                assert abs(k / n - p) == pytest.approx(
                    1.959964 * np.sqrt(p * (1 - p) / n), rel=1e-5
                )
    assert intervals.share(np.zeros(50))["high"] > 0.05


def test_bootstrap_covers():
    """95% intervals of a mean cover it in 95% of 300 repeats; below 90% or above 99% has probability under 1e-3."""
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(300):
        e = intervals.bootstrap(
            lambda index, x=rng.normal(3.0, 2.0, 100): x[index].mean(axis=1), 100, draws=300, seed=i
        )
        hits += e["low"] <= 3.0 <= e["high"]
    assert 0.90 <= hits / 300 <= 0.99


def test_ratio_exp_weights_by_tokens():
    """exp of the total over the total, not a mean of perplexities."""
    assert intervals.ratio_exp(np.array([1.0, 9.0]), np.array([1.0, 3.0]))[
        "value"
    ] == pytest.approx(np.exp(10 / 4))


def test_entropy_and_repetition():
    """log n for n different ids, 0 for one; repeated trigrams are counted."""
    assert text.unigram_entropy(np.arange(7)) == pytest.approx(np.log(7))
    assert text.unigram_entropy(np.zeros(7)) == 0
    assert text.repetition(np.arange(10)) == 0
    assert text.repetition(np.zeros(10)) == pytest.approx(1 - 1 / 8)
    assert text.repetition(np.array([1, 2])) == 0


def test_distinct_n_by_hand():
    """a b a b | a b c: 3 of 7 unigrams; ab, ba, bc of 5 bigrams; aba, bab, abc of 3; none across rows or in the fill."""
    rows = np.array([[1, 2, 1, 2], [1, 2, 3, 0]])
    found = text.distinct_measures(rows, eot_id=0)
    assert [found[f"distinct_{n}"]["value"] for n in (1, 2, 3, 4)] == [3 / 7, 3 / 5, 1.0, 1.0]
    assert set(text.token_measures(rows, 0)) == {"entropy", "repetition", *found}
    assert (
        text.distinct_n([np.array([1])], 2) is None
        and text.distinct_measures(np.zeros((2, 3), int), 0) == {}
    )


def test_jackknife_of_a_mean():
    """With groups of one it is the textbook standard error of a mean; distinct rows keep their value inside the interval."""
    x = np.random.default_rng(0).normal(size=50)
    e = intervals.jackknife(lambda kept: x[kept].mean(), 50, groups=50)
    assert e["high"] - e["value"] == pytest.approx(1.959964 * x.std(ddof=1) / np.sqrt(50))
    unique = text.distinct_n(np.arange(200).reshape(40, 5), 2)
    assert (unique["low"], unique["value"], unique["high"]) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="at least 2"):
        intervals.jackknife(lambda kept: 1.0, 1)


def test_ratio_is_of_sums():
    """Sum over sum."""
    assert intervals.ratio(np.array([1.0, 9.0]), np.array([1.0, 3.0]))["value"] == 2.5


def test_oracle_on_its_own_language():
    """True stories: all valid, exact NLL near the entropy; broken ones: none valid and no exact_nll."""
    good = list(stories.documents(400, 3))
    measures = text.oracle_measures(good)
    assert (
        measures["valid"]["value"]
        == measures["agreement"]["value"]
        == measures["distinct"]["value"]
        == 1
    )
    # The mean of 400 documents: 5 standard errors, false alarm below 1e-6.
    spread = np.std([-stories.log_likelihood(d) for d in good]) / 20
    assert measures["exact_nll"]["value"] == pytest.approx(stories.entropy(), abs=5 * spread)
    bad = text.oracle_measures([d + " again" for d in good])
    assert bad["valid"]["value"] == 0 and "exact_nll" not in bad


JOINT = np.random.default_rng(1).dirichlet(np.full(27, 0.4)).reshape(3, 3, 3)
MASK, LENGTH, NO_EOT = 3, 3, -1


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
    """For a model of exact conditionals the bound is -log p(x): the estimate over many draws agrees within 1%."""
    rng = np.random.default_rng(0)
    flat = rng.choice(27, size=64, p=JOINT.ravel())
    tokens = np.stack(np.unravel_index(flat, (3, 3, 3)), axis=1).astype(np.int32)
    exact = np.exp(-np.log(JOINT.ravel()[flat]).mean() / LENGTH)
    found = likelihood.bound_and_recovery(
        posterior_logits,
        None,
        tokens,
        jax.random.key(0),
        MASK,
        NO_EOT,
        np.arange(4) < MASK,
        draws=2000,
        batch=40,
        estimator=estimator,
    )
    assert found["bound_ppl"]["value"] == pytest.approx(exact, rel=0.01)


def test_recovery_matches_enumeration():
    """E over masks at t ~ U(0, 1]: each subset of k of 3 tokens has weight B(k + 1, 4 - k); argmax recovery enumerated."""
    tokens = np.array([[0, 1, 2], [2, 2, 0]], np.int32)
    hits = total = 0.0
    from math import factorial

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
        posterior_logits,
        None,
        tokens,
        jax.random.key(1),
        MASK,
        NO_EOT,
        np.arange(4) < MASK,
        draws=6000,
        batch=2,
    )
    assert found["recovery"]["value"] == pytest.approx(hits / total, abs=0.015)


def test_generative_perplexity_of_a_uniform_scorer():
    """A scorer with a zero head gives every allowed id the same probability: the perplexity is their number."""
    from diladiff_jax.nn.transformer import TokenDenoiser

    scorer = TokenDenoiser(8, 5, 8, 1, 2, causal=True, zero_head=True)
    import flax.linen as nn

    params = nn.unbox(scorer.init(jax.random.key(0), jnp.zeros((1, 5), jnp.int32)))["params"]
    tokens = np.random.default_rng(0).integers(0, 6, (7, 5)).astype(np.int32)
    e = likelihood.generative_perplexity(scorer, params, tokens, 7, np.arange(8) < 6, batch=3)
    assert e["value"] == pytest.approx(6.0, rel=1e-5) and e["low"] == pytest.approx(6.0, rel=1e-5)


def test_fill_counts_once():
    """Rows closed by end-of-text and filled up with it: tokens are counted up to the first one, the likelihood over all."""
    rows = np.array([[1, 2, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 2, 0, 1, 0]], np.int32)
    counted = np.asarray(likelihood.content_mask(rows, 0))
    np.testing.assert_array_equal(
        counted, [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 1, 1]]
    )

    def uniform(params, x_t, condition):
        return jnp.zeros((*x_t.shape, 4))

    found = likelihood.bound_and_recovery(
        uniform, None, rows, jax.random.key(0), 3, 0, np.arange(4) < 3, draws=4, batch=3
    )
    # Every token costs log 3 whatever is masked, so the estimate has no variance: 18 tokens' cost over 14 counted ones.
    assert found["bound_ppl"]["value"] == pytest.approx(3.0 ** (18 / counted.sum()), rel=1e-5)
    assert found["recovery"]["value"] == pytest.approx(1 / 3, rel=1e-5)


def test_scorer_reads_text_not_pieces():
    """A word spelled byte by byte is scored as the word; documents keep their ends; rows are cut at L."""
    from diladiff_jax.data import TokenizerOptions, tokenizers

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

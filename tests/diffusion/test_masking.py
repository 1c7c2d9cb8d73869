"""Masking, the reverse step and the bound, enumerated on a language of 27 sentences."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from diladiff_jax.diffusion import masking

V, L, MASK = 3, 3, 3
SAMPLEABLE = jnp.arange(V + 2) < V  # then the mask and padding
SENTENCES = np.array(list(itertools.product(range(V), repeat=L)))


@pytest.fixture(scope="module")
def joint():
    return np.random.default_rng(0).dirichlet(np.full(V**L, 0.5))


def exact_logits(joint, x_t):
    """log p(x^l = v | unmasked tokens of x_t), and large logits of mask and padding: [L, V + 2]."""
    agree = ((x_t == SENTENCES) | (x_t == MASK)).all(axis=1) * joint
    logits = np.full((L, V + 2), 9.0)
    for l, v in itertools.product(range(L), range(V)):
        logits[l, v] = np.log(max(agree[SENTENCES[:, l] == v].sum() / agree.sum(), 1e-300))
    return logits


def masked_nll(joint, x):
    """For every set S of masked positions: |S|, and the sum over S of -log p(x^l | rest).

    The library's `token_nll` gives the terms.
    """
    subsets = [s for s in itertools.product([False, True], repeat=L) if any(s)]
    x_t = np.where(np.array(subsets), MASK, x)
    logits = jnp.asarray(np.stack([exact_logits(joint, row) for row in x_t]), jnp.float32)
    nll, _ = masking.token_nll(logits, jnp.broadcast_to(jnp.asarray(x), x_t.shape), SAMPLEABLE)
    total = np.asarray((nll * np.array(subsets)).sum(axis=1), np.float64)
    return np.array(subsets).sum(axis=1), total


def test_both_bounds_are_exact_for_exact_conditionals(joint):
    """E_k (L/k) sum and E_t (1/t) sum, enumerated over subsets, equal -log p(x) of every sentence.

    This is the any-order chain rule.
    """
    nodes, weights = np.polynomial.legendre.leggauss(4)  # exact: the integrand is a polynomial in t
    t, weights = 0.5 * (nodes + 1), 0.5 * weights
    for x, p in zip(SENTENCES, joint, strict=True):
        size, nll = masked_nll(joint, x)
        by_count = sum((1 / L) * (L / k) * nll[size == k].mean() for k in range(1, L + 1))
        pattern = t[:, None] ** size * (1 - t[:, None]) ** (L - size)
        by_time = (weights * np.asarray(masking.bound_weight(t)) * (pattern @ nll)).sum()
        np.testing.assert_allclose([by_count, by_time], -np.log(p), rtol=1e-4)


def test_a_wrong_models_bound_is_above_the_entropy(joint):
    """With the conditionals of another joint, the expected bound exceeds the entropy."""
    other = np.random.default_rng(1).dirichlet(np.full(V**L, 5.0))
    bound = 0.0
    for x, p in zip(SENTENCES, joint, strict=True):
        size, nll = masked_nll(other, x)
        bound += p * sum(nll[size == k].mean() / k for k in range(1, L + 1))
    assert bound > scipy.stats.entropy(joint) + 0.1


def test_every_stratum_has_one_time():
    """B equal strata of (0, 1], all with one offset, which is uniform over keys (KS, 1e-4)."""
    t = np.asarray(
        jax.vmap(lambda key: masking.stratified_times(key, 8))(
            jax.random.split(jax.random.key(0), 500)
        )
    )
    assert (t > 0).all() and (t <= 1).all()
    ordered = np.sort(t, axis=1)
    np.testing.assert_array_equal(np.ceil(ordered * 8 - 1e-4), np.tile(np.arange(1, 9), (500, 1)))
    np.testing.assert_allclose(np.diff(ordered, axis=1), 1 / 8, atol=1e-6)
    assert scipy.stats.kstest(t[:, 0], "uniform").pvalue > 1e-4


def test_each_token_is_masked_independently_with_probability_t(chi_square):
    """Each of the 16 patterns has its probability (chi-square, false alarm 1e-4 each)."""
    n, ratios = 20_000, (0.2, 0.5, 0.8)
    tokens = jnp.broadcast_to(jnp.arange(4), (n, 4))
    for i, t in enumerate(ratios):
        masked = np.asarray(masking.mask_tokens(jax.random.key(i), tokens, jnp.full(n, t), 9)) == 9
        k = np.array(list(itertools.product([0, 1], repeat=4))).sum(axis=1)
        counts = np.bincount(masked @ [8, 4, 2, 1], minlength=16)
        assert chi_square(counts, t**k * (1 - t) ** (4 - k)) > 1e-4


def test_ratio_one_masks_everything_and_ratio_zero_nothing():
    """Tokens that are not masked are copied."""
    tokens = jax.random.randint(jax.random.key(0), (3, 50), 0, 9)
    x = masking.mask_tokens(jax.random.key(1), tokens, jnp.array([0.0, 0.5, 1.0]), 9)
    np.testing.assert_array_equal(x[0], tokens[0])
    assert (x[2] == 9).all() and 0 < (x[1] == 9).sum() < 50
    assert ((x == tokens) | (x == 9)).all()


def test_mask_exactly_masks_uniform_subsets_of_the_given_size(chi_square):
    """Sizes 0 to L; all C(5, 2) subsets are equally likely (chi-square, false alarm 1e-4)."""
    tokens, count = jnp.zeros((6, 5), jnp.int32), jnp.arange(6)
    np.testing.assert_array_equal(
        (masking.mask_exactly(jax.random.key(0), tokens, count, 9) == 9).sum(axis=1), count
    )
    masked = (
        np.asarray(
            masking.mask_exactly(
                jax.random.key(1), jnp.zeros((10_000, 5), jnp.int32), jnp.full(10_000, 2), 9
            )
        )
        == 9
    )
    counts = np.bincount(masked @ (2 ** np.arange(5)), minlength=32)
    assert chi_square(counts, np.array([bin(i).count("1") == 2 for i in range(32)])) > 1e-4


def test_reverse_probability_is_bayes_rule_and_telescopes():
    """1 - s/t = P(clean at s | masked at t), since P(masked at t) = t.

    The probabilities of staying masked multiply, over any grid, to that of its last time.
    """
    t, s = jnp.array([0.9, 0.5, 1.0]), jnp.array([0.3, 0.0, 0.75])
    np.testing.assert_allclose(masking.reverse_step_probability(t, s), (t - s) / t, rtol=1e-6)
    grid = jnp.array([1.0, 0.83, 0.4, 0.11])
    stay = 1 - masking.reverse_step_probability(grid[:-1], grid[1:])
    np.testing.assert_allclose(stay.prod(), 0.11, rtol=1e-6)


def test_ids_that_are_not_text_have_probability_exactly_zero():
    """Whatever their logits: their nll is infinite, and they are never the prediction.

    The nll of text is numpy's.
    """
    logits = jax.random.normal(jax.random.key(0), (2, 4, V + 2)).at[..., V:].set(50.0)
    assert (jax.nn.softmax(masking.restrict(logits, SAMPLEABLE))[..., V:] == 0).all()
    tokens = jax.random.randint(jax.random.key(1), (2, 4), 0, V)
    allowed = np.asarray(logits, np.float64)[..., :V]
    p = np.exp(allowed) / np.exp(allowed).sum(axis=-1, keepdims=True)
    expected = -np.log(np.take_along_axis(p, np.asarray(tokens)[..., None], axis=-1)[..., 0])
    nll, right = jax.jit(masking.token_nll)(logits, tokens, SAMPLEABLE)
    np.testing.assert_allclose(nll, expected, rtol=1e-5)
    np.testing.assert_array_equal(right, allowed.argmax(axis=-1) == tokens)
    nll, right = masking.token_nll(logits, jnp.full((2, 4), MASK), SAMPLEABLE)
    assert np.isinf(nll).all() and not right.any()


def test_one_of_n_equally_likely_tokens_counts_as_one_nth_right():
    """So a head of zeros recovers no more than chance."""
    logits = jnp.zeros((1, len(SAMPLEABLE)))
    _, right = masking.token_nll(logits, jnp.zeros(1, jnp.int32), SAMPLEABLE)
    np.testing.assert_allclose(right, 1 / np.sum(SAMPLEABLE), rtol=1e-6)


@pytest.mark.parametrize("positions", [1, 3, 4, 100])
def test_nll_by_position_is_the_nll_of_all_logits(positions):
    """Values, predictions and gradients, whether or not the parts divide the length of 10.

    No array of the compiled gradient is as large as all logits.
    """
    h = jax.random.normal(jax.random.key(0), (3, 10, 6))
    head = jax.random.normal(jax.random.key(1), (6, V + 2))
    tokens = jax.random.randint(jax.random.key(2), (3, 10), 0, V)

    def plain(h, head):
        return masking.token_nll(h @ head, tokens, SAMPLEABLE)

    def parts(h, head):
        return masking.token_nll_by_position(
            lambda h: h @ head, h, tokens, SAMPLEABLE, positions=positions
        )

    for ours, expected in zip(parts(h, head), plain(h, head), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5)
    gradient = lambda f: jax.grad(lambda h, head: jnp.sin(f(h, head)[0]).sum(), argnums=(0, 1))
    for ours, expected in zip(gradient(parts)(h, head), gradient(plain)(h, head), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)
    # Long rows of many logits, so that nothing else is as large.
    length, size = 60, 64
    h, head = jnp.ones((3, length, 2)), jnp.ones((2, size))
    tokens, allowed = jnp.zeros((3, length), jnp.int32), np.ones(size, bool)
    long = lambda h, head: masking.token_nll_by_position(
        lambda h: h @ head, h, tokens, allowed, positions=positions
    )
    text = jax.jit(gradient(long)).lower(h, head).compile().as_text()
    largest = max(
        math.prod(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", text)
    )
    assert (largest >= 3 * length * size) == (positions == 100)


def test_nll_gradient_is_zero_on_ids_that_are_not_text():
    """On text it is softmax - onehot; the -inf of the others gives no NaN."""
    logits = jnp.array([0.3, -1.0, 2.0, 7.0, 7.0])
    grad = jax.grad(lambda x: masking.token_nll(x, jnp.int32(1), SAMPLEABLE)[0])(logits)
    p = np.exp(logits[:3]) / np.exp(logits[:3]).sum()
    np.testing.assert_allclose(grad, [*(p - [0, 1, 0]), 0, 0], atol=1e-6)


# The process that samplers and losses read.


def test_a_reverse_step_unmasks_the_share_of_bayes_rule():
    """From t to s a masked token becomes x_0 with probability 1 - s/t (false alarm 1e-4).

    Tokens that are not masked stay, whatever x_0 is.
    """
    process = masking.AbsorbingProcess(MASK, np.asarray(SAMPLEABLE))
    x_t, x_0 = jnp.full(30_000, MASK).at[::3].set(1), jnp.full(30_000, 2)
    x_s = np.asarray(process.step(jax.random.key(0), x_t, x_0, jnp.float32(0.8), jnp.float32(0.2)))
    assert (x_s[::3] == 1).all() and set(x_s) == {1, 2, MASK}
    unmasked = (x_s == 2).sum()
    assert scipy.stats.binomtest(unmasked, 20_000, 0.75).pvalue > 1e-4


def test_an_absorbing_process_starts_from_masks_and_opens_them_only():
    """Its corruption and weight are those of the functions above."""
    process = masking.AbsorbingProcess(MASK, np.asarray(SAMPLEABLE))
    np.testing.assert_array_equal(process.initial((2, 3)), np.full((2, 3), MASK))
    x_t, t = jnp.array([[0, MASK, 2]]), jnp.array([0.5])
    np.testing.assert_array_equal(process.is_open(x_t), [[False, True, False]])
    key, tokens = jax.random.key(1), jnp.zeros((1, 50), jnp.int32)
    masked = masking.mask_tokens(key, tokens, t, MASK)
    np.testing.assert_array_equal(process.corrupt(key, tokens, t), masked)
    np.testing.assert_array_equal(process.bound_weight(t), [2.0])

"""Temperature, nucleus and categorical draws, compared with plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diladiff_jax.sampling.categorical import (
    nucleus_threshold,
    sample_categorical,
    text_logits,
    token_distribution,
)

N = 40_000
SAMPLEABLE = np.arange(5) < 3
distribution = jax.jit(token_distribution)


def sorted_nucleus(p, top_p):
    """The nucleus by sorting in float64, and how close a prefix's mass comes to `top_p`.

    It is the smallest set of the most likely tokens of mass >= top_p; ties with the last are kept.
    """
    order = np.argsort(-p, kind="stable")
    size = min(int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1, len(p))
    return p >= p[order[size - 1]], np.abs(np.cumsum(p[order]) - top_p).min()


def many_logits():
    """Logits of many kinds: peaky, flat, with ties, Zipf, with -inf, and one token alone."""
    rng = np.random.default_rng(0)
    peaky, flat = rng.normal(size=(40, 50)) * 6, rng.normal(size=(40, 50)) * 0.01
    ties = rng.integers(0, 4, size=(40, 50)).astype(float)
    zipf = rng.permuted(np.tile(-np.log(np.arange(1, 51)), (40, 1)), axis=1)
    holes = np.where(rng.random((40, 50)) < 0.5, -np.inf, rng.normal(size=(40, 50)))
    holes[:, 0] = 0.0
    alone = np.full((1, 50), -np.inf)
    alone[0, 17] = 3.0
    return np.concatenate([peaky, flat, ties, zipf, holes, alone]).astype(np.float32)


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_nucleus_equals_that_of_a_sort(top_p, temperature):
    """Wherever no prefix's mass is within 1e-5 of top_p; the kept values are the softmax's."""
    logits = many_logits()
    p = np.asarray(distribution(logits, temperature, top_p))
    compared = 0
    for row, ours in zip(logits.astype(np.float64), p, strict=True):
        softmax = np.exp((row - row.max()) / temperature)
        softmax /= softmax.sum()
        # Tokens tied in float32 logits stay tied after the exponential.
        kept, margin = sorted_nucleus(softmax.astype(np.float32).astype(np.float64), top_p)
        if margin > 1e-5:
            compared += 1
            np.testing.assert_array_equal(ours > 0, kept & (softmax > 0))
            np.testing.assert_allclose(ours[kept], softmax[kept], rtol=1e-4)
    assert compared > 0.8 * len(logits)


def test_extreme_nucleus_and_temperature_keep_all_tokens_or_the_most_likely_ones():
    """top_p 1 keeps every finite logit; top_p 0 and temperature 0 keep the most likely tokens."""
    logits = many_logits()
    best = logits == logits.max(axis=1, keepdims=True)
    np.testing.assert_array_equal(distribution(logits, 1.0, 1.0) > 0, np.isfinite(logits))
    np.testing.assert_array_equal(distribution(logits, 1.0, 0.0) > 0, best)
    for top_p in (0.0, 0.5, 1.0):
        np.testing.assert_array_equal((distribution(logits, 0.0, top_p) > 0), best)
    for temperature in (1e-30, 1e-3, 1e3):
        p = distribution(logits, temperature, 0.9)
        assert np.isfinite(p).all() and (np.asarray(p).sum(axis=1) > 0).all()


def test_nucleus_threshold_is_exact_to_the_token():
    """With powers of two as probabilities all sums are exact: at and just above every boundary."""
    p = jnp.array([2.0**-i for i in range(1, 12)] + [2.0**-11])
    for i in range(1, 11):
        boundary = 1 - 2.0**-i
        above = float(np.nextafter(np.float32(boundary), np.float32(1)))
        for top_p, size in ((boundary, i), (above, i + 1)):
            assert float(nucleus_threshold(p, top_p)[0]) == 2.0**-size


def test_logits_without_any_text_become_uniform_over_text(chi_square):
    """Rows of -inf or NaN alone (chi-square, false alarm 1e-4); other rows are only restricted."""
    rows = jnp.array([[-jnp.inf] * 5, [jnp.nan] * 5, [0.3, -jnp.inf, 1.0, 8.0, 9.0]])
    logits = text_logits(rows, SAMPLEABLE)
    for row in logits[:2]:
        p = jnp.broadcast_to(jax.nn.softmax(row), (3000, 5))
        drawn = sample_categorical(p, jax.random.uniform(jax.random.key(1), (3000,)))
        assert chi_square(np.bincount(drawn, minlength=5)[:3], np.ones(3)) > 1e-4
    np.testing.assert_array_equal(logits[2], jnp.array([0.3, -jnp.inf, 1.0, -jnp.inf, -jnp.inf]))


def test_draws_follow_the_unnormalized_probabilities(chi_square):
    """40,000 draws from [3, 0, 1, 0, 4, 2, 0] (chi-square, false alarm 1e-4)."""
    p = jnp.array([3.0, 0, 1, 0, 4, 2, 0])
    uniform = jax.random.uniform(jax.random.key(0), (N,))
    x = jax.jit(sample_categorical)(jnp.broadcast_to(p, (N, 7)), uniform)
    assert x.dtype == jnp.int32
    assert chi_square(np.bincount(x, minlength=7), p) > 1e-4


def test_each_index_is_drawn_on_an_interval_as_long_as_its_probability():
    """Uniform 0 gives the first positive index, and just below 1 the last one."""
    p = jnp.array([[0.0, 0.25, 0, 0.5, 0.25, 0]])
    at = lambda u: int(sample_categorical(p, jnp.full((1,), u, jnp.float32))[0])
    assert [at(u) for u in (0.0, 0.2499, 0.25, 0.7499, 0.75)] == [1, 1, 3, 3, 4]
    assert at(np.nextafter(np.float32(1), np.float32(0))) == 4


def test_rounding_never_draws_an_index_of_probability_zero():
    """At uniforms equal to the partial sums, which a parallel sum may change even where p = 0."""
    size = 4096
    p = jax.random.gamma(jax.random.key(0), 0.3, (size,))
    p = jnp.where(jax.random.bernoulli(jax.random.key(1), 0.5, (size,)), p / p.sum(), 0.0)
    level = jnp.cumsum(p) / jnp.cumsum(p)[-1]
    u = jnp.clip(jnp.concatenate([level, jnp.nextafter(level, 0.0)]), 0, 1 - 2.0**-24)[:, None]
    draw = jax.jit(jax.lax.map, static_argnums=0)
    drawn = draw(lambda u: sample_categorical(p[None, :], u), u)
    assert (p[drawn] > 0).all()


def test_rare_tokens_keep_their_share():
    """Zipf over 2,048 ids: the mean of log p over 8,000 draws is minus the entropy.

    z < 4.5, false alarm 7e-6.
    """
    p = 1 / np.arange(1, 2049)
    p /= p.sum()
    rows = jnp.broadcast_to(jnp.asarray(p, jnp.float32), (320, 2048))

    def draw(key):
        return sample_categorical(rows, jax.random.uniform(key, (320,)))

    keys = jax.random.split(jax.random.key(0), 25)
    logs = np.log(p)[np.asarray(jax.jit(lambda keys: jax.lax.map(draw, keys))(keys))].ravel()
    entropy = -(p * np.log(p)).sum()
    error = np.sqrt((p * np.log(p) ** 2).sum() - entropy**2) / np.sqrt(logs.size)
    assert abs(logs.mean() + entropy) < 4.5 * error

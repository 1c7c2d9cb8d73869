"""Sampling with a cache is sampling without one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from diladiff_jax.diffusion.masking import AbsorbingProcess
from diladiff_jax.nn.transformer import TokenDenoiser
from diladiff_jax.objectives.autoregressive import next_token_nll
from diladiff_jax.sampling import AutoregressiveSampler

LENGTH, VOCAB, MASK, START = 8, 12, 10, 0
SAMPLEABLE = np.arange(VOCAB) < MASK
PROCESS = AbsorbingProcess(MASK, SAMPLEABLE)
BLANK = jnp.full((4, LENGTH), MASK)
KEYS = jax.random.split(jax.random.key(0), 4)


@pytest.fixture(scope="module", params=["learned", "rotary"])
def build(request, random_parameters):
    """Builds samplers of one network with two layers; returns them with its parameters.

    A sampler is compiled once for all tests: they give it four samples and every argument.
    """
    network = TokenDenoiser(VOCAB, LENGTH, 16, 2, 2, causal=True, positions=request.param)
    params = random_parameters(network, BLANK)

    @functools.cache
    def build(segments=3, dtype=jnp.float32):
        sampler = jax.jit(
            AutoregressiveSampler(network.clone(dtype=dtype), PROCESS, START, segments)
        )

        def sample(keys, prompt, temperature=1.0, top_p=1.0):
            return sampler(params, keys, prompt, temperature, top_p)

        return sample, params

    return build


def uncached_logits(params, tokens, **network):
    """Logits of text `[B, L, V]` from one call at all positions."""
    shifted = jnp.concatenate([jnp.full_like(tokens[:, :1], START), tokens[:, :-1]], axis=1)
    module = TokenDenoiser(VOCAB, LENGTH, 16, 2, 2, causal=True, **network)
    return jnp.where(SAMPLEABLE, module.apply({"params": params}, shifted), -jnp.inf)


def network_of(params):
    return dict(positions="learned" if "position" in params else "rotary")


def test_log_probabilities_are_those_of_the_network_without_a_cache(build):
    """They are also minus the loss that the stage `scorer` is trained with."""
    sample, params = build()
    tokens, log_probs = sample(KEYS, BLANK, 1.3, 0.9)
    assert SAMPLEABLE[tokens].all() and len(np.unique(tokens)) > 3
    log_p = jax.nn.log_softmax(uncached_logits(params, tokens, **network_of(params)))
    expected = np.take_along_axis(np.asarray(log_p), np.asarray(tokens)[..., None], -1)[..., 0]
    np.testing.assert_allclose(log_probs, expected, rtol=1e-4, atol=1e-4)
    network = TokenDenoiser(VOCAB, LENGTH, 16, 2, 2, causal=True, **network_of(params))
    nll = next_token_nll(network, params, tokens, START, jnp.asarray(SAMPLEABLE))
    np.testing.assert_allclose(log_probs, -nll, rtol=1e-4, atol=1e-4)


def test_temperature_zero_is_greedy_decoding_without_a_cache(build):
    sample, params = build()
    logits_of = jax.jit(functools.partial(uncached_logits, params, **network_of(params)))
    tokens = np.full((1, LENGTH), START)
    for position in range(LENGTH):
        tokens[:, position] = np.argmax(logits_of(jnp.asarray(tokens))[:, position], axis=-1)
    np.testing.assert_array_equal(sample(KEYS, BLANK, 0.0).tokens, np.repeat(tokens, 4, axis=0))


def test_given_tokens_are_kept_and_seen(build):
    """The log-probabilities after a prefix are those given the prefix."""
    sample, params = build()
    prompt = BLANK.at[:, :3].set(jnp.arange(12).reshape(4, 3) % MASK)
    tokens, log_probs = sample(KEYS, prompt)
    np.testing.assert_array_equal(tokens[:, :3], prompt[:, :3])
    assert (np.asarray(tokens) != np.asarray(sample(KEYS, BLANK).tokens))[:, 3:].any()
    log_p = jax.nn.log_softmax(uncached_logits(params, tokens, **network_of(params)))
    expected = np.take_along_axis(np.asarray(log_p), np.asarray(tokens)[..., None], -1)[..., 0]
    np.testing.assert_allclose(log_probs, expected, rtol=1e-4, atol=1e-4)


def test_a_sample_depends_on_its_own_key_alone(build):
    sample, _ = build()
    others = jax.random.split(jax.random.key(5), 4).at[0].set(KEYS[2])
    every, moved = sample(KEYS, BLANK).tokens, sample(others, BLANK).tokens
    np.testing.assert_array_equal(every[2], moved[0])
    assert (np.asarray(every) != np.asarray(moved)).any()


def test_pairs_of_tokens_have_the_enumerated_probabilities(random_parameters, chi_square):
    """Also after temperature and nucleus: 8,192 texts of two tokens against the product of the
    network's conditionals (p > 1e-4)."""
    network = TokenDenoiser(6, 2, 16, 1, 2, causal=True)
    params = random_parameters(network, jnp.zeros((1, 2), jnp.int32))
    process = AbsorbingProcess(4, np.arange(6) < 4)
    sampler = jax.jit(AutoregressiveSampler(network, process, START, segments=1))
    keys, blank = jax.random.split(jax.random.key(1), 8192), jnp.full((8192, 2), 4)
    # The first token and its successor, for each first token.
    shifted = jnp.stack([jnp.full((4,), START), jnp.arange(4)], axis=1)
    logits = np.asarray(network.apply({"params": params}, shifted), np.float64)[..., :4]

    for temperature, top_p in ((1.0, 1.0), (0.7, 0.6)):
        p = scipy.special.softmax(logits / temperature, axis=-1)
        order = np.argsort(-p, axis=-1)
        ordered = np.take_along_axis(p, order, axis=-1)
        before = np.cumsum(ordered, axis=-1) - ordered
        np.put_along_axis(p, order, np.where(before < top_p, ordered, 0), axis=-1)
        p /= p.sum(axis=-1, keepdims=True)
        joint = p[0, 0][:, None] * p[:, 1]  # p(a) p(b | a)
        tokens = np.asarray(sampler(params, keys, blank, temperature, top_p).tokens)
        counts = np.bincount(tokens @ [4, 1], minlength=16)
        assert chi_square(counts, joint) > 1e-4


@pytest.mark.slow
def test_bfloat16_samples_have_the_bfloat16_networks_log_probabilities(build):
    """Within the rounding of bfloat16: the cache is kept in that type."""
    sample, params = build(dtype=jnp.bfloat16)
    tokens, log_probs = sample(KEYS, BLANK)
    network = network_of(params) | dict(dtype=jnp.bfloat16)
    log_p = jax.nn.log_softmax(uncached_logits(params, tokens, **network))
    expected = np.take_along_axis(np.asarray(log_p), np.asarray(tokens)[..., None], -1)[..., 0]
    np.testing.assert_allclose(log_probs, expected, atol=0.1)


def test_a_network_that_sees_later_tokens_is_rejected():
    network = TokenDenoiser(VOCAB, LENGTH, 16, 2, 2)
    with pytest.raises(ValueError, match="causal"):
        AutoregressiveSampler(network, PROCESS, START)

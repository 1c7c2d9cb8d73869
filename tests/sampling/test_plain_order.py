"""The step-by-step reverse process: the law of `ancestral`, and processes other than masking."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_language import MASK, NETWORK, PROCESS, SAMPLEABLE, law, prompts, sentence_counts

from diladiff_jax.objectives.mdlm import masked_loss
from diladiff_jax.sampling.orders import TokenControls, TokenNetwork, plain

N = 40_000


@functools.cache
def compiled(process, network):
    return jax.jit(
        lambda keys, x, steps: plain(network, process, keys, x, TokenControls(steps, 1.0, 1.0))
    )


def keys_of(seed):
    return jax.random.split(jax.random.key(seed), N)


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_masked_samples_follow_the_law_of_ancestral_sampling(steps, chi_square):
    """40,000 samples (chi-square, false alarm 1e-4); the laws of 1 and 8 steps are rejected."""
    x, when = compiled(PROCESS, NETWORK)(keys_of(steps), prompts(N), steps)
    assert SAMPLEABLE[x].all() and (when >= 0).all()
    assert chi_square(sentence_counts(x), law(steps)) > 1e-4
    assert chi_square(sentence_counts(x), law(1 if steps > 1 else 8)) < 1e-6


def test_positions_unmask_uniformly_and_independently(chi_square):
    """As with `ancestral`: uniform on {0..3}^3 (chi-square, false alarm 1e-4)."""
    _, when = compiled(PROCESS, NETWORK)(keys_of(6), prompts(N), 4)
    seen = np.bincount(np.asarray(when) @ [16, 4, 1], minlength=64)
    assert chi_square(seen, np.ones(64)) > 1e-4


def test_a_prompt_is_kept_and_the_rest_follows_its_law(chi_square):
    """Given the middle token, the others follow the conditional law (false alarm 1e-4)."""
    prompt = (MASK, 1, MASK)
    x, when = compiled(PROCESS, NETWORK)(keys_of(5), prompts(N, prompt), 3)
    assert (x[:, 1] == 1).all() and (when[:, 1] == -1).all()
    assert chi_square(sentence_counts(x), law(3, prompt)) > 1e-4


# Uniform noise, a process that the library does not know.


@dataclasses.dataclass(frozen=True)
class UniformProcess:
    """At time t each token is replaced by a uniformly random one with probability t."""

    vocab_size: int

    @property
    def sampleable(self):
        return np.ones(self.vocab_size, bool)

    def corrupt(self, key, tokens, t):
        coin_key, token_key = jax.random.split(key)
        random = jax.random.randint(token_key, tokens.shape, 0, self.vocab_size)
        return jnp.where(jax.random.uniform(coin_key, tokens.shape) < t[:, None], random, tokens)

    def initial(self, shape):
        return np.random.default_rng(0).integers(self.vocab_size, size=shape).astype(np.int32)

    def is_open(self, x_t):
        return jnp.ones_like(x_t, bool)

    def step(self, key, x_t, x_0, t, s):
        p = self.posterior(x_t, x_0, t, s)
        return jax.random.categorical(key, jnp.log(p), axis=-1).astype(x_t.dtype)

    def bound_weight(self, t):
        return jnp.ones_like(t)

    def posterior(self, x_t, x_0, t, s):
        """q(x_s | x_t, x_0), in proportion to q(x_t | x_s) q(x_s | x_0), `[..., V]`."""
        size, kept = self.vocab_size, (1 - t) / (1 - s)  # a token survives from s to t
        now, clean = jax.nn.one_hot(x_t, size), jax.nn.one_hot(x_0, size)
        joint = (kept * now + (1 - kept) / size) * ((1 - s) * clean + s / size)
        return joint / joint.sum(axis=-1, keepdims=True)


UNIFORM = UniformProcess(2)
PAIRS = np.array(list(itertools.product(range(2), repeat=2)))
PAIR_JOINT = np.array([0.45, 0.05, 0.15, 0.35])


def clean_given_noisy(t):
    """p(x_0^l = v | x_t) of the language of two tokens, `[4, L, V]` over x_t in `PAIRS`."""
    kept = PAIRS[:, None, :] == PAIRS[None, :, :]  # [x_t, x_0, L]
    posterior = PAIR_JOINT * ((1 - t) * kept + t / 2).prod(axis=-1)
    posterior /= posterior.sum(axis=1, keepdims=True)
    return np.einsum("ij,jlv->ilv", posterior, np.eye(2)[PAIRS])


@functools.cache
def uniform_law(steps):
    """Probability of each pair after `steps` reverse steps from uniform noise, enumerated."""
    p = np.full(4, 0.25)
    for k in range(steps):
        t, s = 1 - k / steps, 1 - (k + 1) / steps
        # [x_t, L, x_0, x_s] for each position, then its mean over x_0.
        q = UNIFORM.posterior(PAIRS[:, :, None], np.arange(2)[None, None, :], t, s)
        each = np.einsum("ilv,ilvw->ilw", clean_given_noisy(t), np.asarray(q, np.float64))
        p = p @ (each[:, 0, PAIRS[:, 0]] * each[:, 1, PAIRS[:, 1]])
    return p


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_uniform_noise_follows_its_enumerated_law(steps, chi_square):
    """40,000 samples of a denoiser that knows t (chi-square, false alarm 1e-4).

    The law of one step, the product of the marginals, is rejected for more steps.
    """
    table = np.stack([clean_given_noisy(1 - k / steps) for k in range(steps)])
    logits = jnp.log(jnp.asarray(table, jnp.float32))  # [steps, x_t, L, V]
    network = TokenNetwork(
        lambda x, k: logits[k, 2 * x[:, 0] + x[:, 1]],
        lambda context, positions: jnp.take_along_axis(context, positions[:, :, None], axis=1),
    )
    noise = jax.random.randint(jax.random.key(100 + steps), (N, 2), 0, 2)
    x, _ = compiled(UNIFORM, network)(keys_of(steps), noise, steps)
    counts = np.bincount(np.asarray(x) @ [2, 1], minlength=4)
    assert chi_square(counts, uniform_law(steps)) > 1e-4
    if steps > 1:
        assert chi_square(counts, uniform_law(1)) < 1e-6


def test_many_steps_from_uniform_noise_lead_to_the_joint():
    """The enumeration itself: one step gives the product of marginals, many come near the joint."""
    marginals = PAIR_JOINT.reshape(2, 2).sum(axis=1), PAIR_JOINT.reshape(2, 2).sum(axis=0)
    np.testing.assert_allclose(uniform_law(1), np.outer(*marginals).ravel(), rtol=1e-5)
    distance = [0.5 * np.abs(uniform_law(steps) - PAIR_JOINT).sum() for steps in (1, 5, 40)]
    assert distance[0] > 2 * distance[1] > 4 * distance[2] and distance[2] < 0.02


def test_the_loss_counts_every_position_that_a_process_leaves_open():
    """Under uniform noise no token is known to be clean, so the loss is the mean of all."""
    nll, right = jnp.arange(6.0).reshape(2, 3), jnp.array([[1.0, 0, 0], [1, 1, 0]])
    x_t, t = jnp.zeros((2, 3), jnp.int32), jnp.array([0.2, 0.7])
    loss, metrics = masked_loss(nll, right, x_t, t, UNIFORM, "one")
    np.testing.assert_allclose([loss, metrics["bound"]], nll.mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["recovery"], right.mean(), rtol=1e-6)

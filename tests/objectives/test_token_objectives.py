"""Masked cross-entropy, its bound, and the autoregressive scorer."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diladiff_jax.diffusion import masking
from diladiff_jax.nn.transformer import TokenDenoiser
from diladiff_jax.objectives.autoregressive import Autoregressive, next_token_nll
from diladiff_jax.objectives.base import Context
from diladiff_jax.objectives.mdlm import MDLM, MDLMOptions, masked_loss

MASK = 10


@pytest.fixture(scope="module")
def process(sampleable):
    return masking.AbsorbingProcess(MASK, sampleable)


def test_masked_loss_equals_numpy(process):
    """The sum over masked tokens of -log p, over B L; the bound weights example i by 1 / t_i."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 5, 12)).astype(np.float32) * 2
    logits[..., 10:] += 20  # the ids that are not text have the largest logits
    tokens, t = rng.integers(0, 10, size=(3, 5)), np.array([0.3, 0.6, 1.0], np.float32)
    x_t = np.where(rng.random((3, 5)) < t[:, None], MASK, tokens)
    plain = bound = right = 0.0
    for b, l in itertools.product(range(3), range(5)):
        if x_t[b, l] == MASK:
            row = logits[b, l, :10].astype(np.float64)
            nll = np.log(np.exp(row).sum()) - row[tokens[b, l]]
            plain, bound, right = (
                plain + nll / 15,
                bound + nll / t[b] / 15,
                right + (row.argmax() == tokens[b, l]),
            )
    for weighting, expected in (("one", plain), ("bound", bound)):
        found = masking.token_nll(
            jnp.asarray(logits), jnp.asarray(tokens), jnp.asarray(process.sampleable)
        )
        loss, metrics = masked_loss(*found, jnp.asarray(x_t), t, process, weighting)
        np.testing.assert_allclose([loss, metrics["bound"]], [expected, bound], rtol=1e-5)
        np.testing.assert_allclose(metrics["recovery"], right / (x_t == MASK).sum(), rtol=1e-6)


def test_only_text_logits_of_masked_positions_have_a_gradient(process):
    """Unmasked positions and ids that are not text have none."""
    logits = jax.random.normal(jax.random.key(0), (2, 5, 12))
    x_t = jnp.array([[MASK, 1, MASK, 3, 4], [0, 1, 2, 3, MASK]])
    nll_of = lambda logits: masking.token_nll(
        logits, jnp.zeros((2, 5), jnp.int32), jnp.asarray(process.sampleable)
    )
    t = jnp.array([0.5, 0.2])
    loss = lambda logits: masked_loss(*nll_of(logits), x_t, t, process, "bound")[0]
    grad = np.asarray(jax.grad(loss)(logits))
    assert (grad[np.asarray(x_t) != MASK] == 0).all() and (grad[..., 10:] == 0).all()
    assert (np.abs(grad[np.asarray(x_t) == MASK][:, :10]) > 0).all()


def test_bound_metric_estimates_the_exact_nll(process):
    """With exact conditionals, 100,000 samples of the bound have mean -log p(x).

    z < 4.5, false alarm 7e-6.
    """
    length, n = 3, 100_000
    sentences = np.array(list(itertools.product(range(2), repeat=length)))
    joint = np.random.default_rng(3).dirichlet(np.full(8, 0.7))
    table = np.full((27, length, 12), -30.0)  # contexts in base 3, 2 the mask
    for i, context in enumerate(itertools.product(range(3), repeat=length)):
        agree = ((sentences == context) | (np.array(context) == 2)).all(axis=1) * joint
        for l, v in itertools.product(range(length), range(2)):
            table[i, l, v] = np.log(max(agree[sentences[:, l] == v].sum() / agree.sum(), 1e-12))
    table = jnp.asarray(table, jnp.float32)

    @jax.jit
    def draws(key, x):
        keys = jax.random.split(key)
        t = masking.stratified_times(keys[0], n)
        tokens = jnp.broadcast_to(x, (n, length))
        x_t = masking.mask_tokens(keys[1], tokens, t, MASK)
        logits = table[jnp.sum(jnp.where(x_t == MASK, 2, x_t) * jnp.array([[9, 3, 1]]), axis=1)]
        each = jax.vmap(lambda *a: masked_loss(*(v[None] for v in a), process, "bound")[0])
        nll, right = masking.token_nll(logits, tokens, jnp.asarray(process.sampleable))
        return length * each(nll, right, x_t, t)

    for i in (0, 5):
        bound = np.asarray(draws(jax.random.key(i), jnp.asarray(sentences[i])), np.float64)
        assert abs(bound.mean() + np.log(joint[i])) < 4.5 * bound.std() / np.sqrt(n)


def test_the_weighting_decides_which_loss_is_trained(networks, process, mdlm, tokens):
    """ "one" and "bound" differ, and with "bound" the loss is the metric of that name."""
    objective, params = mdlm
    bounded = MDLM(networks.denoiser, process, MDLMOptions(weighting="bound"))
    run = lambda objective: jax.jit(objective.loss)(params, Context(), tokens, jax.random.key(1), 0)
    (loss, (metrics, _)), (other, (same, _)) = run(bounded), run(objective)
    np.testing.assert_allclose([loss, metrics["bound"]], same["bound"], rtol=1e-6)
    assert abs(loss - other) > 0.1


@pytest.fixture(scope="module")
def mdlm(networks, process):
    objective = MDLM(networks.denoiser, process)
    return objective, nn.unbox(jax.jit(objective.init)(jax.random.key(0)))


def test_mdlm_loss_of_a_uniform_model_is_its_closed_form(mdlm, tokens):
    """With a zero head every masked token has loss log 10."""
    objective, params = mdlm
    flat = params | {"head": jax.tree.map(jnp.zeros_like, params["head"])}
    many = jnp.tile(tokens, (64, 1))
    loss, (metrics, statistics) = jax.jit(objective.loss)(
        flat, Context(), many, jax.random.key(1), 0
    )
    shares = loss / np.log(10)
    # Half of the tokens are masked; false alarm below 7e-6.
    assert abs(shares - 0.5) < 4.5 * 0.5 / np.sqrt(many.size)
    assert statistics == {}
    # E (masked share / t) = 1, with variance E (1 - t) / (t L) where t >= 1 / B: below log(B) / L.
    assert abs(metrics["bound"] / np.log(10) - 1) < 4.5 * np.sqrt(np.log(1024) / many.size)


def test_an_impossible_token_that_is_not_masked_costs_nothing(process):
    """A mask in the clean text has probability zero; unmasked it has no loss and no gradient."""
    tokens = jnp.array([[1, 10, 2, 3]])  # 10 is not text
    x_t, t = jnp.array([[10, 7, 10, 3]]), jnp.array([0.5])
    loss = lambda logits: masked_loss(
        *masking.token_nll(logits, tokens, jnp.asarray(process.sampleable)), x_t, t, process, "one"
    )[0]
    value, gradient = jax.value_and_grad(loss)(jnp.zeros((1, 4, 12)))
    assert float(value) == pytest.approx(2 * np.log(10) / 4, rel=1e-6)
    assert np.isfinite(gradient).all() and (gradient[0, 1] == 0).all()


def test_mdlm_learns_and_depends_on_its_key_alone(mdlm, tokens):
    """The same key gives the same loss, another key another; a gradient step lowers it."""
    objective, params = mdlm
    loss = jax.jit(lambda p, key: objective.loss(p, Context(), tokens, key, 0)[0])
    first = loss(params, jax.random.key(2))
    assert first == loss(params, jax.random.key(2)) != loss(params, jax.random.key(3))
    grads = jax.jit(jax.grad(loss))(params, jax.random.key(2))
    assert loss(jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads), jax.random.key(2)) < first


def test_the_scorers_loss_is_the_chain_rule(sampleable, tokens):
    """nll[l] is -log p(x^l | eot, x^{<l}): a changed token changes only itself and what follows.

    The loss is the mean of nll.
    """
    network = TokenDenoiser(12, 8, 16, 1, 2, causal=True)
    objective = Autoregressive(network, 9, sampleable)
    params = nn.unbox(jax.jit(objective.init)(jax.random.key(0)))
    run = jax.jit(lambda x: next_token_nll(network, params, x, 9, jnp.asarray(sampleable)))
    nll = run(tokens)
    moved = np.abs(run(tokens.at[:, 4].set((tokens[:, 4] + 1) % 10)) - nll).max(axis=0)
    assert (moved[:4] == 0).all() and (moved[4:] > 0).all()
    start = jnp.full((1, 8), 9)
    logits = network.apply({"params": params}, start)[0, 0, :10]
    np.testing.assert_allclose(
        nll[:, 0], -jax.nn.log_softmax(logits)[tokens[:, 0]], rtol=1e-4, atol=1e-5
    )
    loss, (metrics, _) = objective.loss(params, Context(), tokens, jax.random.key(1), 0)
    np.testing.assert_allclose([loss, np.log(metrics["perplexity"])], nll.mean(), rtol=1e-5)

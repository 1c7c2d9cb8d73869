"""The autoencoder's augmentations, initialization, learning order and statistics."""

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from diladiff_jax.diffusion import masking
from diladiff_jax.diffusion.masking import AbsorbingProcess
from diladiff_jax.objectives.autoencoder import (
    Autoencoder,
    AutoencoderOptions,
    add_noise,
    augment_features,
    drop_elements,
)
from diladiff_jax.objectives.base import Context
from diladiff_jax.objectives.encoding import DenoiserFeatures
from diladiff_jax.objectives.mdlm import masked_loss
from diladiff_jax.objectives.statistics import Moments

N, KEY = 20_000, jax.random.key(5)
WITHIN = lambda share, n=N: 4.5 * np.sqrt(share * (1 - share) / n)  # false alarm 7e-6


def test_feature_augmentation_shares():
    """Half of the examples lose p_feat of their elements, without rescaling.

    The others become sqrt(1 - s^2) f + s eps, of the same variance (4.5 sigma, 7e-6 each).
    """
    f = 1 + jax.random.normal(jax.random.key(0), (N, 4, 5))
    out = np.asarray(
        jax.jit(lambda f: augment_features(jax.random.key(1), f, p_feat=0.3, noise=0.5))(f)
    )
    f = np.asarray(f)
    kept = (out == f) | (out == 0)
    zeroed = kept.all(axis=(1, 2))
    assert abs(zeroed.mean() - 0.5) < WITHIN(0.5)
    assert not kept[~zeroed].any()
    assert abs((out[zeroed] == 0).mean() - 0.3) < WITHIN(0.3, zeroed.sum() * 20)
    eps = (out[~zeroed] - np.sqrt(0.75) * f[~zeroed]) / 0.5
    assert abs(eps.mean()) < 4.5 / np.sqrt(eps.size) and abs(eps.var() - 1) < 4.5 * np.sqrt(
        2 / eps.size
    )
    assert abs(out[~zeroed].var() - 1) < 4.5 * np.sqrt(2 / eps.size)


def test_latent_augmentation_shares():
    """At p_drop = 0.75, noise replaces 37.5% of the latents and 12.5% stay as they are.

    The other 50% lose p_lat of their elements (4.5 sigma, 7e-6 each).
    """
    z = 2 + jax.random.normal(jax.random.key(0), (N, 4, 5))
    out = np.asarray(
        jax.jit(lambda z: drop_elements(jax.random.key(1), z, AutoencoderOptions()))(z)
    )
    same, zero = out == np.asarray(z), out == 0
    replaced = (~same & ~zero).all(axis=(1, 2))
    untouched = same.all(axis=(1, 2))
    thinned = (same | zero).all(axis=(1, 2)) & ~untouched
    assert (replaced | untouched | thinned).all()
    for group, share in ((replaced, 0.375), (untouched, 0.125), (thinned, 0.5)):
        assert abs(group.mean() - share) < WITHIN(share)
    assert abs(zero[thinned].mean() - 0.7) < WITHIN(0.7, thinned.sum() * 20)
    noise = out[replaced]
    assert abs(noise.mean()) < 4.5 / np.sqrt(noise.size) and abs(noise.var() - 1) < 4.5 * np.sqrt(
        2 / noise.size
    )


def test_no_augmentation_is_the_identity():
    """All shares and noise at zero leave features and latents as they are."""
    x = jax.random.normal(jax.random.key(0), (6, 4, 5))
    np.testing.assert_array_equal(augment_features(jax.random.key(1), x, p_feat=0.0, noise=0.0), x)
    options = AutoencoderOptions(p_lat=0.0, p_drop=0.0, latent_noise_high=0.0)
    np.testing.assert_array_equal(drop_elements(jax.random.key(1), x, options), x)
    np.testing.assert_array_equal(add_noise(jax.random.key(1), x, options), x)


def test_latent_noise_has_a_level_of_its_own_in_each_example():
    """s is uniform on [0.3, 0.9] with probability p_latent_noise, else 0; p_drop of all have s = 1.

    The level is recovered from latents of 400 equal elements: their mean is sqrt(1 - s^2) c.
    Shares to 4.5 sigma; KS of the levels, false alarm 1e-5.
    """
    options = AutoencoderOptions(
        p_drop=0.2, p_latent_noise=0.6, latent_noise_low=0.3, latent_noise_high=0.9
    )
    z = jnp.full((4_000, 20, 20), 100.0)
    out = np.asarray(jax.jit(lambda z: add_noise(jax.random.key(1), z, options))(z))
    s = np.sqrt(np.clip(1 - (out.mean(axis=(1, 2)) / 100) ** 2, 0, 1))
    replaced, untouched = s > 0.95, (out == 100.0).all(axis=(1, 2))
    assert abs(replaced.mean() - 0.2) < WITHIN(0.2, 4_000)
    assert abs(untouched.mean() - 0.8 * 0.4) < WITHIN(0.32, 4_000)
    noised = s[~replaced & ~untouched]
    assert scipy.stats.kstest(noised, "uniform", (0.3, 0.6)).pvalue > 1e-5
    np.testing.assert_allclose(out.var(axis=(1, 2)), s**2, rtol=0.4)


def test_a_suffix_of_the_latents_is_replaced_by_noise():
    """In p_suffix of the examples, latents from a uniform place on; the first one never is."""
    options = AutoencoderOptions(p_drop=0.0, latent_noise_high=0.0, p_suffix=0.5)
    z = jnp.full((N, 4, 5), 100.0)
    out = np.asarray(jax.jit(lambda z: add_noise(jax.random.key(1), z, options))(z))
    kept = (out == 100.0).all(axis=2)
    assert (kept[:, 0]).all() and (kept[:, :-1] >= kept[:, 1:]).all()
    for length in (1, 2, 3):
        assert abs((kept.sum(axis=1) == length).mean() - 1 / 6) < WITHIN(1 / 6)


@pytest.fixture(scope="module")
def autoencoder(networks, sampleable, context):
    """The objective, parameters that start from the denoiser's, its context and jitted loss."""
    objective = Autoencoder(
        DenoiserFeatures(networks.denoiser),
        networks.encoder,
        networks.decoder,
        AbsorbingProcess(10, sampleable),
    )
    params = nn.unbox(jax.jit(objective.init)(jax.random.key(0)))
    params["decoder"]["backbone"] = context.frozen["features"]
    start = Context(
        frozen={"features": context.frozen["features"]}, statistics=objective.init_statistics()
    )
    return objective, params, start, jax.jit(objective.loss, static_argnames="train")


@pytest.fixture(scope="module")
def gradient(autoencoder, tokens):
    """(parameters, context, key) -> ((loss, (metrics, statistics)), gradient), compiled once."""
    objective = autoencoder[0]
    return jax.jit(
        jax.value_and_grad(
            lambda p, context, key: objective.loss(p, context, tokens, key, 0), has_aux=True
        )
    )


def test_features_are_the_denoisers_states_and_embeddings(autoencoder, networks, tokens):
    """Final states and embeddings of clean text, without a gradient into the denoiser."""
    objective, _, start, _ = autoencoder
    f = objective.features(start.frozen["features"], tokens)
    expected = networks.denoiser.apply(
        {"params": start.frozen["features"]}, tokens, method="hidden"
    )
    np.testing.assert_allclose(f[..., :16], expected, rtol=1e-4, atol=1e-5)
    assert f.shape[-1] == objective.features.dim == 32
    grads = jax.grad(lambda p: objective.features(p, tokens).sum())(start.frozen["features"])
    assert all((g == 0).all() for g in jax.tree.leaves(grads))


def test_at_initialization_the_loss_is_the_mdlms(autoencoder, networks, sampleable, tokens):
    """The initial decoder ignores the latent: with the same masks, the denoiser's loss is equal."""
    objective, params, start, loss = autoencoder
    key = jax.random.key(1)
    time_key, key_of_part = jax.random.split(key)
    keys = jax.random.split(jax.random.fold_in(key_of_part, 0), 5)
    t = masking.stratified_times(time_key, 16)
    x_t = masking.mask_tokens(keys[3], tokens, t, 10)
    logits = networks.denoiser.apply({"params": start.frozen["features"]}, x_t)
    nll, right = masking.token_nll(logits, tokens, jnp.asarray(sampleable))
    expected, _ = masked_loss(nll, right, x_t, t, objective.process, "one")
    np.testing.assert_allclose(loss(params, start, tokens, key, 0)[0], expected, rtol=1e-5)


def test_statistics_change_in_training_and_not_in_validation(autoencoder, networks, tokens):
    """A training loss merges the batch's moments; with train=False nothing changes."""
    objective, params, start, loss = autoencoder
    _, (_, after) = loss(params, start, tokens, jax.random.key(1), 0)
    f = np.asarray(objective.features(start.frozen["features"], tokens)).reshape(-1, 32)
    assert after["features"].weight == 128 and after["latents"].weight == 16
    np.testing.assert_allclose(after["features"].mean, f.mean(axis=0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(after["features"].variance, f.var(axis=0), rtol=1e-3)
    assert after["latents"].mean.shape == (4, 6)
    _, (metrics, unchanged) = loss(
        params, start.replace(statistics=after), tokens, jax.random.key(2), 0, train=False
    )
    jax.tree.map(np.testing.assert_array_equal, unchanged, after)
    assert 0 <= metrics["one_step_recovery"] <= 1


def test_latents_are_discounted_and_features_are_not(autoencoder, tokens):
    """After two batches of 16 texts the latents weigh 16 d + 16, the features 256."""
    _, params, start, loss = autoencoder
    _, (_, once) = loss(params, start, tokens, jax.random.key(1), 0)
    _, (_, twice) = loss(params, start.replace(statistics=once), tokens, jax.random.key(2), 1)
    np.testing.assert_allclose(twice["latents"].weight, 16 * 0.99 + 16, rtol=1e-6)
    assert twice["features"].weight == 256


def test_embedding_is_frozen_and_groups_are_encoder_and_decoder(autoencoder):
    """Only the token embedding is in group "frozen", all else in the group of its network."""
    objective, params, _, _ = autoencoder
    groups = {path: objective.group(path) for path in flax.traverse_util.flatten_dict(params)}
    assert [p for p, g in groups.items() if g == "frozen"] == [("decoder", "backbone", "embedding")]
    assert {g for p, g in groups.items() if p[0] == "encoder"} == {"encoder"}
    assert {g for p, g in groups.items() if p[0] == "decoder"} == {"decoder", "frozen"}


def test_outer_zero_map_moves_first_then_the_inner_and_the_encoder(autoencoder, gradient):
    """Of the cross-attention's two zero maps, at step 0 only the outer one has a gradient.

    Once a gradient step has moved it, the inner one and the encoder have finite gradients too.
    """
    _, params, start, _ = autoencoder
    tx = optax.sgd(0.3)
    state, norms = tx.init(params), []
    for step in range(4):
        (_, (_, statistics)), grads = gradient(params, start, jax.random.key(step))
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
        cross = grads["decoder"]["cross_0"]
        norms.append(
            [float(jnp.abs(cross[name]["kernel"]).max()) for name in ("zero_out", "zero_in")]
            + [float(optax.tree.norm(grads["encoder"]))]
        )
        updates, state = tx.update(grads, state)
        params, start = optax.apply_updates(params, updates), start.replace(statistics=statistics)
    (outer, inner, encoder), *later = norms
    assert outer > 0 and inner == encoder == 0
    assert np.min(later) > 0


def test_gradient_reaches_nothing_through_the_statistics(autoencoder, gradient):
    """The gradient equals that with the updated statistics given as constants."""
    _, params, start, _ = autoencoder
    # The encoder has a gradient only if the outer maps are not zero.
    cross = params["decoder"]["cross_0"]
    noisy = jax.tree.map(lambda x: x + jax.random.normal(KEY, x.shape), cross["zero_out"])
    decoder = params["decoder"] | {"cross_0": cross | {"zero_out": noisy}}
    params = params | {"decoder": decoder}
    (_, (_, after)), moving = gradient(params, start, jax.random.key(1))

    class Fixed(Moments):
        def update(self, x, decay=1.0):
            return self

    fixed = {name: Fixed(m.weight, m.mean, m.variance) for name, m in after.items()}
    _, still = gradient(params, start.replace(statistics=fixed), jax.random.key(1))
    assert optax.tree.norm(still["encoder"]) > 1e-6
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5),
        moving["encoder"],
        still["encoder"],
    )

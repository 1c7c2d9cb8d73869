"""The Perceiver-style encoder and the latent-conditioned decoder."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diladiff_jax.nn.autoencoder import (
    CrossAttention,
    EncoderLayer,
    LatentConditionedDecoder,
    LatentEncoder,
)
from diladiff_jax.nn.transformer import TokenDenoiser

TOKENS = jax.random.randint(jax.random.key(0), (2, 8), 0, 12)
Z = jax.random.normal(jax.random.key(1), (2, 4, 6))
F = jax.random.normal(jax.random.key(2), (2, 8, 10))


@pytest.fixture(scope="module")
def encoder(random_parameters):
    module = LatentEncoder(num_latents=4, latent_dim=6, width=16, heads=2, length=8)
    return module, random_parameters(module, F)


def test_encoder_latents_are_normalized_float32(encoder):
    """Latents are `[B, N, D_lat]`, float32, and of unit mean square at initialization."""
    module, _ = encoder
    fresh = nn.unbox(jax.jit(module.init)(jax.random.key(3), F)["params"])
    z = module.apply({"params": fresh}, F)
    assert z.shape == (2, 4, 6) and z.dtype == jnp.float32
    np.testing.assert_allclose((z**2).mean(axis=-1), 1, rtol=1e-2)


def test_every_latent_reads_every_token_and_its_position(encoder):
    """Every latent depends on each token's features and their order; examples do not mix."""
    module, params = encoder
    run = jax.jit(lambda f: module.apply({"params": params}, f))
    base = run(F)
    for l in range(8):
        assert (np.abs(run(F.at[0, l].add(1.0)) - base).max(axis=2)[0] > 1e-5).all()
    moved = run(F.at[0].set(F[0, ::-1]))
    assert np.abs(moved - base)[0].max() > 1e-3
    np.testing.assert_allclose(moved[1], base[1], rtol=1e-4, atol=1e-5)


def test_without_positions_the_encoder_is_a_function_of_a_set(encoder):
    """With a zero position table, any permutation of the tokens gives the same latents.

    Permuted latent vectors give permuted latents.
    """
    module, params = encoder
    params = params | {"position": jax.tree.map(jnp.zeros_like, params["position"])}
    run = lambda p, f: module.apply({"params": p}, f)
    order = jnp.array([3, 0, 7, 1, 2, 6, 5, 4])
    np.testing.assert_allclose(run(params, F[:, order]), run(params, F), rtol=1e-3, atol=1e-4)
    swapped = params | {"latents": params["latents"][jnp.array([2, 0, 3, 1])]}
    np.testing.assert_allclose(
        run(swapped, F), run(params, F)[:, jnp.array([2, 0, 3, 1])], rtol=1e-3, atol=1e-4
    )


def test_encoder_layer_is_the_stated_attention(random_parameters):
    """z + Attn(Q(RMS z); [W_z RMS z; W_f RMS f]) + MLP, head by head in numpy.

    z and f have separate projections.
    """
    z, f = np.asarray(jax.random.normal(jax.random.key(5), (3, 16))), np.asarray(F[0])
    module = EncoderLayer(16, 2)
    p = jax.tree.map(np.asarray, random_parameters(module, z[None], f[None]))
    rms = lambda x, scale: x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * scale
    heads = lambda name, x: (x @ p[name]["linear"]["kernel"]).reshape(-1, 2, 8)
    normed = lambda name, x: rms(heads(name, x), p[name]["norm"]["scale"])
    zn, fn = rms(z, p["latent_norm"]["scale"]), rms(f, p["feature_norm"]["scale"])
    q, k = (
        normed("query", zn),
        np.concatenate([normed("latent_key", zn), normed("feature_key", fn)]),
    )
    v = np.concatenate([heads("latent_value", zn), heads("feature_value", fn)])
    scores = np.exp(np.einsum("nhd,mhd->hnm", q, k) / np.sqrt(8))
    y = np.einsum("hnm,mhd->nhd", scores / scores.sum(axis=-1, keepdims=True), v).reshape(3, 16)
    h = z + y @ p["out"]["kernel"]
    up = rms(h, p["mlp_norm"]["scale"]) @ p["mlp"]["up"]["kernel"] + p["mlp"]["up"]["bias"]
    out = h + np.asarray(nn.gelu(up)) @ p["mlp"]["down"]["kernel"] + p["mlp"]["down"]["bias"]
    np.testing.assert_allclose(
        module.apply({"params": p}, z[None], f[None])[0], out, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize(
    ("cross", "variant"),
    [((0, 1), {}), ((1,), dict(positions="rotary", norm="layernorm", adaln=8))],
    ids=["paper", "dit"],
)
def test_decoder_starts_as_the_denoiser_exactly(cross, variant, perturb, random_parameters):
    """With the denoiser's weights and fresh cross-attention, logits are bitwise the denoiser's.

    This holds for any latent.
    """
    backbone = TokenDenoiser(12, 8, 16, 2, 2, **variant)
    trained = random_parameters(backbone, TOKENS)
    decoder = LatentConditionedDecoder(backbone.clone(name=None), 4, cross)
    params = nn.unbox(jax.jit(decoder.init)(jax.random.key(2), TOKENS, Z)["params"])
    assert jax.tree.structure(params["backbone"]) == jax.tree.structure(trained)
    assert set(params) == {"backbone", *(f"cross_{i}" for i in cross)}
    params = params | {"backbone": trained}
    run = jax.jit(lambda params, z: decoder.apply({"params": params}, TOKENS, z))
    plain = jax.jit(backbone.apply)({"params": trained}, TOKENS)
    for z in (Z, 100 * Z, jnp.zeros_like(Z)):
        np.testing.assert_array_equal(run(params, z), plain)
    # Once the zero maps have moved, the latent is read.
    params = perturb(params, 3)
    assert np.abs(run(params, Z) - run(params, -Z)).max() > 1e-2
    h = decoder.apply({"params": params}, TOKENS, Z, method="hidden")
    np.testing.assert_allclose(
        decoder.apply({"params": params}, h, method="project"), run(params, Z), rtol=1e-3, atol=1e-4
    )


def test_zero_query_averages_the_values_and_has_finite_gradients():
    """At initialization the attention is the plain mean of the values.

    The gradient of the outer map is not zero, that of the inner one is, and both are finite.
    """
    h = jax.random.normal(jax.random.key(0), (2, 8, 16))
    module = CrossAttention(16, 2, 4)
    params = nn.unbox(jax.jit(module.init)(jax.random.key(1), h, Z)["params"])
    eye = params | {
        "out": {"kernel": jnp.eye(16)},
        "zero_out": {"kernel": jnp.eye(16), "bias": jnp.zeros(16)},
    }
    values = (Z + params["position"]["table"][None]) @ params["value"]["linear"]["kernel"]
    np.testing.assert_allclose(
        module.apply({"params": eye}, h, Z) - h,
        jnp.broadcast_to(values.mean(axis=1, keepdims=True), h.shape),
        rtol=1e-3,
        atol=1e-4,
    )

    target = jax.random.normal(jax.random.key(2), h.shape)
    loss = jax.jit(
        jax.grad(lambda p: jnp.square(module.apply({"params": p}, h, Z) - target).mean())
    )
    grads = loss(params)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert np.abs(grads["zero_out"]["kernel"]).max() > 0 and (grads["zero_in"]["kernel"] == 0).all()
    moved = params | {
        "zero_out": jax.tree.map(lambda p, g: p - 0.1 * g, params["zero_out"], grads["zero_out"])
    }
    grads = loss(moved)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert np.abs(grads["zero_in"]["kernel"]).max() > 0

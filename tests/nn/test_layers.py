"""Norms, attention, rotary positions and embeddings against numpy."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diladiff_jax.nn import layers


def init(module, *args, **kw):
    return nn.unbox(module.init(jax.random.key(0), *args, **kw)["params"])


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_norm(kind):
    """Unit mean square (about zero or the mean) times the gain; scale invariant."""
    x = np.asarray(3 + jax.random.normal(jax.random.key(0), (4, 16)))
    module, params = layers.Norm(kind), {"scale": jnp.arange(16.0)}
    y = module.apply({"params": params}, x)
    centred = x - x.mean(axis=1, keepdims=True) if kind == "layernorm" else x
    np.testing.assert_allclose(
        y,
        centred / np.sqrt((centred**2).mean(axis=1, keepdims=True)) * np.arange(16),
        rtol=1e-4,
        atol=1e-4,
    )
    np.testing.assert_allclose(module.apply({"params": params}, 7 * x), y, rtol=1e-3, atol=1e-3)


def test_norm_of_zero_has_a_bounded_gradient():
    """At x = 0 the value is 0 and the Jacobian 1 / sqrt(epsilon) times the identity: finite."""
    module = layers.Norm(epsilon=1e-4)
    params = init(module, jnp.zeros(4))
    jacobian = jax.jacobian(lambda x: module.apply({"params": params}, x))(jnp.zeros(4))
    np.testing.assert_allclose(jacobian, 100 * np.eye(4), rtol=1e-5)


def test_rotary_depends_only_on_relative_positions():
    """<rotate(q, i), rotate(k, j)> depends on i - j, and on nothing else; norms do not change."""
    q, k = jax.random.normal(jax.random.key(0), (2, 8))
    at_all = lambda x: layers.rotary(jnp.broadcast_to(x, (1, 12, 1, 8)))[0, :, 0]
    products = np.asarray(at_all(q) @ at_all(k).T)
    diagonals = [np.diagonal(products, offset) for offset in range(-11, 12)]
    assert max(np.ptp(d) for d in diagonals) < 1e-5
    assert np.ptp([d[0] for d in diagonals]) > 0.5
    np.testing.assert_allclose(jnp.linalg.norm(at_all(q), axis=1), jnp.linalg.norm(q), rtol=1e-5)
    np.testing.assert_allclose(at_all(q)[0], q, rtol=1e-6)


def test_rotary_rotates_complex_pairs():
    """Pair (i, i + K/2) as a complex number is multiplied by exp(1j position base^(-2i/K))."""
    x = np.asarray(jax.random.normal(jax.random.key(1), (1, 6, 1, 8)))
    z = (x[..., :4] + 1j * x[..., 4:]) * np.exp(
        1j * np.arange(6)[:, None, None] * 10_000.0 ** (-np.arange(4) / 4)
    )
    np.testing.assert_allclose(
        layers.rotary(jnp.asarray(x)),
        np.concatenate([z.real, z.imag], axis=-1),
        rtol=1e-4,
        atol=1e-5,
    )


def test_self_attention_rotates_queries_and_keys(random_parameters):
    """As in numpy: RMS norm per head, then rotation of queries and keys, but not of values."""
    x = np.asarray(jax.random.normal(jax.random.key(2), (1, 6, 16)))
    module = layers.SelfAttention(16, 2, rotary=True)
    p = jax.tree.map(np.asarray, random_parameters(module, x))
    heads = lambda name: (x[0] @ p[name]["linear"]["kernel"]).reshape(6, 2, 8)

    def rotated(name):
        h = heads(name)
        h = h / np.sqrt((h**2).mean(axis=-1, keepdims=True) + 1e-5) * p[name]["norm"]["scale"]
        return (h[..., :4] + 1j * h[..., 4:]) * np.exp(
            1j * np.arange(6)[:, None, None] * 10_000.0 ** (-np.arange(4) / 4)
        )

    scores = np.exp(
        np.einsum("lhd,mhd->hlm", rotated("query"), rotated("key").conj()).real / np.sqrt(8)
    )
    y = np.einsum(
        "hlm,mhd->lhd", scores / scores.sum(axis=-1, keepdims=True), heads("value")
    ).reshape(6, 16)
    np.testing.assert_allclose(
        module.apply({"params": p}, x)[0], y @ p["out"]["kernel"], rtol=1e-3, atol=1e-4
    )


def test_time_sinusoid_is_slow():
    """Frequencies lie between max_frequency / max_period and max_frequency.

    The derivative in time is at most max_frequency in every coordinate.
    """
    t = jnp.linspace(0, 1, 11)
    for top in (1.0, 8.0):
        f = functools.partial(layers.sinusoid, features=64, max_frequency=top, max_period=10.0)
        _, rate = jax.jvp(f, (t,), (jnp.ones(11),))
        assert 0.9 * top < np.abs(rate).max() <= top * (1 + 1e-6)
        np.testing.assert_allclose(f(t)[:, :32] ** 2 + f(t)[:, 32:] ** 2, 1, rtol=1e-5)
        frequency = np.abs(np.asarray(rate)[0, 32:])
        np.testing.assert_allclose(frequency[[0, 16]], [top, top / np.sqrt(10)], rtol=1e-5)
        assert frequency[-1] > top / 10


def test_mlp_kinds():
    """tanh-GELU with biases and SwiGLU without, against numpy.

    SwiGLU is the down projection of silu(gate) * up.
    """
    x = jax.random.normal(jax.random.key(0), (2, 3, 16))
    gelu, swiglu = layers.MLP(16), layers.MLP(16, kind="swiglu")
    p, q = init(gelu, x), init(swiglu, x)
    h = np.asarray(x @ p["up"]["kernel"])
    h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    np.testing.assert_allclose(
        gelu.apply({"params": p}, x), h @ p["down"]["kernel"], rtol=1e-4, atol=1e-5
    )
    assert set(p["up"]) == {"kernel", "bias"} and set(q["up"]) == {"kernel"}
    gate = np.asarray(x @ q["gate"]["kernel"])
    h = gate / (1 + np.exp(-gate)) * np.asarray(x @ q["up"]["kernel"])
    np.testing.assert_allclose(
        swiglu.apply({"params": q}, x), h @ q["down"]["kernel"], rtol=1e-4, atol=1e-5
    )


def test_linear_starts_at_unit_gain():
    """Unit-variance input gives unit-variance output (within 10%) at widths 32 and 512."""
    for width in (32, 512):
        x = jax.random.normal(jax.random.key(1), (200, width))
        module = layers.Linear(width)
        assert abs(module.apply({"params": init(module, x)}, x).std() - 1) < 0.1

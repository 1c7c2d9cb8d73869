"""Norms, attention, rotary positions and embeddings against numpy."""

import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diladiff_jax.nn import layers


def init(module, *args, **kw):
    return nn.unbox(module.init(jax.random.key(0), *args, **kw)["params"])


def test_attention_is_the_softmax_average():
    """Against numpy, with and without the causal mask; H heads are laid side by side."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 2, 4))
    for causal in (False, True):
        out = jax.jit(layers.attend, static_argnames="causal")(q, k, v, causal=causal)
        scores = np.einsum("blhd,bmhd->bhlm", q, k) / 2
        if causal:
            scores = np.where(np.tril(np.ones((5, 5))), scores, -np.inf)
        weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(out, np.einsum("bhlm,bmhd->blhd", weights, v).reshape(2, 5, 8), rtol=1e-4, atol=1e-5)


def test_attention_has_a_forward_derivative():
    """Its jvp equals a central difference (the student's loss is made of it)."""
    q, dq = jax.random.normal(jax.random.key(0), (2, 1, 4, 2, 3))
    f = jax.jit(lambda q: layers.attend(q, jnp.sin(q), jnp.cos(q)))
    _, tangent = jax.jvp(f, (q,), (dq,))
    np.testing.assert_allclose(tangent, (f(q + 1e-2 * dq) - f(q - 1e-2 * dq)) / 2e-2, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_norm(kind):
    """Unit mean square (about zero or the mean) times the gain; scale invariant."""
    x = np.asarray(3 + jax.random.normal(jax.random.key(0), (4, 16)))
    module, params = layers.Norm(kind), {"scale": jnp.arange(16.0)}
    y = module.apply({"params": params}, x)
    centred = x - x.mean(axis=1, keepdims=True) if kind == "layernorm" else x
    np.testing.assert_allclose(y, centred / np.sqrt((centred**2).mean(axis=1, keepdims=True)) * np.arange(16), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(module.apply({"params": params}, 7 * x), y, rtol=1e-3, atol=1e-3)


def test_norm_of_zero_has_a_bounded_gradient():
    """At x = 0 the value is 0 and the Jacobian 1 / sqrt(epsilon) times the identity: finite."""
    module = layers.Norm(epsilon=1e-4)
    params = init(module, jnp.zeros(4))
    jacobian = jax.jacobian(lambda x: module.apply({"params": params}, x))(jnp.zeros(4))
    np.testing.assert_allclose(jacobian, 100 * np.eye(4), rtol=1e-5)


def test_rotary_depends_on_relative_positions_alone():
    """<rotate(q, i), rotate(k, j)> is the same for all pairs of equal i - j, differs between them, and norms are kept."""
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
    z = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * np.arange(6)[:, None, None] * 10_000.0 ** (-np.arange(4) / 4))
    np.testing.assert_allclose(layers.rotary(jnp.asarray(x)), np.concatenate([z.real, z.imag], axis=-1), rtol=1e-4, atol=1e-5)


def test_self_attention_rotates_queries_and_keys(random_parameters):
    """Against numpy: RMS norm per head, then both rotated, values not, and the output projection."""
    x = np.asarray(jax.random.normal(jax.random.key(2), (1, 6, 16)))
    module = layers.SelfAttention(16, 2, rotary=True)
    p = jax.tree.map(np.asarray, random_parameters(module, x))
    heads = lambda name: (x[0] @ p[name]["linear"]["kernel"]).reshape(6, 2, 8)

    def rotated(name):
        h = heads(name)
        h = h / np.sqrt((h**2).mean(axis=-1, keepdims=True) + 1e-5) * p[name]["norm"]["scale"]
        return (h[..., :4] + 1j * h[..., 4:]) * np.exp(1j * np.arange(6)[:, None, None] * 10_000.0 ** (-np.arange(4) / 4))

    scores = np.exp(np.einsum("lhd,mhd->hlm", rotated("query"), rotated("key").conj()).real / np.sqrt(8))
    y = np.einsum("hlm,mhd->lhd", scores / scores.sum(axis=-1, keepdims=True), heads("value")).reshape(6, 16)
    np.testing.assert_allclose(module.apply({"params": p}, x)[0], y @ p["out"]["kernel"], rtol=1e-3, atol=1e-4)


def test_time_sinusoid_is_slow():
    """Frequencies from max_frequency down to above max_frequency / max_period: the derivative in time is at most max_frequency in every coordinate."""
    t = jnp.linspace(0, 1, 11)
    for top in (1.0, 8.0):
        f = lambda t: layers.sinusoid(t, 64, top, 10.0)
        _, rate = jax.jvp(f, (t,), (jnp.ones(11),))
        assert 0.9 * top < np.abs(rate).max() <= top * (1 + 1e-6)
        np.testing.assert_allclose(f(t)[:, :32] ** 2 + f(t)[:, 32:] ** 2, 1, rtol=1e-5)
        frequency = np.abs(np.asarray(rate)[0, 32:])
        np.testing.assert_allclose(frequency[[0, 16]], [top, top / np.sqrt(10)], rtol=1e-5)
        assert frequency[-1] > top / 10


def test_mlp_kinds():
    """tanh-GELU with biases and SwiGLU without, against numpy; SwiGLU is the down projection of silu(gate) * up."""
    x = jax.random.normal(jax.random.key(0), (2, 3, 16))
    gelu, swiglu = layers.MLP(16), layers.MLP(16, kind="swiglu")
    p, q = init(gelu, x), init(swiglu, x)
    h = np.asarray(x @ p["up"]["kernel"])
    h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    np.testing.assert_allclose(gelu.apply({"params": p}, x), h @ p["down"]["kernel"], rtol=1e-4, atol=1e-5)
    assert set(p["up"]) == {"kernel", "bias"} and set(q["up"]) == {"kernel"}
    gate = np.asarray(x @ q["gate"]["kernel"])
    h = gate / (1 + np.exp(-gate)) * np.asarray(x @ q["up"]["kernel"])
    np.testing.assert_allclose(swiglu.apply({"params": q}, x), h @ q["down"]["kernel"], rtol=1e-4, atol=1e-5)


def test_linear_starts_at_unit_gain():
    """Fan-in scaling: unit-variance input gives unit-variance output at widths 32 and 512 (within 10%)."""
    for width in (32, 512):
        x = jax.random.normal(jax.random.key(1), (200, width))
        module = layers.Linear(width)
        assert abs(module.apply({"params": init(module, x)}, x).std() - 1) < 0.1


@pytest.mark.parametrize("causal", [False, True])
def test_attention_in_blocks_is_the_attention_at_once(causal, monkeypatch):
    """Values and gradients agree, with a last block that is not full and with queries standing at chosen positions."""
    monkeypatch.setattr(layers, "BLOCK_SCORES", 2 * 9 * 4)  # four queries at a time
    q, k, v = (jax.random.normal(jax.random.key(i), (2, n, 3, 8)) for i, n in enumerate((7, 9, 9)))
    positions = jnp.array([[8, 0, 3, 5, 1, 2, 7], [4, 4, 6, 0, 8, 1, 2]])

    def both(form):
        f = lambda *qkv: form(*qkv, positions, causal=causal)
        return f(q, k, v), jax.grad(lambda *qkv: jnp.sin(f(*qkv)).sum(), argnums=(0, 1, 2))(q, k, v)

    for ours, plain in zip(jax.tree.leaves(both(layers.attend_in_blocks)), jax.tree.leaves(both(layers.attend_at_once)), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5)


def test_long_text_on_cpus_never_holds_its_score_matrix(monkeypatch):
    """Above the threshold the program compiled here has no array as large as all scores; the plain form, asked for, has one."""
    monkeypatch.setattr(layers, "MANY_SCORES", 1)
    monkeypatch.setattr(layers, "BLOCK_SCORES", 16 * 4)
    q = jax.ShapeDtypeStruct((1, 16, 2, 8), jnp.float32)

    def largest(plain):
        text = jax.jit(lambda q: layers.attend(q, q, q, plain=plain)).lower(q).compile().as_text()
        return max(math.prod(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", text))

    assert largest(plain=True) >= 2 * 16 * 16 > largest(plain=False)

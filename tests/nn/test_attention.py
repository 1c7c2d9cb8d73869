"""Every form of attention against numpy and against the other forms."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from diladiff_jax.nn import attention
from diladiff_jax.parallel import sharding


def test_attention_is_the_softmax_average():
    """It agrees with numpy, with and without the causal mask; the H heads are concatenated."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 2, 4))
    for causal in (False, True):
        out = jax.jit(attention.attend, static_argnames="causal")(q, k, v, causal=causal)
        scores = np.einsum("blhd,bmhd->bhlm", q, k) / 2
        if causal:
            scores = np.where(np.tril(np.ones((5, 5))), scores, -np.inf)
        weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(
            out, np.einsum("bhlm,bmhd->blhd", weights, v).reshape(2, 5, 8), rtol=1e-4, atol=1e-5
        )


def test_attention_has_a_forward_derivative():
    """Its jvp equals a central difference; the student's loss contains it."""
    q, dq = jax.random.normal(jax.random.key(0), (2, 1, 4, 2, 3))
    f = jax.jit(lambda q: attention.attend(q, jnp.sin(q), jnp.cos(q)))
    _, tangent = jax.jvp(f, (q,), (dq,))
    np.testing.assert_allclose(
        tangent, (f(q + 1e-2 * dq) - f(q - 1e-2 * dq)) / 2e-2, rtol=1e-2, atol=1e-3
    )


@pytest.mark.parametrize("causal", [False, True])
def test_attention_in_blocks_equals_attention_at_once(causal, monkeypatch):
    """Values and gradients agree, with a partial last block and queries at chosen positions."""
    monkeypatch.setattr(attention, "BLOCK_SCORES", 2 * 9 * 4)  # four queries at a time
    q, k, v = (jax.random.normal(jax.random.key(i), (2, n, 3, 8)) for i, n in enumerate((7, 9, 9)))
    positions = jnp.array([[8, 0, 3, 5, 1, 2, 7], [4, 4, 6, 0, 8, 1, 2]])

    def both(form):
        f = lambda *qkv: form(*qkv, positions, causal=causal)
        return f(q, k, v), jax.grad(lambda *qkv: jnp.sin(f(*qkv)).sum(), argnums=(0, 1, 2))(q, k, v)

    for ours, plain in zip(
        jax.tree.leaves(both(attention.attend_in_blocks)),
        jax.tree.leaves(both(attention.attend_at_once)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5)


def test_long_text_on_cpus_never_holds_its_score_matrix(monkeypatch):
    """Above the threshold, no array of the compiled program is as large as all scores.

    With `plain`, one is.
    """
    monkeypatch.setattr(attention, "MANY_SCORES", 1)
    monkeypatch.setattr(attention, "BLOCK_SCORES", 16 * 4)
    q = jax.ShapeDtypeStruct((1, 16, 2, 8), jnp.float32)

    def largest(plain):
        text = (
            jax.jit(lambda q: attention.attend(q, q, q, plain=plain)).lower(q).compile().as_text()
        )
        return max(
            math.prod(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", text)
        )

    assert largest(plain=True) >= 2 * 16 * 16 > largest(plain=False)


@pytest.mark.parametrize("causal, mesh", [(True, None), (False, (2, 1, 2)), (True, (1, 2, 4))])
def test_splash_attention_equals_attention_at_once(causal, mesh):
    """The TPU kernel, interpreted, has the values and gradients of the einsum.

    It does so on one device and sharded over examples and heads. Three heads stay unsharded on a
    mesh whose `tensor` axis does not divide them.
    """
    heads = 4 if mesh != (1, 2, 4) else 3
    q, k, v = (
        jax.random.normal(jax.random.key(i), (2, n, heads, 8))
        for i, n in enumerate((128, 256, 256))
    )
    positions = jnp.broadcast_to(jnp.arange(128)[None], (2, 128))

    def both(form):
        f = lambda *qkv: form(*qkv, positions, causal=causal)
        return jax.value_and_grad(lambda *qkv: jnp.sin(f(*qkv)).sum(), argnums=(0, 1, 2))

    run, inputs = both(functools.partial(attention.attend_splash, interpret=True)), (q, k, v)
    if mesh is not None:
        mesh = Mesh(
            np.array(jax.devices()[: math.prod(mesh)]).reshape(mesh),
            ("data", "fsdp", "tensor"),
            axis_types=(AxisType.Auto,) * 3,
        )
        run, inputs = (
            sharding.on_mesh(run, mesh),
            jax.device_put((q, k, v), sharding.batch_sharding(mesh)),
        )
    expected = jax.jit(both(attention.attend_at_once))(q, k, v)
    for ours, plain in zip(
        jax.tree.leaves(jax.jit(run)(*inputs)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(ours, plain, rtol=1e-3, atol=1e-4)


def test_each_platform_gets_its_form():
    """Lowered for TPUs, attention over long text contains a Pallas kernel.

    There is none for lengths that the tiles do not divide, causal queries at other positions, code
    that is differentiated forwards, and several devices without an active mesh.
    """

    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})

    def kernels(length, on_mesh=True, **kw):
        q = jax.ShapeDtypeStruct(
            (4, length, 2, 64), jnp.bfloat16, sharding=sharding.batch_sharding(mesh)
        )
        function = lambda q: attention.attend(q, q, q, **kw)
        text = (
            jax.jit(sharding.on_mesh(function, mesh) if on_mesh else function)
            .trace(q)
            .lower(lowering_platforms=("tpu",))
            .as_text()
        )
        return text.count("tpu_custom_call")

    assert kernels(256) == 1 and kernels(256, causal=True) == 1
    moved = jnp.zeros((4, 256), jnp.int32)
    assert (
        kernels(200) == kernels(256, plain=True) == kernels(256, causal=True, positions=moved) == 0
    )
    assert kernels(256, on_mesh=False) == 0
    # Without a causal mask, the positions of the queries do not matter.
    assert kernels(256, positions=moved) == 1

"""The prior's network, and the student that starts from it."""

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diladiff_jax.nn.latent_denoiser import LatentDenoiser

Z, C = jax.random.normal(jax.random.key(0), (2, 3, 5, 6))
T = jnp.array([0.1, 0.5, 1.0])


@pytest.fixture(scope="module")
def made(random_parameters):
    """(module, parameters none of which is zero) of teacher and student, three layers."""

    def make(**kw):
        module = LatentDenoiser(6, 16, 3, 2, **kw)
        return module, random_parameters(module, Z, T, C, T)

    return {"teacher": make(), "student": make(interval=True), "half": make(dtype=jnp.bfloat16)}


@pytest.fixture(scope="module")
def fresh(made):
    """The student's parameters as they are initialized."""
    return nn.unbox(jax.jit(made["student"][0].init)(jax.random.key(1), Z, T, C, T)["params"])


def test_starts_at_zero_and_reads_everything(made, fresh):
    """The fresh network predicts 0. With no zero parameter, it depends on every input.

    Every output depends on z_t, t, the self-conditioning, and every latent.
    """
    module, params = made["teacher"]
    assert (made["student"][0].apply({"params": fresh}, Z, T, C, T) == 0).all()
    run = jax.jit(lambda z, t, c: module.apply({"params": params}, z, t, c))
    base = run(Z, T, C)
    assert base.dtype == jnp.float32
    for other in (run(Z, 0.9 * T, C), run(Z, T, C + 0.1), run(Z.at[:, 2].add(0.5), T, C)):
        assert (np.abs(other - base).max(axis=2) > 1e-5).all()


def test_no_self_conditioning_is_zeros(made):
    """None equals zeros, and adds exactly nothing, because that path has no bias."""
    module, params = made["teacher"]
    np.testing.assert_array_equal(
        module.apply({"params": params}, Z, T),
        module.apply({"params": params}, Z, T, jnp.zeros_like(Z)),
    )
    assert all("bias" not in params[f"self_{i}"] for i in range(3))


def test_interval_embedding_is_exactly_zero_at_initialization(made, fresh):
    """At initialization, the student does not depend on t - r; without zero parameters, it does.

    With the teacher's weights, it is then the teacher's function.
    """
    module, params = made["student"]
    teacher, taught = made["teacher"]
    student = taught | {"interval_time": fresh["interval_time"]}
    for interval in (None, jnp.zeros(3), T):
        np.testing.assert_array_equal(
            module.apply({"params": student}, Z, T, C, interval),
            teacher.apply({"params": taught}, Z, T, C),
        )
    run = lambda interval: module.apply({"params": params}, Z, T, C, interval)
    np.testing.assert_array_equal(run(None), run(jnp.zeros(3)))
    assert (np.abs(run(T) - run(None)).max(axis=(1, 2)) > 1e-4).all()


def test_only_the_interval_embedding_is_new(made):
    """Student parameters minus teacher parameters are those of `interval_time`."""
    names = lambda kind: set(flax.traverse_util.flatten_dict(made[kind][1]))
    assert {path[0] for path in names("student") ^ names("teacher")} == {"interval_time"}


def test_skips_are_additive_from_the_first_half_to_the_second(random_parameters):
    """Blocks add nothing here, and layer i adds a constant b_i before its block.

    In four layers the third block then gives 2 (h + b_0 + b_1) + b_2, and the last one
    3 h + 3 b_0 + 2 b_1 + b_2 + b_3.
    """
    module = LatentDenoiser(6, 16, 4, 2)
    drawn = random_parameters(module, Z, T, C)
    # Blocks, times and self-conditioning add nothing but the biases of the time projections.
    params = {
        k: v if k in ("in", "final_norm", "out") else jax.tree.map(jnp.zeros_like, v)
        for k, v in drawn.items()
    }
    b = [drawn[f"time_{i}"]["bias"][None, None] for i in range(4)]
    for i in range(4):
        params[f"time_{i}"]["bias"] = drawn[f"time_{i}"]["bias"]
    watched = ("in", "block_2", "block_3")
    _, state = module.apply(
        {"params": params}, Z, T, C, capture_intermediates=lambda m, method: m.name in watched
    )
    h, third, last = (state["intermediates"][name]["__call__"][0] for name in watched)
    np.testing.assert_allclose(third, 2 * (h + b[0] + b[1]) + b[2], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        last, 3 * h + 3 * b[0] + 2 * b[1] + b[2] + b[3], rtol=1e-4, atol=1e-5
    )


def test_an_odd_middle_layer_has_no_skip(random_parameters):
    """In three layers only the first is pushed and only the last pops: the result is 2 h."""
    module = LatentDenoiser(6, 16, 3, 2)
    params = {
        k: v if k in ("in", "final_norm", "out") else jax.tree.map(jnp.zeros_like, v)
        for k, v in random_parameters(module, Z, T, C).items()
    }
    _, state = module.apply(
        {"params": params},
        Z,
        T,
        C,
        capture_intermediates=lambda m, method: m.name in ("in", "block_1", "block_2"),
    )
    h, middle, last = (
        state["intermediates"][name]["__call__"][0] for name in ("in", "block_1", "block_2")
    )
    np.testing.assert_allclose(middle, h, rtol=1e-5)
    np.testing.assert_allclose(last, 2 * h, rtol=1e-5)


def test_examples_do_not_mix(made):
    """Each example's prediction is that of a batch of one; vmap over examples agrees."""
    module, params = made["student"]
    run = lambda z, t, c: module.apply({"params": params}, z, t, c, 0.5 * t)
    whole = jax.jit(run)(Z, T, C)
    np.testing.assert_allclose(run(Z[1:2], T[1:2], C[1:2]), whole[1:2], rtol=1e-4, atol=1e-5)
    each = jax.jit(jax.vmap(lambda z, t, c: run(z[None], t[None], c[None])[0]))(Z, T, C)
    np.testing.assert_allclose(each, whole, rtol=1e-4, atol=1e-5)


def test_bfloat16_compute_stays_close(made):
    """bf16 compute: the mean error is below 5% of the output's spread, and the output float32."""
    module, params = made["teacher"]
    exact, close = (m.apply({"params": params}, Z, T, C) for m in (module, made["half"][0]))
    assert close.dtype == jnp.float32
    assert 0 < np.abs(exact - close).mean() < 0.05 * exact.std()


def test_tangents_in_time_are_moderate(made):
    """d output / dt follows a central difference: the network is smooth at the scale of a step."""
    module, params = made["student"]
    f = jax.jit(lambda t: module.apply({"params": params}, Z, t, C, t))
    _, tangent = jax.jvp(f, (0.9 * T,), (jnp.ones(3),))
    np.testing.assert_allclose(
        tangent, (f(0.9 * T + 0.01) - f(0.9 * T - 0.01)) / 0.02, rtol=0.05, atol=0.05
    )


def test_published_size():
    """12 layers of width 768 and latents of width 768 have about 130 M parameters, by the formula.

    No array is allocated.
    """
    d, h, n = 768, 12, 12
    settings = dict(width=d, num_layers=n, heads=h)
    module = LatentDenoiser(d, **settings)
    z, t = jax.ShapeDtypeStruct((1, 512, d), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    count = sum(
        x.size for x in jax.tree.leaves(jax.eval_shape(module.init, jax.random.key(0), z, t, z))
    )
    block = 4 * d * d + 3 * d * 4 * d + 2 * d + 2 * d // h + (d * d + d) + d * d
    assert count == n * block + 2 * (d * d + d) + d + (256 * d + d + d * d + d)
    assert 125e6 < count < 135e6


def test_learned_positions_tell_equal_latents_apart(random_parameters):
    """Where all latents are equal, attention mixes equal values.

    With only rotary positions all outputs are then equal; with learned positions, none are.
    """
    same = jnp.broadcast_to(Z[:, :1], Z.shape)
    for num_latents in (0, 5):
        module = LatentDenoiser(6, 16, 3, 2, num_latents=num_latents)
        out = module.apply({"params": random_parameters(module, Z, T, C)}, same, T)
        apart = np.abs(out[:, :, None] - out[:, None]).max(axis=3)[:, ~np.eye(5, dtype=bool)]
        assert (apart > 1e-3).all() if num_latents else (apart < 1e-5).all()


@pytest.mark.parametrize(
    "layers, scan, remat",
    [
        pytest.param(3, False, "matmuls", marks=pytest.mark.slow),
        (3, True, "full"),
        pytest.param(4, True, "none", marks=pytest.mark.slow),
    ],
)
def test_scan_and_remat_change_nothing(random_parameters, layers, scan, remat):
    """Scan and rematerialization change neither parameters nor outputs nor gradients (rtol 1e-3).

    Gradients through a forward derivative, as in the student's loss, are the same too. The depth is
    odd and even, with and without a layer between the halves.
    """
    plain = LatentDenoiser(6, 16, layers, 2, interval=True, plain=True)
    z, t = jax.random.normal(jax.random.key(0), (2, 4, 6)), jnp.array([0.3, 0.9])
    params = random_parameters(plain, z, t, z, t)
    module = plain.clone(scan=scan, remat=remat)
    assert jax.tree.structure(
        nn.unbox(jax.eval_shape(module.init, jax.random.key(0), z, t, z, t)["params"])
    ) == jax.tree.structure(params)

    def both(module):
        f = lambda p, t: module.apply({"params": p}, z, t, z, t)
        loss = lambda p: (
            jnp.sin(f(p, t)).sum()
            + jnp.sin(jax.jvp(lambda t: f(p, t), (t,), (jnp.ones(2),))[1]).sum()
        )
        return jax.jit(jax.value_and_grad(loss))(params)

    for ours, expected in zip(
        jax.tree.leaves(both(module)), jax.tree.leaves(both(plain)), strict=True
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_scanned_program_does_not_grow_with_depth(random_parameters):
    """A scanned program of twelve layers has as many products as one of four."""

    def products(layers, **kw):
        module = LatentDenoiser(6, 16, layers, 2, **kw)
        params = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), Z, T, Z)["params"])
        return (
            jax.jit(lambda p: module.apply({"params": p}, Z, T, Z))
            .lower(params)
            .compile()
            .as_text()
            .count(" dot(")
        )

    assert products(12, scan=True) == products(4, scan=True) < products(4)

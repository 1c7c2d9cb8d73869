"""The backbone in its published variants."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diladiff_jax.nn.transformer import TokenDenoiser

VARIANTS = {
    "paper": {},
    "dit": dict(positions="rotary", norm="layernorm", qk_norm=False, adaln=8, zero_head=True),
    "tied": dict(tied_head=True),
    "causal": dict(causal=True),
    "causal_rotary": dict(causal=True, positions="rotary"),
}
TOKENS = jax.random.randint(jax.random.key(0), (2, 8), 0, 12)


@pytest.fixture(scope="module")
def build(random_parameters):
    def build(name, **kw):
        """Module, and parameters none of which is zero."""
        module = TokenDenoiser(12, 8, 16, 2, 2, **VARIANTS[name], **kw)
        return module, random_parameters(module, TOKENS)

    return build


@pytest.mark.parametrize("name", VARIANTS)
def test_project_after_hidden_is_call(build, name):
    """`project(hidden(x)) == __call__(x)`, also for a subset of positions.

    Running the blocks in pieces changes nothing.
    """
    module, params = build(name)
    whole = jax.jit(lambda p: module.apply({"params": p}, TOKENS))(params)
    assert whole.shape == (2, 8, 12) and whole.dtype == jnp.float32
    h = module.apply({"params": params}, TOKENS, method="hidden")
    np.testing.assert_allclose(
        module.apply({"params": params}, h[:, [6, 1]], method="project"),
        whole[:, [6, 1]],
        rtol=1e-3,
        atol=1e-4,
    )

    def pieces(m):
        return m.finish(m.layers(m.layers(m.embed(TOKENS), 0, 1), 1, 2))

    np.testing.assert_allclose(
        nn.apply(pieces, module)({"params": params}), h, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_states_at_on_a_cache_are_those_of_a_complete_pass(build, name):
    """On a cache of the same tokens, states at some positions are those of a complete pass.

    After tokens change, the first layer's updated keys and values are those of a new cache. A
    position outside the text writes nothing.
    """
    module, params = build(name)
    run = lambda *given, **kw: module.apply({"params": params}, *given, method="states_at", **kw)
    h, cache = run(TOKENS)
    np.testing.assert_allclose(
        h, module.apply({"params": params}, TOKENS, method="hidden"), rtol=1e-4, atol=1e-4
    )
    positions = jnp.array([[6, 1], [0, 7]])
    chosen = jnp.take_along_axis(TOKENS, positions, axis=1)
    some, same = run(chosen, cache, positions, write=False)
    np.testing.assert_allclose(
        some, jnp.take_along_axis(h, positions[:, :, None], axis=1), rtol=1e-4, atol=1e-4
    )
    assert len(same) == len(cache) and all(
        a is b
        for kept, old in zip(same, cache, strict=True)
        for a, b in zip(kept, old, strict=True)
    )

    changed = TOKENS.at[0, 6].set((TOKENS[0, 6] + 1) % 12)
    _, renewed = run(changed)
    _, written = run(jnp.take_along_axis(changed, positions, axis=1), cache, positions.at[1].set(8))
    for made, expected in zip(written[0], renewed[0], strict=True):
        np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(written[1][0][1], cache[1][0][1])
    assert np.abs(written[1][0][0] - cache[1][0][0])[6].max() > 0


@pytest.mark.parametrize(
    "name, scan, remat",
    [
        pytest.param("paper", True, "none", marks=pytest.mark.slow),
        ("paper", True, "matmuls"),
        ("dit", True, "full"),
        pytest.param("dit", False, "full", marks=pytest.mark.slow),
    ],
)
def test_scan_and_remat_change_nothing(build, name, scan, remat):
    """Scan and rematerialization change neither parameters, logits nor gradients (rtol 1e-4).

    This includes running the layers in pieces.
    """
    plain, params = build(name)
    module = plain.clone(scan=scan, remat=remat)
    assert jax.tree.structure(
        nn.unbox(module.init(jax.random.key(0), TOKENS)["params"])
    ) == jax.tree.structure(params)

    def both(module):
        return jax.jit(
            jax.value_and_grad(lambda p: jnp.sin(module.apply({"params": p}, TOKENS)).sum())
        )(params)

    for ours, expected in zip(
        jax.tree.leaves(both(module)), jax.tree.leaves(both(plain)), strict=True
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    pieces = lambda m: m.finish(m.layers(m.layers(m.embed(TOKENS), 0, 1), 1, 2))
    np.testing.assert_allclose(
        nn.apply(pieces, module)({"params": params}),
        plain.apply({"params": params}, TOKENS, method="hidden"),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.slow
def test_a_scanned_program_does_not_grow_with_depth_and_full_remat_keeps_less(random_parameters):
    """A scanned program of six layers has as many products as one of three.

    With "full", the gradient needs less memory than with "matmuls", and that less than "none".
    """

    def compiled(layers, **kw):
        module = TokenDenoiser(12, 64, 32, layers, 2, **kw)
        tokens = jnp.zeros((4, 64), jnp.int32)
        params = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), tokens)["params"])
        return (
            jax.jit(jax.grad(lambda p: module.apply({"params": p}, tokens).sum()))
            .lower(params)
            .compile()
        )

    count = lambda c: c.as_text().count(" dot(")
    assert count(compiled(6, scan=True)) == count(compiled(3, scan=True)) < count(compiled(6))
    memory = lambda remat: compiled(8, scan=True, remat=remat).memory_analysis().temp_size_in_bytes
    assert memory("full") < memory("matmuls") < memory("none")


def test_dropout_differs_from_layer_to_layer_when_scanned(build):
    """With dropout, a scanned network depends on its key, and has the unscanned network's mean.

    4,096 draws of the first hidden state agree within 4.5 standard errors.
    """
    plain, params = build("paper", dropout=0.3)
    module = plain.clone(scan=True)

    def draws(module):
        one = lambda key: module.apply(
            {"params": params},
            TOKENS[:1, :2],
            deterministic=False,
            rngs={"dropout": key},
            method="hidden",
        )[0, 0]
        return np.asarray(
            jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), 4096)), np.float64
        )

    ours, theirs = draws(module), draws(plain)
    assert len(np.unique(ours[:, 0])) > 1000
    error = np.sqrt((ours.var(axis=0) + theirs.var(axis=0)) / 4096)
    assert (np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) < 4.5 * error).all()


@pytest.mark.parametrize("name", VARIANTS)
def test_finish_at_gives_the_rows_of_hidden(build, name):
    """The last block and final norm at a few positions give those rows of `hidden`.

    Positions may be in any order, and repeat.
    """
    module, params = build(name)
    positions = jnp.array([[6, 1, 1], [0, 7, 3]])

    def at(m):
        h = m.before_last(TOKENS)
        return m.finish_at(h, m.last_keys_values(h), positions)

    whole = module.apply({"params": params}, TOKENS, method="hidden")
    chosen = jnp.take_along_axis(whole, positions[:, :, None], axis=1)
    np.testing.assert_allclose(
        nn.apply(at, module)({"params": params}), chosen, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_causal_networks_see_no_later_token(build, name):
    """Changing token 4 changes the logits everywhere, or only from 4 on if causal."""
    module, params = build(name)
    run = jax.jit(lambda x: module.apply({"params": params}, x))
    moved = np.abs(run(TOKENS.at[:, 4].set((TOKENS[:, 4] + 1) % 12)) - run(TOKENS)).max(axis=(0, 2))
    seen = np.arange(8) >= 4 if "causal" in name else np.ones(8, bool)
    assert (moved[seen] > 1e-4).all() and (moved[~seen] == 0).all()


@pytest.mark.parametrize("name", ["paper", "dit"])
def test_positions_matter(build, name):
    """Reversing the tokens does not just reverse the logits: the network sees word order."""
    module, params = build(name)
    run = lambda x: module.apply({"params": params}, x)
    assert np.abs(run(TOKENS[:, ::-1])[:, ::-1] - run(TOKENS)).max() > 1e-2


def test_dit_starts_at_uniform_and_its_blocks_at_the_identity(build):
    """adaLN-zero: blocks add nothing at initialization, and the zero head gives logits 0."""
    module, _ = build("dit")
    fresh = nn.unbox(jax.jit(module.init)(jax.random.key(1), TOKENS)["params"])
    assert (module.apply({"params": fresh}, TOKENS) == 0).all()
    h = jax.random.normal(jax.random.key(3), (2, 8, 16))
    np.testing.assert_array_equal(module.apply({"params": fresh}, h, 0, 2, method="layers"), h)


def test_features_hold_the_embeddings_beside_the_states(build):
    """`with_embeddings` appends the table's rows, unchanged."""
    module, params = build("paper")
    f = module.apply({"params": params}, TOKENS, with_embeddings=True, method="features")
    np.testing.assert_allclose(
        f[..., :16], module.apply({"params": params}, TOKENS, method="hidden"), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_array_equal(f[..., 16:], np.asarray(params["embedding"])[TOKENS])


def test_tied_head_reads_the_embedding(build):
    """The tied head has no matrix of its own, and its logits are h E^T."""
    module, params = build("tied")
    assert "head" not in params
    h = module.apply({"params": params}, TOKENS, method="hidden")
    np.testing.assert_allclose(
        module.apply({"params": params}, TOKENS), h @ params["embedding"].T, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("name", ["paper", "dit"])
def test_bfloat16_compute_stays_close(build, name):
    """In bf16, log probabilities differ by less than 5% of their spread on average.

    Parameters stay float32.
    """
    module, params = build(name)
    half, made = build(name, dtype=jnp.bfloat16)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(made))
    exact = jax.nn.log_softmax(module.apply({"params": params}, TOKENS))
    close = jax.nn.log_softmax(half.apply({"params": params}, TOKENS))
    assert close.dtype == jnp.float32
    assert 0 < np.abs(exact - close).mean() < 0.05 * exact.std()


def test_dropout_acts_only_when_asked(build):
    """deterministic=True is a function of the input; False also depends on the key."""
    module, params = build("paper", dropout=0.5)
    run = lambda key: module.apply(
        {"params": params}, TOKENS, deterministic=False, rngs={"dropout": jax.random.key(key)}
    )
    assert np.abs(run(0) - run(1)).max() > 1e-3
    np.testing.assert_array_equal(
        module.apply({"params": params}, TOKENS), module.apply({"params": params}, TOKENS)
    )


def test_published_sizes():
    """The paper's backbone: V D embedding and head, L D positions, 12 blocks.

    A block has 4 D^2 + 8 D^2 + 5 D parameters and its norms. No array is allocated.
    """
    v, length, d, h = 30_522, 1024, 768, 12
    module = TokenDenoiser(v, length, d, 12, h)
    shapes = jax.eval_shape(
        module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, length), jnp.int32)
    )
    count = sum(x.size for x in jax.tree.leaves(shapes))
    block = 12 * d * d + 5 * d + 2 * d + 2 * d // h
    assert count == 2 * v * d + length * d + 12 * block + d


def test_embeddings_and_positions_start_at_the_size_asked_for():
    """Both tables have standard deviation `embedding_std`, within five standard errors."""
    module = TokenDenoiser(512, 64, 32, 1, 2, embedding_std=0.7)
    params = nn.unbox(
        jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 64), jnp.int32))["params"]
    )
    for table in (params["embedding"], params["position"]["table"]):
        assert float(table.std()) == pytest.approx(0.7, rel=5 / np.sqrt(2 * table.size))

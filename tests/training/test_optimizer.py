"""Schedules, groups, decay and clipping of the optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diladiff_jax.training.optimizer import decay_schedule, make_optimizer, warmup_schedule

SETTINGS = dict(
    steps=100,
    optimizer="adamw",
    learning_rate=0.1,
    muon_learning_rate=0.02,
    b1=0.9,
    b2=0.99,
    epsilon=1e-8,
    weight_decay=0.0,
    clip=0.0,
    schedule="cosine",
    final_ratio=0.1,
    warmup=10,
    decoder_warmup=50,
    ema=0.0,
)
PARAMS = {
    "encoder": {"layer": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}},
    "decoder": {"head": {"kernel": jnp.ones((4, 3))}, "embedding": jnp.ones((5, 4))},
}


@pytest.fixture(autouse=True)
def _optax_promotes_ranks():
    with jax.numpy_rank_promotion("allow"):
        yield


def group_of(path):
    return "frozen" if path[-1] == "embedding" else path[0]


def test_schedules_have_their_closed_forms():
    """Constant through the warm-up, then linear or half a cosine to final_ratio at the end."""
    rate = decay_schedule(SETTINGS, 0.1)
    assert rate(0) == rate(10) == pytest.approx(0.1)
    assert rate(100) == pytest.approx(0.01)
    middle = 0.1 * (0.9 * 0.5 * (1 + np.cos(np.pi * 45 / 90)) + 0.1)
    assert rate(55) == pytest.approx(middle, rel=1e-6)
    linear = decay_schedule(SETTINGS | dict(schedule="linear"), 0.1)
    assert linear(55) == pytest.approx(0.1 * (0.5 + 0.5 * 0.1), rel=1e-6)
    np.testing.assert_allclose(
        [warmup_schedule(10)(n) for n in (0, 4, 9, 50)], [0.1, 0.5, 1.0, 1.0], rtol=1e-6
    )


@pytest.mark.parametrize(
    ("settings", "factor"), [({}, 3 / 10), ({"adapter_warmup": 30}, 3 / 30)], ids=["default", "own"]
)
def test_a_group_of_any_name_warms_up(settings, factor):
    """An objective may name a new group: it warms up over NAME_warmup if set, else over warmup."""
    flat = SETTINGS | dict(schedule="constant")
    params = {"adapter": {"kernel": jnp.ones((4, 3))}}
    grads = jax.tree.map(lambda x: 1.0 + jnp.arange(x.size).reshape(x.shape), params)

    def third_update(settings):
        tx = make_optimizer(settings, lambda path: path[0])
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(grads, state, params)
        return updates["adapter"]["kernel"]

    full = third_update(flat | dict(warmup=1, adapter_warmup=1))
    assert np.all(full != 0)
    np.testing.assert_allclose(third_update(flat | settings), factor * full, rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_each_group_has_its_warm_up_and_frozen_ones_never_move(optimizer):
    """Update n is the base update times (n + 1) / warmup of its group, or zero if frozen."""
    ones = jax.tree.map(lambda x: jnp.ones_like(x) + jnp.arange(x.size).reshape(x.shape), PARAMS)
    found = {}
    for warmup, decoder in ((1, 1), (10, 50)):
        tx = make_optimizer(
            SETTINGS
            | dict(optimizer=optimizer, warmup=warmup, decoder_warmup=decoder, schedule="constant"),
            group_of,
        )
        state = tx.init(PARAMS)
        for _ in range(3):
            found[warmup], state = tx.update(ones, state, PARAMS)
    full, warm = found[1], found[10]
    np.testing.assert_allclose(
        warm["encoder"]["layer"]["kernel"], 0.3 * full["encoder"]["layer"]["kernel"], rtol=1e-5
    )
    np.testing.assert_allclose(
        warm["decoder"]["head"]["kernel"], 0.06 * full["decoder"]["head"]["kernel"], rtol=1e-5
    )
    assert not np.any(full["decoder"]["embedding"])
    assert np.all(full["encoder"]["layer"]["bias"] < 0)


def test_muon_orthogonalizes_kernels_only():
    """Kernel updates have nearly equal singular values; head and biases get Adam's steps."""
    tx = make_optimizer(
        SETTINGS | dict(optimizer="muon", warmup=1, decoder_warmup=1, schedule="constant"), group_of
    )
    grads = jax.tree.map(
        lambda x: (
            jax.random.normal(jax.random.key(0), x.shape) * jnp.linspace(1.0, 4.0, x.shape[-1])
        ),
        PARAMS,
    )
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    singular = np.linalg.svd(updates["encoder"]["layer"]["kernel"], compute_uv=False)
    raw = np.linalg.svd(grads["encoder"]["layer"]["kernel"], compute_uv=False)
    assert singular.max() / singular.min() < 2.0 < 3.0 < raw.max() / raw.min()
    # Adam's first step has the same size everywhere, whatever the gradient.
    head = np.abs(updates["decoder"]["head"]["kernel"])
    np.testing.assert_allclose(head, head.mean(), rtol=1e-3)


@pytest.mark.parametrize(
    "optimizer, decayed, rate",
    [
        ("adamw", [("encoder", "layer"), ("decoder", "head")], 0.1),
        ("muon", [("encoder", "layer")], 0.02),
    ],
)
def test_weight_decay_shrinks_matrices_only(optimizer, decayed, rate):
    """Without a gradient the update is -rate * decay * matrix.

    AdamW decays every kernel, Muon those that it orthogonalizes.
    """
    tx = make_optimizer(
        SETTINGS
        | dict(
            optimizer=optimizer, weight_decay=0.3, warmup=1, decoder_warmup=1, schedule="constant"
        ),
        group_of,
    )
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, PARAMS), tx.init(PARAMS), PARAMS)
    for path, update in jax.tree_util.tree_flatten_with_path(updates)[0]:
        names = tuple(part.key for part in path)
        expected = -rate * 0.3 if names[:2] in decayed and names[-1] == "kernel" else 0.0
        np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-12)


def test_the_clipped_norm_is_that_of_what_is_trained():
    """A huge gradient of the frozen embedding does not shrink the others' first moments."""
    tx = make_optimizer(SETTINGS | dict(clip=1.0, warmup=1, decoder_warmup=1), group_of)
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    small = jax.tree.map(lambda g: g * 1e-3, grads)  # below the clip
    loud = {
        **small,
        "decoder": {**small["decoder"], "embedding": 1e6 * grads["decoder"]["embedding"]},
    }
    state = tx.init(PARAMS)
    _, after = tx.update(small, state, PARAMS)
    _, after_loud = tx.update(loud, state, PARAMS)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(after_loud), strict=True):
        np.testing.assert_allclose(a, b)
    _, clipped = tx.update(jax.tree.map(lambda g: 100 * g, grads), state, PARAMS)
    mu = optax.tree.get(clipped, "mu")
    # (1 - b1) times a gradient of norm 1.
    assert optax.tree.norm(mu) == pytest.approx(0.1, rel=1e-4)

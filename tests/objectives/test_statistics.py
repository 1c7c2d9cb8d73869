"""Running moments, compared with two passes over the data."""

import jax
import jax.numpy as jnp
import numpy as np

from diladiff_jax.objectives.statistics import VARIANCE_FLOOR, Moments

update = jax.jit(Moments.update)


def batches(sizes=(3, 40, 1, 17), shape=(2, 3)):
    rng = np.random.default_rng(0)
    return [
        rng.normal(5 * i, 1 + i, size=(n, *shape)).astype(np.float32) for i, n in enumerate(sizes)
    ]


def merge(parts, decay=1.0):
    moments = Moments.zeros(parts[0].shape[1:])
    for part in parts:
        moments = update(moments, part, decay)
    return moments


def test_merged_moments_are_those_of_two_passes_in_any_order():
    """Without a discount: population mean and variance, whatever the order and batch sizes."""
    parts = batches()
    everything = np.concatenate(parts).astype(np.float64)
    for order in (
        parts,
        parts[::-1],
        [np.concatenate(parts)],
        [everything[i : i + 1].astype(np.float32) for i in range(61)],
    ):
        moments = merge(order)
        assert moments.weight == 61
        np.testing.assert_allclose(moments.mean, everything.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(moments.variance, everything.var(axis=0), rtol=1e-4)


def test_discounted_moments_are_the_weighted_ones():
    """With decay d, the examples of k updates ago weigh d^k in mean and variance."""
    parts, decay = batches(), 0.7
    weights = np.concatenate(
        [np.full(len(p), decay ** (len(parts) - 1 - i)) for i, p in enumerate(parts)]
    )
    everything = np.concatenate(parts).astype(np.float64)
    mean = np.average(everything, axis=0, weights=weights)
    moments = merge(parts, decay)
    np.testing.assert_allclose(moments.weight, weights.sum(), rtol=1e-5)
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(
        moments.variance, np.average((everything - mean) ** 2, axis=0, weights=weights), rtol=1e-4
    )


def test_large_means_do_not_cancel():
    """With mean 10,000 and 50 batches in float32, a standard deviation of 1 is right to 1%."""
    x = (10_000 + np.random.default_rng(1).normal(size=(50, 64, 1))).astype(np.float32)
    np.testing.assert_allclose(merge(list(x)).std, x.astype(np.float64).std(), rtol=1e-2)


def test_standardize_is_inverted_by_restore_and_has_unit_moments():
    """Of the examples seen, mean 0 and variance 1 per coordinate, with any leading axes."""
    parts = batches()
    moments, x = merge(parts), np.concatenate(parts)
    z = moments.standardize(x)
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(z.std(axis=0), 1, rtol=1e-3)
    np.testing.assert_allclose(moments.restore(z), x, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(moments.standardize(x.reshape(1, 61, 2, 3))[0], z, rtol=1e-6)


def test_variance_floor():
    """A constant coordinate is divided by sqrt(1e-4), not by zero."""
    moments = merge([np.full((8, 2), 3.0, np.float32)])
    assert VARIANCE_FLOOR == 1e-4
    np.testing.assert_allclose(moments.standardize(jnp.full((1, 2), 3.5)), 50.0, rtol=1e-5)


def test_statistics_carry_no_gradient():
    """The update stops the gradient; standardizing passes it on, divided by the deviation."""
    x = jnp.asarray(batches()[1])
    grad = jax.grad(
        lambda x: sum(jnp.sum(v) for v in jax.tree.leaves(Moments.zeros((2, 3)).update(x)))
    )(x)
    assert (grad == 0).all()
    moments = merge(batches())
    grad = jax.grad(lambda x: moments.standardize(x).sum())(x)
    np.testing.assert_allclose(grad, jnp.broadcast_to(1 / moments.std, x.shape), rtol=1e-5)


def test_moments_of_a_sharded_batch_are_global():
    """Over eight virtual devices the state is that of the whole batch, the same on every device."""
    mesh = jax.make_mesh((8,), ("data",))
    x = np.random.default_rng(2).normal(size=(64, 3)).astype(np.float32) + np.arange(64)[
        :, None
    ].astype(np.float32)
    spread = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    moments = update(Moments.zeros((3,)), spread)
    np.testing.assert_allclose(moments.mean, x.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(moments.variance, x.var(axis=0), rtol=1e-4)
    for shard in moments.variance.addressable_shards:
        np.testing.assert_allclose(shard.data, x.var(axis=0), rtol=1e-4)

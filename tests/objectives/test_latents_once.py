"""Latents of all rows that are computed once: their values, and when they are computed again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diladiff_jax.parallel import sharding
from diladiff_jax.training.latent_cache import cached_latents, fingerprint


class Rows(list):
    """Rows of tokens as the prepared data gives them."""

    def __getitems__(self, indices):
        return [self[i] for i in indices]


@pytest.fixture
def compute(tmp_path, text_encoder, context, tokens):
    """A call of `cached_latents` with the given changes; returns (latents, lines logged)."""

    def call(**changes):
        lines = []
        given = dict(
            folder=tmp_path / "latents",
            split="train",
            rows=Rows(np.asarray(tokens)),
            origin="rows-1",
            text_encoder=text_encoder,
            context=context,
            mesh=sharding.make_mesh({"data": 4, "fsdp": 1, "tensor": 1}, jax.devices()[:4]),
            limit_gib=1.0,
            log=lines.append,
        )
        return cached_latents(**(given | changes)), lines

    return call


def test_cached_latents_are_the_encoders(compute, latents):
    """Row for row and in order, whether the rows fill the devices or not."""
    found, lines = compute()
    assert len(found) == 16 and len(lines) == 1
    np.testing.assert_allclose(
        found.__getitems__([3, 0, 15]), latents[jnp.array([3, 0, 15])], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(found[7], latents[7], rtol=1e-4, atol=1e-5)


def test_rows_that_do_not_fill_the_devices_are_all_there(compute, latents, tokens):
    """Thirteen rows on four devices: the padding of the last batch is left out."""
    found, _ = compute(rows=Rows(np.asarray(tokens[:13])))
    assert len(found) == 13
    np.testing.assert_allclose(found[12], latents[12], rtol=1e-4, atol=1e-5)


def test_they_are_computed_again_only_if_something_changed(compute, context, tmp_path):
    """Other rows, an encoder one element of which differs, or a damaged file."""
    compute()
    assert compute()[1] == []
    assert len(compute(origin="rows-2")[1]) == 1
    frozen = jax.tree.map(lambda x: x, context.frozen)
    leaves, structure = jax.tree.flatten(frozen["encoder"])
    leaves[-1] = leaves[-1].at[(0,) * leaves[-1].ndim].add(1e-3)
    frozen["encoder"] = jax.tree.unflatten(structure, leaves)
    assert len(compute(origin="rows-2", context=context.replace(frozen=frozen))[1]) == 1
    path = tmp_path / "latents" / "train.npy"
    path.write_bytes(path.read_bytes()[:-4])
    assert len(compute(origin="rows-2", context=context.replace(frozen=frozen))[1]) == 1


def test_a_limit_leaves_the_encoding_to_every_update(compute, tmp_path):
    """16 x 4 x 6 floats are 1,536 bytes: no file is made for a limit of 1,000."""
    assert compute(limit_gib=1000 / 2**30) == (None, [])
    assert not (tmp_path / "latents").exists()


def test_a_fingerprint_sees_values_and_places_and_not_shardings():
    """Exchanged elements, a flipped last bit and a sign change it; distribution does not."""
    x = jnp.arange(1.0, 9.0).reshape(8, 1)
    mesh = sharding.make_mesh({"data": 8, "fsdp": 1, "tensor": 1})
    assert fingerprint([jax.device_put(x, sharding.batch_sharding(mesh))]) == fingerprint([x])
    others = [x[::-1], x.at[3].set(jnp.nextafter(x[3], 9.0)), x.at[0].multiply(-1)]
    assert len({fingerprint([y]) for y in [x, *others]}) == 4

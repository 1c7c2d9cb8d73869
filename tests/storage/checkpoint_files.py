"""Small checkpoints, and ways to damage their files."""

import os

import jax
import jax.numpy as jnp
import numpy as np

from diladiff_jax.storage import Checkpoints

STEPS = (3, 5, 8)


def items_at(step):
    """The items of a checkpoint whose numbers tell its step."""
    params = {"w": jnp.float32(step), "scale": {"v": jnp.arange(6.0) + step}}
    return {
        "params": params,
        "ema": jax.tree.map(lambda x: x / 2, params),
        "training": {"step": jnp.int32(step), "key": jax.random.key(step)},
    }


def restored_step(stage):
    """Restores the last checkpoint of a stage, checks its numbers, and returns its step."""
    abstract = jax.eval_shape(lambda: items_at(0))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with Checkpoints(stage / "checkpoints") as checkpoints:
        items, position = checkpoints.restore(abstract, jax.tree.map(lambda _: sharding, abstract))
    step = int(items["training"]["step"])
    assert position == {"position": step}
    jax.tree.map(
        np.testing.assert_array_equal,
        (items["params"], items["ema"]),
        (items_at(step)["params"], items_at(step)["ema"]),
    )
    assert items["training"]["key"] == jax.random.key(step)
    return step


def files_of(stage, step):
    """All files of the items of a checkpoint."""
    return [
        path
        for item in (*items_at(0), "data")
        for path in (stage / "checkpoints" / str(step) / item).rglob("*")
        if path.is_file()
    ]


def flip(path, rng):
    """Flips one random bit of a file."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(path, rng):
    """Cuts a file at a random length."""
    os.truncate(path, rng.randrange(path.stat().st_size))


def remove(path, rng):
    """Deletes a file."""
    path.unlink()


def flip_in_checkpoint(stage, step, rng):
    """Flips one random bit of a random file of a checkpoint."""
    flip(rng.choice([path for path in files_of(stage, step) if path.stat().st_size]), rng)

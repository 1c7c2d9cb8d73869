"""Random parameters for tests of networks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def random_parameters(module, *inputs, seed=0):
    """Parameters of the right shapes, none of them zero: kernels by fan-in, gains near 1.

    The module's init is only traced, because compiling it takes seconds.
    """
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"])
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape)
        kind = path[-1].key
        value = (
            noise / np.sqrt(leaf.shape[0]) if kind == "kernel" else (kind == "scale") + 0.3 * noise
        )
        return jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)

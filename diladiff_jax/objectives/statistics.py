"""Running mean and variance, merged batch by batch: state of the training, never of its gradients."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

Array = jax.Array

VARIANCE_FLOOR = 1e-4


class Moments(flax.struct.PyTreeNode):
    """Weighted mean and variance per coordinate, by the pairwise update of Chan, Golub and LeVeque (1979).

    In a jitted step over a sharded batch the sums run over the global batch, so the state is the same on
    every host by construction.
    """

    weight: Array  # [] number of examples seen, discounted
    mean: Array
    variance: Array

    @classmethod
    def zeros(cls, shape: tuple[int, ...]) -> Moments:
        return cls(jnp.zeros(()), jnp.zeros(shape), jnp.ones(shape))

    def update(self, x: Array, decay: float = 1.0) -> Moments:
        """Merges `x [n, *shape]`; earlier examples first lose weight by `decay` (1 keeps them all, and is then exact)."""
        x = jax.lax.stop_gradient(x.astype(jnp.float32))
        n, old = x.shape[0], self.weight * decay
        total = old + n
        mean, variance = x.mean(axis=0), x.var(axis=0)
        delta = mean - self.mean
        merged = (
            old * self.variance + n * variance + jnp.square(delta) * (old * n / total)
        ) / total
        return Moments(total, self.mean + delta * (n / total), merged)

    @property
    def std(self) -> Array:
        return jnp.sqrt(jnp.maximum(self.variance, VARIANCE_FLOOR))

    def standardize(self, x: Array) -> Array:
        """`(x - mean) / std` over the leading axes of `x [..., *shape]`."""
        lead = (1,) * (x.ndim - self.mean.ndim)
        return (x - self.mean.reshape(lead + self.mean.shape)) / self.std.reshape(
            lead + self.std.shape
        )

    def restore(self, x: Array) -> Array:
        """The inverse of `standardize`."""
        lead = (1,) * (x.ndim - self.mean.ndim)
        return x * self.std.reshape(lead + self.std.shape) + self.mean.reshape(
            lead + self.mean.shape
        )

"""Running mean and variance, merged batch by batch: training state that has no gradient."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

VARIANCE_FLOOR = 1e-4


class Moments(flax.struct.PyTreeNode):
    """Weighted mean and variance per coordinate (Chan, Golub and LeVeque 1979, pairwise update).

    In a jitted step over a sharded batch the sums run over the global batch, so all hosts hold the
    same state by construction.

    Attributes:
      weight: number of examples seen, discounted.
      mean, variance: `[*shape]`.
    """

    weight: Float[Array, ""]
    mean: Float[Array, "..."]
    variance: Float[Array, "..."]

    @classmethod
    def zeros(cls, shape: tuple[int, ...]) -> Moments:
        """No examples yet: mean 0, variance 1."""
        return cls(jnp.zeros(()), jnp.zeros(shape), jnp.ones(shape))

    def update(self, x: Float[Array, "n ..."], decay: Array | float = 1.0) -> Moments:
        """Merges `x [n, *shape]` after discounting earlier examples by `decay` (1: exact)."""
        x = jax.lax.stop_gradient(x.astype(jnp.float32))
        n, old = x.shape[0], self.weight * decay
        total = old + n
        mean, variance = x.mean(axis=0), x.var(axis=0)
        delta = mean - self.mean
        between = jnp.square(delta) * (old * n / total)
        merged = (old * self.variance + n * variance + between) / total
        return Moments(total, self.mean + delta * (n / total), merged)

    @property
    def std(self) -> Float[Array, "..."]:
        """Standard deviation, with the variance's floor."""
        return jnp.sqrt(jnp.maximum(self.variance, VARIANCE_FLOOR))

    def standardize(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """`(x - mean) / std` over the leading axes of `x [..., *shape]`."""
        mean, std = self._aligned(x)
        return (x - mean) / std

    def restore(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The inverse of `standardize`."""
        mean, std = self._aligned(x)
        return x * std + mean

    def _aligned(self, x: Array) -> tuple[Array, Array]:
        """Mean and std with leading axes of size 1 for those of `x`."""
        lead = (1,) * (x.ndim - self.mean.ndim)
        return self.mean.reshape(lead + self.mean.shape), self.std.reshape(lead + self.std.shape)

"""Decoding of tokens: which positions a step unmasks, and the loop over steps.

`ORDERS` is the table of all unmasking orders; `register_order` adds one. Each is a pure function
made to be jitted; the number of steps is a run-time value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from diladiff_jax.diffusion.masking import DiscreteProcess
from diladiff_jax.sampling.categorical import (
    Keys,
    fold_in_per_sample,
    split_per_sample,
    uniform_per_sample,
)
from diladiff_jax.sampling.confidence import by_confidence, by_threshold
from diladiff_jax.sampling.token_network import (
    LOGIT_ROWS,
    Decoded,
    TokenControls,
    TokenNetwork,
    chunk,
    chunk_size,
    sample_at,
    scatter,
)

REFRESH_CHUNK = 32
"""Positions per row whose keys and values are refreshed at once. The number is fixed because
positions refreshed together see each other: samples must not depend on the batch."""

OrderFunction = Callable[
    [TokenNetwork, DiscreteProcess, Keys, Int[Array, "B L"], TokenControls], Decoded
]


@dataclasses.dataclass(frozen=True)
class Order:
    """An unmasking order.

    Attributes:
      decode: the function; see `ancestral` for its arguments and results.
      help: one line for the reference of settings.
      can_refresh: whether it supports `TokenNetwork.refresh`.
      fixed_steps: whether the number of steps is known before decoding starts.
      any_process: whether it decodes any `DiscreteProcess`, not only absorbing masks.
    """

    decode: OrderFunction
    help: str
    can_refresh: bool = False
    fixed_steps: bool = True
    any_process: bool = False


def ancestral(
    network: TokenNetwork,
    process: DiscreteProcess,
    keys: Keys,
    tokens: Int[Array, "B L"],
    controls: TokenControls,
    *,
    equal_counts: bool = False,
    rows: int = LOGIT_ROWS,
) -> Decoded:
    """Unmasks every masked position in `controls.steps` reverse steps on an equal grid from 1 to 0.

    In the step from t to s a masked token is unmasked with probability 1 - s/t. On the equal grid
    this makes the step that unmasks a position uniform over all steps and independent of everything
    else, so it is sampled first, once. The token itself is sampled in that step, with a
    separate random number. A token that is unmasked (or given) never changes.

    Since the positions of a step are known in advance, logits are computed for them alone, and a
    step in which no row unmasks anything is skipped. The distribution is that of `plain`. With
    `network.refresh` it is only close to that.

    Args:
      network: see `TokenNetwork`.
      process: absorbing masks.
      keys: `[B]`, one per sample.
      tokens: the prompt; masked positions are filled in.
      controls: see `TokenControls`.
      equal_counts: every step unmasks the same number of positions (plus or minus one) instead;
        their order is random as before.
      rows: see `LOGIT_ROWS`.
    """
    length, steps = tokens.shape[1], controls.steps
    when_keys, token_keys = split_per_sample(keys)
    when = _unmasking_steps(when_keys, process.is_open(tokens), steps, equal_counts)
    uniform = uniform_per_sample(token_keys, (length,))
    order = jnp.argsort(when, axis=1)
    sampleable = jnp.asarray(process.sampleable)
    size = chunk_size(tokens, rows)

    def next_step(k: Array) -> Array:
        return jnp.min(jnp.where(when > k, when, steps)).astype(jnp.int32)

    def step(carry: tuple[Array, Array, Array, Any]) -> tuple[Array, Array, Array, Any]:
        previous, k, x, context = carry
        context = _updated_context(network, context, x, order, when, previous, k)
        first, last = _unmasked_before(when, k), _unmasked_before(when, k + 1)

        def unmask_chunk(i: Array, x: Array) -> Array:
            positions, target = chunk(order, first, last, i, size)
            drawn, _ = sample_at(network, context, positions, sampleable, controls, uniform)
            return scatter(x, target, drawn.astype(x.dtype))

        x = jax.lax.fori_loop(0, -(-jnp.max(last - first) // size), unmask_chunk, x)
        return k, next_step(k), x, None if network.refresh is None else context

    before_first = jnp.int32(-1)
    start = (before_first, next_step(before_first), tokens, _empty_context(network, tokens))
    return jax.lax.while_loop(lambda carry: carry[1] < steps, step, start)[2], when


def plain(
    network: TokenNetwork,
    process: DiscreteProcess,
    keys: Keys,
    tokens: Int[Array, "B L"],
    controls: TokenControls,
    *,
    rows: int = LOGIT_ROWS,
) -> Decoded:
    """The reverse process step by step, for any `DiscreteProcess`: the reference of `ancestral`.

    Every step samples x_0 at all open positions and lets `process.step` choose what changes. For
    absorbing masks the distribution is that of `ancestral`, at many times its cost.
    """
    size, length = chunk_size(tokens, rows), tokens.shape[1]
    free, sampleable = process.is_open(tokens), jnp.asarray(process.sampleable)
    order = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    none, all_ = jnp.zeros((len(tokens), 1), jnp.int32), jnp.full((len(tokens), 1), length)

    def step(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        x, when = carry
        token_keys, step_keys = split_per_sample(fold_in_per_sample(keys, k))
        uniform = uniform_per_sample(token_keys, (length,))
        context = network.context(x, k)

        def sample_chunk(i: Array, x_0: Array) -> Array:
            positions, target = chunk(order, none, all_, i, size)
            drawn, _ = sample_at(network, context, positions, sampleable, controls, uniform)
            return scatter(x_0, target, drawn.astype(x.dtype))

        x_0 = jax.lax.fori_loop(0, -(-length // size), sample_chunk, x)
        t, s = 1.0 - k / controls.steps, 1.0 - (k + 1) / controls.steps
        x_s = jax.vmap(process.step, in_axes=(0, 0, 0, None, None))(step_keys, x, x_0, t, s)
        x_s = jnp.where(free, x_s, tokens)
        return x_s, jnp.where(x_s != x, k, when)

    start = (tokens, jnp.full(tokens.shape, -1, jnp.int32))
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(controls.steps), step, start)


def equal_counts(*args: Any, **options: Any) -> Decoded:
    """`ancestral` with the same number of positions in every step."""
    return ancestral(*args, equal_counts=True, **options)


ORDERS: dict[str, Order] = {
    "random": Order(ancestral, "the reverse process: random order", can_refresh=True),
    "count": Order(equal_counts, "random order, equal counts in all steps", can_refresh=True),
    "confidence": Order(by_confidence, "the most confident tokens first, equal counts"),
    "threshold": Order(by_threshold, "all tokens above a confidence", fixed_steps=False),
    "plain": Order(
        plain, "the reverse process, all logits in every step (slow; a reference)", any_process=True
    ),
}
"""Every unmasking order by its name in `sampling.order`."""


def register_order(name: str, order: Order) -> None:
    """Makes an unmasking order available as `sampling.order = name`.

    Raises:
      ValueError: the name is taken.
    """
    if name in ORDERS:
        raise ValueError(f"order {name} is already registered")
    ORDERS[name] = order


def _unmasking_steps(keys: Array, masked: Array, steps: Array | int, equal: bool) -> Array:
    """The step in which each position is unmasked, `[B, L]`; -1 where it is given."""
    place = uniform_per_sample(keys, masked.shape[1:])
    if equal:
        rank = jnp.argsort(jnp.argsort(jnp.where(masked, place, 2.0), axis=1), axis=1)
        when = rank * steps // jnp.maximum(masked.sum(axis=1, keepdims=True), 1)
    else:
        when = jnp.floor(place * steps).astype(jnp.int32)
    return jnp.where(masked, jnp.minimum(when, steps - 1), -1)


def _unmasked_before(when: Array, k: Array) -> Array:
    """How many positions of each row are given or unmasked before step k, `[B, 1]`."""
    return jnp.sum(when < k, axis=1, keepdims=True)


def _updated_context(
    network: TokenNetwork,
    context: Any,
    x: Array,
    order: Array,
    when: Array,
    previous: Array,
    k: Array,
) -> Any:
    """The context of step k, given that of the step `previous`."""
    if network.refresh is None:
        return network.context(x, k)
    refresh, every = network.refresh, network.refresh_every
    size = min(x.shape[1], REFRESH_CHUNK)
    first, last = _unmasked_before(when, previous), _unmasked_before(when, k)

    def refresh_chunk(i: Array, context: Any) -> Any:
        positions, target = chunk(order, first, last, i, size)
        return refresh(context, jnp.take_along_axis(x, positions, axis=1), target)

    def refreshed() -> Any:
        return jax.lax.fori_loop(0, -(-jnp.max(last - first) // size), refresh_chunk, context)

    # Whether a row with nothing to unmask in a step skips it depends on its batch: the tokens are
    # the same either way.
    is_due = k // every > previous // every
    return jax.lax.cond(is_due, lambda: network.context(x, k), refreshed)


def _empty_context(network: TokenNetwork, tokens: Array) -> Any:
    """What the loop carries before the first context, where contexts are kept between steps."""
    if network.refresh is None:
        return None
    shapes = jax.eval_shape(network.context, tokens, jnp.int32(0))
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

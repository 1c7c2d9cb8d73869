"""Decoding of tokens: which positions a step unmasks, and the loop over steps.

`ORDERS` is the table of all unmasking orders; `register_order` adds one. Each is a pure function
made to be jitted; the number of steps is a run-time value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from diladiff_jax.diffusion.masking import DiscreteProcess
from diladiff_jax.sampling.categorical import (
    fold_in_per_sample,
    sample_categorical,
    split_per_sample,
    text_logits,
    token_distribution,
    uniform_per_sample,
)

REFRESH_CHUNK = 32
"""Positions per row whose keys and values are refreshed at once. The number is fixed because
positions refreshed together see each other: samples must not depend on the batch."""

LOGIT_ROWS = 256
"""Positions of the whole batch that are projected to the vocabulary at once: it bounds the memory
and does not change the samples."""


class TokenControls(NamedTuple):
    """Run-time settings of a decoding; changing them does not recompile. All scalars."""

    steps: Int[Array, ""] | int
    temperature: Float[Array, ""] | float = 1.0
    top_p: Float[Array, ""] | float = 0.9
    threshold: Float[Array, ""] | float = 0.9  # order "threshold" only


@dataclasses.dataclass(frozen=True)
class TokenNetwork:
    """A denoiser as decoding uses it.

    Attributes:
      context: (tokens `[B, L]`, step) -> what `logits` reads; called once per step.
      logits: (context, positions `[B, K]`) -> logits `[B, K, V]`.
      refresh: (context, tokens `[B, K]`, their positions `[B, K]`) -> the context with only these
        positions recomputed; positions of L and above are ignored.
      refresh_every: with `refresh`, `context` is called only in the first step of each
        `refresh_every`; in between only the tokens of the step before are refreshed.
    """

    context: Callable[[Array, Array], Any]
    logits: Callable[[Any, Array], Array]
    refresh: Callable[[Any, Array, Array], Any] | None = None
    refresh_every: int = 1


Decoded = tuple[Int[Array, "B L"], Int[Array, "B L"]]
"""tokens, and the step in which each position was unmasked (-1 where it was given)."""

OrderFunction = Callable[
    [TokenNetwork, DiscreteProcess, PRNGKeyArray, Int[Array, "B L"], TokenControls], Decoded
]


@dataclasses.dataclass(frozen=True)
class Order:
    """An unmasking order.

    Attributes:
      decode: the function; see `ancestral` for its arguments and results.
      help: one line for the reference of settings.
      can_refresh: whether it supports `TokenNetwork.refresh`.
      fixed_steps: whether the number of steps is known before decoding starts.
    """

    decode: OrderFunction
    help: str
    can_refresh: bool = False
    fixed_steps: bool = True


def ancestral(
    network: TokenNetwork,
    process: DiscreteProcess,
    keys: PRNGKeyArray,
    tokens: Int[Array, "B L"],
    controls: TokenControls,
    *,
    equal_counts: bool = False,
    rows: int = LOGIT_ROWS,
) -> Decoded:
    """Unmasks every masked position in `controls.steps` reverse steps on an equal grid from 1 to 0.

    In the step from t to s a masked token is unmasked with probability 1 - s/t. On the equal grid
    this makes the step that unmasks a position uniform over all steps and independent of everything
    else, so it is sampled first, once. The category is sampled in that step, from a draw of its
    own. A token that is unmasked (or given) never changes.

    Since the positions of a step are known in advance, logits are computed for them alone, and a
    step in which no row unmasks anything is skipped. The law is that of the plain sampler. With
    `network.refresh` it is only close to it.

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
    size = _chunk_size(tokens, rows)

    def next_step(k: Array) -> Array:
        return jnp.min(jnp.where(when > k, when, steps)).astype(jnp.int32)

    def unmasked_before(k: Array) -> Array:
        return jnp.sum(when < k, axis=1, keepdims=True)

    def updated(context: Any, previous: Array, k: Array, x: Array) -> Any:
        if network.refresh is None:
            return network.context(x, k)
        # A row without work in a step may skip it or not, as its batch has it: both give the
        # same tokens.
        return jax.lax.cond(
            k // network.refresh_every > previous // network.refresh_every,
            lambda: network.context(x, k),
            lambda: _refreshed(
                network, context, x, order, unmasked_before(previous), unmasked_before(k)
            ),
        )

    def step(carry: tuple[Array, Array, Array, Any]) -> tuple[Array, Array, Array, Any]:
        previous, k, x, context = carry
        context = updated(context, previous, k, x)
        first, last = unmasked_before(k), unmasked_before(k + 1)

        def unmask_chunk(i: Array, x: Array) -> Array:
            positions, target = _chunk(order, first, last, i, size)
            logits = text_logits(network.logits(context, positions), sampleable)
            p = token_distribution(logits, controls.temperature, controls.top_p)
            drawn = sample_categorical(p, jnp.take_along_axis(uniform, positions, axis=1))
            return _scatter(x, target, drawn.astype(x.dtype))

        x = jax.lax.fori_loop(0, -(-jnp.max(last - first) // size), unmask_chunk, x)
        return k, next_step(k), x, None if network.refresh is None else context

    before_first = jnp.int32(-1)
    start = (before_first, next_step(before_first), tokens, _empty_context(network, tokens))
    return jax.lax.while_loop(lambda carry: carry[1] < steps, step, start)[2], when


def by_confidence(
    network: TokenNetwork,
    process: DiscreteProcess,
    keys: PRNGKeyArray,
    tokens: Int[Array, "B L"],
    controls: TokenControls,
    *,
    use_threshold: bool = False,
    rows: int = LOGIT_ROWS,
) -> Decoded:
    """Unmasks first the tokens that the model is most confident of.

    Every step samples a token for each masked position. Its confidence is the probability that the
    model itself gives it, whatever temperature and nucleus it was sampled with (at temperature 0
    every sample would be certain). Each step keeps the same number of the most confident tokens
    (plus or minus one). With `use_threshold` it keeps every token of at least
    `controls.threshold`, and the most confident one in any case, and takes as many steps as that
    needs (`controls.steps` is ignored). The other tokens are sampled again in the next step. This
    is not a sample of the model's law: it costs diversity.

    Arguments and results are otherwise those of `ancestral`.
    """
    size, length = _chunk_size(tokens, rows), tokens.shape[1]
    free = process.is_open(tokens)
    total = jnp.sum(free, axis=1, keepdims=True)
    sampleable = jnp.asarray(process.sampleable)

    def step(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        k, x, when = carry
        context, masked = network.context(x, k), free & (when < 0)
        left = masked.sum(axis=1, keepdims=True)
        order = jnp.argsort(~masked, axis=1)  # the masked positions first, in their order
        uniform = uniform_per_sample(fold_in_per_sample(keys, k), (length,))

        def sample_chunk(i: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
            positions, target = _chunk(order, jnp.zeros_like(left), left, i, size)
            logits = text_logits(network.logits(context, positions), sampleable)
            p = token_distribution(logits, controls.temperature, controls.top_p)
            drawn = sample_categorical(p, jnp.take_along_axis(uniform, positions, axis=1))
            confidence = jnp.take_along_axis(
                jax.nn.softmax(logits, axis=-1), drawn[..., None], axis=-1
            )[..., 0]
            # NaN (a diverged network) counts as no confidence: every step must keep something.
            return (
                _scatter(found[0], target, drawn.astype(x.dtype)),
                _scatter(found[1], target, jnp.nan_to_num(confidence)),
            )

        nothing = (x, jnp.full(x.shape, -1.0))
        drawn, confidence = jax.lax.fori_loop(0, -(-jnp.max(left) // size), sample_chunk, nothing)
        rank = jnp.argsort(jnp.argsort(-confidence, axis=1), axis=1)
        if use_threshold:
            kept = (rank == 0) | (confidence >= controls.threshold)
        else:
            kept = rank < total * (k + 1) // controls.steps - (total - left)
        kept &= masked
        return k + 1, jnp.where(kept, drawn, x), jnp.where(kept, k, when)

    start = (jnp.int32(0), tokens, jnp.full(tokens.shape, -1, jnp.int32))
    return jax.lax.while_loop(lambda carry: jnp.any(free & (carry[2] < 0)), step, start)[1:]


def plain(
    network: TokenNetwork,
    process: DiscreteProcess,
    keys: PRNGKeyArray,
    tokens: Int[Array, "B L"],
    controls: TokenControls,
    *,
    rows: int = LOGIT_ROWS,
) -> Decoded:
    """The reverse process step by step, for any `DiscreteProcess`: the reference of `ancestral`.

    Every step samples x_0 at all open positions and lets `process.step` choose what changes. For
    absorbing masks the law is that of `ancestral`, at many times its cost.
    """
    size, length = _chunk_size(tokens, rows), tokens.shape[1]
    free, sampleable = process.is_open(tokens), jnp.asarray(process.sampleable)
    order = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    none, all_ = jnp.zeros((len(tokens), 1), jnp.int32), jnp.full((len(tokens), 1), length)

    def step(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        x, when = carry
        token_keys, step_keys = split_per_sample(fold_in_per_sample(keys, k))
        uniform = uniform_per_sample(token_keys, (length,))
        context = network.context(x, k)

        def sample_chunk(i: Array, x_0: Array) -> Array:
            positions, target = _chunk(order, none, all_, i, size)
            logits = text_logits(network.logits(context, positions), sampleable)
            p = token_distribution(logits, controls.temperature, controls.top_p)
            drawn = sample_categorical(p, jnp.take_along_axis(uniform, positions, axis=1))
            return _scatter(x_0, target, drawn.astype(x.dtype))

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


def by_threshold(*args: Any, **options: Any) -> Decoded:
    """`by_confidence` with a threshold."""
    return by_confidence(*args, use_threshold=True, **options)


ORDERS: dict[str, Order] = {
    "random": Order(ancestral, "the reverse process: random order", can_refresh=True),
    "count": Order(equal_counts, "random order, equal counts in all steps", can_refresh=True),
    "confidence": Order(by_confidence, "the most confident tokens first, equal counts"),
    "threshold": Order(by_threshold, "all tokens above a confidence", fixed_steps=False),
    "plain": Order(plain, "the reverse process, all logits in every step (slow; a reference)"),
}
"""Every unmasking order by its name in `sampling.order`."""


def register_order(name: str, order: Order) -> None:
    """Makes an unmasking order available as `sampling.order = name`.

    Raises:
      ValueError: the name is taken.
    """
    if name in ORDERS:
        raise ValueError(f"order {name} is registered already")
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


def _chunk_size(tokens: Array, rows: int) -> int:
    """Positions of each row in a chunk, so that a chunk has about `rows` in the whole batch."""
    batch, length = tokens.shape
    return max(1, min(length, rows // batch))


def _chunk(order: Array, first: Array, last: Array, i: Array, size: int) -> tuple[Array, Array]:
    """The i-th chunk of the positions `order[first:last]` of each row, `[B, size]`.

    The second result is the same with L in the slots past a row's last, where nothing is written.
    """
    length = order.shape[1]
    slot = first + i * size + jnp.arange(size)[None, :]
    positions = jnp.take_along_axis(order, jnp.minimum(slot, length - 1), axis=1)
    return positions, jnp.where(slot < last, positions, length)


def _scatter(x: Array, positions: Array, values: Array) -> Array:
    """Writes `values [B, K]` into `x [B, L]` at `positions`, dropping those out of range."""
    return jax.vmap(lambda row, at, value: row.at[at].set(value, mode="drop"))(x, positions, values)


def _refreshed(
    network: TokenNetwork, context: Any, x: Array, order: Array, first: Array, last: Array
) -> Any:
    """The context with the positions `order[first:last]` of each row refreshed, in chunks."""
    size = min(x.shape[1], REFRESH_CHUNK)

    def refresh_chunk(i: Array, context: Any) -> Any:
        positions, target = _chunk(order, first, last, i, size)
        assert network.refresh is not None
        return network.refresh(context, jnp.take_along_axis(x, positions, axis=1), target)

    return jax.lax.fori_loop(0, -(-jnp.max(last - first) // size), refresh_chunk, context)


def _empty_context(network: TokenNetwork, tokens: Array) -> Any:
    """What the loop carries before the first context, where contexts are kept between steps."""
    if network.refresh is None:
        return None
    shapes = jax.eval_shape(network.context, tokens, jnp.int32(0))
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

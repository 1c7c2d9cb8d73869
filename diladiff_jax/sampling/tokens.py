"""Decoding of masked diffusion, in random order or by confidence, and drawing of tokens with temperature and nucleus."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diladiff_jax.diffusion.masking import restrict

Array = jax.Array

RENEWED = 32
"""Positions of each row whose part of the context is made anew at once; see `ancestral`."""


def nucleus_threshold(probabilities: Array, top_p: Array | float) -> Array:
    """The probability of the last token of the nucleus, `[..., V] -> [..., 1]`: the largest p with mass {>= p} >= top_p.

    Instead of sorting the vocabulary, the threshold's 31 bits are found one by one: non-negative float32
    values are ordered as their bit patterns are, so the result is exact to the token. Tokens as probable as
    the last one are all kept.
    """

    def body(i: Array, low: Array) -> Array:
        candidate = low | (jnp.int32(1) << (30 - i))
        threshold = jax.lax.bitcast_convert_type(candidate, jnp.float32)
        mass = jnp.sum(
            jnp.where(probabilities >= threshold, probabilities, 0.0), axis=-1, keepdims=True
        )
        return jnp.where(mass >= target, candidate, low)

    target = jnp.maximum(
        top_p, jnp.finfo(jnp.float32).tiny
    )  # a nucleus of mass 0 is the most likely token

    low = jnp.zeros(probabilities.shape[:-1] + (1,), jnp.int32)
    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 31, body, low), jnp.float32)


def token_distribution(logits: Array, temperature: Array | float, top_p: Array | float) -> Array:
    """Probabilities after temperature and nucleus, float32 `[..., V]`, not renormalized after the cut.

    Temperature 0 is the most likely token; nucleus 1 keeps everything; the most likely token always stays.
    """
    logits = logits.astype(jnp.float32)
    top = jnp.max(logits, axis=-1, keepdims=True)
    warm = jnp.maximum(temperature, 1e-6)
    tempered = jnp.where(logits == top, 0.0, (logits - top) / warm)
    p = jax.nn.softmax(
        jnp.where(temperature > 0, tempered, jnp.where(logits == top, 0.0, -jnp.inf)), axis=-1
    )
    # At top_p = 1 there is nothing to find, and rounding must not cut a tail whose mass falls short of 1.
    return jax.lax.cond(
        jnp.asarray(top_p) < 1.0,
        lambda: jnp.where(p >= nucleus_threshold(p, top_p), p, 0.0),
        lambda: p,
    )


def of_text(logits: Array, sampleable: Array) -> Array:
    """Logits `[..., V]` as float32, -inf where `sampleable [V]` says that an id is not text, whatever a network gone wrong has given: what is not
    a number counts as -inf, and a row that has nothing left is uniform over text. Otherwise `masking.restrict`."""
    logits = logits.astype(jnp.float32)
    logits = restrict(jnp.where(jnp.isnan(logits), -jnp.inf, logits), sampleable)
    nothing = jnp.max(logits, axis=-1, keepdims=True) == -jnp.inf
    return restrict(jnp.where(nothing, 0.0, logits), sampleable)


def draw(probabilities: Array, uniform: Array) -> Array:
    """Index drawn from unnormalized `probabilities [..., V]` by inverting their cumulative sum at `uniform [...]` in [0, 1).

    One uniform per row, in place of V of them; an index of probability zero is never drawn.
    """
    cumulative = jnp.cumsum(probabilities, axis=-1)
    level = uniform[..., None] * cumulative[..., -1:]
    # A parallel cumulative sum may rise by a rounding error where the probability is zero, so that is asked for too.
    above = (cumulative > level) & (probabilities > 0)
    return jnp.where(
        above.any(axis=-1), jnp.argmax(above, axis=-1), last_positive(probabilities)
    ).astype(jnp.int32)


def last_positive(probabilities: Array) -> Array:
    """Index of the last entry above zero, `[..., V] -> [...]`."""
    size = probabilities.shape[-1]
    return size - 1 - jnp.argmax(jnp.flip(probabilities > 0, axis=-1), axis=-1)


def uniform_per_sample(keys: Array, shape: tuple[int, ...]) -> Array:
    """Uniform [0, 1) `[B, *shape]`, row i drawn from `keys[i]` alone."""
    return jax.vmap(lambda key: jax.random.uniform(key, shape))(keys)


def ancestral(
    context_of: Callable[[Array, Array], Any],
    logits_at: Callable[[Any, Array], Array],
    keys: Array,
    tokens: Array,
    mask_id: int,
    sampleable: Array,
    steps: Array | int,
    *,
    temperature: Array | float = 1.0,
    top_p: Array | float = 0.9,
    equal_counts: bool = False,
    renew: Callable[[Any, Array, Array], Any] | None = None,
    every: int = 1,
    rows: int = 256,
) -> tuple[Array, Array]:
    """Unmasks every masked position of `tokens [B, L]` in `steps` reverse steps from ratio 1 to 0 on an equal grid.

    In the step from t to s a masked token is unmasked with probability 1 - s/t. On the equal grid that makes
    the step in which a position is unmasked uniform over all steps and independent of everything else, so it
    is drawn first, once; the category is drawn when its step comes, with a draw of its own. A token that is
    unmasked (or was given) never changes.

    Since the positions of a step are known before it, logits are made for them alone, some at a time in as many
    rounds as the fullest row needs, and a step in which nothing in the batch is unmasked is left out: the law is
    that of the sampler that does neither.

    Args:
      context_of: (tokens `[B, L]`, the step) -> what `logits_at` reads, made once in every step.
      logits_at: (context, positions `[B, K]`) -> logits `[B, K, V]`.
      keys: `[B]`, one per sample.
      equal_counts: the order of positions is random as before, but every step unmasks the same number of them (one more or less).
      renew: (context, tokens `[B, K]`, their positions `[B, K]`) -> context in which these alone are made anew; positions of L and
        above are nothing. With it `context_of` is called only in the first step of each `every`; between, what the step before
        unmasked is renewed. No longer the model's law, but close to it, for little of the work.
      rows: positions worked on at once in the whole batch; it bounds the memory and leaves the samples as they are.

    Returns:
      tokens `[B, L]` and the step at which each position was unmasked, int32 `[B, L]` (-1 where it was given).
    """
    batch, length = tokens.shape
    when_key, what_key = jax.vmap(lambda key: jax.random.split(key))(keys).T
    masked = tokens == mask_id
    place = uniform_per_sample(when_key, (length,))
    if equal_counts:
        rank = jnp.argsort(jnp.argsort(jnp.where(masked, place, 2.0), axis=1), axis=1)
        when = rank * steps // jnp.maximum(masked.sum(axis=1, keepdims=True), 1)
    else:
        when = jnp.floor(place * steps).astype(jnp.int32)
    when = jnp.where(masked, jnp.minimum(when, steps - 1), -1)
    uniform = uniform_per_sample(what_key, (length,))
    order = jnp.argsort(when, axis=1)
    size = max(1, min(length, rows // batch))

    def next_step(k: Array) -> Array:
        return jnp.min(jnp.where(when > k, when, steps)).astype(jnp.int32)

    def before(k: Array) -> Array:
        return jnp.sum(when < k, axis=1, keepdims=True)

    def changed(context: Any, x: Array, first: Array, last: Array) -> Any:
        # A fixed number at a time, for those that are renewed together see each other: samples must not depend on the batch.
        some = min(length, RENEWED)

        def renewed(i: Array, context: Any) -> Any:
            slot = first + i * some + jnp.arange(some)[None, :]
            positions = jnp.take_along_axis(order, jnp.minimum(slot, length - 1), axis=1)
            return renew(
                context,
                jnp.take_along_axis(x, positions, axis=1),
                jnp.where(slot < last, positions, length),
            )

        return jax.lax.fori_loop(0, -(-jnp.max(last - first) // some), renewed, context)

    def step(carry: tuple[Array, Array, Array, Any]) -> tuple[Array, Array, Array, Any]:
        previous, k, x, context = carry
        first, last = before(k), before(k + 1)
        if renew is None:
            context = context_of(x, k)
        else:
            # Steps in which a row has nothing to do may be left out or not, as the batch has it: its tokens are the same.
            context = jax.lax.cond(
                k // every > previous // every,
                lambda: context_of(x, k),
                lambda: changed(context, x, before(previous), first),
            )

        def some(i: Array, x: Array) -> Array:
            slot = first + i * size + jnp.arange(size)[None, :]
            positions = jnp.take_along_axis(order, jnp.minimum(slot, length - 1), axis=1)
            p = token_distribution(
                of_text(logits_at(context, positions), sampleable), temperature, top_p
            )
            drawn = draw(p, jnp.take_along_axis(uniform, positions, axis=1))
            # Slots past the row's last are sent outside, where nothing is written.
            goal = jnp.where(slot < last, positions, length)
            return jax.vmap(lambda row, at, value: row.at[at].set(value, mode="drop"))(
                x, goal, drawn.astype(x.dtype)
            )

        x = jax.lax.fori_loop(0, -(-jnp.max(last - first) // size), some, x)
        return k, next_step(k), x, None if renew is None else context

    nothing = (
        None
        if renew is None
        else jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(context_of, tokens, jnp.int32(0)),
        )
    )
    start = (jnp.int32(-1), next_step(jnp.int32(-1)), tokens, nothing)
    return jax.lax.while_loop(lambda carry: carry[1] < steps, step, start)[2], when


def by_confidence(
    context_of: Callable[[Array, Array], Any],
    logits_at: Callable[[Any, Array], Array],
    keys: Array,
    tokens: Array,
    mask_id: int,
    sampleable: Array,
    steps: Array | int,
    *,
    temperature: Array | float = 1.0,
    top_p: Array | float = 0.9,
    threshold: Array | float | None = None,
    rows: int = 256,
) -> tuple[Array, Array]:
    """Unmasks first what the model is surest of; arguments and results otherwise as of `ancestral`.

    In every step a token is drawn for each masked position, and its confidence is the probability that the model itself gives it,
    whatever temperature and nucleus it was drawn with (at temperature 0 all draws would be sure). Without
    `threshold` each of the `steps` keeps the same number of the most confident tokens (one more or less); with it, a step keeps all
    that are at least so probable, and the most probable one in any case, and there are as many steps as that takes (`steps`
    is not read). What is not kept is drawn anew in the next step. This is not a sample of the model's law: it costs diversity.
    """
    length = tokens.shape[1]
    size = max(1, min(length, rows // tokens.shape[0]))
    free = tokens == mask_id
    total = jnp.sum(free, axis=1, keepdims=True)

    def step(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        k, x, when = carry
        context, masked = context_of(x, k), free & (when < 0)
        left = masked.sum(axis=1, keepdims=True)
        order = jnp.argsort(~masked, axis=1)  # masked positions first, in their order
        uniform = uniform_per_sample(
            jax.vmap(lambda key: jax.random.fold_in(key, k))(keys), (length,)
        )

        def some(i: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
            slot = i * size + jnp.arange(size)[None, :]
            positions = jnp.take_along_axis(order, jnp.minimum(slot, length - 1), axis=1)
            logits = of_text(logits_at(context, positions), sampleable)
            drawn = draw(
                token_distribution(logits, temperature, top_p),
                jnp.take_along_axis(uniform, positions, axis=1),
            )
            sure = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), drawn[..., None], axis=-1)[
                ..., 0
            ]
            goal = jnp.where(slot < left, positions, length)
            put = jax.vmap(lambda row, at, value: row.at[at].set(value, mode="drop"))
            # Not a number (a network gone wrong) counts as not sure at all: every step must keep something.
            return put(found[0], goal, drawn.astype(x.dtype)), put(
                found[1], goal, jnp.nan_to_num(sure)
            )

        nothing = (x, jnp.full(x.shape, -1.0))
        drawn, sure = jax.lax.fori_loop(0, -(-jnp.max(left) // size), some, nothing)
        rank = jnp.argsort(jnp.argsort(-sure, axis=1), axis=1)
        if threshold is None:
            kept = rank < total * (k + 1) // steps - (total - left)
        else:
            kept = (rank == 0) | (sure >= threshold)
        kept &= masked
        return k + 1, jnp.where(kept, drawn, x), jnp.where(kept, k, when)

    start = (jnp.int32(0), tokens, jnp.full(tokens.shape, -1, jnp.int32))
    return jax.lax.while_loop(lambda carry: jnp.any(free & (carry[2] < 0)), step, start)[1:]

"""Training state and the two compiled functions of every stage: one update, one validation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from diladiff_jax.objectives.base import Context, Metrics, Objective, Part
from diladiff_jax.parallel import sharding
from diladiff_jax.training.optimizer import path_names

Array = jax.Array


_ROUNDING = (
    2**31 - 1
)  # the fold of an update's key that its rounding draws from; microbatches count from 0


class TrainState(flax.struct.PyTreeNode):
    """Everything that an update changes. `key` is constant: step n draws from `fold_in(key, n)`."""

    step: Array
    params: Any
    ema: Any  # None where no average is kept
    optimizer: Any
    statistics: Any
    key: Array

    @property
    def averaged(self) -> Any:
        """The parameters that samplers, validation and later stages use."""
        return self.params if self.ema is None else self.ema


def checkpoint_items(state: TrainState) -> dict[str, Any]:
    """The state, or its shapes or shardings, as the named items of a checkpoint."""
    items = {
        "params": state.params,
        "training": {"optimizer": state.optimizer, "step": state.step, "key": state.key},
    }
    if state.ema is not None:
        items["ema"] = state.ema
    if state.statistics:
        items["statistics"] = state.statistics
    return items


def state_of_items(items: Mapping[str, Any]) -> TrainState:
    """The inverse of `checkpoint_items`."""
    training = items["training"]
    return TrainState(
        step=training["step"],
        params=items["params"],
        ema=items.get("ema"),
        optimizer=training["optimizer"],
        statistics=items.get("statistics", {}),
        key=training["key"],
    )


def stored(params: Any, dtype: Any) -> Any:
    """Parameters as the state keeps them: matrices in `dtype`, gains and biases in float32, which cost nothing."""
    return jax.tree.map(lambda x: x.astype(dtype if x.ndim > 1 else jnp.float32), params)


def round_stochastically(key: Array, x: Array, dtype: Any) -> Array:
    """float32 to bfloat16, up or down with the probabilities that leave the mean as it is; anything else is just cast.

    An update is often less than half the spacing of bfloat16 numbers: rounded to the nearest one it would never arrive.
    """
    if dtype != jnp.bfloat16:
        return x.astype(dtype)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    up = (jax.lax.bitcast_convert_type(x, jnp.uint32) + noise) & jnp.uint32(0xFFFF0000)
    return jnp.where(jnp.isfinite(x), jax.lax.bitcast_convert_type(up, jnp.float32), x).astype(
        dtype
    )


def init_state(
    objective: Objective,
    tx: optax.GradientTransformation,
    key: Array,
    *,
    ema: bool,
    dtype: Any = jnp.float32,
) -> TrainState:
    """Fresh state with parameters still boxed in their logical axis names; meant to be traced. Matrices are kept in `dtype`, average
    and optimizer in float32."""
    init_key, key = jax.random.split(key)
    params = objective.init(init_key)
    plain = nn.unbox(params)
    statistics = objective.init_statistics() if hasattr(objective, "init_statistics") else {}
    # `+ 0`: the average must own its buffers, for the state is donated.
    average = jax.tree.map(lambda x: x + 0, params) if ema else None
    return TrainState(
        jnp.zeros((), jnp.int32),
        stored(params, dtype),
        average,
        tx.init(plain),
        statistics,
        jax.random.key_data(key),
    )


def state_shardings(abstract: TrainState, mesh: Mesh) -> TrainState:
    """Shardings of the unboxed state: average and optimizer lie as their parameters do."""
    params = sharding.parameter_shardings(abstract.params, mesh)
    whole = sharding.replicated(mesh)
    return TrainState(
        step=whole,
        params=params,
        ema=None if abstract.ema is None else params,
        optimizer=sharding.like_parameters(abstract.optimizer, params, mesh),
        statistics=jax.tree.map(lambda _: whole, abstract.statistics),
        key=whole,
    )


def average_decay(step: Array, decay: float) -> Array:
    """The decay at `step`: ramped as (1 + n) / (10 + n), so that the initial parameters are soon forgotten."""
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def make_train_step(
    objective: Objective, tx: optax.GradientTransformation, *, ema: float, accumulate: int
) -> Callable[[TrainState, Context, Array], tuple[TrainState, Metrics]]:
    """`(state, context, tokens [B, L]) -> (state, metrics)`.

    An objective with statistics of its own keeps them in the state; the others read the context's.

    With `accumulate` > 1 the batch is cut into that many microbatches, each with draws of its own; gradients
    and metrics are their means. `gradient_norm` is that of what is trained, before clipping. An update whose loss or gradient
    is not finite leaves everything as it was but the step (`skipped` is 1 then, else 0).
    """

    def train_step(
        state: TrainState, context: Context, tokens: Array
    ) -> tuple[TrainState, Metrics]:
        own = bool(state.statistics)

        def gradients(statistics: Any, tokens: Array, part: Part) -> Any:
            def loss(params: Any) -> Any:
                read = context.replace(statistics=statistics) if own else context
                return objective.loss(params, read, tokens, key, state.step, train=True, part=part)

            (value, (metrics, statistics)), grads = jax.value_and_grad(loss, has_aux=True)(
                state.params
            )
            return grads, {"loss": value, **metrics}, statistics if own else {}

        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        if accumulate == 1:
            grads, metrics, statistics = gradients(state.statistics, tokens, Part())
        else:
            # Every accumulate-th row, so that each microbatch stays spread over all devices.
            micro = tokens.reshape(-1, accumulate, tokens.shape[1]).swapaxes(0, 1)

            def body(carry: Any, item: Any) -> Any:
                total, statistics = carry
                rows, i = item
                grads, metrics, statistics = gradients(statistics, rows, Part(i, accumulate))
                return (jax.tree.map(jnp.add, total, grads), statistics), metrics

            zero = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), state.params)
            (total, statistics), metrics = jax.lax.scan(
                body, (zero, state.statistics), (micro, jnp.arange(accumulate))
            )
            grads = jax.tree.map(lambda g: g / accumulate, total)
            metrics = jax.tree.map(lambda m: m.mean(), metrics)
        grads = stored(grads, jnp.float32)
        trained = jax.tree_util.tree_map_with_path(
            lambda path, g: None if objective.group(path_names(path)) == "frozen" else g, grads
        )
        metrics["gradient_norm"] = optax.tree.norm(trained)
        exact = stored(state.params, jnp.float32)
        updates, optimizer = tx.update(grads, state.optimizer, exact)
        exact = optax.apply_updates(exact, updates)
        leaves, structure = jax.tree.flatten(exact)
        keys = jax.random.split(jax.random.fold_in(key, _ROUNDING), len(leaves))
        rounded = [
            round_stochastically(*item)
            for item in zip(
                keys, leaves, [p.dtype for p in jax.tree.leaves(state.params)], strict=True
            )
        ]
        params = jax.tree.unflatten(structure, rounded)
        average = None
        if state.ema is not None:
            decay = average_decay(state.step, ema)
            average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.ema, exact)
        new = TrainState(state.step, params, average, optimizer, statistics, state.key)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
        metrics["skipped"] = 1.0 - finite
        return jax.tree.map(lambda ours, old: jnp.where(finite, ours, old), new, state).replace(
            step=state.step + 1
        ), metrics

    return train_step


def is_finite(state: TrainState) -> Array:
    """Whether all parameters, and their average, are finite numbers. An update is judged by its loss and gradient, before what it makes of them."""
    return jnp.stack(
        [jnp.isfinite(x).all() for x in jax.tree.leaves((state.params, state.ema))]
    ).all()


def make_validation_step(
    objective: Objective,
) -> Callable[[TrainState, Context, Array, Array], Metrics]:
    """`(state, context, tokens, key) -> metrics` of the averaged parameters, without dropout or augmentation."""

    def validation_step(state: TrainState, context: Context, tokens: Array, key: Array) -> Metrics:
        read = context.replace(statistics=state.statistics) if state.statistics else context
        loss, (metrics, _) = objective.loss(
            state.averaged, read, tokens, key, state.step, train=False
        )
        return {"loss": loss, **metrics}

    return validation_step


def compile_steps(
    objective: Objective,
    tx: optax.GradientTransformation,
    shardings: TrainState,
    context: Context,
    mesh: Mesh,
    *,
    ema: float,
    accumulate: int,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Both functions under `jit` with their shardings; the train step's state is donated."""
    whole, batch = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    context_shardings = jax.tree.map(lambda x: x.sharding, context)
    train = jax.jit(
        sharding.on_mesh(make_train_step(objective, tx, ema=ema, accumulate=accumulate), mesh),
        in_shardings=(shardings, context_shardings, batch),
        out_shardings=(shardings, whole),
        donate_argnums=0,
    )
    validate = jax.jit(
        sharding.on_mesh(make_validation_step(objective), mesh),
        in_shardings=(shardings, context_shardings, batch, whole),
        out_shardings=whole,
    )
    return train, validate

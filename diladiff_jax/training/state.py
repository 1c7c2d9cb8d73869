"""Training state, and the two compiled functions of every stage: one update, one validation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from diladiff_jax.jax_settings import PRNG
from diladiff_jax.objectives.base import Context, Metrics, Objective, Part
from diladiff_jax.parallel import sharding
from diladiff_jax.training.optimizer import FROZEN, path_names

Array = jax.Array
Gradients = tuple[Any, Metrics, Any]
"""(gradients, metrics with the loss, the statistics for the next update)."""

_ROUNDING = 2**31 - 1  # fold of an update's key for its rounding; microbatches count from 0


class TrainState(flax.struct.PyTreeNode):
    """Everything that an update changes.

    Attributes:
      step: number of updates so far.
      params: the parameters.
      ema: their average in float32; None if none is kept.
      optimizer: the optimizer's state.
      statistics: the objective's running moments; empty if it keeps none.
      key: constant; update n draws from `fold_in(key, n)`.
    """

    step: Array
    params: Any
    ema: Any
    optimizer: Any
    statistics: Any
    key: Array

    @property
    def averaged(self) -> Any:
        """The parameters that samplers, validation and later stages use."""
        return self.params if self.ema is None else self.ema

    def items(self) -> dict[str, Any]:
        """The state as the named items of a checkpoint; an average or statistics only if kept."""
        training = {"optimizer": self.optimizer, "step": self.step, "key": self.key}
        items: dict[str, Any] = {"params": self.params, "training": training}
        if self.ema is not None:
            items["ema"] = self.ema
        if self.statistics:
            items["statistics"] = self.statistics
        return items

    @classmethod
    def from_items(cls, items: Mapping[str, Any]) -> TrainState:
        """The inverse of `items`."""
        return cls(
            params=items["params"],
            ema=items.get("ema"),
            statistics=items.get("statistics", {}),
            **items["training"],
        )


def cast_matrices(params: Any, dtype: Any) -> Any:
    """Parameters as the state stores them: matrices in `dtype`, gains and biases in float32."""
    return jax.tree.map(lambda x: x.astype(dtype if x.ndim > 1 else jnp.float32), params)


def round_stochastically(key: Array, x: Array, dtype: Any) -> Array:
    """float32 to bfloat16, up or down with the probabilities that preserve the mean.

    An update is often less than half the spacing of bfloat16 numbers: rounding to the nearest would
    lose it. Any other dtype is just cast.
    """
    if dtype != jnp.bfloat16:
        return x.astype(dtype)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    up = (jax.lax.bitcast_convert_type(x, jnp.uint32) + noise) & jnp.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(up, jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(dtype)


def init_state(
    objective: Objective,
    tx: optax.GradientTransformation,
    key: Array,
    *,
    ema: bool,
    dtype: Any = jnp.float32,
) -> TrainState:
    """Initial state with parameters boxed in their logical axis names; meant to be traced.

    Matrices are stored in `dtype`, average and optimizer in float32.
    """
    init_key, key = jax.random.split(key)
    params = objective.init(init_key)
    plain = nn.unbox(params)
    statistics: Any = getattr(objective, "init_statistics", dict)()
    # `+ 0`: the average must own its buffers, since the state is donated.
    average = jax.tree.map(lambda x: x + 0, params) if ema else None
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=cast_matrices(params, dtype),
        ema=average,
        optimizer=tx.init(plain),
        statistics=statistics,
        key=jax.random.key_data(key),
    )


def state_shardings(abstract: TrainState, mesh: Mesh) -> TrainState:
    """Shardings of the unboxed state; average and optimizer are sharded as their parameters are."""
    params = sharding.parameter_shardings(abstract.params, mesh)
    replicated = sharding.replicated(mesh)
    shardings: Any = TrainState  # a state whose leaves are shardings
    return shardings(
        step=replicated,
        params=params,
        ema=None if abstract.ema is None else params,
        optimizer=sharding.like_parameters(abstract.optimizer, params, mesh),
        statistics=jax.tree.map(lambda _: replicated, abstract.statistics),
        key=replicated,
    )


def average_decay(step: Array, decay: float) -> Array:
    """The decay at `step`, ramped as (1 + n) / (10 + n) so that the start is soon forgotten."""
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def make_train_step(
    objective: Objective, tx: optax.GradientTransformation, *, ema: float, accumulate: int
) -> Callable[[TrainState, Context, Array], tuple[TrainState, Metrics]]:
    """`(state, context, tokens [B, L]) -> (state, metrics)`.

    An objective with statistics of its own keeps them in the state; others read the context's.

    With `accumulate` > 1 the batch is divided into that many microbatches, each with random draws
    of its own; gradients and metrics are their means. `gradient_norm` is that of all groups but
    "frozen", before clipping. If the loss or the gradient is not finite, the update changes only
    the step, and the metric `skipped` is 1 (else 0).
    """

    def train_step(
        state: TrainState, context: Context, tokens: Array
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl=PRNG), state.step)

        def gradients(statistics: Any, tokens: Array, part: Part) -> Gradients:
            def loss(params: Any) -> Any:
                read = context.replace(statistics=statistics) if state.statistics else context
                return objective.loss(params, read, tokens, key, state.step, train=True, part=part)

            found, grads = jax.value_and_grad(loss, has_aux=True)(state.params)
            value, (metrics, statistics) = found
            return grads, {"loss": value, **metrics}, statistics if state.statistics else {}

        if accumulate == 1:
            grads, metrics, statistics = gradients(state.statistics, tokens, Part())
        else:
            grads, metrics, statistics = _accumulated(gradients, state, tokens, accumulate)
        grads = cast_matrices(grads, jnp.float32)
        metrics["gradient_norm"] = optax.tree.norm(_without_frozen(grads, objective))
        new = _updated(state, grads, tx, key, ema).replace(statistics=statistics)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
        metrics["skipped"] = 1.0 - finite
        kept = jax.tree.map(lambda ours, old: jnp.where(finite, ours, old), new, state)
        return kept.replace(step=state.step + 1), metrics

    return train_step


def _accumulated(
    gradients: Callable[[Any, Array, Part], Gradients],
    state: TrainState,
    tokens: Array,
    accumulate: int,
) -> Gradients:
    """Means over microbatches; statistics pass from one to the next."""
    # Every accumulate-th row, so that each microbatch stays distributed over all devices.
    micro = tokens.reshape(-1, accumulate, *tokens.shape[1:]).swapaxes(0, 1)

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
    return grads, jax.tree.map(lambda m: m.mean(), metrics), statistics


def _without_frozen(grads: Any, objective: Objective) -> Any:
    """The gradients of what is trained; None in place of the others."""
    return jax.tree_util.tree_map_with_path(
        lambda path, g: None if objective.group(path_names(path)) == FROZEN else g, grads
    )


def _updated(
    state: TrainState, grads: Any, tx: optax.GradientTransformation, key: Array, ema: float
) -> TrainState:
    """Parameters, average and optimizer after one update, computed in float32."""
    exact = cast_matrices(state.params, jnp.float32)
    updates, optimizer = tx.update(grads, state.optimizer, exact)
    exact = optax.apply_updates(exact, updates)
    leaves, structure = jax.tree.flatten(exact)
    keys = jax.random.split(jax.random.fold_in(key, _ROUNDING), len(leaves))
    dtypes = [p.dtype for p in jax.tree.leaves(state.params)]
    rounded = [round_stochastically(*item) for item in zip(keys, leaves, dtypes, strict=True)]
    average = None
    if state.ema is not None:
        decay = average_decay(state.step, ema)
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.ema, exact)
    return state.replace(
        params=jax.tree.unflatten(structure, rounded), ema=average, optimizer=optimizer
    )


def is_finite(state: TrainState) -> Array:
    """Whether all parameters, and their average, are finite.

    `make_train_step` judges an update by its loss and gradient, before it computes these.
    """
    leaves = jax.tree.leaves((state.params, state.ema))
    return jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()


def make_validation_step(
    objective: Objective,
) -> Callable[[TrainState, Context, Array, Array], Metrics]:
    """`(state, context, tokens, key) -> metrics` of the average, without augmentation."""

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
    replicated, batch = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    context_shardings = jax.tree.map(lambda x: x.sharding, context)
    train = jax.jit(
        sharding.on_mesh(make_train_step(objective, tx, ema=ema, accumulate=accumulate), mesh),
        in_shardings=(shardings, context_shardings, batch),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
    )
    validate = jax.jit(
        sharding.on_mesh(make_validation_step(objective), mesh),
        in_shardings=(shardings, context_shardings, batch, replicated),
        out_shardings=replicated,
    )
    return train, validate

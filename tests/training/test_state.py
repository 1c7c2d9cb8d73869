"""The update: shardings, microbatches, stochastic rounding, averages and statistics."""

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from micro import micro_config

from diladiff_jax import stages
from diladiff_jax.data import DataOptions, load_prepared
from diladiff_jax.diffusion import masking
from diladiff_jax.experiment import Experiment
from diladiff_jax.objectives.base import WHOLE, Context
from diladiff_jax.parallel import sharding
from diladiff_jax.training.optimizer import make_optimizer
from diladiff_jax.training.setup import start_from
from diladiff_jax.training.state import (
    TrainState,
    average_decay,
    compile_steps,
    init_state,
    make_train_step,
    make_validation_step,
    round_stochastically,
    state_shardings,
)

STAGES = [
    stage if stage == "mdlm" else pytest.param(stage, marks=pytest.mark.slow)
    for stage in ("mdlm", "autoencoder", "ladiff", "diladiff", "scorer")
]


@pytest.fixture(autouse=True)
def _optax_promotes_ranks():
    with jax.numpy_rank_promotion("allow"):
        yield


def open_experiment(trained, sizes):
    """The trained experiment on a mesh of the given sizes, and its first 16 training rows."""
    config = micro_config()
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = sharding.make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)), devices)
    prepared = load_prepared(DataOptions.of(config.data), trained)
    rows = np.stack(prepared.rows("train").__getitems__(range(16)))
    return Experiment(config, trained, prepared.tokenizer, mesh), rows


def started(experiment, stage, state):
    """The initial state of a stage with the parameters of its source merged into it."""
    start = stages.STAGES[stage].start
    return start_from(state, start, experiment.restore_source(start.source)) if start else state


def run(trained, stage, sizes, steps=2):
    """Losses of a few updates and of a validation on a mesh of the given sizes, and the state."""
    experiment, rows = open_experiment(trained, sizes)
    config, mesh = experiment.config, experiment.mesh
    objective, settings = experiment.objective(stage), config[stage]
    tx = make_optimizer(settings, objective.group)
    fresh = lambda key: init_state(objective, tx, key, ema=settings.ema > 0)
    key = jax.random.key(7)
    shardings = state_shardings(jax.eval_shape(fresh, key), mesh)
    context = experiment.context(stage)
    state = jax.jit(lambda key: nn.unbox(fresh(key)), out_shardings=shardings)(key)
    state = started(experiment, stage, state)
    train, validate = compile_steps(
        objective, tx, shardings, context, mesh, ema=settings.ema, accumulate=settings.accumulate
    )
    tokens = jax.device_put(rows, sharding.batch_sharding(mesh))
    losses = []
    for _ in range(steps):
        state, metrics = train(state, context, tokens)
        losses.append(float(metrics["loss"]))
    losses.append(float(validate(state, context, tokens, key)["loss"]))
    return losses, state


@pytest.mark.parametrize("stage", STAGES)
def test_every_sharding_gives_the_same_loss(trained, stage):
    """One device and 2 x 2 x 2: equal up to rounding.

    Parameters and moments are really sharded, some over fsdp and tensor both.
    """
    alone, _ = run(trained, stage, (1, 1, 1))
    losses, state = run(trained, stage, (2, 2, 2))
    np.testing.assert_allclose(losses, alone, rtol=2e-4)
    params, moments = (
        [x for x in jax.tree.leaves(tree) if not x.sharding.is_fully_replicated]
        for tree in (state.params, state.optimizer)
    )
    assert len(params) >= 5 and len(moments) >= len(params)
    assert [x for x in params if x.addressable_shards[0].data.size * 4 == x.size]


class Draws:
    """A loss that is a random draw times a parameter.

    The parameter "still" is frozen and has a gradient of 1,000.
    """

    def init(self, key):
        return {"w": jnp.ones(()), "still": jnp.zeros(())}

    def group(self, path):
        return "frozen" if path[-1] == "still" else "all"

    def loss(self, params, context, tokens, key, step, *, train=True, part=WHOLE):
        u = jax.random.uniform(jax.random.fold_in(key, part.index))
        times = masking.stratified_times(key, tokens.shape[0], *part)
        metrics = {
            "u": u,
            "rows": tokens.sum(),
            "times": times.sum(),
            "squares": jnp.square(times).sum(),
        }
        return u * params["w"] + 1e3 * params["still"], (metrics, context.statistics)


def test_an_accumulated_gradient_is_the_mean_over_microbatches_with_draws_of_their_own():
    """The norm is that of what is trained, and every row is in exactly one microbatch.

    Times are stratified over the global batch: together the microbatches have each stratum once.
    """
    objective, tx = Draws(), optax.sgd(1.0)
    state = init_state(objective, tx, jax.random.key(0), ema=False)
    tokens = jnp.arange(8).reshape(8, 1)
    after, metrics = jax.jit(make_train_step(objective, tx, ema=0.0, accumulate=4))(
        state, Context(), tokens
    )
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), 0)
    draws = [float(jax.random.uniform(jax.random.fold_in(key, i))) for i in range(4)]
    assert len(set(draws)) == 4
    assert float(metrics["u"]) == pytest.approx(np.mean(draws), rel=1e-6)
    assert float(state.params["w"] - after.params["w"]) == pytest.approx(np.mean(draws), rel=1e-6)
    assert float(metrics["gradient_norm"]) == pytest.approx(np.mean(draws), rel=1e-6)
    assert float(metrics["rows"]) == pytest.approx(28 / 4)
    whole = np.asarray(masking.stratified_times(key, 8))
    assert float(metrics["times"]) * 4 == pytest.approx(whole.sum(), rel=1e-5)
    assert float(metrics["squares"]) * 4 == pytest.approx((whole**2).sum(), rel=1e-5)


def test_stochastic_rounding_goes_to_a_neighbour_and_preserves_the_mean():
    """100,000 draws: each is one of the two bfloat16 numbers around x, and their mean is x.

    4.5 deviations. Exact numbers, zero and infinities stay, and float32 is not rounded.
    """
    for x in (1.001, -3.3e-5, 255.9):
        numbers = jnp.full(100_000, x, jnp.float32)
        rounded = round_stochastically(jax.random.key(0), numbers, jnp.bfloat16)
        found, exact = np.asarray(rounded, np.float64), float(np.float32(x))
        below, above = sorted({*found})
        assert below < exact < above
        assert float(jnp.nextafter(jnp.bfloat16(below), jnp.bfloat16(above))) == above
        assert abs(found.mean() - exact) < 4.5 * found.std() / np.sqrt(1e5)
    exact = jnp.array([0.0, 1.5, -2.0, jnp.inf, -jnp.inf])
    for x, dtype in ((exact, jnp.bfloat16), (jnp.array([1.001]), jnp.float32)):
        np.testing.assert_array_equal(round_stochastically(jax.random.key(1), x, dtype), x)


def test_bfloat16_parameters_follow_updates_smaller_than_their_spacing():
    """Updates of a hundredth of bfloat16's spacing at 1: after 200 their sum is reached.

    On average, within 4.5 deviations. Vectors, average and optimizer are float32.
    """

    class Slope(Draws):
        def init(self, key):
            return {"w": jnp.ones((64, 64)), "b": jnp.ones(4)}

        def loss(self, params, context, tokens, key, step, *, train=True, part=WHOLE):
            total = params["w"].astype(jnp.float32).sum() + params["b"].sum()
            return total, ({}, context.statistics)

    rate, n = 2.0**-7 / 100, 200  # spacing above one: 2^-7; below: 2^-8
    tx = optax.sgd(rate, momentum=0.0)
    state = init_state(Slope(), tx, jax.random.key(0), ema=True, dtype=jnp.bfloat16)
    assert state.params["w"].dtype == jnp.bfloat16 and state.params["b"].dtype == jnp.float32
    others = [leaf for leaf in jax.tree.leaves((state.ema, state.optimizer)) if leaf.ndim]
    assert others and all(leaf.dtype == jnp.float32 for leaf in others)
    step = jax.jit(make_train_step(Slope(), tx, ema=0.9, accumulate=1))
    for _ in range(n):
        state, _ = step(state, Context(), jnp.zeros((1, 1), jnp.int32))
    w = np.asarray(state.params["w"], np.float64)
    assert abs(w.mean() - (1 - n * rate)) < 4.5 * w.std() / 64
    np.testing.assert_allclose(state.params["b"], 1 - n * rate, rtol=1e-5)


def test_no_update_draws_from_the_key_of_the_initialization():
    """None of the first thousand."""
    seen = []

    class Remember(Draws):
        def init(self, key):
            seen.append(key)
            return super().init(key)

    state = init_state(Remember(), optax.sgd(1.0), jax.random.key(0), ema=False)
    key = jax.random.wrap_key_data(state.key)
    updates = jax.vmap(lambda n: jax.random.key_data(jax.random.fold_in(key, n)))(jnp.arange(1000))
    first = np.asarray(jax.random.key_data(seen[0]))
    assert not (np.asarray(updates) == first).all(axis=1).any()


def test_the_decay_of_the_average_is_ramped():
    """decay(n) = min(decay, (1 + n) / (10 + n))."""
    np.testing.assert_allclose(average_decay(jnp.arange(3), 0.9), [0.1, 2 / 11, 3 / 12], rtol=1e-6)
    assert float(average_decay(jnp.asarray(10_000), 0.9)) == pytest.approx(0.9)


def test_the_average_moves_after_the_update_and_is_what_validation_reads():
    """average <- decay average + (1 - decay) new parameters; the validation loss is of it."""
    objective, tx = Draws(), optax.sgd(1.0)
    state = init_state(objective, tx, jax.random.key(0), ema=True)
    step, expected = jax.jit(make_train_step(objective, tx, ema=0.9, accumulate=1)), 1.0
    for n in range(3):
        state, _ = step(state, Context(), jnp.zeros((4, 1), jnp.int32))
        decay = (1 + n) / (10 + n)
        expected = decay * expected + (1 - decay) * float(state.params["w"])
    assert float(state.ema["w"]) == pytest.approx(expected, rel=1e-6)
    assert abs(expected - float(state.params["w"])) > 1e-3
    key, validate = jax.random.key(3), make_validation_step(objective)
    found = float(validate(state, Context(), jnp.zeros((4, 1), jnp.int32), key)["loss"])
    draw = jax.random.uniform(jax.random.fold_in(key, 0))
    loss = float(draw * state.ema["w"] + 1e3 * state.ema["still"])
    assert found == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("ema", [True, False])
def test_the_items_of_a_checkpoint_are_the_state(ema):
    """An average or statistics are items only if they are kept."""
    state = init_state(Draws(), optax.adam(1.0), jax.random.key(0), ema=ema)
    items = state.items()
    assert items.keys() == {"params", "training"} | ({"ema"} if ema else set())
    counted = state.replace(statistics={"batches": jnp.ones(())})
    assert counted.items().keys() == items.keys() | {"statistics"}
    for original in (state, counted):
        again = TrainState.from_items(original.items())
        assert jax.tree.structure(again) == jax.tree.structure(original)
        jax.tree.map(np.testing.assert_array_equal, again, original)


def test_a_stage_starts_from_the_average_of_the_one_before(trained):
    """The decoder's backbone starts as the MDLM, the student as the teacher.

    A stage's own average starts from there too.
    """
    experiment, _ = open_experiment(trained, (8, 1, 1))
    for stage, source, ours in (
        ("autoencoder", "mdlm", lambda p: p["decoder"]["backbone"]),
        ("mdlm_long", "mdlm", lambda p: p),
        ("diladiff", "ladiff", lambda p: p),
    ):
        objective = experiment.objective(stage)
        init = functools.partial(init_state, objective, optax.sgd(1.0), ema=True)
        initial = nn.unbox(jax.jit(init)(jax.random.key(9)))
        state = started(experiment, stage, initial)
        theirs = flax.traverse_util.flatten_dict(experiment.restore(source))
        for tree in (state.params, state.ema):
            found = flax.traverse_util.flatten_dict(ours(tree))
            assert set(theirs) <= set(found)
            for path, value in theirs.items():
                np.testing.assert_array_equal(found[path], value, err_msg="/".join(path))


def test_statistics_of_a_stage_are_those_of_the_rows_it_was_trained_on(trained):
    """After two updates on the same rows, the features' moments equal numpy's over those rows."""
    _, state = run(trained, "autoencoder", (8, 1, 1))
    experiment, rows = open_experiment(trained, (8, 1, 1))
    features = experiment.objective("autoencoder").features(
        experiment.restore("mdlm"), jnp.asarray(rows)
    )
    flat = np.asarray(features).reshape(-1, features.shape[-1])
    moments = state.statistics["features"]
    assert float(moments.weight) == 2 * len(flat)
    np.testing.assert_allclose(moments.mean, flat.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(moments.variance, flat.var(axis=0), rtol=1e-3, atol=1e-6)


def test_a_mesh_has_all_devices():
    """The sizes must multiply to their number."""
    assert sharding.make_mesh({"data": -1, "fsdp": 2, "tensor": 2}).shape == {
        "data": 2,
        "fsdp": 2,
        "tensor": 2,
    }
    with pytest.raises(ValueError, match="the number of devices, 8"):
        sharding.make_mesh({"data": 3, "fsdp": 1, "tensor": 1})

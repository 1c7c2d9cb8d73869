"""Updates that are not finite, spikes of the loss, and metrics that cannot be written."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diladiff_jax.objectives.base import WHOLE, Context
from diladiff_jax.training.anomalies import (
    SPIKE_DEVIATIONS,
    SPIKE_WINDOW,
    AnomalyMonitor,
    TrainingError,
)
from diladiff_jax.training.metrics import MetricsWriter
from diladiff_jax.training.state import init_state, is_finite, make_train_step


class Root:
    """Loss sqrt(w - tokens), whose statistics count the batches.

    A token above w makes it not finite; a token equal to w only its gradient.
    """

    def init(self, key):
        return {"w": jnp.ones(())}

    def init_statistics(self):
        return {"batches": jnp.zeros(())}

    def loss(self, params, context, tokens, key, step, *, train=True, part=WHOLE):
        return jnp.sqrt(params["w"] - tokens).mean(), (
            {},
            {"batches": context.statistics["batches"] + 1},
        )

    def group(self, path):
        return "all"


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("bad", [2, 1])
def test_an_update_that_is_not_finite_changes_nothing_but_the_step(bad, accumulate):
    """Parameters, average, optimizer and statistics stay, and the next update is as without it.

    Whether loss and gradient, or the gradient alone, are not finite.
    """
    objective, tx = Root(), optax.adam(0.1)
    step = jax.jit(make_train_step(objective, tx, ema=0.9, accumulate=accumulate))
    start = init_state(objective, tx, jax.random.key(0), ema=True)
    good, poison = jnp.zeros((4, 1), jnp.int32), jnp.array([[0], [0], [0], [bad]], jnp.int32)
    skipped, metrics = step(start, Context(), poison)
    assert float(metrics["skipped"]) == 1 and int(skipped.step) == 1
    assert np.isfinite(float(metrics["loss"])) == (bad == 1)
    assert not np.isfinite(float(metrics["gradient_norm"]))
    jax.tree.map(np.testing.assert_array_equal, skipped.replace(step=start.step), start)
    after, metrics = step(skipped, Context(), good)
    assert float(metrics["skipped"]) == 0 and float(after.statistics["batches"]) == accumulate
    expected = step(start.replace(step=start.step + 1), Context(), good)[0]
    np.testing.assert_array_equal(after.params["w"], expected.params["w"])


def make_monitor(tmp_path, max_skips=2):
    """A monitor and the list of lines that it logs."""
    logged = []
    return AnomalyMonitor("mdlm", tmp_path / "skipped", max_skips, logged.append), logged


def metrics(loss=1.0, skipped=0.0):
    return {
        "loss": jnp.float32(loss),
        "gradient_norm": jnp.float32(1.0),
        "skipped": jnp.float32(skipped),
    }


def test_too_many_consecutive_skipped_updates_stop_the_training(tmp_path):
    """An update that is not skipped resets their count. The last batch is saved and named."""
    monitor, logged = make_monitor(tmp_path)
    tokens = jnp.arange(8).reshape(4, 2)
    pattern = [1, 1, 0, 1, 1]
    for step, skipped in enumerate(pattern):
        found = monitor.observe(step, metrics(float("nan") if skipped else 3.0, skipped), tokens)
        assert found == (None if skipped else {"loss": 3.0, "gradient_norm": 1.0})
    assert (monitor.skipped, monitor.consecutive) == (4, 2) and len(logged) == 4
    assert logged[-1] == "mdlm 4: loss nan and gradient_norm 1.0, update skipped (4 so far)"
    words = "stage mdlm: loss inf .* at step 5, and 3 consecutive updates were skipped"
    with pytest.raises(TrainingError, match=words) as stopped:
        monitor.observe(5, metrics(float("inf"), 1.0), tokens)
    [kept] = (tmp_path / "skipped").iterdir()
    assert str(kept) in str(stopped.value) and "\n" not in str(stopped.value)
    np.testing.assert_array_equal(np.load(kept, allow_pickle=False), tokens)


def test_a_batch_that_cannot_be_saved_does_not_hide_why_training_stops(tmp_path):
    """The error names both problems."""
    (tmp_path / "skipped").write_text("in the way")
    monitor, _ = make_monitor(tmp_path, max_skips=0)
    with pytest.raises(TrainingError, match="loss nan.*could not be saved"):
        monitor.observe(0, metrics(float("nan"), 1.0), jnp.zeros((2, 2)))


def test_a_spike_is_logged_and_noise_is_not(tmp_path):
    """Of 3,000 normal losses about a falling line none is logged; one ten deviations above is.

    At six deviations the probability of a false alarm is below 1e-4 in all.
    """
    monitor, logged = make_monitor(tmp_path)
    rng = np.random.default_rng(0)
    for step, loss in enumerate(5 - np.arange(3_000) / 3_000 + 0.1 * rng.normal(size=3_000)):
        monitor.observe(step, metrics(loss), jnp.zeros((1, 1)))
    assert not logged
    monitor.observe(3_000, metrics(4 + 10 * 0.1 + 0.1), jnp.zeros((1, 1)))
    assert len(logged) == 1 and "loss spike, 5.1 after a mean of 4" in logged[0]
    assert SPIKE_DEVIATIONS >= 5


def test_no_spike_is_logged_before_there_is_a_mean_to_compare_with(tmp_path):
    """The first hundred losses only make mean and deviation."""
    monitor, logged = make_monitor(tmp_path)
    for step in range(SPIKE_WINDOW):
        monitor.observe(step, metrics(10.0 ** (step % 3)), jnp.zeros((1, 1)))
    assert not logged


def test_metrics_on_a_full_disk_do_not_stop_training(tmp_path):
    """A failure is logged once, and again only after a write has succeeded in between.

    /dev/full rejects every write. What could be written is in the file.
    """
    logged = []
    writer = MetricsWriter(tmp_path / "m", logged.append)
    writer.write(1, {"loss": 2.0}, "train")
    lines = tmp_path / "m" / "metrics.jsonl"
    lines.rename(tmp_path / "kept")
    lines.symlink_to("/dev/full")
    for step in (2, 3):
        writer.write(step, {"loss": 1.0}, "train")
    assert len(logged) == 1 and "No space left" in logged[0]
    lines.unlink()
    (tmp_path / "kept").rename(lines)
    writer.write(4, {"loss": 0.5}, "train")
    writer.close()
    assert [json.loads(line) for line in lines.read_text().splitlines() if line] == [
        {"step": 1, "train/loss": 2.0},
        {"step": 4, "train/loss": 0.5},
    ]
    (tmp_path / "blocked").write_text("")
    MetricsWriter(tmp_path / "blocked" / "m", logged.append).write(1, {"loss": 1.0}, "train")
    assert len(logged) == 2


def test_every_written_line_is_json_even_after_half_a_line(tmp_path):
    """Half a line of a killed process remains a line of its own; infinities and NaN are null."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    writer = MetricsWriter(tmp_path, print)
    writer.write(2, {"loss": 1.0, "bound": float("inf")}, "train")
    writer.write(3, {"loss": float("nan")}, "train")
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[1] == '{"st' and [json.loads(line) for line in lines[2:]] == [
        {"step": 2, "train/loss": 1.0, "train/bound": None},
        {"step": 3, "train/loss": None},
    ]


def test_one_element_that_is_not_finite_is_found():
    """In any leaf of the parameters or of the average."""
    state = init_state(Root(), optax.adam(0.1), jax.random.key(0), ema=True)
    state = state.replace(
        params={"w": jnp.ones((3, 4)), "b": jnp.zeros(2, jnp.bfloat16)},
        ema={"w": jnp.ones((3, 4)), "b": jnp.zeros(2)},
    )
    assert is_finite(state) and is_finite(state.replace(ema=None))
    for number in (jnp.nan, jnp.inf, -jnp.inf):
        w, b = state.params["w"].at[2, 3].set(number), state.params["b"].at[0].set(number)
        average = state.ema["b"].at[1].set(number)
        for damaged in (
            state.replace(params=state.params | {"w": w}),
            state.replace(params=state.params | {"b": b}),
            state.replace(ema=state.ema | {"b": average}),
        ):
            assert not is_finite(damaged)


def test_the_event_file_has_the_format_of_tensorboard(tmp_path):
    """Records between lengths and checksums, with the values at their steps."""
    from tensorboardX.proto.event_pb2 import Event

    writer = MetricsWriter(tmp_path, print)
    for step in (10, 20):
        writer.write(step, {"loss": step / 8}, "train")
    writer.close()
    [path] = tmp_path.glob("events*")
    data, found = path.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
        data = data[16 + size :]
    assert found == [(10, "train/loss", 1.25), (20, "train/loss", 2.5)]

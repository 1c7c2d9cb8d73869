"""What happens to updates that are not finite, to losses that jump, and to metrics that cannot be written."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diladiff_jax.objectives.base import WHOLE, Context
from diladiff_jax.training.anomalies import MEMORY, SPIKE, TrainingError, Watch
from diladiff_jax.training.metrics import MetricsWriter
from diladiff_jax.training.state import init_state, is_finite, make_train_step


class Root:
    """Loss sqrt(w - tokens): not finite where a token is above w, its gradient alone where it is w itself; statistics count the batches."""

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
    """Loss and gradient, or the gradient alone: parameters, average, optimizer and statistics stay; the next batch is learned from as if nothing had been."""
    objective, tx = Root(), optax.adam(0.1)
    step = jax.jit(make_train_step(objective, tx, ema=0.9, accumulate=accumulate))
    start = init_state(objective, tx, jax.random.key(0), ema=True)
    good, poison = jnp.zeros((4, 1), jnp.int32), jnp.array([[0], [0], [0], [bad]], jnp.int32)
    skipped, metrics = step(start, Context(), poison)
    assert float(metrics["skipped"]) == 1 and int(skipped.step) == 1
    assert np.isfinite(float(metrics["loss"])) == (bad == 1) and not np.isfinite(
        float(metrics["gradient_norm"])
    )
    for ours, old in zip(
        jax.tree.leaves(skipped.replace(step=start.step)), jax.tree.leaves(start), strict=True
    ):
        np.testing.assert_array_equal(ours, old)
    after, metrics = step(skipped, Context(), good)
    assert float(metrics["skipped"]) == 0 and float(after.statistics["batches"]) == accumulate
    np.testing.assert_array_equal(
        after.params["w"], step(start.replace(step=start.step + 1), Context(), good)[0].params["w"]
    )


def watch(tmp_path, most=2):
    said = []
    return Watch("mdlm", tmp_path / "skipped", most, said.append), said


def metrics(loss=1.0, skipped=0.0):
    return {
        "loss": jnp.float32(loss),
        "gradient_norm": jnp.float32(1.0),
        "skipped": jnp.float32(skipped),
    }


def test_skipped_updates_are_counted_and_too_many_in_a_row_end_it(tmp_path):
    """One that is learned from starts the count of those in a row anew; the last batch is kept, and its file is named."""
    eye, said = watch(tmp_path)
    tokens = jnp.arange(8).reshape(4, 2)
    pattern = [1, 1, 0, 1, 1]
    for step, skipped in enumerate(pattern):
        found = eye.look(step, metrics(float("nan") if skipped else 3.0, skipped), tokens)
        assert (found is None) == bool(skipped) and (
            skipped or found == {"loss": 3.0, "gradient_norm": 1.0}
        )
    assert (
        eye.skipped == 4
        and len(said) == 4
        and said[-1] == "mdlm 4: loss nan and gradient_norm 1.0, update skipped (4 so far)"
    )
    with pytest.raises(
        TrainingError, match="at step 5 of stage mdlm, and 3 updates in a row"
    ) as stopped:
        eye.look(5, metrics(float("inf"), 1.0), tokens)
    [kept] = (tmp_path / "skipped").iterdir()
    assert str(kept) in str(stopped.value) and "\n" not in str(stopped.value)
    np.testing.assert_array_equal(np.load(kept, allow_pickle=False), tokens)


def test_a_batch_that_cannot_be_kept_does_not_hide_why_training_stops(tmp_path):
    (tmp_path / "skipped").write_text("in the way")
    eye, _ = watch(tmp_path, most=0)
    with pytest.raises(TrainingError, match="loss nan.*could not be kept"):
        eye.look(0, metrics(float("nan"), 1.0), jnp.zeros((2, 2)))


def test_spikes_are_told_from_noise(tmp_path):
    """Of 3,000 normal losses about a falling line none (six deviations: false alarm below 1e-4 in all); ten deviations above it, one."""
    eye, said = watch(tmp_path)
    rng = np.random.default_rng(0)
    for step, loss in enumerate(5 - np.arange(3_000) / 3_000 + 0.1 * rng.normal(size=3_000)):
        eye.look(step, metrics(loss), jnp.zeros((1, 1)))
    assert not said
    eye.look(3_000, metrics(4 + 10 * 0.1 + 0.1), jnp.zeros((1, 1)))
    assert len(said) == 1 and "loss spikes to 5.1" in said[0]
    fresh, said = watch(tmp_path)
    for step in range(MEMORY):  # no alarm before there is something to compare with
        fresh.look(step, metrics(10.0 ** (step % 3)), jnp.zeros((1, 1)))
    assert not said and SPIKE >= 5


def test_metrics_on_a_full_disk_do_not_stop_training(tmp_path):
    """/dev/full refuses every write: said once, not again until a write has succeeded in between; what could be written is there."""
    said = []
    writer = MetricsWriter(tmp_path / "m", said.append)
    writer.write(1, {"loss": 2.0}, "train")
    lines = tmp_path / "m" / "metrics.jsonl"
    lines.rename(tmp_path / "kept")
    lines.symlink_to("/dev/full")
    for step in (2, 3):
        writer.write(step, {"loss": 1.0}, "train")
    assert len(said) == 1 and "No space left" in said[0]
    lines.unlink()
    (tmp_path / "kept").rename(lines)
    writer.write(4, {"loss": 0.5}, "train")
    writer.close()
    assert [json.loads(line) for line in lines.read_text().splitlines() if line] == [
        {"step": 1, "train/loss": 2.0},
        {"step": 4, "train/loss": 0.5},
    ]
    (tmp_path / "blocked").write_text("")
    MetricsWriter(tmp_path / "blocked" / "m", said.append).write(1, {"loss": 1.0}, "train")
    assert len(said) == 2


def test_a_half_line_spoils_no_other_and_all_is_json(tmp_path):
    """What a killed process has left stays a line of its own; a number that JSON has not is null."""
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


def test_parameters_are_finite_or_not():
    """In the parameters or the average alone, in any element of any leaf."""
    state = init_state(Root(), optax.adam(0.1), jax.random.key(0), ema=True)
    state = state.replace(
        params={"w": jnp.ones((3, 4)), "b": jnp.zeros(2, jnp.bfloat16)},
        ema={"w": jnp.ones((3, 4)), "b": jnp.zeros(2)},
    )
    assert is_finite(state) and is_finite(state.replace(ema=None))
    for number in (jnp.nan, jnp.inf, -jnp.inf):
        assert not is_finite(
            state.replace(params=state.params | {"w": state.params["w"].at[2, 3].set(number)})
        )
        assert not is_finite(
            state.replace(params=state.params | {"b": state.params["b"].at[0].set(number)})
        )
        assert not is_finite(state.replace(ema=state.ema | {"b": state.ema["b"].at[1].set(number)}))


def test_the_event_file_is_one_that_tensorboard_reads(tmp_path):
    """Records framed by their checksums, the values at their steps."""
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

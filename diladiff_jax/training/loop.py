"""The loop over updates that trains every stage.

This file is a little longer than others because all of its parts share the loop's state.
"""

from __future__ import annotations

import contextlib
import gc
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from diladiff_jax import stages
from diladiff_jax.console import Progress
from diladiff_jax.data.pipeline import Batches
from diladiff_jax.data.prepared import Prepared
from diladiff_jax.experiment import Experiment
from diladiff_jax.parallel import sharding
from diladiff_jax.parallel.processes import Preempted, StopSignal
from diladiff_jax.storage import config_file
from diladiff_jax.storage.checkpoints import Checkpoints
from diladiff_jax.training.anomalies import AnomalyMonitor, TrainingError
from diladiff_jax.training.latent_cache import stage_latents
from diladiff_jax.training.metrics import MetricsWriter
from diladiff_jax.training.optimizer import make_optimizer
from diladiff_jax.training.preview import make_preview, show_preview
from diladiff_jax.training.setup import (
    data_seed,
    mean_metrics,
    require_memory,
    stage_keys,
    stage_throughput,
    start_from,
    start_notes,
    validation_batches,
)
from diladiff_jax.training.state import (
    TrainState,
    compile_steps,
    init_state,
    is_finite,
    state_shardings,
)
from diladiff_jax.training.trace import TraceWindow

Array = jax.Array


def train_stage(
    experiment: Experiment,
    prepared: Prepared,
    stage: str,
    stop_signal: StopSignal,
    *,
    stop_at: int | None = None,
) -> TrainState:
    """Trains one stage to its last step, or to `stop_at`, and returns the final state.

    Raises:
      ConfigError, CheckpointError, TrainingError, Preempted: see `run.train`.
    """
    with contextlib.ExitStack() as resources:
        trainer = _StageTrainer(experiment, prepared, stage, stop_signal, stop_at, resources)
        for step in range(trainer.start, trainer.stop):
            trainer.update(step)
        return trainer.state


class _StageTrainer:
    """A stage in training: its state, its data, its compiled functions, and what it reports to.

    The loop dispatches an update and then looks at the metrics of the one before, so that the
    device never waits for the host.
    """

    def __init__(
        self,
        experiment: Experiment,
        prepared: Prepared,
        stage: str,
        stop_signal: StopSignal,
        stop_at: int | None,
        resources: contextlib.ExitStack,
    ) -> None:
        config = experiment.config
        self.experiment, self.stage, self.stop_signal = experiment, stage, stop_signal
        self.settings, self.options = config[stage], config.logging
        self.objective = experiment.objective(stage)
        self.tx = make_optimizer(self.settings, self.objective.group)
        self.key, self.validation_key, self.preview_key = stage_keys(config.seed, stage)
        # Shapes first, then shardings, then arrays that are initialized already sharded.
        boxed = jax.eval_shape(self._initial, self.key)
        self.abstract = nn.unbox(boxed)
        self.shardings = nn.unbox(state_shardings(boxed, experiment.mesh))
        require_memory(stage, self.abstract, self.shardings)
        self.context = experiment.context(stage)
        rows = self._open_data(prepared, resources)
        self.state, skipped = self._restore_or_start()
        self.start = int(self.state.step)
        self.stop = min(self.settings.steps, stop_at or self.settings.steps)
        self._compile(prepared)
        self._open_reports(skipped, resources)
        self._log_start(rows, stop_at)
        if jax.process_index() == 0:  # everything has been validated by now
            config_file.save(config, experiment.workdir)
        self.window: list[dict[str, float]] = []
        self.pending: tuple[int, dict[str, Array], Array] | None = None
        self.checkpoint_due = False

    def _initial(self, key: Array) -> TrainState:
        dtype = jnp.dtype(self.experiment.config.memory.param_dtype)
        ema = self.settings.ema > 0
        return init_state(self.objective, self.tx, key, ema=ema, dtype=dtype)

    def _open_data(self, prepared: Prepared, resources: contextlib.ExitStack) -> int:
        """Opens batches and checkpoints; returns the number of rows in the corpus."""
        experiment, batch = self.experiment, self.settings.batch
        split = stages.stage_named(self.stage).rows
        rows = prepared.rows(split)
        latents = stage_latents(experiment, self.stage, self.objective, self.context, prepared)
        source = rows if latents is None else latents
        self.example = jax.ShapeDtypeStruct((batch, *source[0].shape), source[0].dtype)
        local_rows = sharding.local_rows(experiment.mesh, batch)
        seed = data_seed(experiment.config.seed, self.stage)
        self.batches = resources.enter_context(Batches(source, batch, seed, local_rows))
        self.checkpoints = Checkpoints(
            experiment.checkpoints_directory(self.stage), keep=self.options.keep_checkpoints
        )
        resources.callback(self.checkpoints.close)
        return len(rows)

    def _compile(self, prepared: Prepared) -> None:
        """Prepares the jitted functions, which compile at their first call, and the clock."""
        experiment, settings = self.experiment, self.settings
        self.train_step, self.validate_step = compile_steps(
            self.objective,
            self.tx,
            self.shardings,
            self.context,
            experiment.mesh,
            ema=settings.ema,
            accumulate=settings.accumulate,
        )
        replicated = sharding.replicated(experiment.mesh)
        self.is_finite = jax.jit(is_finite, out_shardings=replicated)
        self.validation = validation_batches(
            prepared, experiment.config, settings.batch, experiment.mesh
        )
        self.preview = make_preview(experiment, self.stage, prepared)
        self.throughput = stage_throughput(
            self.objective,
            settings,
            self.context,
            self.abstract,
            self.example,
            prepared.length,
            experiment.mesh,
        )

    def _open_reports(self, skipped: int, resources: contextlib.ExitStack) -> None:
        """Opens what the loop reports to; only process 0 prints and writes metrics."""
        folder, is_main = self.experiment.workdir / self.stage, jax.process_index() == 0
        self.progress = Progress(self.stage, self.start, self.settings.steps, out=is_main)
        resources.callback(self.progress.close)
        log, options = self.progress.log, self.options
        self.metrics = MetricsWriter(folder / "metrics", log) if is_main else None
        if self.metrics is not None:
            resources.callback(self.metrics.close)
        self.anomalies = AnomalyMonitor(
            self.stage, folder / "skipped", options.max_skips, log, skipped=skipped
        )
        self.trace = TraceWindow(folder / "profile", options.profile_at, options.profile_steps)
        resources.callback(self.trace.close)

    def update(self, step: int) -> None:
        """Dispatches update `step`; then logs, validates and saves what is due.

        Raises:
          TrainingError: training cannot continue.
          Preempted: a signal asked to stop, and what can be saved is saved.
        """
        tokens = sharding.batch_array(self.experiment.mesh, next(self.batches), self.settings.batch)
        self.trace.before(step)
        self.state, metrics = self.train_step(self.state, self.context, tokens)
        if step == self.start:
            gc.collect()  # compiling a tiny network leaves 200 MiB that Python would keep for long
        self.throughput.updated()
        done = step + 1
        self.trace.after(done, metrics, last=done == self.stop)
        self._observe_pending()
        self.pending = (step, metrics, tokens)

        stopping, last = self.stop_signal.reached(), done == self.stop
        self.checkpoint_due |= done % self.options.checkpoint_every == 0
        if last or stopping or self.checkpoint_due:  # check an update before saving it
            self._observe_pending()
        self._log_metrics(done, now=last or stopping)
        validates = last or (done % self.options.validate_every == 0 and not stopping)
        if validates:
            self._validate(done, last)
        saved = self._save(done, last or stopping)
        if validates:  # only now: what is merely shown must not cost what can be saved
            with self.throughput.paused():
                show_preview(self.preview, self.state, self.preview_key, self.progress.log)
        if stopping or (last and not saved):
            self._report_stop(done, last, saved)

    def _restore_or_start(self) -> tuple[TrainState, int]:
        """The state to continue from, and how many updates were skipped before."""
        if self.checkpoints.latest_step() is not None:
            # `quarantine_corrupt` has verified it.
            items, position = self.checkpoints.restore(
                self.abstract.items(), self.shardings.items(), verify=False
            )
            self.batches.set_state(position)
            return TrainState.from_items(items), position.get("skipped", 0)
        init = jax.jit(lambda key: nn.unbox(self._initial(key)), out_shardings=self.shardings)
        state = init(self.key)
        if (start := stages.stage_named(self.stage).start) is not None:
            state = start_from(state, start, self.experiment.restore_source(start.source))
        return state, 0

    def _log_start(self, rows: int, stop_at: int | None) -> None:
        """Says where the stage resumes, and what its user may not expect."""
        if self.start:
            beyond = f", which is not below stop_at = {stop_at}" if self.start >= self.stop else ""
            where = f"step {self.start} of {self.settings.steps}"
            self.progress.log(f"{self.stage}: resumes from {where}{beyond}")
        for note in start_notes(
            rows, self.settings.batch, self.abstract, self.shardings, self.experiment.mesh
        ):
            self.progress.log(f"{self.stage}: {note}")

    def _observe_pending(self) -> None:
        """Waits for the update before this one and keeps its metrics."""
        if self.pending is not None:
            if (metrics := self.anomalies.observe(*self.pending)) is not None:
                self.window.append(metrics)
            self.pending = None

    def _log_metrics(self, done: int, *, now: bool) -> None:
        """Writes the mean of the metrics since the last time, if it is due."""
        if not self.window or not (now or done % self.options.metrics_every == 0):
            self.progress.advance(done, {})
            return
        means = mean_metrics(self.window)
        self.window.clear()
        if self.metrics is not None:
            skipped = {"skipped": float(self.anomalies.skipped)}
            self.metrics.write(done, means | skipped | self.throughput.lap(), "train")
        self.progress.advance(done, means)

    def _validate(self, done: int, last: bool) -> None:
        """Validates on the held-out text.

        Raises:
          TrainingError: the loss after the last step is not finite.
        """
        with self.throughput.paused():
            batches = self.validation(self.validation_key)
            found = [self.validate_step(self.state, self.context, *batch) for batch in batches]
            means = mean_metrics(jax.device_get(found))
            if self.metrics is not None:
                self.metrics.write(done, means, "validation")
            shown = ", ".join(f"{name} {value:.4g}" for name, value in means.items())
            self.progress.log(f"{self.stage} {done}: validation {shown}")
            if last and not math.isfinite(means["loss"]):
                raise self._not_finite(f"validation loss is {means['loss']}", done)

    def _save(self, done: int, now: bool) -> bool:
        """Saves a checkpoint if one is due; whether it did.

        While updates are skipped, what they start from may be the cause: except at the very end, it
        must not replace the earlier checkpoints.

        Raises:
          TrainingError: parameters are not finite.
        """
        wanted = (now or self.checkpoint_due) and not self.anomalies.consecutive
        if not (wanted or done == self.settings.steps):
            return False
        with self.throughput.paused():
            if not self.is_finite(self.state):
                raise self._not_finite("parameters are not finite", done)
            position = self.batches.get_state() | {"skipped": self.anomalies.skipped}
            self.checkpoints.save(done, self.state.items(), position)
        self.checkpoint_due = False
        return True

    def _report_stop(self, done: int, last: bool, saved: bool) -> None:
        """Says what was saved when training stops before the stage's end.

        Raises:
          Preempted: a signal asked to stop.
        """
        outcome = "which is saved"
        if not saved:
            outcome = f"which was skipped and is not saved ({self.checkpoints.describe_last()})"
        if last:
            self.progress.log(f"{self.stage}: stops at step {done}, {outcome}")
            return
        raise Preempted(
            f"stage {self.stage} was stopped by {self.stop_signal.name} after step {done}, "
            f"{outcome}; the same command resumes",
            interrupted_by_user=self.stop_signal.interrupted_by_user,
        )

    def _not_finite(self, what: str, done: int) -> TrainingError:
        return TrainingError(
            f"stage {self.stage}: {what} after step {done}, which is not saved "
            f"({self.checkpoints.describe_last()}). Try a lower learning rate."
        )

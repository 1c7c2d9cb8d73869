"""The loop over updates that trains every stage."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diladiff_jax import stages
from diladiff_jax.data.pipeline import Batches
from diladiff_jax.data.prepared import Prepared
from diladiff_jax.data.terminal import printable
from diladiff_jax.experiment import Experiment
from diladiff_jax.parallel import sharding
from diladiff_jax.parallel.processes import Preempted, StopSignal
from diladiff_jax.storage import config_file
from diladiff_jax.storage.checkpoints import Checkpoints
from diladiff_jax.training.anomalies import AnomalyMonitor, TrainingError
from diladiff_jax.training.metrics import MetricsWriter, Progress
from diladiff_jax.training.optimizer import make_optimizer
from diladiff_jax.training.preview import make_preview
from diladiff_jax.training.setup import (
    data_seed,
    require_memory,
    stage_keys,
    stage_throughput,
    start_from,
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
Metrics = dict[str, float]


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
        config, mesh = experiment.config, experiment.mesh
        self.experiment, self.stage, self.stop_signal = experiment, stage, stop_signal
        self.settings, self.options = config[stage], config.logging
        self.is_main = jax.process_index() == 0
        objective = experiment.objective(stage)
        tx = make_optimizer(self.settings, objective.group)
        self.key, self.validation_key, self.preview_key = stage_keys(config.seed, stage)

        # 1. Shapes first, then shardings, then arrays that are initialized already sharded.
        def initial(key: Array) -> TrainState:
            dtype = jnp.dtype(config.memory.param_dtype)
            return init_state(objective, tx, key, ema=self.settings.ema > 0, dtype=dtype)

        boxed = jax.eval_shape(initial, self.key)
        self.abstract = nn.unbox(boxed)
        self.shardings = nn.unbox(state_shardings(boxed, mesh))
        require_memory(stage, self.abstract, self.shardings)
        self.context = experiment.context(stage)

        # 2. The last checkpoint, or a start from the predecessor.
        rows = prepared.rows(stages.stage_named(stage).rows)
        local_rows = sharding.local_rows(mesh, self.settings.batch)
        seed = data_seed(config.seed, stage)
        # Closed last to first: the checkpoints come first, whatever else fails.
        self.batches = resources.enter_context(Batches(rows, self.settings.batch, seed, local_rows))
        self.checkpoints = Checkpoints(
            experiment.checkpoints_directory(stage), keep=self.options.keep_checkpoints
        )
        resources.callback(self.checkpoints.close)
        self.state, skipped = self._restore_or_start(initial)
        self.start = int(self.state.step)
        self.stop = min(self.settings.steps, stop_at or self.settings.steps)

        # 3. Compiled functions and reports.
        self.train_step, self.validate_step = compile_steps(
            objective,
            tx,
            self.shardings,
            self.context,
            mesh,
            ema=self.settings.ema,
            accumulate=self.settings.accumulate,
        )
        self.is_finite = jax.jit(is_finite, out_shardings=sharding.replicated(mesh))
        self.progress = Progress(stage, self.start, self.settings.steps, out=self.is_main)
        resources.callback(self.progress.close)
        folder = experiment.workdir / stage
        self.metrics = (
            MetricsWriter(folder / "metrics", self.progress.log) if self.is_main else None
        )
        if self.metrics is not None:
            resources.callback(self.metrics.close)
        self.anomalies = AnomalyMonitor(
            stage, folder / "skipped", self.options.max_skips, self.progress.log, skipped=skipped
        )
        self.trace = TraceWindow(
            folder / "profile", self.options.profile_at, self.options.profile_steps
        )
        resources.callback(self.trace.close)
        self.throughput = stage_throughput(
            objective, self.settings, self.context, self.abstract, prepared.length, mesh
        )
        self.validation = validation_batches(prepared, config, self.settings.batch, mesh)
        self.preview = make_preview(experiment, stage, prepared)
        self._log_start(len(rows), stop_at)
        if self.is_main:  # everything has been validated by now
            config_file.save(config, experiment.workdir)
        self.window: list[Metrics] = []
        self.pending: tuple[int, dict[str, Array], Array] | None = None
        self.checkpoint_due = False

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

        stopping = self.stop_signal.reached()
        last = done == self.stop
        self.checkpoint_due |= done % self.options.checkpoint_every == 0
        if last or stopping or self.checkpoint_due:  # nothing is saved before it was looked at
            self._observe_pending()
        self._log_metrics(done, now=last or stopping)
        if last or (done % self.options.validate_every == 0 and not stopping):
            self._validate(done, last)
        saved = self._save(done, last or stopping)
        if stopping or (last and not saved):
            self._report_stop(done, last, saved)

    def _restore_or_start(self, initial: Callable[[Array], TrainState]) -> tuple[TrainState, int]:
        """The state to continue from, and how many updates were skipped before."""
        if self.checkpoints.latest_step() is not None:
            # `quarantine_corrupt` has verified it.
            items, position = self.checkpoints.restore(
                self.abstract.items(), self.shardings.items(), verify=False
            )
            self.batches.set_state(position)
            return TrainState.from_items(items), position.get("skipped", 0)
        init = jax.jit(lambda key: nn.unbox(initial(key)), out_shardings=self.shardings)
        state = init(self.key)
        start = stages.stage_named(self.stage).start
        if start is not None:
            source = self.experiment.restore_source(start.source)
            state = start_from(state, start, source)
        return state, 0

    def _log_start(self, rows: int, stop_at: int | None) -> None:
        """Says where the stage resumes, and what its user may not expect."""
        log, batch = self.progress.log, self.settings.batch
        if self.start:
            beyond = f", which is not below stop_at = {stop_at}" if self.start >= self.stop else ""
            log(f"{self.stage}: resumes from step {self.start} of {self.settings.steps}{beyond}")
        if rows < batch:
            log(
                f"{self.stage}: the corpus has {rows} rows, so a batch of {batch} contains each of "
                f"them about {batch / rows:.1f} times"
            )
        replicated = sharding.replicated_parameters(
            self.abstract.params, self.shardings.params, self.experiment.mesh
        )
        if replicated:
            names = ", ".join(f"{name} ({size / 2**20:.0f} MiB)" for name, size in replicated)
            log(f"{self.stage}: replicated although fsdp x tensor could shard them: {names}")

    def _observe_pending(self) -> None:
        """Waits for the update before this one and keeps its metrics."""
        if self.pending is not None:
            metrics = self.anomalies.observe(*self.pending)
            if metrics is not None:
                self.window.append(metrics)
            self.pending = None

    def _log_metrics(self, done: int, *, now: bool) -> None:
        """Writes the mean of the metrics since the last time, if it is due."""
        if not self.window or not (now or done % self.options.metrics_every == 0):
            self.progress.advance(done, {})
            return
        means = {name: float(np.mean([m[name] for m in self.window])) for name in self.window[0]}
        self.window.clear()
        if self.metrics is not None:
            skipped = {"skipped": float(self.anomalies.skipped)}
            self.metrics.write(done, means | skipped | self.throughput.lap(), "train")
        self.progress.advance(done, means)

    def _validate(self, done: int, last: bool) -> None:
        """Validates and prints the preview.

        Raises:
          TrainingError: the loss after the last step is not finite.
        """
        with self.throughput.paused():
            found = []
            for i, tokens in enumerate(self.validation()):
                key = jax.random.fold_in(self.validation_key, i)
                values = self.validate_step(self.state, self.context, tokens, key)
                found.append(jax.device_get(values))
            means = {name: float(np.mean([m[name] for m in found])) for name in found[0]}
            if self.metrics is not None:
                self.metrics.write(done, means, "validation")
            shown = ", ".join(f"{name} {value:.4g}" for name, value in means.items())
            self.progress.log(f"{self.stage} {done}: validation {shown}")
            if last and not math.isfinite(means["loss"]):
                raise self._not_finite(f"validation loss is {means['loss']}", done)
            if self.preview is not None:
                for text in self.preview(self.state, self.preview_key):
                    self.progress.log("  | " + printable(text).replace("\n", "\n  | "))

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
        if saved:
            outcome = "which is saved"
        else:
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

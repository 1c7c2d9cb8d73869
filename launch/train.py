"""Trains one stage of an experiment, or every stage that is not finished yet.

    python launch/train.py --config=configs/tiny.py --workdir=runs/tiny --stage=all
    python launch/train.py --workdir=runs/tiny --stage=diladiff      # with the workdir's own config
    python launch/train.py --config=configs/owt.py --workdir=W --stage=mdlm --config.mdlm.batch=256

To resume a stopped run, run the same command again. SIGTERM, SIGHUP (a closed terminal), SIGXCPU,
SIGUSR1 and SIGUSR2 save a checkpoint and end the run with exit code 75, with any number of
processes. Ctrl-C also saves a checkpoint if there is only one process.

--stage=all trains the four stages in order, and the baselines for which the config sets a number of
steps. It skips stages that are finished.
"""

import os
import signal
import threading
from types import FrameType

import cli
from absl import flags

_CONFIG = cli.experiment_flags()
_STAGE = flags.DEFINE_string(
    "stage",
    "all",
    "Stage to train: one of {stages}, or all.",
)
_INIT_FROM = flags.DEFINE_string(
    "init_from",
    None,
    "Another workdir or bundle, whose earlier stages are reused if this workdir lacks them. Their"
    " settings must match; without --config, all settings come from there.",
)
cli.distributed_flags()
_STOP_AT = flags.DEFINE_integer(
    "stop_at",
    None,
    "Save a checkpoint and end after this many steps of a stage; default: train all its steps.",
    lower_bound=1,
)


def main(argv: list[str]) -> None:
    from diladiff_jax import config as config_lib
    from diladiff_jax.parallel.processes import STOP_SIGNALS
    from diladiff_jax.stages import STAGES
    from diladiff_jax.training import train

    _exit_on_signal_before_training()
    cli.join_processes()
    config = cli.load_config(_CONFIG)
    cli.require_one_of("stage", _STAGE.value, [*STAGES, "all"])
    stages = config_lib.stages_of(config) if _STAGE.value == "all" else (_STAGE.value,)
    train(config, flags.FLAGS.workdir, stages, init_from=_INIT_FROM.value, stop_at=_STOP_AT.value)
    # Everything is saved, so a signal while the interpreter shuts down must not look like a
    # failure. Ignored instead of handled, because the interpreter removes Python's handlers first.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _exit_on_signal_before_training() -> None:
    """Makes a stop signal end the process at once, until training installs its own handlers.

    Preparing text may take hours, and waiting for other processes minutes. The exit code tells the
    launchers to run the command again. A thread does it, because a Python handler runs only when
    the library call in progress returns.
    """

    from diladiff_jax.console import say
    from diladiff_jax.parallel.processes import handled_stop_signals

    def ignore(number: int, frame: FrameType | None) -> None:
        pass

    def watch() -> None:
        while numbers := os.read(read_end, 64):
            for number in set(numbers) & set(stops):
                if signal.getsignal(number) is ignore:
                    name = signal.Signals(number).name
                    say(
                        f"stopped by {name} before training. Run the same command to resume.",
                        error=True,
                    )
                    os._exit(cli.PREEMPTED)  # unfinished files have temporary names

    stops = handled_stop_signals()
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    for number in stops:
        signal.signal(number, ignore)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    threading.Thread(target=watch, name="before training", daemon=True).start()


if __name__ == "__main__":
    cli.run(main, __doc__)

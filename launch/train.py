"""Trains one stage of an experiment, or whatever is missing of it.

    python launch/train.py --config=configs/tiny.py --workdir=runs/tiny --stage=all
    python launch/train.py --workdir=runs/tiny --stage=diladiff            # the config is the workdir's own
    python launch/train.py --config=configs/owt.py --workdir=W --stage=mdlm --config.mdlm.batch=256

A stopped run goes on with the same command; Ctrl-C saves first where one process runs, and SIGTERM with any number of
them, which ends with exit code 75.
`--stage=all` trains the four stages in their order and the baselines that the config gives steps; finished ones are
passed over.
"""

import os
import signal
import threading
from types import FrameType

import cli
from absl import flags

_CONFIG = cli.experiment_flags()
_STAGE = flags.DEFINE_string(
    "stage", "all", "mdlm, autoencoder, ladiff, diladiff, mdlm_long, scorer, or all."
)
_INIT_FROM = flags.DEFINE_string(
    "init_from",
    None,
    "Workdir or bundle whose earlier stages this one starts from, where its own lacks them.",
)
cli.distributed_flags()
_STOP_AT = flags.DEFINE_integer(
    "stop_at", None, "End after this many steps of a stage, with a checkpoint.", lower_bound=1
)


def _answer_before_training() -> None:
    """Preparing text may take hours, and waiting for others minutes: told to end in them, the process ends at once, with the code on which launchers
    start it again. By a thread, for a handler waits until libraries come back; once training has a handler of its own, that answers alone."""

    def passed(number: int, frame: FrameType | None) -> None:
        pass

    def watch() -> None:
        while told := os.read(heard, 64):
            if signal.SIGTERM in told and signal.getsignal(signal.SIGTERM) is passed:
                os.write(2, b"stopped by SIGTERM before training; the same command goes on\n")
                os._exit(cli.PREEMPTED)  # what is half made lies aside

    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.signal(signal.SIGTERM, passed)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    threading.Thread(target=watch, name="before training", daemon=True).start()


def main(argv: list[str]) -> None:
    from diladiff_jax import config as config_lib
    from diladiff_jax.training.loop import train

    _answer_before_training()
    cli.join_processes()
    config = cli.experiment(_CONFIG)
    known = config_lib.STAGES + config_lib.BASELINES
    if _STAGE.value != "all" and _STAGE.value not in known:
        raise cli.UsageError(
            f"--stage is {_STAGE.value!r}; it must be one of {', '.join(known)}, all"
        )
    stages = config_lib.stages_of(config) if _STAGE.value == "all" else (_STAGE.value,)
    train(config, flags.FLAGS.workdir, stages, init_from=_INIT_FROM.value, stop_at=_STOP_AT.value)
    # All is saved: a SIGTERM that comes while the interpreter takes itself down has nothing left to stop, and must not look like a failure.
    # (Ignored and not handled, for the interpreter gives its own handlers up before it is down.)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


if __name__ == "__main__":
    cli.run(main, __doc__)

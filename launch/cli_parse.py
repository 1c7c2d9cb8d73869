"""Parsing of a command line: its paths, the config of its workdir, its help and its errors."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

from absl import flags
from cli_errors import (
    asks_for_help,
    describe_config_error,
    describe_flag_error,
    expand_home,
    flag_value,
    locate_released,
    print_error,
)

PATHS = (
    *("workdir", "init_from", "out", "config", "compare"),
    *("texts", "reference", "training_text", "scorer"),  # of score.py
)
"""Flags whose values are paths."""

CLOSED_OUTPUT = 141
"""128 + SIGPIPE, as of other programs in a pipe."""

RELEASED = pathlib.Path(__file__).resolve().parents[1] / "diladiff_jax" / "released"


def parse(argv: Sequence[str]) -> Sequence[str]:
    """Parses the flags for absl's `app.run`. Returns the remaining arguments."""
    argv = locate_released(expand_home(argv, PATHS), RELEASED)
    workdir, source = flag_value(argv, "workdir"), None
    for name in ("workdir", "init_from"):
        if flag_value(argv, name) == "":
            raise SystemExit(
                print_error(f"--{name} is empty. Give an experiment's folder, --{name}=DIR.")
            )
    if flag_value(argv, "config") is None and workdir is not None and "config" in flags.FLAGS:
        # A new workdir has the settings of the one that it starts from.
        source = workdir
        if not os.path.exists(os.path.join(workdir, "config.json")):
            source = flag_value(argv, "init_from") or workdir
        # As the first flag, because the overrides change what it loads.
        loader = pathlib.Path(__file__).with_name("workdir_config.py")
        argv.insert(1, f"--config={loader}:{source}")
    if asks_for_help(argv):
        _list_names_in_help()
    try:
        rest = flags.FLAGS(argv)
    except SystemExit as end:
        if asks_for_help(argv):
            raise SystemExit(0) from None  # absl's code is 1
        raise SystemExit(print_error(describe_config_error(argv, end))) from None
    except flags.Error as error:
        raise SystemExit(print_error(describe_flag_error(argv, error))) from None
    except BrokenPipeError:  # `--help | head`
        raise SystemExit(CLOSED_OUTPUT) from None
    except Exception as error:
        raise SystemExit(print_error(describe_config_error(argv, error))) from None
    if source is not None and source != workdir:
        _check_inherited_corpus(argv, source)
    return rest


def _list_names_in_help() -> None:
    """Fills in {stages} and {models} in help texts; not at definition, to keep start-up fast."""
    from diladiff_jax import stages

    names = {"{stages}": ", ".join(stages.STAGES), "{models}": ", ".join(stages.sampled_models())}
    for name in flags.FLAGS:
        for field, listed in names.items():
            help_text = flags.FLAGS[name].help or ""
            flags.FLAGS[name].help = help_text.replace(field, listed)


def _check_inherited_corpus(argv: Sequence[str], source: str) -> None:
    """Ends the command if a bundle's settings would make it download or read text unasked."""
    data = flags.FLAGS.config.data
    if not os.path.exists(os.path.join(source, "bundle.json")):
        return
    if flag_value(argv, "config.data.corpus") is not None or data.corpus in ("stories", "pydocs"):
        return
    if data.corpus != "text_files":
        raise SystemExit(
            print_error(
                f"--config.data.corpus is missing: the bundle {source} was trained on"
                f" {data.corpus!r}, which would be downloaded. Give"
                f" --config.data.corpus={data.corpus} to allow that, or"
                " --config.data.corpus=FOLDER if it is here already."
            )
        )
    if flag_value(argv, "config.data.files") is None:
        raise SystemExit(
            print_error(
                f"--config.data.files is missing: the bundle {source} was trained on files called"
                f" {data.files!r}. Give your own text, --config.data.files=FOLDER."
            )
        )

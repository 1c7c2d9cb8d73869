"""Bad input as one line on standard error, in the words of the command line."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import sys
from collections.abc import Sequence

from absl import flags

# An error may quote long input; the middle of a longer line is replaced by "...".
_MAX_CHARACTERS = 800


class UsageError(ValueError):
    """A command line that cannot be carried out; the message is one line."""


def print_error(message: str, code: int = 1) -> int:
    """Prints `error: MESSAGE` as one printable line on standard error. Returns `code`."""
    line = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode()
        for c in " ".join(message.split())
    )
    if len(line) > _MAX_CHARACTERS:
        line = f"{line[: _MAX_CHARACTERS // 2]} ... {line[-_MAX_CHARACTERS // 2 :]}"
    with contextlib.suppress(OSError, ValueError):  # the exit code still says it
        print(f"error: {line}", file=sys.stderr, flush=True)
    return code


def flag_value(argv: Sequence[str], name: str) -> str | None:
    """Finds `--NAME=VALUE` or `--NAME VALUE` on a command line that is not parsed yet.

    Returns:
      The value, the last one if the flag is repeated; None if it is not there.
    """
    value = None
    for i, word in enumerate(argv[1:], 1):
        key, equals, after = word.lstrip("-").partition("=")
        if word.startswith("-") and key == name:
            value = after if equals else argv[i + 1] if i + 1 < len(argv) else ""
    return value


def expand_home(argv: Sequence[str], names: Sequence[str]) -> list[str]:
    """The command line with `~` expanded in the values of some flags.

    The shell expands it only at the start of a word, so not in `--workdir=~/runs`.
    """
    words, follows = list(argv[:1]), False
    for word in argv[1:]:
        key, equals, value = word.partition("=")
        if follows:
            word = os.path.expanduser(word)
        elif key.startswith("-") and key.lstrip("-") in names and equals:
            parts = value.split(",") if key.endswith("compare") else [value]
            word = f"{key}={','.join(map(os.path.expanduser, parts))}"
        follows = not follows and not equals and word.startswith("-") and key.lstrip("-") in names
        words.append(word)
    return words


def locate_released(argv: Sequence[str], folder: pathlib.Path) -> list[str]:
    """The command line with the name of a released model in `folder` replaced by its path.

    It may be the value of --workdir or --init_from, unless a folder of that name exists here.
    """
    words = []
    for before, word in zip(["", *argv], argv, strict=False):
        key, equals, value = word.rpartition("=") if word.startswith("-") else (before, "", word)
        if (
            key.lstrip("-") in ("workdir", "init_from")
            and pathlib.PurePath(value).name == value
            and os.path.isfile(folder / value / "bundle.json")  # False for any impossible name
            and not os.path.exists(value)
        ):
            word = f"{key}={folder / value}" if equals else str(folder / value)
        words.append(word)
    return words


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether the command line has one of absl's help flags."""
    names = ("help", "helpshort", "helpfull", "helpxml", "?")
    words = (word for word in argv[1:] if word.startswith("-"))
    return any(word.lstrip("-").partition("=")[0] in names for word in words)


def describe_flag_error(argv: Sequence[str], error: flags.Error) -> str:
    """What a user should read of an error that absl found in the flags."""
    text = str(error)
    if flag_value(argv, "workdir") is None and "--workdir" in text:
        return "--workdir is missing. Give the experiment's folder, --workdir=DIR."
    # An error in a config file arrives as the text of a traceback, whose last line is the reason.
    if "Traceback" in text:
        text = [line for line in text.splitlines() if line.strip()][-1]
        return re.sub(r"^[\w.]*Error: ", "", text.strip())
    number = re.fullmatch(
        r"(?s)flag --([\w.]+)=(.*): (?:invalid literal for int|could not convert string to float"
        r"|Exceeds the limit).*",
        text,
    )
    if number:
        kind = "a number" if "to float" in text else "a whole number"
        return f"--{number[1]}: got {number[2]!r}, expected {kind}."
    if boolean := re.fullmatch(r"(?s)flag --([\w.]+)=(.*): \('Non-boolean.*", text):
        return f"--{boolean[1]}: got {boolean[2]!r}, expected true or false."
    if bound := re.fullmatch(r"(?s)flag --([\w.]+)=(.*): .* is not (an? .*|integer .*)", text):
        return f"--{bound[1]}: got {bound[2]}, expected {bound[3]}."
    return re.sub(r"^[\w.]*Error: ", "", text.strip().removeprefix("ERROR:: "))


def describe_config_error(argv: Sequence[str], error: BaseException) -> str:
    """What a user should read of an error while the config file and its overrides were loaded."""
    path = flag_value(argv, "config")
    if isinstance(error, SystemExit):
        return f"--config={path} ends the command instead of defining get_config()."
    if isinstance(error, SyntaxError):
        return (
            f"--config={path} is not an experiment file, which is Python and defines get_config():"
            f" {error}."
        )
    if isinstance(error, AttributeError | KeyError):
        reason = str(error.args[0]) if error.args else type(error).__name__
        if "get_config" in reason:
            return f"--config={path} is not an experiment file: it does not define get_config()."
        return _describe_unknown_setting(argv, reason)
    # An experiment file may raise anything.
    has_message = isinstance(error, OSError | ImportError | TypeError | ValueError) and str(error)
    reason = has_message or f"{type(error).__name__} {error}".strip()
    if isinstance(error, TypeError) and "get_config" in reason:
        reason = f"this experiment takes no :ARGUMENT ({reason})"
    return reason if path is None or "config" in reason else f"--config={path}: {reason}"


def _describe_unknown_setting(argv: Sequence[str], reason: str) -> str:
    """Names the flag that asked for an unknown setting, and the nearest setting that exists."""
    found, near = re.search(r"\w+", reason), re.search(r'mean "(\w+)"', reason)
    name = found[0] if found else ""
    overrides = [
        word.lstrip("-").partition("=")[0]
        for word in argv[1:]
        if word.lstrip("-").startswith("config.")
    ]
    flag = next((key for key in overrides if name in key.split(".")[1:]), None)
    if flag is None:  # the experiment file itself asked for it
        return f"--config={flag_value(argv, 'config')}: there is no setting {reason}"
    advice = f"Did you mean {near[1]}?" if near else "See diladiff_jax/config.py for all settings."
    return f"--{flag}: there is no setting {name}. {advice}"

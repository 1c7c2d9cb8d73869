"""What is printed can never stop a program."""

import io
import os
import sys

import pytest

from diladiff_jax import console
from diladiff_jax.console import say


def closed_file():
    stream = io.TextIOWrapper(io.BytesIO(), "utf-8")
    stream.close()
    return stream


def full_disk():
    return open("/dev/full", "w", encoding="utf-8")


def closed_pipe():
    read_end, write_end = os.pipe()
    os.close(read_end)
    return os.fdopen(write_end, "w")


@pytest.fixture(
    params=[closed_file, full_disk, closed_pipe, lambda: None],
    ids=["closed file", "full disk", "closed pipe", "none"],
)
def broken(request, monkeypatch):
    """A stream that takes nothing, as standard output and standard error."""
    stream = request.param()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    yield stream
    monkeypatch.undo()
    if stream is not None:
        try:
            stream.close()
        except OSError:  # what could not be written is still in its buffer
            os.close(stream.fileno()) if not stream.closed else None


def test_a_line_that_cannot_be_written_is_dropped(broken):
    """A closed stream, a full disk, a reader that is gone, and no console at all."""
    say("text")
    say("text", error=True)


def test_progress_does_not_need_a_reader(broken):
    """Neither lines nor, on a terminal, the bar."""
    for terminal in (False, True):
        if broken is not None:
            broken.isatty = lambda terminal=terminal: terminal
        progress = console.Progress("mdlm", 0, 3, seconds=0.0)
        for step in (1, 2, 3):
            progress.advance(step, {"loss": 1.0})
            progress.log("validation")
        progress.close()


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", "Zo\\xeb \\u0142 \\u2581 \\U0001f600"),
        ("latin-1", "Zo\xeb \\u0142 \\u2581 \\U0001f600"),
        ("cp1252", "Zo\xeb \\u0142 \\u2581 \\U0001f600"),
        ("utf-8", "Zo\xeb \u0142 \u2581 \U0001f600"),
    ],
)
def test_characters_that_an_encoding_lacks_are_escaped(monkeypatch, encoding, shown):
    """Text of the corpus, of a path or of a model, whatever PYTHONIOENCODING says."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding))
    say("Zo\xeb \u0142 \u2581 \U0001f600")
    assert raw.getvalue().decode(encoding) == shown + "\n"


def test_the_time_left_is_estimated_without_the_compilation(monkeypatch, capsys):
    """The first update takes 600 s and the others 1 s: no estimate counts the first."""
    clock = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    progress = console.Progress("mdlm", 0, 100, seconds=0.0)
    for step in range(1, 11):
        clock[0] += 600.0 if step == 1 else 1.0
        progress.advance(step, {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "mdlm 1/100" and "left" not in lines[1] + lines[2]
    assert lines[-1] == "mdlm 10/100  1.00 steps/s  1:30 left"

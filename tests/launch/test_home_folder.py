"""`~` is expanded once, where a command or a call reads a path."""

import os
import pathlib
import subprocess
import sys

import pytest

import diladiff_jax as dl
from diladiff_jax import files
from diladiff_jax.data import tokenizers

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def home(trained, tmp_path, monkeypatch):
    """A home folder that holds the trained workdir; the current folder is another one."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "w").symlink_to(trained)
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--workdir=~/w"], ["--workdir={home}/w"]),
        (["--workdir", "~/w", "--num", "~"], ["--workdir", "{home}/w", "--num", "~"]),
        (["-init_from=~/w"], ["-init_from={home}/w"]),
        (["--config=~/a.py:~/texts"], ["--config={home}/a.py:~/texts"]),
        (["--compare=~/a,b,~/c"], ["--compare={home}/a,b,{home}/c"]),
        (["--prompt=~/w", "--workdir=./~/w"], ["--prompt=~/w", "--workdir=./~/w"]),
    ],
)
def test_flags_that_are_paths_are_expanded(home, flags, expected):
    """Other flags, and a folder that is really called `~`, stay as they are."""
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'launch')!r}); import cli_errors, cli_parse\n"
        f"print(cli_errors.expand_home(['x', *{flags!r}], cli_parse.PATHS)[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str([word.format(home=home) for word in expected])


def test_library_calls_expand_their_paths(home):
    """No call makes a folder called `~`."""
    model = dl.load("~/w")
    assert model.experiment.workdir == home / "w" and model.models
    assert tokenizers.load("~/w/tokenizer").vocab_size == model.tokenizer.vocab_size
    assert files.expand("~/w") == home / "w" and files.expand("./~/w") == pathlib.Path("~/w")
    assert not list(pathlib.Path.cwd().iterdir())

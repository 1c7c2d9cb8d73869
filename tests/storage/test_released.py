"""Models that come with the package are found by name, in the library and on command lines."""

import pathlib
import sys

import pytest

import diladiff_jax as dl
from diladiff_jax.storage import released

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "launch"))
import cli_errors
import cli_parse


@pytest.fixture
def shipped(bundle, tmp_path, monkeypatch):
    """A folder of released models with one in it; the current folder is another one."""
    (tmp_path / "released").mkdir()
    (tmp_path / "released" / "tiny-model").symlink_to(bundle)
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(released, "FOLDER", tmp_path / "released")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "released"


def test_a_released_model_loads_by_name(shipped):
    assert dl.models() == ("tiny-model",)
    assert dl.load("tiny-model").has("diladiff")


def test_a_folder_of_the_same_name_takes_precedence(shipped):
    pathlib.Path("tiny-model").mkdir()
    assert released.locate("tiny-model") == pathlib.Path("tiny-model")
    words = ["sample.py", "--workdir=tiny-model"]
    assert cli_errors.locate_released(words, shipped) == words


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--workdir=tiny-model"], ["--workdir={0}/tiny-model"]),
        (["--init_from", "tiny-model", "--num=1"], ["--init_from", "{0}/tiny-model", "--num=1"]),
        (["--out=tiny-model", "--workdir=other"], ["--out=tiny-model", "--workdir=other"]),
        (["--workdir=../released/tiny-model"], ["--workdir=../released/tiny-model"]),
        (["--workdir=" + 300 * "x"], ["--workdir=" + 300 * "x"]),  # no file can have such a name
    ],
)
def test_commands_find_it_too(shipped, words, expected):
    """Only where a workdir is read, and only by its plain name."""
    found = cli_errors.locate_released(["sample.py", *words], shipped)
    assert found == ["sample.py", *(word.format(shipped) for word in expected)]


def test_commands_look_where_the_library_does():
    assert cli_parse.RELEASED == released.FOLDER


def test_every_model_in_the_package_is_an_intact_bundle_with_a_card():
    for name in dl.models():
        dl.load(name)
        assert (released.FOLDER / name / "README.md").read_text().startswith("# ")

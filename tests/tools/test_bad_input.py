"""Bad input of every kind, as whole command lines, ends in success or in one line; and the judge of that sees what it should."""

import pathlib
import shutil
import sys

import hypothesis
import pytest
from hypothesis import strategies as st

sys.path.append(str(pathlib.Path(__file__).parents[2] / "tools" / "reliability"))

import bad_input
import fork_server

SHORT = 100  # cases of all kinds; tools/reliability/faults.py --inputs=2000 runs more


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """The process that forks."""
    with fork_server.Commands(
        bad_input.ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("xla"))}
    ) as commands:
        yield commands


@pytest.fixture(scope="module")
def base(trained, tmp_path_factory):
    """A copy of the trained workdir with one checkpoint a stage, so that a damaged one has none before it to go on from."""
    folder = tmp_path_factory.mktemp("base") / "w"
    shutil.copytree(trained, folder)
    for stage in folder.glob("*/checkpoints"):
        for old in sorted(stage.iterdir(), key=lambda step: int(step.name))[:-1]:
            shutil.rmtree(old)
    return folder


@pytest.mark.parametrize(("kind", "number"), bad_input.shares(SHORT).items())
def test_bad_input_is_refused_in_one_line(commands, base, tmp_path, kind, number):
    """No traceback, no hang, no file damaged; what fails is shrunk to the smallest command line that does."""

    @hypothesis.settings(
        max_examples=number,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(bad_input.KINDS[kind][0](bad_input.contents(base)))
    def ends_well(case):
        assert bad_input.trial(commands, base, tmp_path / "case", case)[1] is None

    ends_well()


def judged(commands, folder, source, *, script="sample.py", limit=20.0):
    """The judge's word on a script of this source, which is run as `script`."""
    (folder / "w").mkdir(parents=True)
    (folder / "w" / "config.json").write_text("{}")
    (folder / "texts.txt").write_text("text\n")
    path = folder.parent / "planted.py"
    path.write_text(source)
    before = bad_input.contents(folder)
    ended = commands.run(path, ["--flag"], cwd=folder, limit=limit)
    return bad_input.judge(
        bad_input.Case(script, ("--flag",)), ended, before, bad_input.contents(folder)
    )


REFUSE = "import sys\nsys.exit('error: --flag is 1; it must be 2')"


@pytest.mark.parametrize(
    ("source", "script", "words"),
    [
        ("1 / 0", "sample.py", "a traceback"),
        ("import traceback\ntry: 1 / 0\nexcept ZeroDivisionError: traceback.print_exc()", "sample.py", "a traceback"),
        ("import time\ntime.sleep(60)", "sample.py", "hangs"),
        ("import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()", "sample.py", "hangs"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "sample.py", "signal 11"),
        ("raise SystemExit(1)", "sample.py", "not one clear line"),
        ("import sys\nprint('warning: what', file=sys.stderr)\nsys.exit('error: a')", "sample.py", "not one clear line"),
        ("import sys\nsys.exit('error: ' + 'a' * 2000)", "sample.py", "not one clear line"),
        ("import sys\nsys.exit('error: \\x1b[31m')", "sample.py", "not one clear line"),
        ("open('w/config.json', 'a').write(' ')", "sample.py", "w/config.json first"),
        ("open('w/config.json', 'a').write(' ')\n" + REFUSE, "train.py", "w/config.json first"),
        ("import os\nos.remove('texts.txt')", "train.py", "texts.txt first"),
    ],
)  # fmt: skip
def test_the_judge_sees_what_is_wrong(commands, tmp_path, source, script, words):
    """Each planted fault is named."""
    assert words in judged(
        commands, tmp_path / "case", source, script=script, limit=1.0 if words == "hangs" else 20.0
    )


@pytest.mark.parametrize(
    ("source", "script"),
    [(REFUSE, "sample.py"), ("print('done')", "sample.py"), ("open('w/config.json', 'a').write(' ')", "train.py"), ("import sys\nassert sys.argv[1:] == ['--flag'] and __name__ == '__main__'", "sample.py")],
)  # fmt: skip
def test_the_judge_lets_pass_what_is_right(commands, tmp_path, source, script):
    """Success, one line, and what training may change."""
    assert judged(commands, tmp_path / "case", source, script=script) is None


def test_cases_come_from_the_seed_alone():
    """The same seed makes the same cases, another one others, as many as asked for."""
    base = {"config.json": b'{"seed": 0, "data": {"length": 32}}'}
    first, again, other = (bad_input.drawn("bad config", base, 30, seed) for seed in (1, 1, 2))
    assert first == again != other and len(first) == 30
    assert sum(bad_input.shares(2001).values()) == 2001


@hypothesis.settings(max_examples=20, derandomize=True, database=None, deadline=None)
@hypothesis.given(
    st.lists(
        st.tuples(
            st.sampled_from(["w/a", "w/a/b", "w", "w/", "w/a/", "t/é"]),
            st.none() | st.binary(max_size=3),
        ),
        max_size=4,
    )
)
def test_files_are_laid_over_what_is_there(tmp_path_factory, files):
    """A file may stand where a folder was and the other way round: the last one counts."""
    folder = tmp_path_factory.mktemp("case")
    (folder / "w").mkdir()
    bad_input.lay(bad_input.Case("sample.py", (), tuple(files)), folder)
    if files:
        name, data = files[-1]
        path = folder / name
        assert (
            path.is_dir()
            if name.endswith("/")
            else not path.exists()
            if data is None
            else path.read_bytes() == data
        )

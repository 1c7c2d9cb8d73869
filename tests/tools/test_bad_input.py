"""Bad input ends with success or with one line, and the judge of that notices every problem."""

import shutil

import bad_input
import fork_server
import hypothesis
import input_case
import pytest
from hypothesis import strategies as st

CASES = 40  # of all kinds together; tools/reliability/faults.py --inputs=2000 runs more


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Runs the commands."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("xla"))}
    with fork_server.ForkServer(input_case.ENVIRONMENT | cache) as server:
        yield server


@pytest.fixture(scope="module")
def base(trained, tmp_path_factory):
    """A copy of the trained workdir with one checkpoint per stage.

    There is none before it to fall back on when it is damaged.
    """
    folder = tmp_path_factory.mktemp("base") / "w"
    shutil.copytree(trained, folder)
    for checkpoints in folder.glob("*/checkpoints"):
        for old in sorted(checkpoints.iterdir(), key=lambda step: int(step.name))[:-1]:
            shutil.rmtree(old)
    return folder


@pytest.mark.parametrize(("kind", "number"), bad_input.shares(CASES).items())
def test_bad_input_is_rejected_in_one_line(server, base, tmp_path, kind, number):
    """No traceback, no hang, no damaged file; hypothesis shrinks the command line that fails."""

    @hypothesis.settings(
        max_examples=number,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(bad_input.KINDS[kind].strategy(input_case.file_contents(base)))
    def ends_well(case):
        assert input_case.run_case(server, base, tmp_path / "case", case)[1] is None

    ends_well()


def problem_of(server, folder, source, *, script="sample.py", limit=20.0):
    """What the judge says of a script with this source, judged as if it were `script`."""
    (folder / "w").mkdir(parents=True)
    (folder / "w" / "config.json").write_text("{}")
    (folder / "texts.txt").write_text("text\n")
    path = folder.parent / "planted.py"
    path.write_text(source)
    before = input_case.file_contents(folder)
    outcome = server.run(path, ["--flag"], cwd=folder, limit=limit)
    case = input_case.Case(script, ("--flag",))
    return input_case.find_problem(case, outcome, before, input_case.file_contents(folder))


REJECT = "import sys\nsys.exit('error: --flag: got 1, expected 2.')"
CHANGE_CONFIG = "open('w/config.json', 'a').write(' ')"
PRINT_TRACEBACK = "import traceback\ntry: 1 / 0\nexcept ZeroDivisionError: traceback.print_exc()"
HANG_IN_THREAD = "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()"
CRASH = "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)"
TWO_LINES = "import sys\nprint('warning: what', file=sys.stderr)\nsys.exit('error: a')"


@pytest.mark.parametrize(
    ("source", "script", "problem"),
    [
        ("1 / 0", "sample.py", "a traceback"),
        (PRINT_TRACEBACK, "sample.py", "a traceback"),
        ("import time\ntime.sleep(60)", "sample.py", "hangs"),
        (HANG_IN_THREAD, "sample.py", "hangs"),
        (CRASH, "sample.py", "signal 11"),
        ("raise SystemExit(1)", "sample.py", "not one clear line"),
        (TWO_LINES, "sample.py", "not one clear line"),
        ("import sys\nsys.exit('error: ' + 'a' * 2000)", "sample.py", "not one clear line"),
        ("import sys\nsys.exit('error: \\x1b[31m')", "sample.py", "not one clear line"),
        (CHANGE_CONFIG, "sample.py", "w/config.json first"),
        (f"{CHANGE_CONFIG}\n{REJECT}", "train.py", "w/config.json first"),
        ("import os\nos.remove('texts.txt')", "train.py", "texts.txt first"),
    ],
)
def test_the_judge_notices_a_planted_problem(server, tmp_path, source, script, problem):
    limit = 1.0 if problem == "hangs" else 20.0
    found = problem_of(server, tmp_path / "case", source, script=script, limit=limit)
    assert problem in found


@pytest.mark.parametrize(
    ("source", "script"),
    [
        (REJECT, "sample.py"),
        ("print('done')", "sample.py"),
        (CHANGE_CONFIG, "train.py"),
        (
            "import sys\nassert sys.argv[1:] == ['--flag'] and __name__ == '__main__'",
            "sample.py",
        ),
    ],
)
def test_the_judge_accepts_success_one_line_and_trained_workdirs(server, tmp_path, source, script):
    assert problem_of(server, tmp_path / "case", source, script=script) is None


def test_the_seed_determines_the_cases():
    base = {"config.json": b'{"seed": 0, "data": {"length": 32}}'}
    first, again, other = (
        bad_input.sample_cases("bad config", base, 30, seed) for seed in (1, 1, 2)
    )
    assert first == again != other and len(first) == 30


def test_the_shares_of_all_kinds_add_up_to_the_total():
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
def test_the_last_change_to_a_file_wins(tmp_path_factory, files):
    """A file may replace a folder, and a folder a file."""
    folder = tmp_path_factory.mktemp("case")
    (folder / "w").mkdir()
    input_case.place_files(input_case.Case("sample.py", (), tuple(files)), folder)
    if not files:
        return
    name, data = files[-1]
    path = folder / name
    if name.endswith("/"):
        assert path.is_dir()
    elif data is None:
        assert not path.exists()
    else:
        assert path.read_bytes() == data
